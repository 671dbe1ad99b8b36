"""A progress bar on a terminal, and nothing where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from hf_gradacc.text import printable

__all__ = ["with_progress"]

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], *, what: str, total: int | None = None) -> Iterator[Item]:
    """Pass items through, with a bar on standard error that is gone afterwards.

    Args:
        items: What to pass through.
        what: Words beside the bar.
        total: Their number, where `items` does not know it.

    >>> list(with_progress([1, 2], what="counting"))
    [1, 2]
    """
    yield from track(
        items,
        description=escape(printable(what)),
        total=total,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
