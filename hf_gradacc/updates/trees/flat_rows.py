"""Rows of tokens end to end in one array: four bytes a token, and of each row but its length."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["PADDING", "FlatRows", "ranges"]

PADDING = 256
"""Zeros behind the last row, so that as many tokens can be looked at from any place of a row."""

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class FlatRows:
    """Rows of tokens end to end.

    Attributes:
        tokens: Ids of all rows ``[tokens + PADDING]``, little-endian int32. If ids need more bits,
            smaller numbers stand for them.
        starts: Where each row begins ``[rows]``.
        held: Tokens of each row that are here ``[rows]``.
        lengths: Tokens that it has ``[rows]``.
    """

    tokens: np.ndarray
    starts: np.ndarray
    held: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(
        cls,
        batches: Iterable[tuple[np.ndarray, np.ndarray]],
        *,
        most: int | None = None,
        num_tokens: int = 0,
    ) -> FlatRows:
        """Lay rows end to end that come in batches.

        Args:
            batches: The ids of some rows end to end, and how many are of each.
            most: Tokens to hold of each row.
            num_tokens: About how many there will be in all; with more, they are copied once.

        >>> rows = FlatRows.of([(np.array([5, 6, 7, 9]), np.array([3, 1]))], most=2)
        >>> rows.tokens[:3].tolist(), rows.starts.tolist(), rows.lengths.tolist()
        ([5, 6, 9], [0, 2], [3, 1])
        """
        tokens, used = np.empty(num_tokens + PADDING, dtype="<i4"), 0
        counts = [np.zeros(0, dtype=np.int64)]
        for ids, sizes in batches:
            counts.append(sizes)
            if most is not None and sizes.size and sizes.max() > most:
                first = np.cumsum(sizes) - sizes
                ids = ids[ranges(first, first + np.minimum(sizes, most))]
            if tokens.itemsize == 4 and not _fits(ids):
                tokens = tokens.astype("<i8")
            if used + ids.size + PADDING > tokens.size:
                larger = np.empty(2 * (used + ids.size) + PADDING, dtype=tokens.dtype)
                larger[:used], tokens = tokens[:used], larger
            tokens[used : used + ids.size] = ids
            used += ids.size
        tokens = tokens[: used + PADDING]  # what is behind was never written, by no two ranks alike
        tokens[used:] = 0
        if tokens.itemsize > 4:
            tokens = np.unique(tokens, return_inverse=True)[1].astype("<i4")
        lengths = np.concatenate(counts)
        held = lengths if most is None else np.minimum(lengths, most)
        return cls(tokens, np.cumsum(held) - held, held, lengths)

    @classmethod
    def of_rows(cls, rows: Iterable[Any], *, most: int | None = None) -> FlatRows:
        """Lay rows end to end: lists, arrays or tensors of one dimension.

        >>> FlatRows.of_rows([[5, 6, 7], [9]]).held.tolist()
        [3, 1]
        """
        sizes = map(operator.length_hint, rows) if isinstance(rows, list) else ()
        num_tokens = sum(sizes if most is None else (min(size, most) for size in sizes))
        return cls.of(_batches(rows), most=most, num_tokens=num_tokens)


def _batches(rows: Iterable[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    remaining = iter(rows)
    while some := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
        ids = [np.asarray(row, dtype=np.int64).reshape(-1) for row in some]
        yield np.concatenate(ids), np.array([row.size for row in ids], dtype=np.int64)


def ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return the numbers from each start to before its stop, one range after the other.

    >>> ranges(np.array([0, 7]), np.array([2, 10])).tolist()
    [0, 1, 7, 8, 9]
    """
    sizes = stops - starts
    skipped = np.cumsum(sizes) - sizes
    numbers: np.ndarray = np.arange(int(sizes.sum())) + np.repeat(starts - skipped, sizes)
    return numbers


def _fits(ids: np.ndarray) -> bool:
    """Return whether 32 bits can hold all ids."""
    bounds = np.iinfo(np.int32)
    if ids.itemsize <= 2 or not ids.size:
        return True
    return bool(ids.min() >= bounds.min and ids.max() <= bounds.max)
