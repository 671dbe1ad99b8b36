"""A progress bar on a terminal, and a line every half minute where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from hf_gradacc.text import printable, write_line

__all__ = ["with_progress"]

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], *, what: str, total: int | None = None) -> Iterator[Item]:
    """Pass items through, with a bar on standard error that is gone afterwards.

    Where standard error is no terminal, a line on standard output says how many have passed: first
    after two seconds, then every half minute.

    Args:
        items: What to pass through.
        what: Words beside the bar.
        total: Their number, where `items` does not know it.

    >>> list(with_progress([1, 2], what="counting"))
    [1, 2]
    """
    if not sys.stderr.isatty():
        yield from _with_lines(items, what=what, total=total)
        return
    yield from track(
        items,
        description=escape(printable(what)),
        total=total,
        console=Console(stderr=True),
        transient=True,
    )


_FIRST_SECONDS, _EVERY_SECONDS = 2.0, 30.0


def _with_lines(items: Iterable[Item], *, what: str, total: int | None) -> Iterator[Item]:
    due = time.monotonic() + _FIRST_SECONDS
    for count, item in enumerate(items):
        if time.monotonic() >= due:
            due = time.monotonic() + _EVERY_SECONDS
            of = f" of {total:,}" if total else ""
            write_line(f"{printable(what)}: {count:,}{of}", sys.stdout)
        yield item
