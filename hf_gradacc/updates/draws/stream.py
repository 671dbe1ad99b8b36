"""Read a stream so that what it draws for a row is a function of seed, epoch and the row's place.

A stream that augments its rows, or shuffles them in a buffer of its own, draws from the generators
of the process: other numbers on each rank, with a worker, and after a resume. Then ranks would not
even agree on which rows there are. Generators that the stream holds itself are left as they are,
since the order of its rows may hang on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from hf_gradacc.updates.draws.randomness import RandomSources

__all__ = ["SeededStream"]

_STREAMING = 4
_WATCHED_ROWS = 64
"""A stream that has drawn nothing for so many rows is read without watching it."""


class SeededStream(Iterator[Any]):
    """One pass over a stream.

    Args:
        stream: Any iterable over rows.
        seed: The run's seed.
        epoch: Which pass it is.
        first: The place of the first row, of a stream that has sought.
    """

    def __init__(self, stream: Iterable[Any], *, seed: int, epoch: int, first: int = 0) -> None:
        self._entropy = (_STREAMING, seed, epoch)
        self._place = self._first = first
        self._is_drawing = False
        self._sources = RandomSources()
        with self._sources.put_back():  # it may shuffle before its first row
            self._sources.seed(*self._entropy)
            self._rows = iter(stream)

    def __next__(self) -> Any:
        place, self._place = self._place, self._place + 1
        if not self._is_drawing and place - self._first >= _WATCHED_ROWS:
            return next(self._rows)
        with self._sources.put_back():
            self._sources.seed(*self._entropy, place)
            before = None if self._is_drawing else self._sources.state()
            row = next(self._rows)
            if before is not None:
                self._is_drawing = self._sources.has_moved(before)
            return row
