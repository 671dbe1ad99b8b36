"""Updates with more rows behind one beginning than a micro-batch holds, and what is kept of it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch

from hf_gradacc.loss.trees.kept import KeptBeginning

from .tiny import VOCABULARY

__all__ = ["KEEPING", "NUM_ROWS", "keeping_always", "rows_behind", "watching_kept"]

KEEPING = {"layout": "shared_prefix", "per_device_train_batch_size": 3}
NUM_ROWS = 17


def rows_behind(
    *, seed: int = 0, low: int = 3, high: int = VOCABULARY, unit: int = 1
) -> list[dict[str, Any]]:
    """Return rows behind two beginnings of ``14 * unit`` and ``11 * unit`` tokens, in no order.

    Some begin alike beyond that; one is the beginning and nothing else, one is there twice, one is
    the beginning of another, and two stand behind neither. Tokens of the beginnings are targets of
    some rows, and every row has another number of targets.
    """
    draw = random.Random(seed)

    def some(count: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(count)]

    first, second, more = some(14 * unit), some(11 * unit), some(4)
    rows = [first + some(n) for n in (1, 2, 3, 5, 7)] + [first + more + some(n) for n in (1, 4)]
    rows += [first, first + more, list(rows[2])]
    rows += [second + some(n) for n in (1, 3, 4, 6, 9)] + [some(5), some(8)]
    assert len(rows) == NUM_ROWS
    draw.shuffle(rows)
    firsts = [(0, 1, 3, 10, len(ids) - 2)[n % 5] for n, ids in enumerate(rows)]
    return [
        {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [-100] * min(first, len(ids) - 2) + ids[min(first, len(ids) - 2) :],
        }
        for first, ids in zip(firsts, rows, strict=True)
    ]


@contextlib.contextmanager
def keeping_always() -> Iterator[None]:
    """Let one more micro-batch cost nothing, so that short beginnings are worth keeping."""
    from hf_gradacc.updates import collator

    before, collator.OVERHEAD_ON_CPU = collator.OVERHEAD_ON_CPU, 0
    try:
        yield
    finally:
        collator.OVERHEAD_ON_CPU = before


@contextlib.contextmanager
def watching_kept() -> Iterator[list[int]]:
    """List the tokens of each beginning whose gradient was sent back."""
    closed: list[int] = []
    stock = KeptBeginning.close

    def close(self: KeptBeginning) -> None:
        if self._bodies and torch.is_grad_enabled():
            closed.append(len(self.tokens))
        stock(self)

    KeptBeginning.close = close  # type: ignore[method-assign]
    try:
        yield closed
    finally:
        KeptBeginning.close = stock  # type: ignore[method-assign]
