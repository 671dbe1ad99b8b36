"""A model on the Hugging Face Hub: its files, and no others of the folder that it lies in.

The folder of a run also holds checkpoints, logs, pickled arguments and whatever else was put there.
What is pushed is listed by kind, so nothing new in it is pushed by accident.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.folder import RECIPE_NAME
from hf_gradacc.tracking.card import CARD_NAME, PLOT_NAME

__all__ = ["make_repository", "push_folder", "push_trained", "pushed_files"]

_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
_PUSHED = (
    *_WEIGHTS,
    "*.safetensors.index.json",
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jin*"),
    *("preprocessor_config.json", "processor_config.json", "*.py"),
    *(CARD_NAME, PLOT_NAME, RECIPE_NAME, "LICENSE*"),
)
"""Files at the top of the folder. Templates of a tokenizer that has several lie below it."""

_TEMPLATES = "additional_chat_templates"


def pushed_files(folder: Path) -> list[Path]:
    """List the files of a model that are pushed.

    Raises:
        ConfigError: If there are no weights in safetensors.
    """
    tops = [p for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
    files = [p for p in tops if any(fnmatch(p.name, kind) for kind in _PUSHED)]
    if not any(fnmatch(p.name, kind) for p in files for kind in _WEIGHTS):
        raise ConfigError(f"{folder} holds no model in safetensors: name the folder of a run.")
    return sorted([*files, *(folder / _TEMPLATES).glob("*.jinja")])


def make_repository(name: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make a repository, or find it; return its full name.

    Raises:
        ConfigError: If the hub does not allow it, or does not answer.
    """
    from huggingface_hub import create_repo

    try:
        return create_repo(name, private=private, token=token, exist_ok=True).repo_id
    except Exception as error:  # of the network, of the hub, of a name
        raise ConfigError(
            f"the repository {name!r} cannot be written ({_reason(error)}): log in with `hf auth "
            "login` or set HF_TOKEN, and name one of yours (train.hub_model_id)."
        ) from error


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload the model",
) -> str:
    """Push a model in one commit; files of the repository that it lacks stay there.

    Args:
        folder: Where the model lies.
        repository: Its name on the hub.
        private: Whether a new repository is private; None leaves it to the account.
        token: In place of the one that is logged in.
        revision: A branch.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: If there is no model, or it could not be pushed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = pushed_files(folder)
    name = make_repository(repository, private=private, token=token)
    operations: list[Any] = [
        CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files
    ]
    try:
        commit = HfApi(token=token).create_commit(
            name, operations, commit_message=message, revision=revision
        )
    except Exception as error:
        raise ConfigError(
            f"{folder} was not pushed to {name!r} ({_reason(error)}). It is as it was: try again "
            f"with `hf-gradacc push {folder} {name}`."
        ) from error
    return str(commit.commit_url)


def push_trained(trainer: Any, folder: Path) -> None:
    """Push what a run has saved, as its training arguments say; on the first rank."""
    from hf_gradacc.trainer.checkpoints.saving import finish_pushes

    if not trainer.is_world_process_zero():
        return
    finish_pushes(trainer)
    args = trainer.args
    url = push_folder(
        folder,
        trainer.hub_model_id,
        private=args.hub_private_repo,
        token=args.hub_token,
        revision=args.hub_revision,
    )
    print(f"pushed: {url}")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
