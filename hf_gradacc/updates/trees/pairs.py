"""Pairs as trees: the rows that a sequence became share what they begin with, and stay together.

The two answers of a preference have one prompt, and it is computed once. Several pairs may be one
tree where that costs less: of the same prompt, or of prompts that begin alike. Pure functions on
integers, as in `hf_gradacc.updates.trees.plan`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_gradacc.updates.limits import NO_LIMITS, Limits
from hf_gradacc.updates.trees.cost import TreeCost
from hf_gradacc.updates.trees.kept import plan_with_kept
from hf_gradacc.updates.trees.plan import (
    GrownTrees,
    SharedPlan,
    plan_trees,
    trees_of,
)
from hf_gradacc.updates.trees.prefixes import (
    Sorted,
    count_common,
    count_distinct_tokens,
    sort_by_prefix,
)

__all__ = ["halve_trees", "plan_shared_sequences", "sort_together", "trees_of_sequences"]


def sort_together(sequences: Sequence[Sequence[Any]]) -> Sorted:
    """Sort sequences of several rows each, so that those with a common prefix are neighbours.

    Args:
        sequences: Token ids of the rows of each; all have equally many.

    >>> pairs = [([1, 2, 3], [1, 2, 4, 5]), ([9], [8]), ([1, 2, 7], [1, 2, 6])]
    >>> found = sort_together(pairs)
    >>> found.order.tolist(), found.lengths.tolist(), found.shared.tolist()
    ([0, 2, 1], [5, 4, 2], [0, 2, 0])
    """
    rows = [[np.asarray(row, dtype=np.int64).reshape(-1) for row in each] for each in sequences]
    keys = [each[0].tobytes() for each in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    lengths = [count_distinct_tokens(sort_by_prefix(rows[i])) for i in order]
    shared = [0] * min(len(order), 1)
    for before, here in itertools.pairwise(order):
        # Whoever is added to a tree finds at least its longest path there.
        both = itertools.product(rows[before], rows[here])
        shared.append(max(count_common(a, b) for a, b in both))
    return Sorted(
        np.asarray(order, dtype=np.int64),
        np.asarray(lengths, dtype=np.int64),
        np.asarray(shared, dtype=np.int64),
        rows_each=max(map(len, rows), default=1),
    )


def plan_shared_sequences(
    sequences: Sequence[Sequence[Any]], cost: TreeCost, limits: Limits = NO_LIMITS
) -> SharedPlan:
    """Cut sequences of one or more rows into micro-batches of trees, each sequence in one tree.

    Args:
        sequences: Token ids of the rows of each; all have equally many.
        cost: What trees and rows cost.
        limits: Of each micro-batch.

    Returns:
        The plan, in numbers of sequences; its trees are in rows of the collated micro-batch, where
        the first rows of all sequences come first, then all second ones.

    >>> pairs = [([1, 2, 3], [1, 2, 4, 5]), ([9], [8]), ([1, 2, 7], [1, 2, 6])]
    >>> plan = plan_shared_sequences(pairs, TreeCost(), Limits(max_tokens=8))
    >>> plan.pieces, [trees.rows for trees in plan.trees], [trees.sizes for trees in plan.trees]
    ([[0, 2], [1]], [((0, 1, 2, 3),), ((0, 1),)], [(7,), (2,)])
    """
    if all(len(each) == 1 for each in sequences):
        return plan_with_kept(sort_by_prefix([each[0] for each in sequences]), cost, limits)
    plan = plan_trees(sort_together(sequences), cost, limits)
    trees = []
    for piece, grown in zip(plan.pieces, plan.trees, strict=True):
        blocks = range(len(sequences[piece[0]]))
        tokens = [sequences[i][block] for block in blocks for i in piece]
        trees.append(grown.counted(tokens))
    return replace(plan, trees=trees)


def trees_of_sequences(sequences: Sequence[Sequence[Any]], cost: TreeCost) -> GrownTrees | None:
    """Grow the trees of one micro-batch, see `trees_of`; its rows are collated in blocks."""
    blocks = range(len(sequences[0]))
    return trees_of([each[block] for block in blocks for each in sequences], cost)


def halve_trees(trees: GrownTrees, num_sequences: int) -> list[list[int]]:
    """Cut the sequences of a micro-batch in two, between trees if there are several.

    Args:
        trees: Of its collated rows, which lie in blocks.
        num_sequences: At least two.

    Returns:
        The sequences of either half, neighbours in a tree beside each other. Halves compute about
        equally many tokens.

    >>> halve_trees(GrownTrees(((0, 3), (1, 2)), (9, 5)), 4)
    [[0, 3], [1, 2]]
    >>> halve_trees(GrownTrees(((2, 0, 1),), (9,)), 3)
    [[2, 0], [1]]
    """
    order: dict[int, None] = {}
    ends = {}  # sequences in front of the end of each tree: the tokens of those trees
    tokens = 0
    for rows, size in zip(trees.rows, trees.sizes, strict=True):
        order |= dict.fromkeys(row % num_sequences for row in rows)
        tokens += size
        ends[len(order)] = tokens
    middle = (num_sequences + 1) // 2
    between = [end for end in ends if end < num_sequences]
    if between:
        middle = min(between, key=lambda end: abs(2 * ends[end] - tokens))
    return [list(order)[:middle], list(order)[middle:]]
