"""Lay out rows that begin alike as trees: each common prefix once.

A tree is laid out depth first. Its nodes descend from those that stand before them and have not
ended, which is all the attention has to know: token ``i`` sees ``j`` if ``j <= i < end[j]``.
Positions count from the root, so that they are those of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.loss.trees.attention import Group, group_rows
from hf_gradacc.loss.trees.kept import KeptBeginning
from hf_gradacc.updates.trees.prefixes import sort_by_prefix
from hf_gradacc.updates.update import start_copy

__all__ = ["Trees", "lay_out_trees"]


@dataclass(frozen=True)
class Trees:
    """The rows of a micro-batch as trees, beside each other and padded to the widest.

    Attributes:
        rows: Token ids ``[rows, seq]`` as the model is given them.
        ids: Token ids ``[trees, width]``.
        positions: Each token's place in its row ``[trees, width]``.
        ends: Where the descendants of each token end ``[trees, width]``, in places of its tree.
        nodes: For each token of the rows ``[rows, seq]``, its place in the flattened trees. Padding
            has that of its row's first token, and whatever comes back there goes nowhere.
        num_tokens: Tokens of all trees, without what pads them.
        groups: How their attention is computed row by row, see `hf_gradacc.loss.trees.attention`;
            none if it is computed under a mask over each tree.
        places: See `group_rows`.
        behind: What stands kept in front of all rows. Trees then hold the tokens after it, and
            `nodes` counts in its tokens and theirs, laid end to end.
        whole: Lays out the rows with their beginning, in case it cannot be kept.
    """

    rows: Tensor
    ids: Tensor
    positions: Tensor
    ends: Tensor
    nodes: Tensor
    num_tokens: int
    groups: tuple[Group, ...] = ()
    places: Tensor | None = None
    behind: KeptBeginning | None = None
    whole: Callable[[], Trees] | None = None

    def to(self, device: torch.device) -> Trees:
        """Copy to a device, without waiting for it."""
        names = ("rows", "ids", "positions", "ends", "nodes")
        there: dict[str, Any] = {name: start_copy(getattr(self, name), device) for name in names}
        if self.places is not None:
            there["places"] = start_copy(self.places, device)
            there["groups"] = tuple(group.to(device) for group in self.groups)
        return replace(self, **there)


def lay_out_trees(
    ids: Tensor,
    mask: Tensor | None,
    trees: Sequence[Sequence[int]],
    *,
    by_rows: bool = False,
    behind: KeptBeginning | None = None,
) -> Trees:
    """Lay out padded rows as trees.

    Args:
        ids: Token ids ``[rows, seq]``; trees are laid out on the CPU.
        mask: 1 for tokens, 0 for padding, of that shape; None if there is no padding.
        trees: The rows of each tree; every row is in one. Rows of a tree that have nothing in
            common stand beside each other in it.
        by_rows: Attention is computed row by row. All trees then stand in one row, without padding.
        behind: What all rows begin with, if it is kept; every row has more tokens than that.

    >>> trees = lay_out_trees(torch.tensor([[5, 6, 7], [5, 6, 8]]), None, [(0, 1)])
    >>> trees.ids.tolist(), trees.positions.tolist(), trees.ends.tolist(), trees.nodes.tolist()
    ([[5, 6, 7, 8]], [[0, 1, 2, 2]], [[4, 4, 3, 4]], [[0, 1, 2], [0, 1, 3]])
    """
    ids = ids.cpu()  # a step of somebody's own may have moved the rows
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().ne(0)
    num_kept = 0 if behind is None else len(behind.tokens)
    tokens = [row[of_row][num_kept:].numpy() for row, of_row in zip(ids, real, strict=True)]
    # Nothing tells trees in one row from a tree whose rows have nothing in common.
    together = [[row for rows in trees for row in rows]] if by_rows else trees
    grown = [_grow(tokens, rows) for rows in together]
    width = max(len(tree.ids) for tree in grown)
    shape = (len(grown), width)
    # What pads a tree sees itself alone: attention to nothing is NaN.
    flat_ids = ids.new_full(shape, int(ids[0, 0]))
    positions = torch.zeros(shape, dtype=torch.int64)
    ends = torch.arange(1, width + 1).repeat(len(grown), 1)
    nodes = torch.zeros(ids.shape, dtype=torch.int64)
    for place, tree in enumerate(grown):
        size = len(tree.ids)
        flat_ids[place, :size] = torch.tensor(tree.ids, dtype=ids.dtype)
        positions[place, :size] = torch.tensor(tree.positions) + num_kept
        ends[place, :size] = torch.tensor(tree.ends)
        for row, path in tree.paths.items():
            where = torch.tensor([*range(num_kept), *(num_kept + node for node in path)])
            where += place * width
            nodes[row] = where[0] if len(where) else place * width
            nodes[row, real[row]] = where
    laid_out = Trees(ids, flat_ids, positions, ends, nodes, sum(len(tree.ids) for tree in grown))
    if not by_rows:
        return laid_out
    (tree,) = grown
    groups, places = group_rows(
        list(tree.paths.values()),
        [tree.num_own[row] for row in tree.paths],
        num_kept=num_kept,
    )
    laid_out = replace(laid_out, groups=tuple(groups), places=places)
    if behind is None:
        return laid_out
    whole = partial(lay_out_trees, ids, mask, trees, by_rows=True)
    return replace(laid_out, behind=behind, whole=whole)


@dataclass
class _Tree:
    """One tree, as lists over its nodes, and the nodes of each row."""

    ids: list[int]
    positions: list[int]
    ends: list[int]
    paths: dict[int, list[int]]
    num_own: dict[int, int]


def _grow(tokens: Sequence[Any], rows: Sequence[int]) -> _Tree:
    """Write the tokens of some rows depth first, common prefixes once."""
    found = sort_by_prefix([tokens[row] for row in rows])
    tree = _Tree([], [], [], {}, {})
    path: list[int] = []
    for place, shared in zip(found.order.tolist(), found.shared.tolist(), strict=True):
        own = tokens[rows[place]][shared:].tolist()
        here = len(tree.ids)
        for node in path[shared:]:
            tree.ends[node] = here
        path = path[:shared] + list(range(here, here + len(own)))
        tree.ids += own
        tree.positions += range(shared, shared + len(own))
        tree.ends += [0] * len(own)
        tree.paths[rows[place]], tree.num_own[rows[place]] = path, len(own)
    for node in path:
        tree.ends[node] = len(tree.ids)
    return tree
