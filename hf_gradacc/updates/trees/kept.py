"""Which beginnings to compute once for several micro-batches, and keep while these run.

A beginning that more rows have in common than fit into one micro-batch is computed again in each,
unless what later tokens see of it is kept. Then its micro-batches hold the tokens after it alone.
It takes its own room in each of them, so there may be more of them. Pure functions on integers, as
in `hf_gradacc.updates.trees.plan`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_gradacc.updates.limits import NO_LIMITS, Limits
from hf_gradacc.updates.trees.cost import BRANCH, HELD, TreeCost, cost_of_trees
from hf_gradacc.updates.trees.flat_rows import ranges
from hf_gradacc.updates.trees.plan import GrownTrees, SharedPlan, fill_bins, grow_trees, plan_trees
from hf_gradacc.updates.trees.prefixes import Sorted
from hf_gradacc.updates.trees.range_minimum import RangeMinimum

__all__ = [
    "LEAST_KEPT_SAVING",
    "MOST_KEPT",
    "KeptRun",
    "choose_kept",
    "count_kept",
    "plan_with_kept",
]

MOST_KEPT = 3 / 4
"""Part of a micro-batch's budget that a kept beginning may take."""

LEAST_KEPT_SAVING = 0.02
"""Beginnings are kept where that promises to save this part of a plan; less than that is noise."""


@dataclass(frozen=True)
class KeptRun:
    """Neighbours whose common beginning is kept.

    Attributes:
        start: Place of the first row.
        stop: Place behind the last.
        num_tokens: Tokens of the beginning. Every row has at least one more.
    """

    start: int
    stop: int
    num_tokens: int


def count_kept(beginnings: Iterable[Sequence[Any]]) -> int:
    """Count the tokens of kept beginnings: once for micro-batches in a row that have the same.

    Args:
        beginnings: The kept tokens in front of each micro-batch, in order; none for most.

    >>> count_kept([(5, 6), (5, 6), (), (7,), (5, 6)])
    5
    """
    return sum(len(beginning) for beginning, _ in itertools.groupby(beginnings))


def plan_with_kept(
    found: Sorted,
    cost: TreeCost,
    limits: Limits = NO_LIMITS,
) -> SharedPlan:
    """Cut sorted rows into micro-batches of trees, some behind a beginning that is kept.

    Args:
        found: The rows, sorted.
        cost: What trees and rows cost. Nothing is kept unless it says so.
        limits: Of each micro-batch; a kept beginning counts in each.

    Returns:
        The plan with kept beginnings if it saves `LEAST_KEPT_SAVING`, else that without.
        Micro-batches behind one beginning stand in a row.

    >>> from hf_gradacc.updates.trees.prefixes import sort_by_prefix
    >>> rows = sort_by_prefix([[*range(20), n, n] for n in range(30, 38)])
    >>> plan = plan_with_kept(rows, TreeCost(by_rows=True, keeps=True), Limits(max_sequences=4))
    >>> [(trees.kept, trees.sizes) for trees in plan.trees]
    [(20, (8,)), (20, (8,))]
    """
    trees = grow_trees(found, cost, limits)
    runs = choose_kept(found, cost, limits, trees=trees)
    if not runs:
        return plan_trees(found, cost, limits, trees=trees)
    parts = [_plan_behind(found, run, cost, limits) for run in runs]
    is_left = np.ones(len(found.order), dtype=bool)
    for run in runs:
        is_left[run.start : run.stop] = False
    rest = found.among(np.flatnonzero(is_left))
    parts.append(plan_trees(rest, cost, limits))
    kept = SharedPlan(
        [piece for part in parts for piece in part.pieces],
        [trees for part in parts for trees in part.trees],
        [of_piece for part in parts for of_piece in part.costs],
    )
    # The trees alone cost less than any plan of them, which then need not be made.
    if kept.cost < (1 - LEAST_KEPT_SAVING) * cost_of_trees(trees, found, cost):
        return kept
    plain = plan_trees(found, cost, limits, trees=trees)
    return kept if kept.cost < (1 - LEAST_KEPT_SAVING) * plain.cost else plain


def _plan_behind(found: Sorted, run: KeptRun, cost: TreeCost, limits: Limits) -> SharedPlan:
    """Cut rows behind their kept beginning; the first micro-batch pays for it."""
    kept = run.num_tokens
    inside = slice(run.start, run.stop)
    lengths, shared = found.lengths[inside], found.shared[inside].copy()
    shared[0] = kept
    behind = Sorted(found.order[inside], lengths - kept, shared - kept)
    if limits.max_tokens is not None:
        limits = replace(limits, max_tokens=limits.max_tokens - kept)
    trees = grow_trees(behind, cost, limits, held_by_each=HELD * kept)
    trees.sort(key=lambda tree: -tree[2])
    bins = fill_bins(trees, behind, limits, held_by_each=HELD * kept)
    first, last, _ = np.array([tree for inside in bins for tree in sorted(inside)]).T
    num_rows, num_trees = last - first, np.array([len(inside) for inside in bins])
    of_tree, of_bin = np.cumsum(num_rows) - num_rows, np.cumsum(num_trees) - num_trees
    places = ranges(first, last)
    shared = behind.shared[places]
    # Trees in one micro-batch are one: each has in common what all between it and the last have.
    joins = np.setdiff1d(np.arange(len(first)), of_bin)
    shared[of_tree[joins]] = RangeMinimum(behind.shared).of_each(last[joins - 1], first[joins] + 1)
    begins = of_tree[of_bin]
    shared[begins] = 0
    lengths = behind.lengths[places]
    own = lengths - shared
    prices = np.add.reduceat(cost.branch(own, lengths + kept), begins) + limits.overhead_tokens
    prices[0] += _cost_of_keeping(kept, cost, limits)
    order = behind.order[places].tolist()
    pieces = [order[a:b] for a, b in itertools.pairwise([*begins.tolist(), len(order)])]
    sizes = np.add.reduceat(own, begins).tolist()
    grown = [
        GrownTrees((tuple(range(len(piece))),), (size,), by_rows=True, kept=kept)
        for piece, size in zip(pieces, sizes, strict=True)
    ]
    return SharedPlan(pieces, grown, prices.tolist())


def _cost_of_keeping(num_tokens: int, cost: TreeCost, limits: Limits) -> float:
    """Return what a beginning costs: a row, in a forward and a backward of its own."""
    return float(cost.row(num_tokens)) + limits.overhead_tokens


def choose_kept(
    rows: Sorted,
    cost: TreeCost,
    limits: Limits = NO_LIMITS,
    *,
    trees: Sequence[tuple[int, int, int]] | None = None,
) -> list[KeptRun]:
    """Choose runs of neighbours whose common beginning pays to be kept.

    A run that does not fit into a micro-batch keeps what all its rows begin with, or is parted
    where neighbours have least in common, and each part decides for itself. The places where it may
    be parted make a tree (a Cartesian tree of what neighbours share), and its nodes are priced from
    the smallest run up, so the time grows with the number of rows.

    Args:
        rows: From `sort_by_prefix`.
        cost: What trees and rows cost.
        limits: Of each micro-batch.
        trees: What is grown of the rows without keeping anything, if that is known.

    Returns:
        The runs, in order; none that overlap.
    """
    n = len(rows.order)
    has_limit = limits.max_tokens is not None or limits.max_sequences is not None
    if not (cost.keeps and cost.by_rows and has_limit) or n < 3 or rows.rows_each > 1:
        return []
    if trees is None:
        trees = grow_trees(rows, cost, limits)
    prices = _Prices(rows, cost, limits, trees)
    # What a run costs at best, and whether it keeps its beginning for that.
    best: dict[tuple[int, int], tuple[float, int]] = {}
    parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start, stop, cuts in prices.too_large(_nodes(rows.shared)):
        inside = list(itertools.pairwise([start, *cuts, stop]))
        apart = sum(best[part][0] if part in best else prices.plain(*part) for part in inside)
        plain, num_kept = prices.plain(start, stop), 0
        least = min(plain, apart)
        kept, price = prices.kept(start, stop, int(rows.shared[cuts[0]]))
        if price < least:
            least, num_kept = price, kept
        # -1: its parts decide.
        best[start, stop] = least, num_kept or (-1 if apart < plain else 0)
        parts[start, stop] = inside
    chosen: list[KeptRun] = []
    waiting = [(0, n)]
    while waiting:
        run = waiting.pop()
        if run not in best:
            continue
        num_kept = best[run][1]
        if num_kept > 0:
            chosen.append(KeptRun(*run, num_kept))
        elif num_kept < 0:
            waiting += parts[run]
    return sorted(chosen, key=lambda run: run.start)


class _Prices:
    """What runs of neighbours cost, each in constant time."""

    def __init__(
        self,
        rows: Sorted,
        cost: TreeCost,
        limits: Limits,
        trees: Sequence[tuple[int, int, int]],
    ) -> None:
        self.rows, self.cost, self.limits = rows, cost, limits
        own = rows.lengths - rows.shared
        first = np.asarray(cost.row(rows.lengths), dtype=float) + BRANCH
        branch = np.asarray(cost.branch(own, rows.lengths), dtype=float)
        # What rows cost and hold as trees are grown today, from which runs are cut out.
        self.begins = np.zeros(len(own), dtype=bool)
        self.begins[[start for start, *_ in trees]] = True
        self.more = first - branch
        self.costs = _sums(np.where(self.begins, first, branch))
        self.branches = _sums(branch)
        self.held = _sums(own + HELD * rows.shared)
        self.held_as_trees = _sums(np.where(self.begins, rows.lengths, own + HELD * rows.shared))
        self.shortest = RangeMinimum(rows.lengths)

    def too_large(
        self, nodes: list[tuple[int, int, list[int]]]
    ) -> Iterator[tuple[int, int, list[int]]]:
        """Yield the runs that do not fit into one micro-batch; in others nothing is kept."""
        start, stop, cut = (
            np.array(which, dtype=np.int64)
            for which in zip(*((a, b, cuts[0]) for a, b, cuts in nodes), strict=True)
        )
        is_large = np.zeros(len(nodes), dtype=bool)
        if self.limits.max_sequences is not None:
            is_large |= stop - start > self.limits.max_sequences
        if self.limits.max_tokens is not None:
            shared = self.rows.shared
            held = self.held[stop] - self.held[start]
            held += (1 - HELD) * shared[start] + HELD * shared[cut]
            is_large |= held > self.limits.max_tokens
        return (nodes[i] for i in np.flatnonzero(is_large).tolist())

    def num_micro_batches(self, held: float, num_rows: int, kept: int = 0) -> float:
        """Estimate how many micro-batches rows take, part of the last one as a part."""
        by_rows = num_rows / self.limits.max_sequences if self.limits.max_sequences else 0.0
        return max(
            held / (self.limits.max_tokens - kept) if self.limits.max_tokens else 0.0, by_rows
        )

    def plain(self, start: int, stop: int) -> float:
        """Price a run without a kept beginning."""
        held = float(self.held_as_trees[stop] - self.held_as_trees[start])
        price = float(self.costs[stop] - self.costs[start])
        if not self.begins[start]:  # cut out of a tree: its first row pays for all its tokens
            price += float(self.more[start])
            held += (1 - HELD) * float(self.rows.shared[start])
        return price + self.limits.overhead_tokens * self.num_micro_batches(held, stop - start)

    def kept(self, start: int, stop: int, shared: int) -> tuple[int, float]:
        """Price a run behind its common beginning.

        Returns:
            Tokens to keep, and the price; no end of it if nothing is to be kept.
        """
        kept = min(shared, self.shortest(start, stop) - 1)
        too_long = self.limits.max_tokens is not None and kept > MOST_KEPT * self.limits.max_tokens
        if kept < 1 or too_long:  # before what is left of the budget divides anything
            return 0, math.inf
        held = float(self.held[stop] - self.held[start])
        # The first row has no neighbour here, and shares the beginning all the same.
        held += (1 - HELD) * float(self.rows.shared[start] - kept)
        count = self.num_micro_batches(held, stop - start, kept)
        if count <= 1:
            return 0, math.inf
        length = int(self.rows.lengths[start])
        own = length - int(self.rows.shared[start]), length - kept
        price = float(self.branches[stop] - self.branches[start])
        price += float(self.cost.branch(own[1], length)) - float(self.cost.branch(own[0], length))
        price += _cost_of_keeping(kept, self.cost, self.limits)
        return kept, price + self.limits.overhead_tokens * math.ceil(count)


def _sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate(([0.0], np.cumsum(values)))


def _nodes(shared: np.ndarray) -> list[tuple[int, int, list[int]]]:
    """Part the places where neighbours share least, and the parts likewise.

    Returns:
        ``(start, stop, cuts)`` of each run of two rows or more: it is parted in front of each cut.
        Runs stand behind the runs that they are made of.

    >>> _nodes(np.array([0, 2, 1, 3, 1]))
    [(0, 2, [1]), (2, 4, [3]), (0, 5, [2, 4])]
    """
    nodes: list[tuple[int, int, list[int]]] = []
    # Runs whose right end is open, what they share growing.
    open_runs: list[tuple[int, int, list[int]]] = []
    n = len(shared)
    for place, least in enumerate([*shared[1:].tolist(), -1], start=1):
        start = place - 1
        while open_runs and open_runs[-1][0] > least:
            _, start, cuts = open_runs.pop()
            nodes.append((start, place, cuts))
        if open_runs and open_runs[-1][0] == least:
            open_runs[-1][2].append(place)
        elif place < n:
            open_runs.append((least, start, [place]))
    return nodes
