"""Sort rows by their tokens, so that those which begin alike are neighbours.

Pure functions on integers. What two neighbours share tells all: a tree of rows is a run of
neighbours, and holds their tokens less what each shares with the one before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Sorted", "count_common", "count_distinct_tokens", "sort_by_prefix"]


@dataclass(frozen=True)
class Sorted:
    """Rows in an order in which those with a common prefix are neighbours.

    Attributes:
        order: Which row is at each place.
        lengths: Tokens of the row at each place.
        shared: Tokens at its beginning that it has in common with the row before it; 0 for the
            first.
        rows_each: Rows at each place; more than one if they are to stay together, as those of a
            pair. Then `lengths` counts what is left of them once common prefixes are computed once,
            and `shared` what they surely have in common with those before.
    """

    order: np.ndarray
    lengths: np.ndarray
    shared: np.ndarray
    rows_each: int = 1

    def among(self, places: np.ndarray) -> Sorted:
        """Keep some rows. What two of them share is the least that any two between them share.

        Args:
            places: Which places to keep, each above the one before.

        >>> found = sort_by_prefix([[5, 6, 7], [9], [5, 6, 8, 8], [5, 6, 7]])
        >>> found.among(np.array([0, 2, 3])).shared.tolist()
        [0, 2, 0]
        """
        shared = np.zeros(len(places), dtype=np.int64)
        if len(places) > 1:
            shared[1:] = np.minimum.reduceat(self.shared[: places[-1] + 1], places[:-1] + 1)
        return Sorted(self.order[places], self.lengths[places], shared)


def sort_by_prefix(
    rows: Iterable[Any], *, most: int | None = None, dtype: Any = np.int64
) -> Sorted:
    """Sort rows by the bytes of their tokens; count what each has in common with the one before.

    Takes ``n log n`` comparisons, each no longer than a common prefix, and memory for the tokens.

    Args:
        rows: Token ids of each row: lists, arrays or tensors of one dimension.
        most: Tokens of each row to look at; what rows share beyond them is not counted.
        dtype: Integers to hold tokens in meanwhile.

    >>> found = sort_by_prefix([[5, 6, 7], [9], [5, 6, 8, 8], [5, 6, 7]])
    >>> found.order.tolist(), found.lengths.tolist(), found.shared.tolist()
    ([0, 3, 2, 1], [3, 3, 4, 1], [0, 3, 2, 0])
    """
    tokens: list[np.ndarray] = []
    of_rows: list[int] = []
    for row in rows:
        ids = np.asarray(row).reshape(-1)
        of_rows.append(ids.size)
        tokens.append(np.asarray(ids[:most], dtype=dtype))
    # Half the bytes sort twice as fast. Ids that 32 bits cannot hold may sort rows apart that begin
    # alike, and nothing worse: what two neighbours share is counted in the ids themselves.
    keys = [ids.astype(np.int32, copy=False).tobytes() for ids in tokens]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    neighbours = itertools.pairwise([tokens[i] for i in order])
    shared = [0] * min(len(keys), 1) + [count_common(before, here) for before, here in neighbours]
    return Sorted(
        order=np.asarray(order, dtype=np.int64),
        lengths=np.asarray([of_rows[i] for i in order], dtype=np.int64),
        shared=np.asarray(shared, dtype=np.int64),
    )


def count_common(a: np.ndarray, b: np.ndarray) -> int:
    """Count the tokens that two rows begin with alike.

    >>> count_common(np.array([5, 6, 7]), np.array([5, 6, 8, 9]))
    2
    """
    least = min(a.size, b.size)
    if least == 0 or a[0] != b[0]:
        return 0
    differs = a[:least] != b[:least]
    first = int(differs.argmax())
    return first if differs[first] else least


def count_distinct_tokens(rows: Sorted) -> int:
    """Count the tokens that are left if every common prefix is computed once.

    >>> count_distinct_tokens(sort_by_prefix([[5, 6, 7], [5, 6, 8], [9]]))
    5
    """
    return int(rows.lengths.sum() - rows.shared.sum())
