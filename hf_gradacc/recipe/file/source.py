"""Read recipe files as written: inheritance, overrides, and the line every value came from.

A recipe is data. YAML is read without tags that build objects (`reading`), and interpolation knows
other keys of the recipe and a few variables of the environment (`interpolation`); nothing is
executed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hf_gradacc.recipe.file.interpolation import (
    READABLE_VARIABLES,
    FromEnvironment,
    escape,
    resolve,
)
from hf_gradacc.recipe.file.problems import Key, Origin, Problem, RecipeError, dotted
from hf_gradacc.recipe.file.reading import parse_value, read_yaml
from hf_gradacc.text import SECRET_KEY

__all__ = ["COMMAND_LINE", "RecipeSource", "flatten_recipe", "read_recipe", "write_values"]

COMMAND_LINE = "command line"


class RecipeSource:
    """The merged, still unchecked values of a recipe, and where each was written.

    Attributes:
        path: The recipe's file.
        values: Its values, interpolations filled in.
        origins: File and line of each key.
        written: The values before that.
        files: The recipe and its bases, each before those that inherit it.
        from_environment: The keys that hold something from the environment.
        problems: Overrides and interpolations that could not be applied; `values` is without them.
    """

    def __init__(
        self,
        path: Path,
        values: dict[str, Any],
        origins: dict[Key, Origin],
        *,
        written: Mapping[str, Any] | None = None,
        files: Sequence[str] = (),
        from_environment: Mapping[Key, FromEnvironment] | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        self.path = path
        self.values = values
        self.origins = origins
        self.written = values if written is None else written
        self.files = list(files)
        self.from_environment = dict(from_environment or {})
        self.problems = list(problems)

    def origin(self, key: Sequence[str | int]) -> Origin:
        """Where the value at `key`, or the closest section around it, was written."""
        return _origin(self.path, self.origins, key)

    def folder(self, key: Sequence[str | int]) -> Path:
        """The folder that a relative path at `key` starts from: its recipe's, or the current."""
        file = self.origin(key).file
        return Path.cwd() if file == COMMAND_LINE else Path(file).absolute().parent

    def by_name(self, problem: Problem) -> Problem:
        """A problem that says which variable a value came from, and not what that held."""
        for key, held in self.from_environment.items():
            if dotted(key) == problem.key:
                value = problem.value if problem.value is ... else held.written
                why, fix = (_without(text, held) for text in (problem.why, problem.fix))
                return replace(problem, why=why, fix=fix, value=value)
            if problem.value is not ... and dotted(key).startswith(f"{problem.key}"):
                return replace(problem, value=...)
        return problem


def _without(text: str, held: FromEnvironment) -> str:
    return held.by_name(text) if any(value and value in text for _, value in held.parts) else text


def _origin(path: Path, origins: Mapping[Key, Origin], key: Sequence[str | int]) -> Origin:
    for length in range(len(key), 0, -1):
        found = origins.get(tuple(key[:length]))
        if found is not None:
            return found
    return Origin(str(path))


def read_recipe(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    readable: Collection[str] = READABLE_VARIABLES,
) -> RecipeSource:
    """Read a recipe with everything it inherits, then apply `key.sub=value` overrides.

    Args:
        path: The recipe's file.
        overrides: What is applied last, in order; each may begin with two hyphens.
        readable: Variables of the environment that it may read.

    Returns:
        The values. An override that cannot be applied, and an interpolation that leads nowhere or
        reads what it may not, is one of its `problems`: the rest can be checked beside them.

    Raises:
        RecipeError: If a file cannot be read as YAML.
    """
    origins: dict[Key, Origin] = {}
    files: list[str] = []
    written = _read_with_bases(path, origins, seen=(), files=files)
    problems = [
        problem
        for override in overrides
        if (problem := _override(written, override, origins)) is not None
    ]
    values, from_environment, unresolved = resolve(
        written, origin_of=lambda key: _origin(path, origins, key), readable=readable
    )
    return RecipeSource(
        path,
        values,
        origins,
        written=written,
        files=files,
        from_environment=from_environment,
        problems=[*problems, *unresolved],
    )


def flatten_recipe(path: Path) -> str:
    """A recipe with its bases merged in, as YAML under its own opening comment.

    Raises:
        RecipeError: As `read_recipe`.
    """
    text = path.read_text(encoding="utf-8")
    comment = re.match(r"(#.*\n)*", text)
    assert comment is not None
    values = _read_with_bases(path, {}, seen=(), files=[])
    merged = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"{comment.group()}\n{merged}"


def write_values(values: Mapping[str, Any]) -> str:
    """Write values as the YAML of a recipe that holds just these: no reference in them is read.

    >>> print(write_values({"data": {"system": "${HOME}", "seed": 1}}), end="")
    data:
      system: \\${HOME}
      seed: 1
    """
    return yaml.dump(
        _escaped(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def _escaped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _escaped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return escape(value) if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Without aliases, which nobody reads."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _read_with_bases(
    path: Path, origins: dict[Key, Origin], seen: tuple[Path, ...], files: list[str]
) -> dict[str, Any]:
    """One file merged over its `base`; `origins` ends with the line that won for each key.

    `files` gets the names of all of them.
    """
    if path.resolve() in seen:
        loop = " -> ".join(str(step) for step in (*seen, path.resolve()))
        raise RecipeError(
            [Problem("base", "inherits itself", f"break the circle: {loop}", Origin(str(path)))]
        )
    values, lines = read_yaml(path)
    is_whole = values.get("peft") == "none"  # it turns off what the base says, to the last key
    if isinstance(values.get("peft"), str) and ("peft",) in lines:
        lines["peft", "method"] = lines["peft",]
    _expand_short_forms(values)
    base = values.pop("base", None)
    if base is not None:
        origin = lines.get(("base",), Origin(str(path)))
        if not isinstance(base, str):
            fix = "write the path of one recipe, relative to this file"
            raise RecipeError([Problem("base", "is not a path", fix, origin, base)])
        parent = path.parent / base
        if not _is_file(parent):
            fix = f"{parent} is not a file; the path is relative to this recipe"
            raise RecipeError([Problem("base", "is not a recipe", fix, origin, base)])
        if len(seen) >= _MOST_BASES:
            fix = "inherit from fewer recipes"
            why = f"is the {_MOST_BASES}th recipe above another"
            raise RecipeError([Problem("base", why, fix, origin, base)])
        below = _read_with_bases(parent, origins, (*seen, path.resolve()), files)
        if is_whole:
            below.pop("peft", None)
        values = _merge(below, values)
    origins.update(lines)
    files.append(str(path))
    return values


_MOST_BASES = 20


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        return False


def _merge(below: Any, above: Any) -> Any:
    """Lay values over others: sections key by key, anything else as a whole."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    merged = {name: _merge(below[name], value) for name, value in above.items() if name in below}
    return {**below, **above, **merged}


def _expand_short_forms(values: dict[str, Any]) -> None:
    """`peft: lora` sets the method and leaves the section's other keys to base and overrides.

    `peft: none` leaves nothing of them.
    """
    peft = values.get("peft")
    if isinstance(peft, str) and "${" not in peft:
        values["peft"] = {"method": peft}


def _override(values: dict[str, Any], text: str, origins: dict[Key, Origin]) -> Problem | None:
    """Apply one `key.sub=value` or `--key.sub=value` in place; a problem if that is impossible."""
    origin = Origin(COMMAND_LINE)
    name, equals, value = text.removeprefix("--").partition("=")
    name = name.strip()
    if not equals or len(name) > 500 or not re.fullmatch(r"\w+(\.\w+|\[\d+\])*", name):
        shown = name if equals and SECRET_KEY.search(name) else text
        return Problem(shown[:200], "is not an override", "write key.sub=value", origin)
    key: Key = tuple(int(p) if p.isdecimal() else p for p in re.findall(r"\w+", name))
    if not value.strip():
        why = "has no value, as if a variable of the shell were not set"
        fix = f"write {name}=null for the default"
        return Problem(name, why, fix, origin)
    try:
        # Options are written by Python programs, W&B's agent among them, whose null is None.
        is_none = text.startswith("--") and value == "None"
        # A pattern of files is no alias: there is no anchor on a command line.
        is_pattern = re.fullmatch(r"\*[^\[\]{},:]*", value.strip()) is not None
        parsed = None if is_none else value.strip() if is_pattern else parse_value(value)
        if key == ("peft",) and parsed == "none":
            values.pop("peft", None)  # not a key of it is left
        elif key == ("peft",) and isinstance(parsed, str) and "${" not in parsed:
            key = ("peft", "method")
        _set(values, key, parsed)
    except ValueError as error:
        fix = "check the key, and quote values with brackets"
        shown_value = ... if SECRET_KEY.search(name) else value
        return Problem(name, f"cannot be set: {error}", fix, origin, shown_value)
    _expand_short_forms(values)
    for known in [known for known in origins if known[: len(key)] == key]:
        del origins[known]
    origins[key] = origin
    return None


def _set(values: Any, key: Key, value: Any) -> None:
    """Lay a value over the one at a key, making the sections on the way there.

    Raises:
        ValueError: If there is a list on the way, and not so long.
    """
    for index, step in enumerate(key[:-1]):
        inner = values[_place(values, step, key)] if _has(values, step) else None
        if not isinstance(inner, dict | list):
            inner = {}
            values[_place(values, step, key[: index + 1])] = inner
        values = inner
    last = _place(values, key[-1], key)
    values[last] = _merge(values[last], value) if _has(values, key[-1]) else value


def _has(values: Any, step: str | int) -> bool:
    return isinstance(values, list) or step in values or str(step) in values


def _place(values: Any, step: str | int, key: Key) -> Any:
    if isinstance(values, list):
        if isinstance(step, int) and step < len(values):
            return step
        raise ValueError(f"{dotted(key[:-1])} is a list of {len(values)}")
    return str(step)
