"""Assign rows that begin alike to ranks, by the tokens that each rank will compute.

Pure functions on integers, like `hf_gradacc.updates.dealing`. A common prefix is computed once on
each rank that holds rows with it, so rows that share are better together; and all ranks should
finish at about the same time. Sorted by their tokens, rows that share are neighbours, so a deal
hands out runs of neighbours. Several deals are planned as the ranks will plan them, that by lengths
alone among them, and the one whose slowest rank costs least is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_gradacc.updates.dealing import deal_by_cost, deal_rows
from hf_gradacc.updates.limits import NO_LIMITS, Limits
from hf_gradacc.updates.planner import cut_sorted
from hf_gradacc.updates.trees.cost import TreeCost, costs_of_trees, padded_cost
from hf_gradacc.updates.trees.kept import plan_with_kept
from hf_gradacc.updates.trees.plan import grow_trees
from hf_gradacc.updates.trees.prefixes import Sorted

__all__ = ["DealTerms", "deal_trees", "price_share"]

_Shares = list[list[int]]


@dataclass(frozen=True)
class DealTerms:
    """By what a rank's share is planned and priced: the same on all ranks.

    Attributes:
        cost: What rows and trees cost.
        limits: Of each micro-batch.
        least_saving: The part of a share's cost that trees must save to be taken.
        packed: Rows that are no trees are laid end to end.
        lockstep: Ranks wait for each other in every micro-batch, not once in an update.
    """

    cost: TreeCost
    limits: Limits = NO_LIMITS
    least_saving: float = 0.0
    packed: bool = False
    lockstep: bool = False


def deal_trees(
    found: Sorted, num_ranks: int, by_length: Sequence[Sequence[int]], terms: DealTerms
) -> list[list[int]]:
    """Deal rows that begin alike, so that the slowest rank computes as little as possible.

    A tree that is larger than a rank's fair share is split where its parts share least. Among
    deals whose slowest ranks cost the same, the one that computes less in all is taken.

    Args:
        found: The rows that have a target, sorted by their tokens; ``order`` holds their numbers.
        num_ranks: How many ranks share the update.
        by_length: A deal of all rows by their lengths alone, see `deal_rows`.
        terms: How shares are planned and priced.

    Returns:
        One list of rows per rank; every row of `by_length` in exactly one of them. By `terms` the
        slowest rank costs no more than in `by_length`.

    >>> from hf_gradacc.updates.trees.prefixes import sort_by_prefix
    >>> head = list(range(10, 30))
    >>> rows = sort_by_prefix([[*head, 1], [*head, 2], [7] * 21, [8] * 21])
    >>> deal_trees(rows, 2, [[0, 2], [1, 3]], DealTerms(TreeCost()))  # at 42 tokens, not 63
    [[2, 3], [0, 1]]
    >>> rows = sort_by_prefix([[*head, 1], [*head, 2], [*head, 3], [*head, 4]])
    >>> deal_trees(rows, 2, [[0, 3, 1], [2]], DealTerms(TreeCost()))  # at 22 tokens, not 23
    [[0, 1], [2, 3]]
    """
    trees = grow_trees(found, terms.cost, terms.limits)
    if num_ranks == 1 or len(trees) == len(found.order) or len(found.order) <= num_ranks:
        return [list(share) for share in by_length]  # nothing is shared, or a row is a rank's share
    place_of = np.full(max(map(max, filter(None, by_length))) + 1, -1)
    place_of[found.order] = np.arange(len(found.order))
    kept = [np.sort(place_of[np.asarray(share, dtype=np.int64)]) for share in by_length]
    by_length_alone = [places[places >= 0] for places in kept]
    best, least = None, (math.inf, math.inf)
    for deal in itertools.chain(_deal_runs(found, trees, num_ranks, terms), [by_length_alone]):
        cost = _cost(found, deal, terms, most=least[0])
        if cost < least or (cost == least and deal is by_length_alone):
            best, least = deal, cost
    if best is None or best is by_length_alone:
        return [list(share) for share in by_length]
    shares: _Shares = [found.order[places].tolist() for places in best]
    # What has no target costs nothing, wherever it is left out.
    rest = [row for share in by_length for row in share if place_of[row] < 0]
    for row in rest:
        min(shares, key=len).append(row)
    return shares


def price_share(found: Sorted, terms: DealTerms) -> list[float]:
    """Return what each micro-batch of a rank costs, planned as its collator will plan it.

    Args:
        found: The rank's rows.
        terms: How they are planned and priced.

    >>> from hf_gradacc.updates.trees.prefixes import sort_by_prefix
    >>> price_share(sort_by_prefix([[5, 6, 7], [9, 9], [5, 6, 8]]), DealTerms(TreeCost()))
    [4.0, 2.0]
    """
    if not len(found.order):
        return []
    shared = plan_with_kept(found, terms.cost, terms.limits)
    # Unpadded and in no micro-batch, rows cost less than in any plan.
    if shared.pays(sum(terms.cost.row(found.lengths).tolist()), least_saving=terms.least_saving):
        return shared.costs
    rows = _price_rows(found, terms)
    return shared.costs if shared.pays(sum(rows), least_saving=terms.least_saving) else rows


def _price_rows(found: Sorted, terms: DealTerms) -> list[float]:
    """Price the micro-batches of rows as they are."""
    widths = sorted(found.lengths.tolist(), reverse=True)
    limits, overhead = terms.limits, terms.limits.overhead_tokens
    if terms.packed:
        tokens = sum(widths)
        most = limits.max_tokens or tokens
        if limits.max_sequences is not None:
            most = min(most, -(-tokens * limits.max_sequences // len(widths)))
        count = max(1, -(-tokens // max(most, 1)))
        total = padded_cost(widths, [[i] for i in range(len(widths))], terms.cost)
        return [total / count + overhead] * count
    cuts = cut_sorted(widths, limits)
    return [(b - a) * float(terms.cost.row(widths[a])) + overhead for a, b in cuts]


def _cost(
    found: Sorted, deal: Sequence[np.ndarray], terms: DealTerms, *, most: float = math.inf
) -> tuple[float, float]:
    """Return what the slowest rank costs, and all together; no end of it once one exceeds `most`.

    Ranks in lockstep take at least as long as the costliest of them.
    """
    costs: list[list[float]] = []
    for places in deal:
        costs.append(sorted(price_share(found.among(places), terms), reverse=True))
        if sum(costs[-1]) > most:
            return math.inf, math.inf
    total = sum(map(sum, costs))
    if terms.lockstep:
        passes = itertools.zip_longest(*costs, fillvalue=0.0)
        return sum(map(max, passes)), total
    return max(map(sum, costs)), total


def _deal_runs(
    found: Sorted, trees: Sequence[tuple[int, int, int]], num_ranks: int, terms: DealTerms
) -> Iterator[list[np.ndarray]]:
    """Return deals of runs of neighbours, as the places of each rank.

    First one run for each rank, cut anywhere: at most ``num_ranks - 1`` prefixes are computed on a
    second rank, for the best balance. Then whole trees by their width, like rows: less is padded,
    and each prefix is on one rank. Then smaller trees.
    """
    yield _one_run_each(found, trees, num_ranks, terms.cost)
    fair = -(-sum(width for *_, width in trees) // num_ranks)
    before = 0
    for limit in (None, fair, max(1, fair // 2)):
        units = (
            trees if limit is None else grow_trees(found, terms.cost, terms.limits.within(limit))
        )
        if len(units) in (before, len(found.order)):
            continue  # the same trees again, or none: then rows were dealt by length already
        before = len(units)
        shares = _deal_units(found, units, num_ranks, terms)
        yield _leave_none_empty([_places([units[i] for i in share]) for share in shares])


def _deal_units(
    found: Sorted, trees: Sequence[tuple[int, int, int]], num_ranks: int, terms: DealTerms
) -> _Shares:
    """Deal whole trees: like rows of their width, or by their cost where none is padded."""
    cost = terms.cost
    if cost.by_rows:
        return deal_by_cost(list(map(round, costs_of_trees(trees, found, cost))), num_ranks)
    attention = cost.attention_length
    return deal_rows(
        [width for *_, width in trees],
        num_ranks,
        replace(terms.limits, max_sequences=None),
        attention_length=None if attention is None else max(1, int(attention / cost.masked)),
        lockstep=terms.lockstep,
    )


def _places(trees: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return the places of the rows of some trees."""
    runs = [np.arange(start, stop) for start, stop, _ in sorted(trees)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *runs])


def _one_run_each(
    found: Sorted, trees: Sequence[tuple[int, int, int]], num_ranks: int, cost: TreeCost
) -> list[np.ndarray]:
    """Cut the sorted rows into one run for each rank, so that the costliest costs least."""
    n = len(found.order)
    joins = np.ones(n, dtype=bool)
    joins[[start for start, *_ in trees]] = False
    tokens = found.lengths - found.shared
    if cost.by_rows:
        alone = np.asarray(cost.row(found.lengths), dtype=float)
        own = np.asarray(cost.branch(tokens, found.lengths), dtype=float)
    else:  # a token attends to its tree, so it costs as much as the tree is wide
        per_token = np.empty(n)
        for start, stop, width in trees:
            price = cost.row if stop - start == 1 else cost.tree
            per_token[start:stop] = float(price(width)) / max(width, 1)
        alone, own = found.lengths * per_token, tokens * per_token
    own = np.where(joins, own, alone)
    ends = np.concatenate(([0.0], np.cumsum(own)))
    first = alone - own  # what a row costs more that begins a run

    def cut(limit: float) -> list[int] | None:
        stops, start = [], 0
        for _ in range(num_ranks):
            room = ends[start] + limit - first[start]
            start = max(start + 1, int(np.searchsorted(ends, room, side="right")) - 1)
            stops.append(start)
            if start >= n:
                return stops
        return None

    least, most = float(ends[-1]) / num_ranks, float(ends[-1] + first.sum())
    stops = cut(most) or [n]
    for _ in range(20):
        middle = (least + most) / 2
        tried = cut(middle)
        if tried is None:
            least = middle
        else:
            most, stops = middle, tried
    stops += [n] * (num_ranks - len(stops))
    return _leave_none_empty([np.arange(a, b) for a, b in itertools.pairwise([0, *stops])])


def _leave_none_empty(deal: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Give ranks without rows the last one of whoever has most: no rank then has to idle."""
    shares = list(deal)
    for rank, places in enumerate(shares):
        if not len(places):
            giver = max(range(len(shares)), key=lambda rank: len(shares[rank]))
            shares[rank], shares[giver] = shares[giver][-1:], shares[giver][:-1]
    return shares
