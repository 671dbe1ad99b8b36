"""Rows of the training data as the loss sees them: text with its targets marked, and lengths.

W&B's table of samples and `hf-gradacc plan --show-rows` show the same rows by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

__all__ = [
    "BETWEEN",
    "PREVIEW_COLUMNS",
    "REJECTED",
    "Piece",
    "RowPreview",
    "first_ids",
    "mark_targets",
    "plain_numbers",
    "preview_row",
    "preview_rows",
    "sampled_lengths",
]

IGNORE_INDEX = -100
PREVIEW_COLUMNS = ["row", "text, targets in ⟦ ⟧", "input tokens", "target tokens"]
BETWEEN = " → "
"""Stands between a source and its target, and belongs to neither."""
REJECTED = "\n✗ "
"""Stands before the rejected answer of a pair."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind, as text.

    Attributes:
        text: What the tokenizer decodes them to, special tokens included.
        is_target: Whether they enter the loss.
    """

    text: str
    is_target: bool


@dataclass(frozen=True)
class RowPreview:
    """One row as the loss sees it.

    Attributes:
        pieces: Its text in order; for an encoder-decoder the source, then the target; for a
            classification the text, then the class; for a pair the prompt, the chosen answer and
            the rejected one.
        num_inputs: Input tokens.
        num_targets: Targets; None if the row's labels are of a kind not known here.
    """

    pieces: tuple[Piece, ...]
    num_inputs: int
    num_targets: int | None

    def __str__(self) -> str:
        return "".join(f"⟦{one.text}⟧" if one.is_target else one.text for one in self.pieces)


def preview_row(
    row: Any,
    *,
    tokenizer: Any = None,
    is_seq2seq: bool = False,
    label_names: Mapping[int, str] | None = None,
) -> RowPreview | None:
    """Describe one row.

    Args:
        row: `{input_ids, labels}`; labels as long as the input, a target sequence, or one label. Or
            a pair, `{prompt_ids, chosen_ids, rejected_ids}` or the latter two alone.
        tokenizer: Decodes the ids; without it the ids themselves are shown.
        is_seq2seq: Whether the labels are a sequence of their own.
        label_names: Classification: names of the classes.

    Returns:
        Its preview; None if it has no token ids.
    """
    if isinstance(row, Mapping) and "chosen_ids" in row:
        return _preview_pair(row, tokenizer)
    ids = _ids(row)
    if ids is None:
        return None
    labels = plain_numbers(row.get("labels"))
    if isinstance(labels, int | float):
        named = (label_names or {}).get(int(labels)) if isinstance(labels, int) else None
        label = f"{labels:g}" if named is None else named
        pieces = (Piece(_decode(tokenizer, ids), False), Piece(BETWEEN, False), Piece(label, True))
        return RowPreview(pieces, len(ids), 1)
    if is_seq2seq and isinstance(labels, Sequence):
        target = [int(label) for label in labels if label != IGNORE_INDEX]
        source = Piece(_decode(tokenizer, ids), False)
        pieces = (source, Piece(BETWEEN, False), Piece(_decode(tokenizer, target), True))
        return RowPreview(pieces, len(ids), len(target))
    if not isinstance(labels, Sequence) or len(labels) != len(ids):
        return RowPreview((Piece(_decode(tokenizer, ids), False),), len(ids), None)
    num_targets = sum(label != IGNORE_INDEX for label in labels[1:])
    return RowPreview(_pieces(ids, labels, tokenizer), len(ids), num_targets)


def _preview_pair(row: Mapping[str, Any], tokenizer: Any) -> RowPreview:
    prompt, chosen, rejected = (
        plain_numbers(row.get(f"{name}_ids", ())) for name in ("prompt", "chosen", "rejected")
    )
    pieces = [Piece(_decode(tokenizer, prompt), False)] if prompt else []
    pieces += [Piece(_decode(tokenizer, chosen), True), Piece(REJECTED, False)]
    pieces.append(Piece(_decode(tokenizer, rejected), True))
    return RowPreview(tuple(pieces), 2 * len(prompt) + len(chosen) + len(rejected), 1)


def first_ids(row: Mapping[str, Any]) -> list[int]:
    """The token ids that a row begins with: of a pair the prompt, or else the chosen answer."""
    names = ("input_ids", "prompt_ids", "chosen_ids")
    found = (plain_numbers(row.get(name, ())) for name in names)
    return next((ids for ids in found if ids), [])


def mark_targets(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Any = None) -> str:
    """Write a causal LM's row as text, with the parts that enter the loss between ⟦ and ⟧.

    Args:
        input_ids: Token ids ``[seq]``.
        labels: Labels ``[seq]``; position 0 predicts nothing and is never marked.
        tokenizer: Decodes the ids; without it the ids themselves are shown.

    >>> mark_targets([5, 6, 7, 8], [-100, -100, 7, 8])
    '5 6 ⟦7 8⟧'
    """
    return str(preview_row({"input_ids": list(input_ids), "labels": labels}, tokenizer=tokenizer))


def preview_rows(
    dataset: Any,
    *,
    tokenizer: Any = None,
    num_rows: int = 8,
    is_seq2seq: bool = False,
    label_names: Mapping[int, str] | None = None,
) -> list[list[Any]]:
    """Show a few rows spread evenly over a map dataset, under `PREVIEW_COLUMNS`.

    Rows whose labels are of a kind not known here are shown without marks.
    """
    table = []
    for index in _spread(dataset, num_rows):
        shown = preview_row(
            dataset[index], tokenizer=tokenizer, is_seq2seq=is_seq2seq, label_names=label_names
        )
        if shown is not None:
            table.append([index, str(shown), shown.num_inputs, shown.num_targets])
    return table


def sampled_lengths(dataset: Any, *, num_rows: int = 256) -> list[int]:
    """Measure the input tokens of at most `num_rows` rows spread evenly over a map dataset."""
    rows = (preview_row(dataset[index]) for index in _spread(dataset, num_rows))
    return [row.num_inputs for row in rows if row is not None]


def _pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> tuple[Piece, ...]:
    runs: list[tuple[bool, list[int]]] = []
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        is_target = position > 0 and label != IGNORE_INDEX
        if not runs or runs[-1][0] != is_target:
            runs.append((is_target, []))
        runs[-1][1].append(int(token))
    pieces = [Piece(_decode(tokenizer, run), is_target) for is_target, run in runs]
    if tokenizer is None:  # numbers need blanks between them
        blanks = [piece for one in pieces for piece in (Piece(" ", False), one)]
        pieces = blanks[1:]
    return tuple(pieces)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    # Some tokenizers take the blank before a full stop away, which is not what the model reads.
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


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
    ids = plain_numbers(row.get("input_ids")) if isinstance(row, Mapping) else None
    return None if not isinstance(ids, list) or not all(type(i) is int for i in ids[:1]) else ids


def plain_numbers(value: Any) -> Any:
    """Numbers as Python's own, whatever holds them: an array, a tensor, a column of Arrow."""
    for name in ("tolist", "to_pylist", "as_py"):
        if hasattr(value, name):
            return getattr(value, name)()
    return [*map(plain_numbers, value)] if isinstance(value, tuple | list) else value
