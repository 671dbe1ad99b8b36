"""Rows of the training data as the loss sees them: text with its targets marked, and lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

__all__ = ["PREVIEW_COLUMNS", "mark_targets", "preview_rows", "row_lengths"]

IGNORE_INDEX = -100
PREVIEW_COLUMNS = ["row", "text, targets in ⟦ ⟧", "input tokens", "target tokens"]


def mark_targets(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Any = None) -> str:
    """Write a causal LM's row as text, with the parts that enter the loss between ⟦ and ⟧.

    Args:
        input_ids: Token ids ``[seq]``.
        labels: Labels ``[seq]``; position 0 predicts nothing and is never marked.
        tokenizer: Decodes the ids; without it the ids themselves are shown.

    >>> mark_targets([5, 6, 7, 8], [-100, -100, 7, 8])
    '5 6 ⟦7 8⟧'
    """
    pieces: list[tuple[bool, list[int]]] = []
    for position, (token, label) in enumerate(zip(input_ids, labels, strict=False)):
        is_target = position > 0 and label != IGNORE_INDEX
        if not pieces or pieces[-1][0] != is_target:
            pieces.append((is_target, []))
        pieces[-1][1].append(int(token))
    texts = []
    for is_target, ids in pieces:
        text = tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))
        texts.append(f"⟦{text}⟧" if is_target else text)
    return ("" if tokenizer is not None else " ").join(texts)


def preview_rows(dataset: Any, *, tokenizer: Any = None, num_rows: int = 8) -> list[list[Any]]:
    """Show a few rows spread evenly over a map dataset, under `PREVIEW_COLUMNS`.

    Rows that are not causal LM rows (labels as long as the input) are shown without marks.
    """
    table = []
    for index in _spread(dataset, num_rows):
        row = dataset[index]
        ids = _ids(row)
        if ids is None:
            continue
        labels = row.get("labels")
        aligned = hasattr(labels, "__len__") and len(labels) == len(ids)
        marked = [int(label) for label in labels] if aligned else [IGNORE_INDEX] * len(ids)
        num_targets = sum(label != IGNORE_INDEX for label in marked[1:])
        text = mark_targets(ids, marked, tokenizer)
        table.append([index, text, len(ids), num_targets if aligned else None])
    return table


def row_lengths(dataset: Any, *, num_rows: int = 256) -> list[int]:
    """Measure the input tokens of at most `num_rows` rows spread evenly over a map dataset."""
    ids = (_ids(dataset[index]) for index in _spread(dataset, num_rows))
    return [len(row) for row in ids if row is not None]


def _spread(dataset: Any, num_rows: int) -> range:
    # A stream is left alone: looking at its rows would use them up. It may have a length, or
    # methods that only raise, so asking what it has does not tell.
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return range(0)
    try:
        size = len(dataset)
    except (TypeError, NotImplementedError):
        return range(0)
    return range(0, size, max(1, -(-size // num_rows))) if size else range(0)


def _ids(row: Any) -> list[int] | None:
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    if ids is None or not hasattr(ids, "__len__"):
        return None
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    return None if ids and not isinstance(ids[0], int) else list(ids)
