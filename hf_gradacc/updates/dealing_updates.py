"""Assign an update's rows to ranks by how they will be laid out: padded, packed or as trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hf_gradacc.updates.budget import FIRST_BUDGET
from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.dealing import deal_by_cost, deal_rows
from hf_gradacc.updates.trees.cost import TreeCost
from hf_gradacc.updates.trees.dealing import DealTerms, deal_trees
from hf_gradacc.updates.trees.prefixes import Sorted

__all__ = ["deal_update"]


def deal_update(
    collator: UpdateCollator,
    lengths: Sequence[int],
    num_ranks: int,
    sort: Callable[[], Sorted | None] | None = None,
    *,
    attention_length: int | None = None,
    tree_cost: TreeCost | None = None,
    lockstep: bool = False,
) -> list[list[int]]:
    """Assign an update's rows to ranks by what they cost in the layout they will have.

    The assignment depends on settings and rows only, never on a budget that tunes itself or shrank.
    Such a budget may differ between ranks, and then their assignments would differ.

    Args:
        collator: Plans the shares later.
        lengths: Tokens of each row; 0 for one without a target.
        num_ranks: Ranks that share the update.
        sort: Sorts the rows by their tokens, for rows that may be computed as trees.
        attention_length: See `deal_rows`.
        tree_cost: What trees cost, by the model's size alone.
        lockstep: See `deal_rows`.
    """
    if collator.pad_to_one_width or not any(lengths):
        return deal_by_cost([int(length > 0) for length in lengths], num_ranks)
    limits = collator.limits
    if collator.tunes_budget:
        limits = replace(limits, max_tokens=max(FIRST_BUDGET, 4 * max(lengths, default=0)))
    if collator.packed:
        attends = attention_length or 0
        costs = [length * (attends + length if attends else 1) for length in lengths]
        shares = deal_by_cost(costs, num_ranks)
    else:
        shares = deal_rows(
            lengths,
            num_ranks,
            limits,
            attention_length=attention_length,
            lockstep=lockstep,
        )
    shares_prefixes = collator.shares_prefixes and collator.rows_per_sequence == 1
    found = sort() if sort is not None and shares_prefixes else None
    if found is None:
        return shares
    terms = DealTerms(
        # How a model attends to trees is the same on all ranks; what a device was fitted to is not.
        replace(
            tree_cost or TreeCost(),
            by_rows=collator.tree_cost.by_rows,
            keeps=collator.tree_cost.keeps,
        ),
        limits,
        least_saving=collator.least_saving,
        packed=collator.packed,
        lockstep=lockstep,
    )
    with_target = np.asarray(lengths, dtype=np.int64)[found.order] > 0
    return deal_trees(found.among(np.flatnonzero(with_target)), num_ranks, shares, terms)
