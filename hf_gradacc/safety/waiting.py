"""Say so, while a wait or a check takes long; it goes on."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from transformers.utils import logging

from hf_gradacc.text import duration, printable, write_line

__all__ = ["TellOfWait", "silenced", "telling", "telling_for"]

logger = logging.get_logger(__name__)

_STEP_SECONDS = 1.0
_IDLE_SECONDS = 60.0


class TellOfWait:
    """Writes a line while a block waits, first after some seconds, then ever more seldom.

    A thread looks at the clock; it ends when nobody has waited for a minute.

    Args:
        describe: Returns what is waited for, given the seconds so far; None to say nothing yet.
            It is called in that thread.
        after: Seconds until the first line.
    """

    def __init__(self, describe: Callable[[float], str | None], *, after: float) -> None:
        self._describe, self._after = describe, after
        self._since: float | None = None
        self._ended = 0.0
        self._next = after
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self._next = self._after
        self._since = time.monotonic()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._watch, name="tell-of-wait", daemon=True)
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._since, self._ended = None, time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(min(_STEP_SECONDS, self._after / 4))
            since = self._since
            if since is None:
                if time.monotonic() - self._ended > _IDLE_SECONDS:
                    return
                continue
            waited = time.monotonic() - since
            if waited < self._next:
                continue
            line = self._describe(waited)
            if line is not None and self._since == since:
                logger.warning(printable(line))
                self._next = 2 * waited


def telling_for(
    trainer: Any, what: str | Callable[[], str]
) -> contextlib.AbstractContextManager[None]:
    """As `telling`, on the first rank alone, and not if only errors are logged.

    Args:
        trainer: The trainer.
        what: As for `telling`.
    """
    is_told = trainer.is_world_process_zero()
    if not is_told or trainer.args.log_level in ("error", "critical"):
        return contextlib.nullcontext()
    return telling(what)


@contextlib.contextmanager
def telling(
    what: str | Callable[[], str],
    *,
    after: float = 2.0,
    every: float = 30.0,
    beside_bars: bool = False,
) -> Iterator[None]:
    """Write to standard error what a block does if it takes long, and later that it still does.

    Args:
        what: What it does: "comparing gradients"; or returns that at the time, with how far it
            is, and is called in another thread.
        after: Seconds until the first line.
        every: Seconds between the lines that follow.
        beside_bars: The block draws bars of its own where standard error is a terminal; there they
            tell.

    >>> with contextlib.redirect_stderr(sys.stdout), telling("adding up", after=0.02):
    ...     time.sleep(0.2)
    adding up ...
    """
    is_done = threading.Event()

    def watch() -> None:
        waited, pause = 0.0, after
        while not is_done.wait(pause):
            waited, pause = waited + pause, every
            so_far = f" {duration(waited)} so far" if waited > after else ""
            line = what if isinstance(what, str) else what()
            write_line(f"{printable(line)} ...{so_far}", sys.stderr)

    if _is_silenced or (beside_bars and sys.stderr.isatty()):
        yield
        return
    watcher = threading.Thread(target=watch, name="telling", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_done.set()
        watcher.join()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Let `telling` write nothing for a while."""
    global _is_silenced
    before, _is_silenced = _is_silenced, True
    try:
        yield
    finally:
        _is_silenced = before


_is_silenced = False
