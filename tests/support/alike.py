"""Rows that begin alike: prefixes within prefixes, a row twice, a row that another continues."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hf_gradacc.loss.shortcuts.tree_trial import Sharing, TreeTrial
from hf_gradacc.loss.trees import hooks as tree_hooks
from hf_gradacc.loss.trees.layout import Trees

from .zoo_rows import FIRST_PLAIN_TOKEN, IGNORE_INDEX, VOCAB_SIZE, HeadRow, rows_for

__all__ = ["NUM_ROWS", "counting_trees", "paths", "rows_alike", "training_apart"]

NUM_ROWS = 13


def paths(
    *, seed: int = 0, unit: int = 3, low: int = FIRST_PLAIN_TOKEN, high: int = VOCAB_SIZE
) -> list[list[int]]:
    """Return token ids of thirteen rows, in no order.

    Nine begin with the same ``2 * unit`` tokens, and three and four of these go on alike for
    another ``unit`` and ``2 * unit``. One row is there twice, one is the beginning of another, two
    have a beginning of their own in common, and one begins like none.

    Args:
        seed: Of the tokens.
        unit: Scales the lengths, which are between ``unit`` and ``8 * unit``.
        low: Smallest token id.
        high: Token ids are below it.
    """
    draw = random.Random(seed)

    def some(count: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(count)]

    root, left, right, other = some(2 * unit), some(unit), some(2 * unit), some(3 * unit)
    rows = [root + left + some(n) for n in (unit, 2 * unit + 1, 1)]
    rows += [root + right + some(n) for n in (2, unit + 2, 4 * unit)]
    rows += [root + right, root + some(3), list(rows[0])]
    rows += [other + some(2), other + some(unit + 1), some(unit), some(4 * unit + 1)]
    draw.shuffle(rows)
    assert len(rows) == NUM_ROWS
    return rows


def rows_alike(head: str, *, seed: int = 0, unit: int = 3) -> list[HeadRow]:
    """Return such rows with the labels that a head trains on.

    A causal LM keeps labels in the common beginnings as well, of some rows and not of others: a
    token that many rows share is a target of a few.
    """
    tokens = paths(seed=seed, unit=unit)
    rows = rows_for(head, seed=seed, lengths=[len(row) for row in tokens])
    for index, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
        if head == "mc":
            row["input_ids"] = [ids, ids[: unit + 1]]
            continue
        row["input_ids"] = ids
        if head == "causal":
            first = (0, 1, unit, 2 * unit - 1, len(ids) - 2)[index % 5]
            first = min(max(first, 0), len(ids) - 2)
            row["labels"] = [IGNORE_INDEX] * first + ids[first:]
    return rows


@contextlib.contextmanager
def training_apart() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether a forward is of training: trials of trees take gradients, too."""
    stock, running = TreeTrial.run, []

    def run(self: TreeTrial) -> Sharing:
        running.append(self)
        try:
            return stock(self)
        finally:
            running.pop()

    TreeTrial.run = run  # type: ignore[method-assign]
    try:
        yield lambda: torch.is_grad_enabled() and not running
    finally:
        TreeTrial.run = stock  # type: ignore[method-assign]


@contextlib.contextmanager
def counting_trees() -> Iterator[list[Trees]]:
    """List the trees that bodies compute in training."""
    computed: list[Trees] = []
    stock = tree_hooks.tree_masks

    with training_apart() as is_training:

        def counted(laid: Trees, *args: Any, **kwargs: Any) -> Any:
            if is_training():
                computed.append(laid)
            return stock(laid, *args, **kwargs)

        tree_hooks.tree_masks = counted
        try:
            yield computed
        finally:
            tree_hooks.tree_masks = stock
