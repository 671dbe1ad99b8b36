"""Rows that begin alike: which of them to compute as one tree, so that no token is computed twice.

In a causal model the hidden state of a token depends on the tokens before it and on nothing else,
so rows with a common prefix have the same hidden states there. A tree of rows is computed as one
sequence: each prefix once, then each row's own tokens, which see the tokens they descend from
(Tree Training, arXiv 2511.00413; prefix sharing, arXiv 2410.20305). Pure functions on integers.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_gradacc.updates.limits import NO_LIMITS, Limits
from hf_gradacc.updates.planner import cut_sorted
from hf_gradacc.updates.trees.cost import HELD, TreeCost, cost_of_trees, costs_of_trees, padded_cost
from hf_gradacc.updates.trees.prefixes import Sorted, count_distinct_tokens, sort_by_prefix
from hf_gradacc.updates.trees.range_minimum import RangeMinimum

__all__ = [
    "GrownTrees",
    "SharedPlan",
    "fill_bins",
    "grow_trees",
    "plan_shared_micro_batches",
    "plan_trees",
    "trees_of",
]


def grow_trees(
    rows: Sorted, cost: TreeCost, limits: Limits = NO_LIMITS, *, held_by_each: float = 0.0
) -> list[tuple[int, int, int]]:
    """Decide which neighbours to compute as one tree: the cheapest cut into runs.

    A prefix that is too short to pay for the attention of a wider tree is not shared. Dynamic
    programming over the sorted rows finds the cheapest cut of all; its window is as wide as a tree
    may be, so its time grows with the number of rows.

    Args:
        rows: From `sort_by_prefix`.
        cost: What trees and rows cost.
        limits: Of a tree; what shared tokens hold counts among its tokens, see `HELD`.
        held_by_each: Tokens that each row takes of them besides.

    Returns:
        Where each tree starts and stops in the sorted rows, and its tokens.

    >>> grow_trees(sort_by_prefix([[5, 6, 7], [9], [5, 6, 8, 8]]), TreeCost())
    [(0, 2, 5), (2, 3, 1)]
    """
    n = len(rows.order)
    if n == 0:
        return []
    own = rows.lengths - rows.shared
    ends = np.concatenate(([0], np.cumsum(own)))  # tokens of all trees up to each place
    # A tree never pays that joins rows which have nothing in common.
    apart = np.flatnonzero(rows.shared == 0)
    next_apart = np.append(apart, n)[np.searchsorted(apart, np.arange(n), side="right")]
    widest = cost.widest(int(rows.shared.max()), int(rows.lengths.max()))
    if cost.by_rows:
        widest = None
        if limits.max_tokens is None and limits.max_sequences is None:
            # What a row costs in a tree depends on no other row of it.
            splits = cost.branch(own, rows.lengths) >= cost.row(rows.lengths)
            starts = np.flatnonzero(splits | (rows.shared == 0)).tolist()
            return [
                (a, b, int(ends[b] - ends[a] + rows.shared[a]))
                for a, b in itertools.pairwise([*starts, n])
            ]
    limits = limits.within(widest)
    # The first row of a tree has no neighbour to share with: it pays for all its tokens.
    befores = ends[:-1] - rows.shared
    stops = next_apart
    if limits.max_sequences is not None:
        stops = np.minimum(stops, np.arange(n) + limits.max_sequences)
    if limits.max_tokens is not None:
        held = np.cumsum(HELD * rows.shared if cost.by_rows else np.zeros(n))
        each = held_by_each * np.arange(n + 1)
        filled = ends + np.concatenate(([0.0], held)) + each
        room = befores + held + each[:-1] + limits.max_tokens
        most = np.searchsorted(filled, room, side="right")
        stops = np.minimum(stops, most - 1)
    # Rows that stay together are a tree by themselves.
    price = cost.row if cost.by_rows or rows.rows_each == 1 else cost.tree
    alone = price(rows.lengths).tolist()
    if cost.by_rows:
        added = np.concatenate(([0.0], np.cumsum(cost.branch(own, rows.lengths))))
        take = _cheapest_by_rows(alone, added.tolist(), stops.tolist())
    else:
        take = _cheapest_by_width(alone, ends, befores, stops, cost)
    trees, start = [], 0
    while start < n:
        stop = start + take[start]
        trees.append((start, stop, int(ends[stop] - befores[start])))
        start = stop
    return trees


def _cheapest_by_width(
    alone: Sequence[float],
    ends: np.ndarray,
    befores: np.ndarray,
    stops: np.ndarray,
    cost: TreeCost,
) -> list[int]:
    """Return how many rows a tree takes that begins at each place, where its width is its price."""
    best, take, last = np.zeros(len(ends)), [1] * len(alone), 0.0
    starts = range(len(alone) - 1, -1, -1)
    for start, stop, before in zip(
        starts, stops[::-1].tolist(), befores[::-1].tolist(), strict=True
    ):
        last += alone[start]
        if stop >= start + 2:
            costs = cost.tree(ends[start + 2 : stop + 1] - before)
            costs += best[start + 2 : stop + 1]
            least = int(costs.argmin())
            if costs[least] < last:
                last, take[start] = float(costs[least]), least + 2
        best[start] = last
    return take


def _cheapest_by_rows(
    alone: Sequence[float], added: Sequence[float], stops: Sequence[int]
) -> list[int]:
    """As `_cheapest_by_width`, where what a row costs in a tree depends on no other row of it.

    Then the best end of a tree is the cheapest in a window that only moves to the left, and a queue
    holds what may still be that.

    Args:
        alone: What each row costs by itself ``[rows]``.
        added: What all rows before each place cost in trees ``[rows + 1]``.
        stops: The last place at which a tree from each place on may end, never falling ``[rows]``.
    """
    n = len(alone)
    take, best, price = [1] * n, [0.0] * (n + 1), [0.0] * (n + 1)
    ends: deque[int] = deque()  # ever cheaper to the right
    for start in range(n - 1, -1, -1):
        end, stop = start + 2, stops[start]
        if end <= n:
            price[end] = added[end] + best[end]
            while ends and price[ends[0]] >= price[end]:
                ends.popleft()
            ends.appendleft(end)
        while ends and ends[-1] > stop:
            ends.pop()
        best[start] = alone[start] + best[start + 1]
        if ends:
            joined = price[ends[-1]] + (alone[start] - added[start + 1])
            if joined < best[start]:
                best[start], take[start] = joined, ends[-1] - start
    return take


@dataclass(frozen=True)
class SharedPlan:
    """Micro-batches of trees.

    Attributes:
        pieces: Rows of each micro-batch, as `plan_micro_batches` returns them; those of a tree are
            neighbours.
        trees: The trees of each micro-batch, in the same order.
        costs: What each micro-batch costs, in tokens.
    """

    pieces: list[list[int]]
    trees: list[GrownTrees]
    costs: list[float]

    @property
    def cost(self) -> float:
        """What all micro-batches cost."""
        return sum(self.costs)

    def pays(self, cost_of_rows: float, *, least_saving: float) -> bool:
        """Return whether rows share anything, and cost less by the part that this has to save."""
        shares = any(
            trees.kept or any(len(rows) > 1 for rows in trees.rows) for trees in self.trees
        )
        return shares and self.cost <= (1 - least_saving) * cost_of_rows


@dataclass(frozen=True)
class GrownTrees:
    """The trees that rows of a micro-batch make.

    Attributes:
        rows: Rows of each tree; every row is in one.
        sizes: Tokens of each tree, those that are kept not among them.
        by_rows: See `TreeCost`.
        kept: Tokens that all rows begin with, computed once for several micro-batches and kept
            while these run; 0 if there are none. Then there is one tree.
        common: Tokens that a tree has in common with one before it. By rows all trees stand in one
            row, where they are computed once, though it would not have paid to join trees for them.
    """

    rows: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    by_rows: bool = False
    kept: int = 0
    common: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all trees."""
        return sum(self.sizes) - self.common

    @property
    def num_computed(self) -> int:
        """Tokens that are computed, with what pads each tree to the widest."""
        if self.by_rows:
            return self.num_tokens
        return len(self.sizes) * max(self.sizes, default=0)

    @property
    def are_rows(self) -> bool:
        """Whether each tree is a single row, to be computed as rows are."""
        return not self.by_rows and all(len(rows) == 1 for rows in self.rows)

    def counted(self, tokens: Sequence[Any]) -> GrownTrees:
        """Count the tokens of each tree anew, by those its rows have.

        Nothing is kept if some row does not begin as the others do, or has no token after that.

        >>> GrownTrees(((0, 1), (2,)), (9, 9)).counted([[5, 6], [5, 7], [8]]).sizes
        (3, 1)
        >>> GrownTrees(((0, 1),), (9,), kept=1).counted([[5, 6], [5, 7]]).sizes
        (2,)
        """
        found = [sort_by_prefix([tokens[row] for row in rows]) for rows in self.rows]
        sizes, common = tuple(map(count_distinct_tokens, found)), 0
        if self.by_rows and len(found) > 1:
            together = sort_by_prefix([tokens[row] for rows in self.rows for row in rows])
            common = sum(sizes) - count_distinct_tokens(together)
        if not self.kept:
            return replace(self, sizes=sizes, common=common)
        (tree,) = found
        if min(*tree.lengths[:1], *tree.lengths - 1, *tree.shared[1:]) < self.kept:
            return replace(self, sizes=sizes, kept=0)
        return replace(self, sizes=(sizes[0] - self.kept,))


def plan_shared_micro_batches(
    rows: Sequence[Any],
    cost: TreeCost,
    limits: Limits = NO_LIMITS,
) -> SharedPlan:
    """Cut rows into micro-batches of trees: of like width, padded to the widest; by rows unpadded.

    Args:
        rows: Token ids of each row.
        cost: What trees and rows cost.
        limits: Of each micro-batch.

    >>> rows = [[1, 2, 3, 4], [1, 2, 3, 5], [9, 9, 9]]
    >>> plan = plan_shared_micro_batches(rows, TreeCost(), Limits(max_tokens=8))
    >>> plan.pieces, [trees.rows for trees in plan.trees], plan.trees[0].sizes
    ([[0, 1], [2]], [((0, 1),), ((0,),)], (5,))
    """
    return plan_trees(sort_by_prefix(rows), cost, limits)


def plan_trees(
    found: Sorted,
    cost: TreeCost,
    limits: Limits = NO_LIMITS,
    *,
    trees: Sequence[tuple[int, int, int]] | None = None,
) -> SharedPlan:
    """As `plan_shared_micro_batches`, of rows that are sorted already.

    Rows that stay together are one entry of a piece, and collated as blocks, see `slice_rows`.
    Trees that were grown already are not grown again.
    """
    if trees is None:
        trees = grow_trees(found, cost, limits)
    trees = sorted(trees, key=lambda tree: -tree[2])
    if not trees:
        return SharedPlan([], [], [])
    if cost.by_rows:
        bins = fill_bins(trees, found, limits)
    elif limits.max_sequences is None:
        cuts = cut_sorted([width for *_, width in trees], limits)
    else:
        cuts = _cut_counting(trees, limits.max_tokens, limits.max_sequences)
    if not cost.by_rows:
        bins = [trees[start:stop] for start, stop in cuts]
    order = found.order.tolist()
    price_of = (
        dict(zip(trees, costs_of_trees(trees, found, cost), strict=True)) if cost.by_rows else {}
    )
    plan = SharedPlan([], [], [])
    common = _common(bins, found) if cost.by_rows else [0] * len(bins)
    for inside, in_common in zip(bins, common, strict=True):
        plan.pieces.append([i for first, last, _ in inside for i in order[first:last]])
        ends = [0, *itertools.accumulate(last - first for first, last, _ in inside)]
        blocks = range(0, found.rows_each * ends[-1], ends[-1])
        rows = tuple(
            tuple(block + i for block in blocks for i in range(a, b))
            for a, b in itertools.pairwise(ends)
        )
        sizes = tuple(size for *_, size in inside)
        plan.trees.append(GrownTrees(rows, sizes, cost.by_rows, common=in_common))
        price = (
            sum(price_of[tree] for tree in inside)
            if cost.by_rows
            else cost_of_trees(inside, found, cost)
        )
        plan.costs.append(price + limits.overhead_tokens)
    return plan


def _common(bins: Sequence[Sequence[tuple[int, int, int]]], found: Sorted) -> list[int]:
    """Count the tokens that trees of each micro-batch have in common with one before, by rows."""
    in_order = [sorted(trees) for trees in bins]
    joins = [(a[1], b[0] + 1) for trees in in_order for a, b in itertools.pairwise(trees)]
    if not joins:
        return [0] * len(bins)
    # What neighbours share is the least that any two rows between them do.
    starts, stops = np.array(joins, dtype=np.int64).T
    least = RangeMinimum(found.shared).of_each(starts, stops)
    ends = np.cumsum([0, *(len(trees) - 1 for trees in bins)])
    common: list[int] = np.diff(np.concatenate(([0], np.cumsum(least)))[ends]).tolist()
    return common


def fill_bins(
    trees: Sequence[tuple[int, int, int]],
    rows: Sorted,
    limits: Limits,
    *,
    held_by_each: float = 0.0,
) -> list[list[tuple[int, int, int]]]:
    """Fill micro-batches whose trees stand end to end: each tree into the first with room.

    Args:
        trees: From `grow_trees`.
        rows: What they were grown of.
        limits: Of each micro-batch.
        held_by_each: Tokens that each row takes of it besides.

    Returns:
        The trees of each micro-batch.
    """
    first, last, computed = np.array(trees, dtype=np.int64).reshape(-1, 3).T
    shared = np.concatenate(([0], np.cumsum(rows.shared)))
    sizes = computed + HELD * (shared[last] - shared[first + 1]) + held_by_each * (last - first)
    bins: list[list[tuple[int, int, int]]] = []
    # Micro-batches are the leaves of a binary tree, as many as there may be. Each node knows the
    # most room below it, so the first leaf with enough is found in a few steps.
    leaves = 1 << max(len(trees) - 1, 0).bit_length()
    tokens = [float(limits.max_tokens or math.inf)] * (2 * leaves)
    sequences = [float(limits.max_sequences or math.inf)] * (2 * leaves)
    for tree, size, count in zip(trees, sizes.tolist(), (last - first).tolist(), strict=True):
        node = 1
        while True:
            if tokens[node] >= size and sequences[node] >= count:
                if node >= leaves:
                    break
                node *= 2
                continue
            while node & 1:  # a right half: on behind what it is a half of
                node >>= 1
            if not node:  # larger than any micro-batch may be: in one of its own
                node = leaves + len(bins)
                break
            node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(tree)
        tokens[node] -= size
        sequences[node] -= count
        while node > 1:
            node >>= 1
            most = max(tokens[2 * node], tokens[2 * node + 1])
            places = max(sequences[2 * node], sequences[2 * node + 1])
            if (most, places) == (tokens[node], sequences[node]):
                break
            tokens[node], sequences[node] = most, places
    return bins


def _cut_counting(
    trees: Sequence[tuple[int, int, int]], max_tokens: int | None, max_sequences: int
) -> list[tuple[int, int]]:
    """Cut trees sorted by width so that no micro-batch has too many rows or tokens."""
    cuts, start, rows = [], 0, 0
    for place, (first, last, _) in enumerate(trees):
        count = last - first
        wide = (place - start + 1) * trees[start][2]
        is_full = rows + count > max_sequences or (max_tokens is not None and wide > max_tokens)
        if place > start and is_full:
            cuts.append((start, place))
            start, rows = place, 0
        rows += count
    return [*cuts, (start, len(trees))]


def trees_of(rows: Sequence[Any], cost: TreeCost, limits: Limits = NO_LIMITS) -> GrownTrees | None:
    """Grow the trees of one micro-batch; None if its rows cost less as they are.

    >>> trees_of([[1, 2, 3], [9], [1, 2, 4]], TreeCost()).rows
    ((0, 2), (1,))
    """
    found = sort_by_prefix(rows)
    trees = grow_trees(found, cost, limits)
    order = found.order.tolist()
    rows_of = tuple(tuple(order[first:last]) for first, last, _ in trees)
    (common,) = _common([trees], found) if cost.by_rows else [0]
    sizes = tuple(size for *_, size in trees)
    grown = GrownTrees(rows_of, sizes, cost.by_rows, common=common)
    if all(len(inside) == 1 for inside in grown.rows):
        return None
    lengths = found.lengths.tolist()
    as_rows = padded_cost(lengths, [range(len(lengths))], cost)
    as_trees = cost_of_trees(sorted(trees, key=lambda tree: -tree[2]), found, cost)
    return grown if as_trees < as_rows else None
