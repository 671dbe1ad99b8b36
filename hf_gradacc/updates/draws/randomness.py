"""Everything that collators and datasets draw random numbers from: watched, seeded, put back.

Code that runs in a loader's worker may draw from the generators of torch, numpy and Python, or from
one of its own: an attribute (``DataCollatorForLanguageModeling(seed=...)``), a variable of the
function's module, or one that a closure holds.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomSources", "find_generators", "seeds_of"]

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MOST_OBJECTS = 2000
_MOST_ITEMS = 64


class RandomSources:
    """The generators that a piece of code may draw from, on the host.

    Args:
        holder: The code: a function or an object that may hold generators.
    """

    def __init__(self, holder: Any = None) -> None:
        self._holder = holder
        # The methods of these modules are bound to their global generators.
        self._global: list[Any] = [
            torch.default_generator,
            getattr(np.random.seed, "__self__", None) or np.random.mtrand._rand,
            random.seed.__self__,  # type: ignore[attr-defined]
        ]
        self._all = [*self._global, *find_generators(holder)]
        self._has_looked = holder is None

    def state(self) -> list[Any]:
        """Return the state of each."""
        return [_state_of(generator) for generator in self._all]

    def has_moved(self, state: list[Any]) -> bool:
        """Return whether any was used since."""
        return not all(_same(a, _state_of(g)) for a, g in zip(state, self._all, strict=False))

    def has_drawn(self, state: list[Any]) -> bool:
        """Return whether the code drew since; to be asked after it was called.

        After its first call it is searched for generators again: many are made only then.
        """
        if not self._has_looked:
            self._has_looked = True
            before = len(self._all)
            self._all = [*self._global, *find_generators(self._holder)]
            if len(self._all) > before:
                return True
        return self.has_moved(state)

    def restore(self, state: list[Any]) -> None:
        """Put each back."""
        for generator, one in zip(self._all, state, strict=False):
            _set_state(generator, one)

    def seed(self, *entropy: int) -> None:
        """Seed each by some integers, and each differently."""
        for generator, seed in zip(
            self._all, seeds_of(*entropy, count=len(self._all)), strict=True
        ):
            _seed(generator, seed)

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Leave all as they were before the context."""
        state = self.state()
        try:
            yield
        finally:
            self.restore(state)


def seeds_of(*entropy: int, count: int = 1) -> list[int]:
    """Make seeds of 63 bits out of some integers, as independent as numpy makes them.

    >>> seeds_of(1, 2) == seeds_of(1, 2), seeds_of(1, 2) == seeds_of(2, 1)
    (True, False)
    """
    words = np.random.SeedSequence([n & (2**64 - 1) for n in entropy])
    return [int(word) >> 1 for word in words.generate_state(count, np.uint64)]


def find_generators(holder: Any) -> list[Any]:
    """Find the generators that a function or object holds, however deep, in a fixed order.

    >>> class Collator:
    ...     def __init__(self): self.generator = random.Random(3)
    >>> len(find_generators(Collator()))
    1
    """
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [holder]
    while waiting and len(seen) < _MOST_OBJECTS:
        item = waiting.pop(0)
        if id(item) in seen or isinstance(item, (type, ModuleType, str, bytes, int, float)):
            continue
        seen.add(id(item))
        if isinstance(item, _KINDS):
            if not isinstance(item, random.SystemRandom):
                found.append(item)
            continue
        waiting += _parts_of(item)
    return found


def _parts_of(item: Any) -> list[Any]:
    """Return what an object holds."""
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, FunctionType):
        held = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
        for cell in item.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                held.append(cell.cell_contents)
        return held + _globals_of(item)
    if isinstance(item, dict):
        return list(item.values()) if len(item) <= _MOST_ITEMS else []
    if isinstance(item, (list, tuple)):
        return list(item) if len(item) <= _MOST_ITEMS else []
    if isinstance(item, (Tensor, np.ndarray)):
        return []
    held = list(getattr(item, "__dict__", {}).values())
    for method in vars(type(item)).values():
        if isinstance(method, FunctionType):
            held += _globals_of(method)
    return held


def _globals_of(function: FunctionType) -> list[Any]:
    """Return the generators among the variables of its module that a function names."""
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [value for value in named if isinstance(value, _KINDS)]


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed([seed & 0xFFFFFFFF, seed >> 32])
    else:
        generator.seed(seed)


def _same(a: Any, b: Any) -> bool:
    """Compare two states."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Mapping):
        return all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and any(isinstance(part, np.ndarray) for part in a):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
