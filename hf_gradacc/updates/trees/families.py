"""Families: rows that begin alike, to be drawn together so that they meet in one update.

Shuffling one by one scatters them, and what they share is computed for each anew. Families are
shuffled instead, and the rows inside each. Integers only: a family depends on the rows' tokens and
the size of an update, its place in an epoch on seed and epoch, and neither on ranks or workers.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hf_gradacc.updates.trees.flat_rows import ranges
from hf_gradacc.updates.trees.prefixes import Sorted

__all__ = ["LEAST_SHARED", "MOST_ROWS", "Families", "find_families", "most_rows_of"]

LEAST_SHARED = 1 / 8
"""Part of what rows compute if they are shuffled that drawing them together must save. An eighth
keeps the first turn of a chat, which is short, with those that follow."""

MOST_ROWS = 16
"""Rows drawn together compute 1/16 of what they have in common. More would save no more than that,
and make the rows of an update resemble each other more."""

_LOOK_AHEAD = 32
"""Families that may wait for the next update, since this one has less room than they have rows."""


def most_rows_of(rows_per_update: float) -> int:
    """Return how many rows of an update may be drawn together: a quarter, of at most `MOST_ROWS`.

    So an update has four families at least.

    >>> [most_rows_of(size) for size in (2, 8, 32, 64, 1024)]
    [2, 2, 8, 16, 16]
    """
    return max(2, min(MOST_ROWS, int(rows_per_update) // 4))


@dataclass(frozen=True)
class Families:
    """The rows of a dataset, and which of them to draw together.

    Attributes:
        rows: Indices of the dataset's rows ``[rows]``, in the order of their tokens.
        shared: Tokens that the row at each place has in common with the one before ``[rows]``.
        starts: The place at which each family begins ``[families]``; each is a run of neighbours.
            A row in none is drawn by itself.
        stops: The place behind its last row.
        most_rows: Rows to draw together. Larger families are cut, anew in every epoch.
    """

    rows: np.ndarray
    shared: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    most_rows: int

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_rows(self) -> int:
        """Rows that have a family."""
        return int((self.stops - self.starts).sum())

    @property
    def digest(self) -> int:
        """A number that families of other rows do not have; ranks compare it."""
        value = zlib.crc32(np.int64(self.most_rows).tobytes())
        for array in (self.rows, self.starts, self.stops):
            value = zlib.crc32(np.ascontiguousarray(array, dtype=np.int64).tobytes(), value)
        return value

    def draw(
        self, seed: int, epoch: int, *, size: int, weights: np.ndarray | None = None
    ) -> np.ndarray:
        """Draw the order of an epoch: families at random, and at random the rows of each.

        A family that an update has no room for waits for the next one, and those behind it that
        fit come first. Where nothing fits, it is cut by the end of the update.

        Args:
            seed: Of the run.
            epoch: Which one.
            size: An update is full when the weights of its rows reach it.
            weights: Of each row of the dataset, such as its targets; 1 by default.

        Returns:
            Indices of the dataset's rows, each once.
        """
        random = np.random.default_rng([seed, epoch])
        group_of = self._groups(random)
        rank_of = random.permutation(int(group_of.max()) + 1)[group_of]
        places = np.lexsort((random.random(len(self.rows)), rank_of))
        rows = self.rows[places]
        starts = np.flatnonzero(np.diff(rank_of[places], prepend=-1))
        if len(starts) == len(rows):
            return rows
        ends = np.arange(len(rows) + 1) if weights is None else _cumulated(weights[rows])
        order = list(_fill(starts, np.append(starts[1:], len(rows)), ends, size))
        first, last = np.asarray(order, dtype=np.int64).T
        taken: np.ndarray = rows[ranges(first, last)]
        return taken

    def _groups(self, random: np.random.Generator) -> np.ndarray:
        """Number what is drawn together in an epoch, for each place: families, or pieces of one."""
        begins = np.ones(len(self.rows), dtype=bool)
        begins[ranges(self.starts + 1, self.stops)] = False
        group_of = np.cumsum(begins) - 1
        num_groups = int(group_of[-1]) + 1
        large = self.stops - self.starts > self.most_rows
        for start, stop in np.stack((self.starts, self.stops), axis=1)[large].tolist():
            ring = np.roll(np.arange(start, stop), -int(random.integers(stop - start)))
            shared = self.shared[ring]
            shared[ring == start] = self.shared[start + 1 : stop].min()  # the ends of the ring meet
            for a, b in _pieces(shared, self.most_rows):
                group_of[ring[a:b]] = num_groups
                num_groups += 1
        return np.unique(group_of, return_inverse=True)[1] if large.any() else group_of


def find_families(found: Sorted, *, rows_per_update: float) -> Families:
    """Find families: runs of rows, as coarse as possible, whose common beginning is worth it.

    From all rows down to ever longer beginnings: rows are a family if what all of them share saves
    `LEAST_SHARED` of what they compute. A beginning that an update has several times anyway, since
    nearly all rows have it (a system prompt), saves little, and rows are told apart further on.

    Args:
        found: The rows of the dataset, sorted by their tokens.
        rows_per_update: Rows in an update, over all ranks.

    >>> rows = [[1, 7, 7, 7, 5], [1, 3, 2], [1, 7, 7, 7, 6], [1, 4, 4, 4], [2, 2]]
    >>> from hf_gradacc.updates.trees.prefixes import sort_by_prefix
    >>> families = find_families(sort_by_prefix(rows), rows_per_update=1)
    >>> [families.rows[a:b].tolist() for a, b in zip(families.starts, families.stops)]
    [[0, 2]]
    """
    n, most_rows = len(found.order), most_rows_of(rows_per_update)
    tokens_before = _cumulated(found.lengths)
    none = np.zeros(0, dtype=np.int64)
    kept = [(none, none)]
    starts, stops = np.zeros(1, dtype=np.int64), np.full(1, n, dtype=np.int64)
    # Of each run, a beginning that is longer than one looked at before: its tokens, and how many of
    # them are shared even by rows that are shuffled.
    depth = by_chance = np.zeros(1)
    while True:
        several = stops - starts > 1
        starts, stops = starts[several], stops[several]
        depth, by_chance = depth[several], by_chance[several]
        if not len(starts):
            break
        sizes = stops - starts
        inside = ranges(starts + 1, stops)
        shared = found.shared[inside]
        common = np.minimum.reduceat(shared, _cumulated(sizes - 1)[:-1])
        met = _met_by_chance(sizes * (rows_per_update / n))
        # No more can be saved where an update has as many of them as are drawn together.
        met[met >= 1 - 1 / most_rows] = 1.0
        by_chance = by_chance + (common - depth) * met
        saved = (common - by_chance) * (sizes - sizes / np.minimum(sizes, most_rows))
        computed = tokens_before[stops] - tokens_before[starts] - by_chance * sizes
        pays = (saved > 0) & (saved >= LEAST_SHARED * computed)
        kept.append((starts[pays], stops[pays]))
        goes_on = np.repeat(~pays, sizes - 1)
        cuts = inside[(shared == np.repeat(common, sizes - 1)) & goes_on]
        parents = starts
        starts = np.sort(np.concatenate((starts[~pays], cuts)))
        stops = np.sort(np.concatenate((stops[~pays], cuts)))
        parent_of = np.searchsorted(parents, starts, side="right") - 1
        depth, by_chance = common[parent_of], by_chance[parent_of]
    first, last = (np.sort(np.concatenate(ends)) for ends in zip(*kept, strict=True))
    return Families(found.order, found.shared, first, last, most_rows)


def _met_by_chance(expected: np.ndarray) -> np.ndarray:
    """Return which part of such rows finds another one in its update already if all are shuffled.

    Args:
        expected: How many of them an update has on average.
    """
    met: np.ndarray = 1 + np.expm1(-expected) / expected
    return met


def _pieces(shared: np.ndarray, most_rows: int) -> Iterator[tuple[int, int]]:
    """Cut a run into pieces of `most_rows` to half of that, each where least is shared."""
    start, stop = 0, len(shared)
    half = max(1, most_rows // 2)
    while stop - start > most_rows:
        low, high = start + half, min(start + most_rows, stop - half)
        window = shared[low : high + 1]
        cut = high - int(window[::-1].argmin())  # of several the last: fewer pieces
        yield start, cut
        start = cut
    yield start, stop


def _fill(
    starts: np.ndarray, stops: np.ndarray, ends: np.ndarray, size: int
) -> Iterator[tuple[int, int]]:
    """Put groups of rows into updates one after the other, none across an end where avoidable.

    Args:
        starts: The first row of each group.
        stops: The row behind its last.
        ends: The weights of all rows in front of each row, and of all.
        size: Weight that ends an update.

    Yields:
        The groups, each once.
    """
    # A group fits if its last row at most ends the update.
    needs = (ends[stops - 1] - ends[starts] + 1).tolist()
    groups = iter(zip(starts.tolist(), stops.tolist(), needs, strict=True))
    cumulated = ends.tolist()
    waiting: deque[tuple[int, int, int]] = deque()
    room = size
    while True:
        if room == size:  # an update begins
            still: deque[tuple[int, int, int]] = deque()
            for start, stop, need in waiting:
                if need <= room:
                    yield start, stop
                    room -= cumulated[stop] - cumulated[start]
                    room = room if room > 0 else size
                else:
                    still.append((start, stop, need))
            waiting = still
        group = next(groups, None) if len(waiting) < _LOOK_AHEAD else None
        if group is not None and room < group[2] <= size:
            waiting.append(group)
            continue
        if group is None:
            if not waiting:
                return
            group = waiting.popleft()
        start, stop, _ = group
        yield start, stop
        for row in range(start, stop):
            room -= cumulated[row + 1] - cumulated[row]
            room = room if room > 0 else size


def _cumulated(values: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(values)))
