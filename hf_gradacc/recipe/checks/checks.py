"""Compare the values of a recipe with its sections, and describe every mismatch.

The local files and folders a recipe names: made absolute, or reported where they are not there.

Works on the values as written, so that a missing file is reported together with a misspelt key.
"""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hf_gradacc.data.chat_templates import is_template_path, shipped_templates
from hf_gradacc.recipe.file.problems import Key, Problem, dotted
from hf_gradacc.recipe.file.source import COMMAND_LINE, RecipeSource
from hf_gradacc.recipe.keys.sections import RESERVED, Recipe, train_section
from hf_gradacc.text import SECRET_KEY, nearest

__all__ = ["check_section", "find_remote_code", "resolve_paths"]


def check_section(
    model: type[BaseModel], values: dict[str, Any], prefix: Key, source: RecipeSource
) -> list[Problem]:
    """Find every way in which values do not fit a section.

    Args:
        model: The section's class.
        values: What the recipe says.
        prefix: Where the section stands in the recipe.
        source: Knows the line of each value.
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        grouped: dict[Key, list[ErrorDetails]] = {}
        for details in error.errors(include_url=False):
            grouped.setdefault(_existing(details["loc"], values), []).append(details)
        misspelt = {
            guess
            for key, details in grouped.items()
            if details[0]["type"] == "extra_forbidden" and (guess := _sibling(model, key))
        }
        hidden = {} if prefix else _contradictions_behind(model, values, {*grouped} | misspelt)
        return [
            _problem(model, key, details, prefix, source)
            for key, details in (hidden | grouped).items()
            # `trian: ...` is one mistake, not a misspelt key and a missing one.
            if not (details[0]["type"] == "missing" and key in misspelt)
        ]
    return []


def _contradictions_behind(
    model: type[BaseModel], values: dict[str, Any], faulty: set[Key]
) -> dict[Key, list[ErrorDetails]]:
    """Find keys that contradict each other, which pydantic asks about only if each is right.

    So values that are wrong by themselves are left out. A contradiction that names one of them may
    only follow from that, and waits until it is right.
    """
    rest = copy.deepcopy(values)
    for key in faulty:
        _leave_out(rest, key)
    names = {str(key[-1]) for key in faulty if key}
    found: dict[Key, list[ErrorDetails]] = {}
    try:
        model.model_validate(rest)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            named = set(re.findall(r"\w+", details["msg"]))
            if details["type"] == "value_error" and not named & names:
                found.setdefault(_existing(details["loc"], rest), []).append(details)
    return found


def _leave_out(values: dict[str, Any], key: Key) -> None:
    """Remove a value; one of a list with its list, and no section as a whole."""
    holder: Any = values
    for step in key[:-1]:
        following = holder.get(step) if isinstance(holder, dict) else None
        if not isinstance(following, dict):
            key = (step,)
            break
        holder = following
    if key and isinstance(holder, dict) and not isinstance(holder.get(key[-1]), dict):
        holder.pop(key[-1], None)


def _problem(
    model: type[BaseModel], key: Key, details: list[ErrorDetails], prefix: Key, source: RecipeSource
) -> Problem:
    where, full, kind = source.origin((*prefix, *key)), dotted((*prefix, *key)), details[0]["type"]
    # A secret in the wrong place is not repeated on a screen or in a log.
    hidden = kind == "missing" or any(SECRET_KEY.search(str(part)) for part in key)
    value = ... if hidden else details[0]["input"]
    if kind == "missing":
        return Problem(full, "is missing", f"add `{key[-1]}:`", where)
    if kind == "extra_forbidden":
        name = str(key[-1])
        if prefix == ("train",) and name in RESERVED:
            return Problem(full, "belongs elsewhere", RESERVED[name], where, value)
        # A key of that very name elsewhere is meant sooner than one that is written alike here.
        elsewhere, guess = _elsewhere(name), _sibling(model, key)
        meant = elsewhere or (None if guess is None else dotted((*prefix, *guess)))
        fix = f"did you mean {meant}?" if meant else _known(model, key)
        return Problem(full, "no such key", fix, where, value)
    if kind == "value_error":
        why = details[0]["msg"].removeprefix("Value error, ")
        if not isinstance(value, dict | list):  # of one key, and not of several together
            return Problem(full, "has a wrong value", why, where, value)
        return Problem(full, "does not hold together", why, where)
    reasons = dict.fromkeys(_sentence(one) for one in details)
    return Problem(full, "has a wrong value", " or ".join(reasons), where, value)


def _sentence(details: ErrorDetails) -> str:
    """Pydantic's message, and the nearest word where the value should be one of a few."""
    message = details["msg"][0].lower() + details["msg"][1:]
    if details["type"] == "literal_error" and isinstance(details["input"], str):
        choices = details["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        guess = nearest(details["input"], choices)
        return f"{message}; did you mean {guess}?" if guess else message
    return message


def _existing(location: Sequence[str | int], values: Any) -> Key:
    """The part of pydantic's location that is a key of the recipe; the rest names union members."""
    key: list[str | int] = []
    part: Any
    for part in location:
        is_index = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if is_index or (isinstance(values, dict) and part in values):
            values = values[part]
        elif isinstance(values, dict) and part == 0:
            continue  # a source written without its list
        elif isinstance(values, dict) and part == location[-1]:
            return (*key, part)  # a missing key
        else:
            break
        key.append(part)
    return tuple(key)


def _fields(model: type[BaseModel], key: Sequence[str | int]) -> type[BaseModel] | None:
    """The section class at `key`, through lists and optional types."""
    current: Any = model
    for part in key:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None
        current = _section_in(field.annotation)
        if current is None:
            return None
    return current


def _section_in(hint: Any) -> type[BaseModel] | None:
    # `list[int]` is an instance of type, too, and no argument for issubclass.
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return hint if issubclass(hint, BaseModel) else None
    found = (_section_in(argument) for argument in typing.get_args(hint))
    return next((section for section in found if section is not None), None)


def _sibling(model: type[BaseModel], key: Key) -> Key | None:
    section = _fields(model, key[:-1])
    guess = nearest(str(key[-1]), section.model_fields) if section else None
    return None if guess is None else (*key[:-1], guess)


def _known(model: type[BaseModel], key: Key) -> str:
    section = _fields(model, key[:-1])
    names = list(section.model_fields) if section else []
    return f"known keys: {', '.join(names)}" if 0 < len(names) < 30 else "remove it"


def _elsewhere(name: str) -> str | None:
    """A key of that very name in another section."""
    for section, field in Recipe.model_fields.items():
        inner = train_section() if section == "train" else _section_in(field.annotation)
        if inner is not None and name in inner.model_fields:
            return f"{section}.{name}"
    return None


def find_remote_code(source: RecipeSource) -> list[Problem]:
    """Find what would run code that a model's repository ships, and that only a file asks for.

    Such code can do whatever its author likes, so whoever starts the run has to want it too.
    """
    section = source.written.get("model")
    read = source.values.get("model")
    if not isinstance(section, dict) or not isinstance(read, dict):
        return []
    asked: list[tuple[Key, Any]] = []
    if read.get("trust_remote_code") not in (None, False):
        asked.append((("model", "trust_remote_code"), read["trust_remote_code"]))
    for path in ((), ("overrides",), ("config",)):
        inner = read.get(path[0]) if path else read
        for name, value in inner.items() if isinstance(inner, dict) else ():
            # A name with a slash is a kernel of the hub, which transformers downloads and runs.
            if str(name).endswith("_implementation") and isinstance(value, str) and "/" in value:
                asked.append((("model", *path, name), value))
    problems = []
    for key, value in asked:
        written: Any = section
        for step in key[1:]:
            written = written.get(step) if isinstance(written, dict) else None
        if source.origin(key).file != COMMAND_LINE or written != value:
            why = "runs code of the model's repository, and the command line does not say so"
            fix = (
                "read that code; then add --trust-remote-code "
                "(load_recipe(..., trust_remote_code=True)), or set it to null"
            )
            problems.append(Problem(dotted(key), why, fix, source.origin(key), value))
    return problems


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
    place, problem = _template_file(source)
    if place is not None:
        found[("tokenizer", "chat_template")] = place
    if problem is not None:
        problems.append(problem)
    files, wrong = _config_files(source)
    return found | files, problems + wrong


def _template_file(source: RecipeSource) -> tuple[str | None, Problem | None]:
    """The file of a chat template; a bare word may be a file here, or the name of a template."""
    section = source.values.get("tokenizer")
    written = section.get("chat_template") if isinstance(section, dict) else None
    if not isinstance(written, str) or "{" in written or written in shipped_templates():
        return None, None
    key: Key = ("tokenizer", "chat_template")
    if not written.strip():
        fix = "name a template or a file, or write Jinja text"
        return None, Problem(dotted(key), "is empty", fix, source.origin(key), written)
    place = source.folder(key) / Path(written).expanduser()
    try:
        exists = place.is_file()
    except (OSError, ValueError) as error:
        return None, Problem(dotted(key), "is not a path", str(error), source.origin(key), written)
    if exists:
        return str(place.resolve()), None
    if is_template_path(written):
        fix = f"{place} does not exist"
        return None, Problem(dotted(key), "no such file", fix, source.origin(key), written)
    return None, None


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


def _config_files(source: RecipeSource) -> tuple[dict[Key, str], list[Problem]]:
    """Files that the `train` section names: options, and the checkpoint to go on from."""
    section: Any = source.values.get("train")
    found: dict[Key, str] = {}
    problems: list[Problem] = []
    for name in (*_CONFIG_FILES, "resume_from_checkpoint") if isinstance(section, dict) else ():
        path, key = section.get(name), ("train", name)
        is_checkpoint = name == "resume_from_checkpoint"
        if not isinstance(path, str) or path.lstrip().startswith("{") or path == "auto":
            continue  # options in place, or no path
        try:
            place = (source.folder(key) / Path(path).expanduser()).absolute()
            exists = place.is_dir() if is_checkpoint else place.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            problems.append(Problem(dotted(key), "is not a path", why, source.origin(key), path))
            continue
        if exists:
            found[key] = str(place)
        else:
            why = "no such folder" if is_checkpoint else "no such file"
            fix = f"{place} does not exist"
            problems.append(Problem(dotted(key), why, fix, source.origin(key), path))
    return found, problems
