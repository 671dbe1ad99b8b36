"""Assign an update's sequences to ranks, so that all ranks finish at about the same time.

Pure functions on integers. Every rank computes the same assignment, without communication. Which
rank trains a sequence never changes the gradient, so each goes where it costs least. A rank's cost
is that of the micro-batches it will run, padding included, and the update takes as long as its
slowest rank.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from hf_gradacc.updates.limits import NO_LIMITS, Limits
from hf_gradacc.updates.planner import cut_sorted

__all__ = ["deal_at_random", "deal_by_cost", "deal_rows", "measures_noise"]

_Shares = list[list[int]]
_Found = TypeVar("_Found")


def deal_by_cost(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal sequences that cost the same wherever they run, so that ranks cost about the same.

    Longest processing time first (Graham 1969): the costliest sequence goes to the rank with the
    least so far. The heaviest rank stays within 4/3 of the best deal there is.

    Args:
        costs: Cost of each sequence, in any unit.
        num_ranks: How many ranks share the update.

    Returns:
        One list of indices per rank; every index in exactly one of them. A rank's list is empty
        only if there are fewer sequences than ranks.

    >>> deal_by_cost([8, 1, 1, 6], 2)
    [[0], [3, 1, 2]]
    """
    shares: _Shares = [[] for _ in range(num_ranks)]
    ranks = [(0, 0, rank) for rank in range(num_ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, count, rank = ranks[0]
        shares[rank].append(i)
        heapq.heapreplace(ranks, (load + costs[i], count + 1, rank))
    return shares


def deal_rows(
    lengths: Sequence[int],
    num_ranks: int,
    limits: Limits = NO_LIMITS,
    *,
    attention_length: int | None = None,
    lockstep: bool = False,
) -> list[list[int]]:
    """Deal sequences that are padded to the longest of their micro-batch.

    Dealt one by one, neighbours in length end up on different ranks and each is padded to some
    longer one. So runs of neighbours are dealt, in several ways: as few or as many runs as there
    are micro-batches, each of like cost; and runs as long as a rank has room for, the last ones
    filling what room is left. Every rank's share is then planned, and the deal whose slowest rank
    costs least is taken, among them the one by one.

    Args:
        lengths: Tokens of each sequence.
        num_ranks: How many ranks share the update.
        limits: Of each micro-batch.
        attention_length: Length at which attending costs a sequence as much as all the rest; six
            times the width of a transformer. None leaves attention out.
        lockstep: Ranks wait for each other in every micro-batch, not once in an update.

    Returns:
        One list of indices per rank; every index in exactly one of them. A rank's list is empty
        only if there are fewer sequences than ranks.

    >>> deal_rows([9, 9, 3, 3, 3, 3, 3, 3], 2, Limits(max_sequences=8, overhead_tokens=1))
    [[0, 1], [2, 3, 4, 5, 6, 7]]
    >>> deal_by_cost([9, 9, 3, 3, 3, 3, 3, 3], 2)
    [[0, 2, 4, 6], [1, 3, 5, 7]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    widths = [lengths[i] for i in order]
    price = _Price(limits, attention_length)
    one_by_one = deal_by_cost([price.row(width) for width in widths], num_ranks)
    if num_ranks == 1 or len(widths) <= num_ranks:
        return [[order[i] for i in share] for share in one_by_one]
    num_alone = _count_alone(widths, num_ranks, price)
    alone = [[i] for i in range(num_alone)]
    deals = [one_by_one]
    for shares in _deal_runs(widths[num_alone:], num_ranks - num_alone, price):
        rest = [[i + num_alone for i in share] for share in shares]
        deals.append(_leave_none_empty([*alone, *rest]))

    def cost(shares: _Shares) -> tuple[int, int]:
        plans = [price.plan([widths[i] for i in sorted(share)]) for share in shares]
        total = sum(map(sum, plans))
        if lockstep:
            passes = itertools.zip_longest(*plans, fillvalue=0)
            return sum(map(max, passes)), total
        return max(map(sum, plans)), total

    return [[order[i] for i in share] for share in min(deals, key=cost)]


@dataclass(frozen=True)
class _Price:
    """What rows and micro-batches cost, as integers, and how many rows go into one."""

    limits: Limits
    attention_length: int | None

    def row(self, width: int) -> int:
        return width * (self.attention_length + width) if self.attention_length else width

    @property
    def overhead(self) -> int:
        return self.limits.overhead_tokens * (self.attention_length or 1)

    def most_rows(self, width: int) -> int:
        """Return how many rows a micro-batch holds whose longest has this width."""
        most = [limit for limit in (self.limits.max_sequences, sys.maxsize) if limit]
        if self.limits.max_tokens is not None:
            most.append(max(1, self.limits.max_tokens // max(width, 1)))
        return min(most)

    def plan(self, widths: Sequence[int]) -> list[int]:
        """Return the cost of each micro-batch the planner makes of one share, costliest first."""
        if not widths:
            return []
        cuts = cut_sorted(widths, self.limits)
        costs = [(stop - start) * self.row(widths[start]) + self.overhead for start, stop in cuts]
        return sorted(costs, reverse=True)


def _deal_runs(widths: Sequence[int], num_ranks: int, price: _Price) -> Iterator[_Shares]:
    """Return deals of runs of neighbours; see `deal_rows`."""
    least = price.row(widths[0]) + price.overhead
    most = len(widths) * least
    mean = sum(map(price.row, widths)) // num_ranks
    fill = partial(_fill_ranks, widths, num_ranks, price)
    filled = _find_least(fill, least=max(least, mean), most=most)
    if filled is not None:
        yield filled
    fewest = -(-len(price.plan(widths)) // num_ranks)
    for per_rank in range(max(1, fewest - 1), fewest + 3):
        cut = partial(_cut_runs, widths, per_rank * num_ranks, price)
        runs = _find_least(cut, least=least, most=most)
        if runs is not None:
            costs = [(b - a) * price.row(widths[a]) + price.overhead for a, b in runs]
            shares = deal_by_cost(costs, num_ranks)
            yield [[i for run in share for i in range(*runs[run])] for share in shares]


def _find_least(attempt: Callable[[int], _Found | None], *, least: int, most: int) -> _Found | None:
    """Return the result of `attempt` for the smallest limit it succeeds with, to a thousandth."""
    found = attempt(most)
    if found is None:
        return None
    while most - least > least >> 10:
        middle = (least + most) // 2
        tried = attempt(middle)
        if tried is None:
            least = middle + 1
        else:
            most, found = middle, tried
    return found


def _cut_runs(
    widths: Sequence[int], count: int, price: _Price, limit: int
) -> list[tuple[int, int]] | None:
    """Cut sorted rows into at most `count` micro-batches, none of which costs more than a limit."""
    runs: list[tuple[int, int]] = []
    start = 0
    while start < len(widths):
        fit = (limit - price.overhead) // max(price.row(widths[start]), 1)
        if len(runs) == count or fit < 1:
            return None
        stop = min(start + min(fit, price.most_rows(widths[start])), len(widths))
        runs.append((start, stop))
        start = stop
    return runs


def _fill_ranks(widths: Sequence[int], num_ranks: int, price: _Price, limit: int) -> _Shares | None:
    """Give each rank the next rows until the limit is reached, again and again until none fits.

    The first round hands out almost everything, in one long run each. What follows is short and
    fits into the room that was less than the row next in length.
    """
    shares: _Shares = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    start = -1
    done = 0
    while done < len(widths) and start < done:
        start = done
        for rank in sorted(range(num_ranks), key=lambda rank: (loads[rank], rank)):
            while done < len(widths):
                cost = max(price.row(widths[done]), 1)
                fit = (limit - loads[rank] - price.overhead) // cost
                if fit < 1:
                    break
                stop = min(done + min(fit, price.most_rows(widths[done])), len(widths))
                shares[rank] += range(done, stop)
                loads[rank] += price.overhead + (stop - done) * cost
                done = stop
    return shares if done == len(widths) else None


def _count_alone(widths: Sequence[int], num_ranks: int, price: _Price) -> int:
    """Count the rows so long that each takes a rank more time than the others need for the rest."""
    rest = sum(map(price.row, widths))
    for i in range(num_ranks - 1):
        cost = price.row(widths[i])
        if cost * (num_ranks - i) < rest:
            return i
        rest -= cost
    return num_ranks - 1


def _leave_none_empty(shares: _Shares) -> _Shares:
    """Give ranks without rows the shortest one of whoever has most: no rank then has to idle."""
    shares = [sorted(share) for share in shares]
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return shares


def deal_at_random(num_sequences: int, num_ranks: int, *, seed: Sequence[int]) -> list[list[int]]:
    """Deal sequences to ranks in random order, the same one on every rank.

    For an update whose noise is measured: dealt by cost, what a rank holds is no random sample of
    the update, and neither are micro-batches cut of it.

    Args:
        num_sequences: Sequences of the update.
        num_ranks: How many ranks share it.
        seed: What the order is a function of, non-negative integers.

    Returns:
        One list of indices per rank, each in the order to cut it in; every index in exactly one.

    >>> sorted(map(len, deal_at_random(7, 2, seed=(0, 1))))
    [3, 4]
    """
    order: list[int] = np.random.default_rng(list(seed)).permutation(num_sequences).tolist()
    return [order[rank::num_ranks] for rank in range(num_ranks)]


def measures_noise(update: int, *, every: int | None) -> bool:
    """Return whether an update of an epoch is one whose noise is measured.

    >>> [update for update in range(6) if measures_noise(update, every=2)]
    [0, 2, 4]
    """
    return bool(every) and update % (every or 1) == 0
