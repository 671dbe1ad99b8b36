"""Limits on what a chat template may compute: time, memory, and sizes that no conversation needs.

A template comes with a tokenizer or a recipe, so from strangers. Transformers compiles it in
Jinja's sandbox, which keeps it from files and from Python, and not from nesting loops or from
multiplying a text by ten billion. A step in C cannot be interrupted, so steps that make much of
little are checked before they run; everything else runs against a clock of CPU time.
"""

from __future__ import annotations

import functools
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = [
    "GuardedEnvironment",
    "TemplateLimitError",
    "check_length",
    "guard_templates",
    "within_limits",
]

MOST_SECONDS = 0.5
"""CPU time of one rendering; those of published templates take a millisecond."""

MOST_BYTES = 2**28
"""What one rendering may add to the memory of the process."""

MOST_REPEATS = 10_000
"""Largest width, count or indentation."""

MOST_CHARACTERS = 1_000_000
"""Longest text that one step may make of shorter ones."""

_MOST_BITS = 10_000
_CHECK_SECONDS = 0.02


class TemplateLimitError(Exception):
    """A chat template computes more than any conversation needs."""


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a look at each step that makes much of little."""

    # What is intercepted is not computed while a template is compiled, either.
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters = _Filters(self.filters)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator if its result is of a size that can be meant."""
        if operator == "%":
            if isinstance(left, str):
                _check_step("format", left)
        elif operator == "*":
            _check_product(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            _refuse_if(abs(left) > 1 and left.bit_length() * right > _MOST_BITS, "**")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """Format a text if the result is of a size that can be meant."""
        run = super().wrap_str_format(value)
        if run is None:
            return None

        @functools.wraps(run)
        def checked(*args: Any, **kwargs: Any) -> Any:
            _check_step("format", value.__self__)
            return run(*args, **kwargs)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a method if its result is of a size that can be meant."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_step(getattr(__obj, "__name__", ""), owner, *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)


class _Filters(dict[str, Callable[..., Any]]):
    """Filters, those among them checked that make much of little; Transformers adds its own."""

    def __init__(self, filters: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        for name, run in filters.items():
            self[name] = run

    def __setitem__(self, name: str, run: Callable[..., Any]) -> None:
        super().__setitem__(name, _checked_filter(run, name) if name in _FILTERS else run)


def _checked_filter(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(run)  # with Jinja's marks of what it passes before the value
    def checked(*args: Any, **kwargs: Any) -> Any:
        value, *options = [
            *(args[1:] if hasattr(run, "jinja_pass_arg") else args),
            *kwargs.values(),
        ]
        if name != "join":
            _check_step(name, value, *options)
            return run(*args, **kwargs)
        # The method is called on what the filter is given, and parts that come one by one cannot be
        # looked at twice.
        parts = [*value] if hasattr(value, "__next__") else value
        _check_step(name, options[0] if options else "", parts)
        first = 1 if hasattr(run, "jinja_pass_arg") else 0
        return run(*args[:first], parts, *args[first + 1 :], **kwargs)

    return checked


_FILTERS = {"batch", "center", "format", "indent", "join", "replace", "round", "slice"}
_FILTERS |= {"sum", "tojson"}
_REPEATING = {"center", "ljust", "rjust", "zfill", "expandtabs", *_FILTERS} - {"format"}
_WIDE = re.compile(r"\d{5,}|\*|:[^}]*\{")
"""A width in a format, written out or taken from what is formatted."""


def _check_step(name: str, value: Any, *options: Any) -> None:
    """Check a filter or a method of a text.

    Args:
        name: Which.
        value: The text; what lies between the parts, for `join`.
        options: What it is called with.
    """
    if name in ("format", "format_map"):
        _refuse_if(_WIDE.search(str(value)) is not None, name)
    elif name == "translate":
        tables = (option.values() for option in options if isinstance(option, dict))
        _refuse_if(any(len(str(text)) > 100 for table in tables for text in table), name)
    elif name in _REPEATING:
        numbers = (option for option in options if isinstance(option, int | float))
        _refuse_if(any(number > MOST_REPEATS for number in numbers), name)
        if name == "replace" and len(options) >= 2:
            old, new = map(str, options[:2])
            _refuse_if(str(value).count(old) * len(new) > MOST_CHARACTERS, name)
        elif name == "join":
            parts = options[0] if options and isinstance(options[0], list | tuple) else ()
            size = sum(len(part) for part in parts if isinstance(part, str))
            too_wide = isinstance(value, str) and len(value) > MOST_REPEATS
            _refuse_if(too_wide or size > 10 * MOST_CHARACTERS, name)
        elif name == "indent":
            _refuse_if(any(len(str(text)) > MOST_REPEATS for text in options), name)
        elif name == "sum":  # of lists, each added to a copy of all before
            _refuse_if(any(isinstance(option, list | tuple) for option in options), name)


def _check_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(other, int) and isinstance(one, str | bytes | list | tuple):
            _refuse_if(len(one) * other > MOST_CHARACTERS, "*")
    if isinstance(left, int) and isinstance(right, int):
        _refuse_if(left.bit_length() + right.bit_length() > _MOST_BITS, "*")


def _refuse_if(is_too_much: bool, step: str) -> None:
    if is_too_much:
        raise TemplateLimitError(f"its `{step}` makes more than {MOST_CHARACTERS:,} characters")


def check_length(text: str, messages: Any) -> None:
    """Refuse a rendering that is far longer than what was said.

    Raises:
        TemplateLimitError: If it is.
    """
    if len(text) > MOST_CHARACTERS and len(text) > MOST_CHARACTERS + 20 * len(str(messages)):
        raise TemplateLimitError(f"it makes {len(text):,} characters of a conversation")


@functools.cache
def guard_templates() -> None:
    """Let Transformers compile chat templates in our sandbox, in this process, from now on."""
    from transformers.utils import chat_template_utils as stock

    if getattr(stock, "ImmutableSandboxedEnvironment", None) is ImmutableSandboxedEnvironment:
        vars(stock)["ImmutableSandboxedEnvironment"] = GuardedEnvironment
        stock._compile_jinja_template.cache_clear()


class _Clock:
    """Interrupts what runs between `start` and `stop` if it takes too much."""

    def __init__(self) -> None:
        self._started, self._memory, self._is_installed = 0.0, -1, False
        self._block: FrameType | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._is_installed and not self._install():
            return
        self._started, self._memory = time.thread_time(), -1
        self._block = sys._getframe(1)
        signal.setitimer(signal.ITIMER_VIRTUAL, _CHECK_SECONDS, _CHECK_SECONDS)

    def _install(self) -> bool:
        """Handle the signal from now on, if the system has it and nobody else does."""
        if hasattr(signal, "SIGVTALRM") and signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL:
            signal.signal(signal.SIGVTALRM, self._look)
            self._is_installed = True
        return self._is_installed

    def __exit__(self, *error: object) -> None:
        if self._block is not None:
            self._block = None
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _look(self, number: int, frame: FrameType | None) -> None:
        # A signal may come late, in `__exit__` or behind it, where nobody expects an error.
        while frame is not None and frame is not self._block:
            frame = None if frame.f_code is _Clock.__exit__.__code__ else frame.f_back
        if frame is None:
            return
        if time.thread_time() - self._started > MOST_SECONDS:
            raise TemplateLimitError(f"it takes more than {MOST_SECONDS:g} s of a processor")
        memory = _memory()
        self._memory = memory if self._memory < 0 else self._memory
        if memory - self._memory > MOST_BYTES:
            raise TemplateLimitError(f"it takes more than {MOST_BYTES / 1e9:.1f} GB of memory")


@functools.cache
def within_limits() -> AbstractContextManager[None]:
    """Return what interrupts a block that takes too much CPU time or memory.

    The clock is a signal, which only the main thread of a process can handle: loader workers and
    the processes that prepare rows have one each. It raises `TemplateLimitError`.
    """
    return _Clock()


def _memory() -> int:
    """The memory this process holds now, in bytes; 0 where the system does not say."""
    try:
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
