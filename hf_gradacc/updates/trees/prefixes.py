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

from hf_gradacc.updates.trees.flat_rows import PADDING, FlatRows, ranges

__all__ = ["Sorted", "count_common", "count_distinct_tokens", "sort_by_prefix", "sort_flat_rows"]

_FEW_ROWS = 200
"""Rows that are compared one by one in less time than a round takes."""

_MOST_ROUNDS = 24
"""Where each round tells but a few rows from the others, comparing rows is faster."""

_TOKENS_AT_ONCE = 2**18


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


def sort_by_prefix(rows: Iterable[Any]) -> Sorted:
    """Sort rows by the bytes of their tokens; count what each has in common with the one before.

    Args:
        rows: Token ids of each row: lists, arrays or tensors of one dimension.

    >>> found = sort_by_prefix([[5, 6, 7], [9], [5, 6, 8, 8], [5, 6, 7]])
    >>> found.order.tolist(), found.lengths.tolist(), found.shared.tolist()
    ([0, 3, 2, 1], [3, 3, 4, 1], [0, 3, 2, 0])
    """
    return sort_flat_rows(FlatRows.of_rows(rows))


def sort_flat_rows(rows: FlatRows) -> Sorted:
    """As `sort_by_prefix`, of rows that lie end to end; what is not held of them does not count.

    All rows are one run at first. In each round, a run is parted by the token behind what all its
    rows have in common, so a common beginning is read once and not in every comparison. What few
    rows are left, or still have to be parted after many rounds, is compared row by row.
    """
    order = np.arange(len(rows.starts))
    shared = np.zeros(len(order), dtype=np.int64)
    runs = _Runs(np.zeros(1, dtype=np.int64), np.full(1, len(order)), np.zeros(1, dtype=np.int64))
    for _ in range(_MOST_ROUNDS):
        if runs.num_rows < _FEW_ROWS:
            break
        runs = _part(rows, order, shared, runs)
    for start, stop, common in zip(
        runs.starts.tolist(), runs.stops.tolist(), runs.common.tolist(), strict=True
    ):
        _sort_run(rows, order[start:stop], shared[start:stop], common)
    return Sorted(order, rows.lengths[order], shared)


@dataclass(frozen=True)
class _Runs:
    """Runs of places whose rows begin alike, not sorted yet.

    Attributes:
        starts: The first place of each ``[runs]``.
        stops: The place behind its last ``[runs]``.
        common: Tokens that its rows are known to begin with ``[runs]``.
    """

    starts: np.ndarray
    stops: np.ndarray
    common: np.ndarray

    @property
    def num_rows(self) -> int:
        return int((self.stops - self.starts).sum())


def _part(rows: FlatRows, order: np.ndarray, shared: np.ndarray, runs: _Runs) -> _Runs:
    """Part each run by the first token in which its rows differ; return what is to be parted again.

    Args:
        rows: The rows.
        order: Which row is at each place; sorted in place.
        shared: What each has in common with the one before; written in place.
        runs: Of at least two rows each.
    """
    sizes = runs.stops - runs.starts
    places = ranges(runs.starts, runs.stops)
    members = order[places]
    common = np.repeat(_common(rows, members, sizes, runs.common), sizes)
    has_more = rows.held[members] > common
    token = rows.tokens[rows.starts[members] + common].view(">u4").astype(np.int64)
    run = np.repeat(np.arange(len(sizes)), sizes)
    # Rows that end here come first, then the others by the bytes of their next token.
    key = (run << 33) | np.where(has_more, 2 * token + 1, 0)
    by_key = np.argsort(key, kind="stable")
    order[places], key = members[by_key], key[by_key]
    is_inside = np.ones(len(places), dtype=bool)
    is_inside[np.cumsum(sizes) - sizes] = False  # what is before a run, it has been told apart from
    shared[places[is_inside]] = common[is_inside]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    stops = np.append(starts[1:], len(key))
    goes_on = (stops - starts > 1) & (key[starts] & 1 > 0)
    starts, stops = starts[goes_on], stops[goes_on]
    return _Runs(places[starts], places[stops - 1] + 1, common[starts] + 1)


def _common(
    rows: FlatRows, members: np.ndarray, sizes: np.ndarray, common: np.ndarray
) -> np.ndarray:
    """Count the tokens that all rows of each run begin with.

    Args:
        rows: The rows.
        members: Those of one run after those of the other ``[members]``.
        sizes: How many are of each ``[runs]``, at least two.
        common: Tokens they are known to begin with ``[runs]``.
    """
    firsts = np.cumsum(sizes) - sizes
    shortest = np.minimum.reduceat(rows.held[members], firsts)
    found = common.copy()
    is_open, width = np.flatnonzero(found < shortest), 16
    while len(is_open):
        first, size = firsts[is_open], sizes[is_open]
        of_run = members[ranges(first, first + size)]
        at = rows.starts[of_run] + np.repeat(found[is_open], size)
        alike = _count_alike(rows.tokens, at, width)
        begins = np.cumsum(size) - size
        alike[begins] = width  # the row before is of another run
        more = np.minimum.reduceat(alike, begins)
        found[is_open] = np.minimum(found[is_open] + more, shortest[is_open])
        is_open = is_open[(more == width) & (found[is_open] < shortest[is_open])]
        width = min(2 * width, PADDING)
    return found


def _count_alike(tokens: np.ndarray, at: np.ndarray, width: int) -> np.ndarray:
    """Count the tokens from each place on, of `width`, that are those from the place before."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, width)
    alike = np.zeros(len(at), dtype=np.int64)
    step = _TOKENS_AT_ONCE // width
    for start in range(1, len(at), step):
        seen = windows[at[start - 1 : start + step]]
        differs = seen[1:] != seen[:-1]
        first = differs.argmax(1)
        first[~differs[np.arange(len(first)), first]] = width
        alike[start : start + step] = first
    return alike


def _sort_run(rows: FlatRows, order: np.ndarray, shared: np.ndarray, common: int) -> None:
    """Sort the rows of a run in place, each compared with others as a whole."""
    starts = rows.starts[order]
    spans = zip((starts + common).tolist(), (starts + rows.held[order]).tolist(), strict=True)
    ids = [rows.tokens[start:stop] for start, stop in spans]
    keys = [row.tobytes() for row in ids]
    by_key = sorted(range(len(keys)), key=keys.__getitem__)
    order[:] = order[by_key]
    pairs = itertools.pairwise([ids[i] for i in by_key])
    shared[1:] = [common + count_common(before, here) for before, here in pairs]


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
