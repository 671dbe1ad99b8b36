"""The stock loop sees one batch per step; everybody else sees the arguments as the user wrote them.

One item of the loader is one update, so the stock loop must not accumulate. Its filter of losses
replaces a NaN by the mean of earlier ones. Both are arguments that the loop reads in between calls
of overrides, callbacks, samplers and optimizers, which may read them too. So what is shown depends
on who reads: the code of the stock loop, or anybody.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from transformers import Trainer

__all__ = ["changed", "hide_from_stock_loop", "noting_reads", "stock_loop_sees_one_batch"]

_LOOP_SEES: dict[str, Any] = {"gradient_accumulation_steps": 1, "logging_nan_inf_filter": False}

_LOOP = frozenset(
    method.__code__
    for method in (Trainer._inner_training_loop, Trainer._init_training_state, Trainer._run_epoch)
)

_in_loop: set[int] = set()
"""Which arguments, by identity, belong to a loop that runs now."""

_noted: dict[int, Callable[[], None]] = {}
"""What to call when a user's code reads ``gradient_accumulation_steps``, by identity."""

_LIBRARIES = ("accelerate", "hf_gradacc", "transformers")


class _HiddenFromLoop:
    """A field of the arguments that the stock loop sees another value of."""

    def __init__(self, name: str, default: Any) -> None:
        self._name = name
        self._default = default  # what the class itself gives, as a dataclass does

    def __get__(self, arguments: Any, owner: type) -> Any:
        if arguments is None:
            return self._default
        if id(arguments) in _in_loop and sys._getframe(1).f_code in _LOOP:
            return _LOOP_SEES[self._name]
        if id(arguments) in _noted and self._name == "gradient_accumulation_steps":
            reader = str(sys._getframe(1).f_globals.get("__name__"))
            if reader.partition(".")[0] not in _LIBRARIES:
                _noted[id(arguments)]()
        return vars(arguments)[self._name]

    def __set__(self, arguments: Any, value: Any) -> None:
        vars(arguments)[self._name] = value


def hide_from_stock_loop(arguments: Any) -> None:
    """Put fields into the class of some arguments that show the stock loop other values.

    Outside of the loop they do what plain attributes do, copies and pickles included.

    Args:
        arguments: Of any subclass of ``TrainingArguments``.
    """
    owner = type(arguments)
    for name in _LOOP_SEES:
        if not isinstance(vars(owner).get(name), _HiddenFromLoop):
            setattr(owner, name, _HiddenFromLoop(name, getattr(owner, name, None)))


@contextlib.contextmanager
def stock_loop_sees_one_batch(arguments: Any) -> Iterator[None]:
    """Let the stock loop see one batch per step, for as long as it runs."""
    hide_from_stock_loop(arguments)
    was_in_loop = id(arguments) in _in_loop
    _in_loop.add(id(arguments))
    try:
        yield
    finally:
        if not was_in_loop:
            _in_loop.discard(id(arguments))


@contextlib.contextmanager
def noting_reads(arguments: Any, note: Callable[[], None]) -> Iterator[None]:
    """Call `note` whenever a user's code reads ``gradient_accumulation_steps``."""
    hide_from_stock_loop(arguments)
    _noted[id(arguments)] = note
    try:
        yield
    finally:
        del _noted[id(arguments)]


@contextlib.contextmanager
def changed(arguments: Any, **values: Any) -> Iterator[None]:
    """Change arguments for as long as the context lasts."""
    before = {name: getattr(arguments, name) for name in values}
    for name, value in values.items():
        setattr(arguments, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(arguments, name, value)
