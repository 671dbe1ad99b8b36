r"""`${...}` in a recipe: another key, or a variable of the environment that recipes may read.

Everything else is refused, whatever it looks like: what stands between the braces is a plain key,
or `oc.env:` and a plain name, and nothing in it is itself looked up. `\${` is the text `${`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_gradacc.recipe.file.problems import Key, Origin, Problem, dotted
from hf_gradacc.recipe.file.reading import (
    MOST_CHARACTERS,
    MOST_LEVELS,
    MOST_VALUES,
    type_word,
)
from hf_gradacc.text import nearest

__all__ = [
    "READABLE_VARIABLES",
    "SECRET_NAME",
    "FromEnvironment",
    "allow_variables",
    "escape",
    "resolve",
]

READABLE_VARIABLES = frozenset(
    {
        *("HOME", "USER", "LOGNAME", "HOSTNAME", "TMPDIR", "SCRATCH", "WORK"),
        *("DATA_DIR", "MODEL_DIR", "OUTPUT_DIR", "HF_HOME"),
        *("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME", "WANDB_RUN_GROUP"),
        *("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
        *("SLURM_NNODES", "SLURM_NTASKS", "SLURM_TMPDIR", "SLURM_SUBMIT_DIR"),
    }
)
"""Variables of the environment that any recipe may read; whoever runs one may allow more."""

SECRET_NAME = re.compile(
    r"token|secret|passw|pwd|api_?key|access_?key|private|credential|auth", re.IGNORECASE
)
"""Variables that nobody can allow: the libraries that need them find them in the environment."""

_OPENS = re.compile(r"(?<!\\)(\\*)\$\{")
_INSIDE = re.compile(r"([^{}$]*)\}")
_KEY = re.compile(r"[\w-]+(?:\.[\w-]+|\[\d+\])*")
_LONGEST_CHAIN = 100
_VARIABLE = re.compile(r"oc\.env\s*:\s*([A-Za-z_]\w*)\s*(?:,(.*))?", re.DOTALL)


@dataclass(frozen=True)
class FromEnvironment:
    """A value that holds something from the environment.

    Attributes:
        written: The value as the recipe has it.
        parts: Each interpolation in it, and what its variable held.
    """

    written: str
    parts: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        """Leave out what variables held: objects are printed where nobody expects it."""
        return f"FromEnvironment({self.written!r})"

    def by_name(self, value: Any, *, escaped: bool = False) -> str:
        """Write names in place of what variables held.

        Args:
            value: What the value has become since, such as an absolute path.
            escaped: Write it so that a recipe that holds it reads the same again.
        """
        names = {held: written for written, held in self.parts if held}
        if not isinstance(value, str) or not names:
            return self.written
        longest_first = sorted(names, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", value)
        if len(pieces) == 1:  # a link was followed, say
            return self.written
        write = escape if escaped else str
        return "".join(names[p] if i % 2 else write(p) for i, p in enumerate(pieces))


@dataclass
class _Resolved:
    """A value, what came from outside in it, and how much it stands for."""

    value: Any
    outside: dict[Key, FromEnvironment] = field(default_factory=dict)
    num_values: int = 1
    num_characters: int = 0
    num_levels: int = 1


def allow_variables(names: Collection[str]) -> frozenset[str]:
    """The variables that a recipe may read if its caller allows some more.

    Raises:
        ValueError: If one of them is no name, or looks like that of a secret.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"{name!r} is not the name of an environment variable")
        if SECRET_NAME.search(name):
            raise ValueError(
                f"{name!r} looks like a secret, which no recipe may read: leave it in the "
                "environment; transformers and wandb find it there"
            )
    return READABLE_VARIABLES | frozenset(names)


def escape(text: str) -> str:
    r"""Write a text so that a recipe that holds it reads it as it is.

    >>> print(escape("${x}"), escape("\\${x}"))
    \${x} \\\${x}
    """
    return _OPENS.sub(lambda found: 2 * found[1] + "\\${", text)


def resolve(
    values: Mapping[str, Any], *, origin_of: Callable[[Key], Origin], readable: Collection[str]
) -> tuple[dict[str, Any], dict[Key, FromEnvironment], list[Problem]]:
    """Replace every interpolation in the values of a recipe.

    A text that is one interpolation and nothing else takes the type of what it stands for.

    Args:
        values: The values as written; they are left as they are.
        origin_of: Tells where the value at a key was written.
        readable: Variables of the environment that may be read.

    Returns:
        The values; for each key that holds something from the environment, what; and every
        interpolation that is none, leads nowhere or in a circle, or reads what it may not. Where
        one of those stands, the value is null.
    """
    resolver = _Resolver(values, origin_of, readable)
    result = resolver.resolve(values, ())
    return result.value or {}, result.outside, resolver.problems


class _Resolver:
    def __init__(
        self, root: Any, origin_of: Callable[[Key], Origin], readable: Collection[str]
    ) -> None:
        self.problems: list[Problem] = []
        self._root, self._origin_of, self._readable = root, origin_of, readable
        self._done: dict[Key, _Resolved] = {}
        self._open: list[Key] = []
        self._spent_values = self._spent_characters = 0

    def resolve(self, value: Any, key: Key) -> _Resolved:
        if key in self._done:
            return self._done[key]
        self._open.append(key)
        try:
            if isinstance(value, Mapping):
                inner = {name: self.resolve(part, (*key, name)) for name, part in value.items()}
                found = self._joined({name: r.value for name, r in inner.items()}, inner, key)
            elif isinstance(value, list):
                parts = {i: self.resolve(part, (*key, i)) for i, part in enumerate(value)}
                found = self._joined([r.value for r in parts.values()], parts, key)
            elif isinstance(value, str):
                found = self._text(value, key) or _Resolved(None)
            else:
                found = _Resolved(value)
        finally:
            self._open.pop()
        self._done[key] = found
        return found

    def _joined(self, value: Any, parts: Mapping[Any, _Resolved], key: Key) -> _Resolved:
        inside = parts.values()
        found = _Resolved(
            value,
            {
                (name, *at): held
                for name, part in parts.items()
                for at, held in part.outside.items()
            },
            1 + sum(part.num_values for part in inside),
            sum(part.num_characters for part in inside),
            1 + max((part.num_levels for part in inside), default=0),
        )
        too_much = found.num_values > MOST_VALUES or found.num_levels > MOST_LEVELS
        if too_much or found.num_characters > MOST_CHARACTERS:
            self._refuse_size(key, ...)
            return _Resolved(None)
        return found

    def _text(self, text: str, key: Key) -> _Resolved | None:
        """Resolve the interpolations of one text; None if one of them was refused."""
        parts: list[_Resolved] = []
        place, is_alone = 0, False
        while opens := _OPENS.search(text, place):
            slashes = len(opens[1])
            before = text[place : opens.start()] + slashes // 2 * "\\"
            if slashes % 2:
                parts.append(_Resolved(before + "${"))
                place = opens.end()
                continue
            inside = _INSIDE.match(text, opens.end())
            if inside is None:
                why = "holds a ${ that is no interpolation"
                fix = (
                    "write ${section.key} or ${oc.env:NAME}, with nothing looked up in between; "
                    "the text ${ itself is \\${"
                )
                return self._refuse(key, why, fix, text)
            found = self._interpolate(inside[1].strip(), text, key)
            if found is None:
                return None
            is_alone = opens.start() == 0 and inside.end() == len(text)
            parts += [_Resolved(before), found] if before else [found]
            place = inside.end()
        if is_alone:
            return parts[0]
        parts.append(_Resolved(text[place:]))
        if any(isinstance(part.value, dict | list) for part in parts):
            return self._refuse(
                key, "puts a section into a text", "refer to a key that holds one value", text
            )
        size = sum(len(str(part.value)) for part in parts)
        if not self._spend(0, size, text, key):
            return None
        whole = "".join(str(part.value) for part in parts)
        held = tuple(pair for part in parts for at in part.outside.values() for pair in at.parts)
        return _Resolved(whole, {(): FromEnvironment(text, held)} if held else {}, 1, size)

    def _interpolate(self, inside: str, text: str, key: Key) -> _Resolved | None:
        variable = _VARIABLE.fullmatch(inside)
        if variable is not None:
            return self._read(variable[1], variable[2], inside, text, key)
        if _KEY.fullmatch(inside):
            return self._follow(inside, text, key)
        name = inside.partition(":")[0].strip()
        why = f"calls ${{{name}:...}}" if ":" in inside else f"holds ${{{inside}}}"
        fix = "only ${section.key} and ${oc.env:NAME} are known to recipes"
        return self._refuse(key, why, fix, text)

    def _read(
        self, name: str, default: str | None, inside: str, text: str, key: Key
    ) -> _Resolved | None:
        if name not in self._readable:
            if SECRET_NAME.search(name):
                why = f"reads the secret {name}"
                fix = "leave it in the environment; transformers and wandb find it there"
            else:
                why = f"reads the environment variable {name}, which recipes may not"
                guess = nearest(name, sorted(self._readable))
                hint = f"did you mean {guess}? " if guess else ""
                fix = f"{hint}whoever runs the recipe can allow it: --allow-env {name}"
            return self._refuse(key, why, fix, text)
        held = os.environ.get(name)
        if held is not None:
            written = f"${{{inside}}}"
            outside = FromEnvironment(written, ((written, held),))
            return _Resolved(type_word(held), {(): outside}, 1, len(held))
        if default is None:
            why = f"reads the environment variable {name}, which is not set"
            return self._refuse(key, why, f"set it, or write ${{oc.env:{name},default}}", text)
        quoted = re.fullmatch(r"\s*(['\"])(.*)\1\s*", default, re.DOTALL)
        value = quoted[2] if quoted else type_word(default.strip())
        return _Resolved(value, {}, 1, len(default))

    def _follow(self, inside: str, text: str, key: Key) -> _Resolved | None:
        value: Any = self._root
        target: Key = ()
        for step in re.findall(r"[\w-]+", inside):
            at = int(step) if isinstance(value, list) and step.isdecimal() else step
            is_there = isinstance(value, Mapping) and at in value
            if isinstance(value, list):
                is_there = isinstance(at, int) and at < len(value)
            if not is_there:
                keys = list(value) if isinstance(value, Mapping) else []
                guess = nearest(step, keys)
                fix = f"did you mean {guess}?" if guess else "write a key that this recipe has"
                return self._refuse(key, f"refers to {inside}, which is not there", fix, text)
            value = value[at]
            target = (*target, at)
        if target in self._open:
            circle = [*self._open[self._open.index(target) :], target]
            why = f"refers to itself ({' -> '.join(map(dotted, circle))})"
            return self._refuse(key, why, "give one of them a value", text)
        if len(self._open) > _LONGEST_CHAIN:
            fix = "refer to the value itself"
            return self._refuse(key, "is a long chain of references", fix, text)
        found = self.resolve(value, target)
        if not self._spend(found.num_values, found.num_characters, text, key):
            return None
        # A copy: what two keys hold must not change together.
        return replace(found, value=_copied(found.value))

    def _spend(self, num_values: int, num_characters: int, text: str, key: Key) -> bool:
        """Count what interpolations have made so far; whether that is still within limits."""
        self._spent_values += num_values
        self._spent_characters += num_characters
        if self._spent_values <= MOST_VALUES and self._spent_characters <= MOST_CHARACTERS:
            return True
        self._refuse_size(key, text)
        return False

    def _refuse_size(self, key: Key, value: Any) -> None:
        why = (
            f"stands for more than {MOST_VALUES:,} values, {MOST_CHARACTERS:,} characters or "
            f"{MOST_LEVELS} levels"
        )
        self._refuse(key, why, "write out what the run needs, and nothing else", value)

    def _refuse(self, key: Key, why: str, fix: str, value: Any) -> Any:
        """Note a problem. Returns None, as what the text stands for."""
        self.problems.append(Problem(dotted(key), why, fix, self._origin_of(key), value))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
