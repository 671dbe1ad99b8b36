"""YAML text to plain values and the line each was written on, within limits.

A recipe may come from a stranger. What a few lines of YAML can blow up to, by aliases of aliases or
by nesting, is counted before any of it is built; and nothing but words, numbers, lists and mappings
is built at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hf_gradacc.recipe.file.problems import Key, Origin, Problem, RecipeError, dotted

__all__ = ["MOST_CHARACTERS", "MOST_LEVELS", "MOST_VALUES", "parse_value", "read_yaml", "type_word"]

MOST_BYTES = 400_000
"""Longest file. YAML of that length is read in a second or two."""

MOST_VALUES = 10_000
"""Most values of a recipe, each alias and each `${...}` counted for all it stands for."""

MOST_CHARACTERS = 2_000_000
"""Most characters of all its texts, counted in the same way."""

MOST_LEVELS = 40
"""Deepest nesting."""

_MOST_DIGITS = 100
_TOO_DEEP = f"it nests deeper than {MOST_LEVELS} levels"


class _LimitError(ValueError):
    """A text holds more than a recipe may."""

    def __init__(self, problem: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(problem)
        self.problem, self.problem_mark = problem, mark


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates, with `1e-3` a number, and with limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_values = self._num_levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._num_values += 1
        self._num_levels += 1
        if self._num_values > MOST_VALUES:
            raise _LimitError(f"it holds more than {MOST_VALUES:,} values")
        if self._num_levels > MOST_LEVELS:
            raise _LimitError(_TOO_DEEP, self.get_mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self._num_levels -= 1


_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_LEFT_OUT = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _LEFT_OUT]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))

_FAILURES = (yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError, OverflowError)
"""What PyYAML raises for a text it cannot read, or cannot make values of."""


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, Origin]]:
    """Read one file.

    Returns:
        Its values, and the file and line of each key.

    Raises:
        RecipeError: If it cannot be read, is no mapping, or holds more than a recipe may.
    """
    origin = Origin(str(path))
    text = _read_text(path, origin)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return {}, {}
        _check_size(root)
    except _FAILURES as error:
        raise RecipeError([_yaml_problem(error, origin)]) from None
    if not isinstance(root, yaml.MappingNode):
        fix = "a recipe is sections of `key: value`, such as model, data, train"
        raise RecipeError([Problem("", "is not a mapping", fix, Origin(str(path), 1))])
    lines: dict[Key, Origin] = {}
    problems: list[Problem] = []
    for key, line, why in _walk(root, (), ()):
        lines[key] = Origin(str(path), line)
        if why:
            fix = "keys are plain words, each once, and an anchor cannot hold itself"
            problems.append(Problem(dotted(key), why, fix, lines[key]))
    if problems:
        raise RecipeError(problems)
    try:
        return _plain(loader.construct_document(root)), lines
    except _FAILURES as error:
        raise RecipeError([_yaml_problem(error, origin)]) from None


def parse_value(text: str) -> Any:
    """Read the value of an override.

    Raises:
        ValueError: If it is no YAML, or holds more than a recipe may; one line says why.

    >>> parse_value("1e-3"), parse_value("[q_proj, v_proj]"), parse_value("")
    (0.001, ['q_proj', 'v_proj'], None)
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES:,} characters")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root)
        for key, _, why in _walk(root, (), ()):
            if why:
                raise ValueError(f"{dotted(key)} {why}")
        return _plain(loader.construct_document(root))
    except _FAILURES as error:
        raise ValueError(_reason(error)) from None


def type_word(text: str) -> Any:
    """Read one word as YAML would: a number, true, false, null, or else the word itself.

    >>> type_word("8"), type_word("1e-3"), type_word("[8]"), type_word("eight")
    (8, 0.001, '[8]', 'eight')
    """
    resolver: Any = _Loader("")
    tag = resolver.resolve(yaml.ScalarNode, text, (True, False))
    kinds = ("int", "float", "bool", "null")
    if len(text) > _MOST_DIGITS or tag not in {f"tag:yaml.org,2002:{kind}" for kind in kinds}:
        return text
    try:
        return resolver.construct_object(yaml.ScalarNode(tag, text))
    except _FAILURES:  # a number of thousands of digits
        return text


def _read_text(path: Path, origin: Origin) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            why = f"is longer than {MOST_BYTES:,} bytes"
            fix = "name long texts, such as a chat template, by the path of a file"
            raise RecipeError([Problem("", why, fix, origin)])
        return content.decode("utf-8")
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise RecipeError([Problem("", reason, "check the path", origin)]) from None
    except UnicodeDecodeError as error:
        fix = f"save it as UTF-8; byte {error.start} is not"
        raise RecipeError([Problem("", "is not text", fix, origin)]) from None


def _check_size(root: yaml.Node) -> None:
    """Count what the aliases below a node stand for, each node only once.

    Raises:
        _LimitError: If it is more than a recipe may hold.
    """
    sizes: dict[int, tuple[int, int, int]] = {}

    def measure(node: yaml.Node) -> tuple[int, int, int]:
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = (1, 0, 1)  # one that holds itself is told by its key
        if isinstance(node, yaml.ScalarNode):
            values, characters, levels = 1, len(node.value), 1
            if len(node.value) > _MOST_DIGITS and node.tag != "tag:yaml.org,2002:str":
                raise _LimitError(f"a number has more than {_MOST_DIGITS} digits", node.start_mark)
        else:
            inner = [part for item in node.value for part in _parts(item)]
            measured = [measure(part) for part in inner]
            values = 1 + sum(size for size, _, _ in measured)
            characters = sum(size for _, size, _ in measured)
            levels = 1 + max((size for _, _, size in measured), default=0)
        if levels > MOST_LEVELS:
            raise _LimitError(_TOO_DEEP, node.start_mark)
        if values > MOST_VALUES:
            why = f"it stands for more than {MOST_VALUES:,} values"
            raise _LimitError(why, node.start_mark)
        if characters > MOST_CHARACTERS:
            why = f"it stands for more than {MOST_CHARACTERS:,} characters"
            raise _LimitError(why, node.start_mark)
        sizes[id(node)] = (values, characters, levels)
        return values, characters, levels

    measure(root)


def _parts(item: Any) -> tuple[yaml.Node, ...]:
    return item if isinstance(item, tuple) else (item,)


def _plain(value: Any) -> Any:
    """Copy a value, so that aliases share nothing.

    Raises:
        ValueError: If it holds anything but words, numbers, lists and mappings.
    """
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError("a number is larger than 64 bits hold")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"a {type(value).__name__} is neither word, number, list nor mapping")


def _walk(
    node: yaml.Node, key: Key, parents: tuple[int, ...]
) -> Iterator[tuple[Key, int, str | None]]:
    """Yield key, line and, where something is wrong with it, why, for every value below `node`."""
    if id(node) in parents:
        yield key, node.start_mark.line + 1, "refers to itself"
        return
    parents = (*parents, id(node))
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode) or name.tag != "tag:yaml.org,2002:str":
                yield (*key, str(name.value)[:40]), line, "is not a word"
                continue
            why = "stands here twice" if name.value in names else None
            names.add(name.value)
            yield (*key, name.value), line, why
            yield from _walk(value, (*key, name.value), parents)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*key, index), value.start_mark.line + 1, None
            yield from _walk(value, (*key, index), parents)


def _yaml_problem(error: Exception, origin: Origin) -> Problem:
    mark = getattr(error, "problem_mark", None)
    line = None if mark is None else mark.line + 1
    fix = "check indentation, colons and quotes around this line"
    if mark is not None and "${" in (mark.get_snippet() or ""):
        fix = "write ${...} in quotes where it stands inside of { } or [ ]"
    if isinstance(error, _LimitError | RecursionError):
        fix = "write out what the run needs, and nothing else"
    why = f"is not a YAML that a recipe may hold: {_reason(error)}"
    return Problem("", why, fix, Origin(origin.file, line))


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    text = getattr(error, "problem", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
