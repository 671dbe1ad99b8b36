"""The output folder of a recipe: whose it is, and what may be removed from it.

A folder that holds a run is gone on with (`--resume`), replaced (`--overwrite`) or left alone. Only
what a run of ours wrote is ever removed: each checkpoint's manifest lists its files, and
`gradacc_files.json` those of the model saved at the end. A file changed since is somebody else's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradacc.errors import ConfigError
from hf_gradacc.safety.checkpoints import (
    MANIFEST_NAME,
    STAGING_NAME,
    holds_optimizer,
    list_checkpoints,
)
from hf_gradacc.tracking.run_files import LOG_NAME, RUN_NAME, kind_of, read_run

if TYPE_CHECKING:
    from hf_gradacc.recipe.keys.sections import Recipe

__all__ = [
    "FILES_NAME",
    "RECIPE_HEADER",
    "RECIPE_NAME",
    "claim_folder",
    "clear_folder",
    "find_source_problem",
    "notes_files",
    "refuse_foreign",
]

FILES_NAME = "gradacc_files.json"
RECIPE_NAME = "recipe.yaml"
RECIPE_HEADER = "# The recipe of this run, completed."
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def claim_folder(recipe: Recipe, *, resume: bool | str = False) -> None:
    """Refuse an output folder that holds another run, before anything is loaded.

    Args:
        recipe: The recipe.
        resume: As for `train_recipe`; ``train.resume_from_checkpoint`` counts, too.

    Raises:
        ConfigError: Naming what is there, and the ways out.
    """
    folder = Path(recipe.output.dir or ".")
    asked = resume or recipe.train.get("resume_from_checkpoint")
    overwrite = recipe.output.overwrite
    if asked and overwrite:
        raise ConfigError(
            f"output.overwrite = true removes the run in {folder}, and resuming goes on with it: "
            "leave out one of --overwrite and --resume."
        )
    if int(os.environ.get("RANK", "0")) != 0 or not folder.is_dir():
        return
    checkpoints = list_checkpoints(folder)
    if asked is True and checkpoints and not holds_optimizer(checkpoints[0]):
        raise ConfigError(
            f"--resume: {checkpoints[0]} holds weights and no optimizer (train.save_only_model), "
            f"so optimizer, learning rate and random numbers would start anew.\n  To do so, name "
            f"it: train.resume_from_checkpoint={checkpoints[0]}"
        )
    if asked and (checkpoints or asked is True or asked != "auto"):
        return
    if overwrite:
        _refuse_own_source(recipe, folder)
        refuse_foreign(folder)
        return
    if found := _describe_run(folder):
        raise ConfigError(
            f"output.dir = {str(folder)!r} holds a run: {found}.\n  Go on with it: --resume (in a "
            f"script train.resume_from_checkpoint=auto). Replace it: --overwrite (in a script "
            f"output.overwrite=true). Or keep both: output.dir=ANOTHER_FOLDER."
        )


def find_source_problem(recipe: Recipe) -> str | None:
    """Say which source of the recipe its output would be written into; None if into none.

    >>> from hf_gradacc.recipe.keys.sections import Recipe
    >>> find_source_problem(Recipe.model_validate({"model": {"name": "gpt2"},
    ...     "data": {"train": "rows.jsonl"}, "output": {"dir": "runs/mine"}}))
    """
    folder = Path(recipe.output.dir or ".").resolve()
    for key, name in (("model.name", recipe.model.name), ("tokenizer.name", recipe.tokenizer.name)):
        if name and Path(name).is_dir() and folder == Path(name).resolve():
            return f"is {key}, whose files the run would overwrite"
    for source in (*recipe.data.train, *recipe.data.eval):
        place = Path(source.path)
        if place.is_dir() and folder.is_relative_to(place.resolve()):
            return f"lies in {source.path}, which holds the rows"
        if place.is_file() and folder == place.resolve().parent:
            return f"is the folder of {source.path}, which holds the rows"
    return None


def _refuse_own_source(recipe: Recipe, folder: Path) -> None:
    """Refuse to remove the checkpoint that the run is to begin from."""
    for key, name in (("model.name", recipe.model.name), ("tokenizer.name", recipe.tokenizer.name)):
        if name and Path(name).is_dir() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{key} = {name!r} lies in output.dir = {str(folder)!r}, which output.overwrite = "
                f"true would clear: set output.dir to another folder."
            )


def _describe_run(folder: Path) -> str | None:
    """Say what of a run a folder holds; None if nothing would be lost."""
    parts = [path.name for path in list_checkpoints(folder)[:1]]
    parts += sorted(path.name for kind in _WEIGHTS for path in folder.glob(kind))[:2]
    num_rows = 0
    if (folder / LOG_NAME).is_file():
        _, rows = read_run(folder)
        num_rows = sum(kind_of(row) == "train" for row in rows)
    if num_rows:
        parts.append(f"{num_rows:,} rows in {LOG_NAME}")
    return ", ".join(parts) or None


# ---- removing ----------------------------------------------------------------------------------
def clear_folder(folder: str | Path) -> None:
    """Remove what earlier runs of ours wrote into a folder, and nothing else.

    Raises:
        ConfigError: If a checkpoint or weights are there that no run of ours wrote: they would lie
            beside the new ones. Nothing is removed then.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    for checkpoint in list_checkpoints(folder):
        for path in _own_files(checkpoint, MANIFEST_NAME):
            path.unlink()
        for place in sorted((p for p in checkpoint.rglob("*") if p.is_dir()), reverse=True):
            place.rmdir()
        checkpoint.rmdir()
    shutil.rmtree(folder / STAGING_NAME, ignore_errors=True)
    logs = [LOG_NAME.replace(".jsonl", f"{kind}.jsonl") for kind in ("", ".previous", ".damaged")]
    for path in [*_own_files(folder, FILES_NAME), *(folder / n for n in (*logs, RUN_NAME))]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        if (folder / RECIPE_NAME).read_bytes().startswith(RECIPE_HEADER.encode()):
            (folder / RECIPE_NAME).unlink()


def refuse_foreign(folder: Path) -> None:
    """Refuse to clear a folder with a checkpoint or weights that no run of ours wrote.

    Raises:
        ConfigError: Naming them.
    """
    inside = [p for c in list_checkpoints(folder) for p in c.rglob("*") if p.is_file()]
    weights = [path for kind in _WEIGHTS for path in folder.glob(kind)]
    own = {p for c in list_checkpoints(folder) for p in _own_files(c, MANIFEST_NAME)}
    own |= set(_own_files(folder, FILES_NAME))
    foreign = sorted(p.relative_to(folder).as_posix() for p in (*inside, *weights) if p not in own)
    if foreign:
        more = f" and {len(foreign) - 3} more files" if len(foreign) > 3 else ""
        raise ConfigError(
            f"output.overwrite = true: {', '.join(foreign[:3])}{more} in {folder}: not written by "
            f"a run of ours, or changed since. Nothing was removed. Move it, or set output.dir "
            f"to another folder."
        )


def _own_files(folder: Path, record_name: str) -> list[Path]:
    """Return the files that a record lists and nobody wrote since, and the record."""
    record = folder / record_name
    try:
        names = list(json.loads(record.read_bytes())["files"])
        written = record.stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return []
    paths = [folder / str(name) for name in names]
    own = [
        path
        for path in paths
        if path.is_file()
        and path.resolve().is_relative_to(folder.resolve())
        and path.stat().st_mtime_ns <= written
    ]
    return [*own, record]


def notes_files(save: Callable[..., Path]) -> Callable[..., Path]:
    """Let a function that saves a model list the files it wrote, in `gradacc_files.json`."""

    @functools.wraps(save)
    def saving(trainer: Any, *args: Any, **kwargs: Any) -> Path:
        folder = Path(trainer.args.output_dir)
        before = dict(_files(folder))
        result = save(trainer, *args, **kwargs)
        if trainer.is_world_process_zero():
            written = [name for name, time in _files(folder) if before.get(name) != time]
            with contextlib.suppress(OSError):  # the model is saved, which is what counts
                (folder / FILES_NAME).write_text(json.dumps({"files": sorted(written)}, indent=1))
        return result

    return saving


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the files of a folder with the time of their last change, those of runs left out."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_model = not name.startswith(("checkpoint-", "gradacc_", "."))
        if is_model and path.is_file():
            yield name, path.stat().st_mtime_ns
