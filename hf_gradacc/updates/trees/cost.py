"""What rows cost to compute, as they are and as trees, in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_gradacc.updates.trees.flat_rows import ranges
from hf_gradacc.updates.trees.prefixes import Sorted

__all__ = [
    "BRANCH",
    "HELD",
    "MASKED_ATTENTION",
    "TreeCost",
    "cost_of_trees",
    "costs_of_trees",
    "padded_cost",
]

MASKED_ATTENTION = 2
"""What a token of a tree pays for each token of the tree, in what a token of a row pays for each
token of its row: attention under a mask computes both halves of its square."""

BRANCH = 4
"""What a row costs in a tree besides its own tokens, in tokens: it is gathered for attention."""

HELD = 1 / 8
"""What a token that a row shares still needs of memory where attention is computed row by row: its
key and value in each layer, beside the twenty or so vectors that a computed token leaves there."""


@dataclass(frozen=True)
class TreeCost:
    """What rows and trees cost to compute, in tokens of a row that attends to nothing.

    Attributes:
        attention_length: Length at which attending to what stands before costs a row as much as all
            the rest; None leaves attention out.
        by_rows: Attention over a tree is computed row by row, and trees stand in one row without
            padding; else under a mask over each tree, padded to the widest.
        masked: See `MASKED_ATTENTION`.
        keeps: A beginning may be computed once for several micro-batches, see
            `hf_gradacc.updates.trees.kept`.
    """

    attention_length: int | None = None
    by_rows: bool = False
    masked: float = MASKED_ATTENTION
    keeps: bool = False

    def row(self, width: np.ndarray | float) -> Any:
        """Cost of a row of this width, its padding included."""
        return width * (1 + width / self.attention_length) if self.attention_length else 1.0 * width

    def branch(self, own: np.ndarray | int, length: np.ndarray | int) -> Any:
        """Cost of a row's own tokens in a tree whose attention is computed row by row."""
        attends = self.masked * length / self.attention_length if self.attention_length else 0.0
        return own * (1 + attends) + BRANCH

    def tree(self, width: np.ndarray | int) -> Any:
        """Cost of a tree of this width under a mask."""
        if not self.attention_length:
            return 1.0 * width
        return width * (1 + self.masked * width / self.attention_length)

    def widest(self, shared: int, longest: int) -> int | None:
        """Width from which on a tree is cheaper as two; None for no such width.

        Two trees compute a common prefix twice. One of twice the width attends to twice as much.
        """
        if not self.attention_length:
            return None
        halves = 2 * math.sqrt(self.attention_length * max(shared, 1) / self.masked)
        return int(2 * max(halves, longest))


def cost_of_trees(trees: Sequence[tuple[int, int, int]], rows: Sorted, cost: TreeCost) -> float:
    """Return the cost of one micro-batch of trees, the widest first."""
    if not cost.by_rows:
        are_rows = all(last - first == 1 for first, last, _ in trees) and rows.rows_each == 1
        price = cost.row if are_rows else cost.tree
        return len(trees) * float(price(trees[0][2]))
    return sum(costs_of_trees(trees, rows, cost))


def costs_of_trees(
    trees: Sequence[tuple[int, int, int]], rows: Sorted, cost: TreeCost
) -> list[float]:
    """Return the cost of each tree whose attention is computed row by row."""
    if not trees:
        return []
    first, last, _ = np.array(trees, dtype=np.int64).T
    places, begins = ranges(first, last), np.cumsum(last - first) - (last - first)
    lengths = rows.lengths[places]
    costs = np.asarray(cost.branch(lengths - rows.shared[places], lengths), dtype=float)
    costs[begins] = BRANCH + cost.row(lengths[begins])  # it has nobody to share with
    of_each: list[float] = np.add.reduceat(costs, begins).tolist()
    return of_each


def padded_cost(
    lengths: Sequence[int],
    plan: Sequence[Sequence[int]],
    cost: TreeCost,
    *,
    overhead_tokens: int = 0,
    packed: bool = False,
    rows_each: int = 1,
) -> float:
    """Cost of a plan without sharing, in the unit of `SharedPlan.cost`.

    Args:
        lengths: Tokens of each sequence, of all its rows and what pads them to one width.
        plan: The sequences of each micro-batch.
        cost: What rows cost.
        overhead_tokens: As for `plan_shared_micro_batches`.
        packed: Rows are laid end to end.
        rows_each: Rows of each sequence.

    >>> padded_cost([3, 9, 4], [[1], [2, 0]], TreeCost())
    17.0
    """
    total = 0.0
    for piece in plan:
        widths = [lengths[i] for i in piece]
        if packed:
            total += sum(float(cost.row(width)) for width in widths)
        else:
            total += rows_each * len(widths) * float(cost.row(max(widths) / rows_each))
    return total + overhead_tokens * len(plan)
