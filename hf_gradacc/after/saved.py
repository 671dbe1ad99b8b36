"""The model that a run left in a folder: found, described and loaded as it was trained."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradacc.data.section import ModelSection, Task
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.checks.checks import check_section
from hf_gradacc.recipe.file.interpolation import allow_variables
from hf_gradacc.recipe.file.problems import RecipeError
from hf_gradacc.recipe.file.source import read_recipe
from hf_gradacc.recipe.folder import RECIPE_NAME
from hf_gradacc.recipe.keys.sections import HEADS, Recipe
from hf_gradacc.safety.checkpoints import list_checkpoints
from hf_gradacc.text import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "SavedModel",
    "find_saved",
    "load_adapter",
    "load_saved",
    "load_tokenizer_of",
    "loading_quietly",
]

_ADAPTER, _CONFIG = "adapter_config.json", "config.json"
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")


@dataclass(frozen=True)
class SavedModel:
    """A folder that holds a model, and what is known of the run that made it.

    Attributes:
        folder: The folder.
        is_adapter: It holds an adapter, whose base model lies elsewhere.
        task: What the model does.
        recipe: The run's recipe, found here or beside the checkpoint; None without.
        section: How the model that is loaded first, the base of an adapter, was described.
        trusted: Code of the model's repository may be run.
    """

    folder: Path
    is_adapter: bool
    task: Task
    recipe: Recipe | None
    section: ModelSection
    trusted: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether it was trained on a base in 4 bits."""
        return self.is_adapter and self.recipe is not None and self.recipe.peft.method == "qlora"

    @property
    def classifies(self) -> bool:
        """Whether it gives scores, not text."""
        return HEADS[self.task] == "ForSequenceClassification"


def find_saved(
    run: str | Path, *, allow_env: Collection[str] = (), trust_remote_code: bool = False
) -> SavedModel:
    """Find the model in the folder of a run, of one of its checkpoints, or of any saved model.

    Nothing is loaded. Rows that the recipe names need not be there any more.

    Args:
        run: The folder.
        allow_env: Variables of the environment that the recipe may read, as for `load_recipe`.
        trust_remote_code: Code of the model's repository may be run, if the recipe says so too.

    Raises:
        ConfigError: If the folder holds no model; it says what it holds, and what to name instead.
        RecipeError: If the recipe in it cannot be read.
    """
    folder = Path(run)
    if not folder.is_dir():
        beside = folder.parent if folder.parent.is_dir() else Path("runs")
        names = [str(p) for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else []
        guess = nearest(str(folder), names)
        hint = f"did you mean {guess}?" if guess else "name the folder that `train` printed."
        raise ConfigError(f"RUN = {str(run)!r} is no folder: {hint}")
    is_adapter = (folder / _ADAPTER).is_file()
    has_weights = any(True for kind in _WEIGHTS for _ in folder.glob(kind))
    if not has_weights or not (is_adapter or (folder / _CONFIG).is_file()):
        raise ConfigError(f"RUN = {str(run)!r} holds no model{_what_instead(folder)}")
    recipe = _read_recipe(folder, allow_env)
    section, task = _describe(folder, is_adapter, recipe)
    trusted = section.trust_remote_code and trust_remote_code
    if section.trust_remote_code and not trusted:
        raise ConfigError(
            f"model.trust_remote_code = true in {folder / RECIPE_NAME}: the model needs code of "
            "its repository; read that code, then add --trust-remote-code."
        )
    return SavedModel(folder, is_adapter, task, recipe, section, trusted)


def _what_instead(folder: Path) -> str:
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        return f" of a run that has ended; its newest checkpoint is {checkpoints[0]}."
    pickled = next(iter([*folder.glob("*.bin"), *folder.glob("*.pt")]), None)
    if pickled is not None:
        return f" in safetensors; {pickled.name} is a pickle, which could run code."
    inside = [p.parent for p in folder.glob("*/*") if p.name in (_CONFIG, _ADAPTER)]
    if inside:
        return f" itself; did you mean {min(inside)}?"
    started = (folder / RECIPE_NAME).is_file()
    return " yet; the run has saved none." if started else ", and no run of ours wrote into it."


def _read_recipe(folder: Path, allow_env: Collection[str]) -> Recipe | None:
    path = next((p for f in (folder, folder.parent) if (p := f / RECIPE_NAME).is_file()), None)
    if path is None or (path.parent != folder and folder not in list_checkpoints(path.parent)):
        return None
    try:
        source = read_recipe(path, readable=allow_variables(allow_env))
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise ConfigError(f"allow_env: {error}.") from None
    problems = source.problems or check_section(Recipe, source.values, (), source)
    if problems:
        raise RecipeError(map(source.by_name, problems))
    return Recipe.model_validate(source.values)


def _describe(folder: Path, is_adapter: bool, recipe: Recipe | None) -> tuple[ModelSection, Task]:
    if not is_adapter:
        task = _task_of(_read_json(folder / _CONFIG)) if recipe is None else recipe.model.task
        trusted = recipe is not None and recipe.model.trust_remote_code
        section = ModelSection(name=str(folder), task=task, trust_remote_code=trusted)
        return section, task
    if recipe is not None:
        if recipe.model.name is None:
            raise ConfigError(
                f"{folder} holds an adapter to a model with random weights (model.config), which "
                "were not saved: train again with peft.merge_on_save=true, or without peft."
            )
        here = {"attn_implementation": None}  # of the machine that it was trained on
        return recipe.model.model_copy(update=here), recipe.model.task
    adapter = _read_json(folder / _ADAPTER)
    base, kind = adapter.get("base_model_name_or_path"), adapter.get("task_type")
    if not base:
        raise ConfigError(f"{folder / _ADAPTER}: base_model_name_or_path is empty: write it there.")
    tasks: dict[Any, Task] = {"SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "classification"}
    task = tasks.get(kind, "causal_lm")
    return ModelSection(name=base, revision=adapter.get("revision"), task=task), task


def _task_of(config: dict[str, Any]) -> Task:
    names = " ".join(config.get("architectures") or [])
    if "ForSequenceClassification" in names:
        return "classification"
    return "seq2seq" if config.get("is_encoder_decoder") else "causal_lm"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): is the folder whole?") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object: is the folder whole?")
    return found


# ---- loading -----------------------------------------------------------------------------------
def load_tokenizer_of(saved: SavedModel) -> Any:
    """Load the tokenizer that was saved beside the model.

    Raises:
        ConfigError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(saved.folder, trust_remote_code=saved.trusted)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{saved.folder} holds no tokenizer that can be loaded ({why}): copy that of the model "
            "into it."
        ) from error


def load_saved(saved: SavedModel, *, tokenizer: Any) -> PreTrainedModel:
    """Load a model, or a base and its adapter, in eval mode and on the first accelerator.

    Raises:
        ConfigError: If its files do not make a model, or the base is not to be found.
    """
    import torch

    from hf_gradacc.recipe.model.ends import add_stop_tokens

    with loading_quietly():
        if saved.is_adapter:
            quantize = saved.is_quantized and importlib.util.find_spec("bitsandbytes") is not None
            model = load_adapter(saved, tokenizer=tokenizer, quantize=quantize)
        else:
            model = _load_whole(saved)
    if saved.recipe is not None:  # a checkpoint of an adapter has no generation config beside it
        add_stop_tokens(model, saved.recipe, tokenizer=tokenizer, folder=str(saved.folder))
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and not getattr(model, "hf_device_map", None):
        model = model.to(device)
    return model.eval()


def _load_whole(saved: SavedModel) -> Any:
    import transformers

    head = getattr(transformers, f"AutoModel{HEADS[saved.task]}")
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": saved.trusted}
    try:
        model, found = head.from_pretrained(saved.folder, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"{saved.folder} cannot be loaded ({why}): is it whole?") from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would draw them at random
        raise ConfigError(
            f"{saved.folder} lacks {len(missing)} weights, {missing[0]} among them: is it whole?"
        )
    return model


@contextlib.contextmanager
def loading_quietly() -> Iterator[None]:
    """Load without a report of what the head of a base lacks, and without bars in a log."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def load_adapter(saved: SavedModel, *, tokenizer: Any, quantize: bool = False) -> Any:
    """Load the base of an adapter as the run loaded it, and the adapter onto it.

    Args:
        saved: An adapter.
        tokenizer: Its tokenizer; the base's embeddings grow to it.
        quantize: Load the base in 4 bits.

    Raises:
        ConfigError: If one of them cannot be loaded.
    """
    import peft
    import transformers

    from hf_gradacc.recipe.model.load import load_model

    names = _classes(saved) if saved.classifies else None
    base = load_model(saved.section, tokenizer=tokenizer, label_names=names, quantize=quantize)
    try:
        model = peft.PeftModel.from_pretrained(base, str(saved.folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the adapter in {saved.folder} does not fit {saved.section.name} ({why}): is it the "
            "base that the run began with?"
        ) from error
    if (saved.folder / "generation_config.json").is_file():
        settings = transformers.GenerationConfig.from_pretrained(saved.folder)
        model.generation_config = base.generation_config = settings
    return model


def _classes(saved: SavedModel) -> list[str]:
    """The classes of an adapter that classifies; an empty list is regression."""
    path = saved.folder / _CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{saved.folder} holds an adapter without {path.name}, which names its classes: take "
            "the folder of the run, once it has ended."
        )
    config = _read_json(path)
    names = config.get("id2label") or {}
    if config.get("problem_type") == "regression" or not names:
        return []
    return [names[key] for key in sorted(names, key=int)]
