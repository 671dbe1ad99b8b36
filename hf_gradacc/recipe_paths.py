"""The local files and folders a recipe names: made absolute, or reported where they are not there.

Works on the values as written, so that a missing file is told together with a misspelt key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_gradacc.recipe_report import Key, Problem, dotted
from hf_gradacc.recipe_source import RecipeSource

__all__ = ["resolve_paths"]

_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".text")
_CONFIG_FILES = ("accelerator_config", "deepspeed", "fsdp_config")


def resolve_paths(source: RecipeSource) -> tuple[dict[Key, str], list[Problem]]:
    """Look for every local path of a recipe, checked or not.

    Args:
        source: The recipe's values, and where each was written.

    Returns:
        The absolute path for each key that is local, with data sources always counted
        (`("data", "train", 0)`); and a problem for each path that leads nowhere.
    """
    found: dict[Key, str] = {}
    problems: list[Problem] = []
    for key, written, path in _data_paths(source.values.get("data")):
        place, problem = _look(source, written, path, folder_only=False)
        if place is not None:
            found[key] = place
        if problem is not None:
            problems.append(problem)
    for name in ("model", "tokenizer"):
        section = source.values.get(name)
        folder = section.get("name") if isinstance(section, dict) else None
        if isinstance(folder, str):
            place, problem = _look(source, (name, "name"), folder, folder_only=True)
            if place is not None:
                found[(name, "name")] = place
            if problem is not None:
                problems.append(problem)
    return found, problems + _config_files(source)


def _data_paths(section: Any) -> list[tuple[Key, Key, str]]:
    """Each source's key, the key its path was written at, and the path."""
    paths: list[tuple[Key, Key, str]] = []
    for part in ("train", "eval") if isinstance(section, dict) else ():
        value = section.get(part)
        items = value if isinstance(value, list) else [value]
        for index, item in enumerate(items):
            written: Key = ("data", part, index) if len(items) > 1 else ("data", part)
            if isinstance(item, dict):
                inner: Key = ("data", part, index) if isinstance(value, list) else ("data", part)
                written, item = (*inner, "path"), item.get("path")
            if isinstance(item, str):
                paths.append((("data", part, index), written, item))
    return paths


def _look(
    source: RecipeSource, key: Key, path: str, *, folder_only: bool
) -> tuple[str | None, Problem | None]:
    """The absolute path where there is one; a problem where there should be one."""
    where, name = source.origin(key), dotted(key)
    if not path.strip():
        return None, Problem(name, "is empty", "name a file, a folder or a hub set", where, path)
    folder = source.folder(key)
    pattern = not folder_only and any(letter in path for letter in "*?[")
    try:
        place = (folder / Path(path).expanduser()).resolve()
        exists = place.is_dir() if folder_only else place.exists()
        if pattern and not exists:
            root = Path(place.anchor)
            exists = any(root.glob(str(place.relative_to(root))))
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, Problem(name, "is not a path", why, where, path)
    if exists:
        return str(place), None
    if pattern:
        return None, Problem(name, "no such file", f"nothing matches {place}", where, path)
    if path.startswith((".", "/", "~")) or path.endswith(_SUFFIXES):
        why = "no such folder" if folder_only else "no such file"
        return None, Problem(name, why, f"{place} does not exist", where, path)
    return None, None


def _config_files(source: RecipeSource) -> list[Problem]:
    """Files of options that the `train` section names; they start at the current folder."""
    section: Any = source.values.get("train")
    problems: list[Problem] = []
    for name in _CONFIG_FILES if isinstance(section, dict) else ():
        path = section.get(name)
        if isinstance(path, str) and path.endswith((".json", ".yaml", ".yml")):
            place = Path(path).expanduser().absolute()
            if not place.is_file():
                fix = f"{place} does not exist"
                where = source.origin(("train", name))
                problems.append(Problem(f"train.{name}", "no such file", fix, where, path))
    return problems
