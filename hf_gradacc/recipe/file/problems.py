"""What is wrong with a recipe, all of it, in one report: file, line, key, value, way out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_gradacc.errors import ConfigError

__all__ = ["Key", "Origin", "Problem", "RecipeError", "dotted", "without_consequences"]

Key = tuple[str | int, ...]
"""Where a value stands in a recipe: `("data", "train", 0, "path")`."""


@dataclass(frozen=True)
class Origin:
    """The file and line a value was written in; no line for an override or a missing key."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing to correct.

    Attributes:
        key: The dotted key, or "" for the file as a whole.
        why: What is wrong, in a few words.
        fix: What to do instead.
        origin: Where it was written.
        value: What was written; `...` where there is no value to show.
    """

    key: str
    why: str
    fix: str
    origin: Origin
    value: Any = ...

    def __str__(self) -> str:
        shown = _cut(self.key, 200)
        if self.value is not ...:
            shown += f" = {_cut(repr(self.value), 80)}"
        why, fix = _cut(self.why, _LONGEST_LINE), _cut(self.fix, _LONGEST_LINE)
        head = f"{self.origin}: {shown}: {why}" if shown else f"{self.origin}: {why}"
        return f"{head}\n    {fix}" if fix else head


class RecipeError(ConfigError):
    """A recipe cannot be used; the message lists every problem found.

    Attributes:
        problems: The same, one by one.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        unique = {(p.origin.file, p.origin.line or 0, p.key, p.why): p for p in problems}
        self.problems = [unique[rank] for rank in sorted(unique)]
        count = len(self.problems)
        title = "1 problem in this recipe" if count == 1 else f"{count} problems in this recipe"
        lines = [f"  {problem}" for problem in self.problems[:_MOST_SHOWN]]
        if count > _MOST_SHOWN:
            lines.append(f"  and {count - _MOST_SHOWN} more")
        super().__init__("\n".join([f"{title}:", *lines]))


def without_consequences(problems: Iterable[Problem], *, of: Collection[Problem]) -> list[Problem]:
    """Leave out what may only follow from values that could not be read.

    Args:
        problems: What the values that could be read gave rise to.
        of: The others. A problem of the same key, of a section around it, of a key in it, or one
            that names it, is left out.
    """
    return [p for p in problems if not any(_may_follow(p, from_) for from_ in of)]


def _may_follow(problem: Problem, from_: Problem) -> bool:
    key, cause = (re.findall(r"\w+", one.key) for one in (problem, from_))
    shared = min(len(key), len(cause))
    words = re.findall(r"\w+", f"{problem.why} {problem.fix}")
    return key[:shared] == cause[:shared] or cause[-1] in words


def dotted(key: Sequence[str | int]) -> str:
    """Write a key the way overrides do.

    >>> dotted(("data", "train", 0, "path"))
    'data.train[0].path'
    """
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


_MOST_SHOWN = 40
_LONGEST_LINE = 2000


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
