"""What happens to rows that are too long.

Lengths and targets of prepared rows, read by columns: a million rows take a second or two.

Cut a corpus into blocks without losing a token.

Documents, each closed by EOS, are laid end to end and cut every `block_size - 1` tokens; every
block begins with the last token of the one before, as context. So each token of the corpus but
the very first is a target exactly once. The last block is as short as it comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from hf_gradacc.data.progress import with_progress
from hf_gradacc.data.reader import Encoded
from hf_gradacc.data.report import Fate
from hf_gradacc.data.section import PAIR_TASKS, Format, Task
from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = [
    "fit_length",
    "measure_lengths",
    "measure_pairs",
    "measure_targets",
    "pack_blocks",
]

TooLong = Literal["truncate", "drop", "error"]


def fit_length(
    encoded: Encoded,
    *,
    format: Format,
    max_length: int | None,
    max_target_length: int | None,
    too_long: TooLong,
) -> tuple[Encoded, Fate]:
    """Apply the length policy to one row.

    `truncate` keeps the first tokens. An answer cut so has no EOS: the model does not learn to
    stop in mid-sentence. An encoder's input keeps its closing token, which belongs to the format.
    """
    if format == "preference":
        return _fit_pair(encoded, max_length=max_length, too_long=too_long)
    input_ids, labels = encoded["input_ids"], encoded["labels"]
    if not input_ids:  # an empty document
        return encoded, Fate.NO_TARGET
    fate = Fate.KEPT
    if format != "text" and max_length is not None and len(input_ids) > max_length:
        if too_long != "truncate":
            return encoded, Fate.TOO_LONG
        fate = Fate.TRUNCATED
        if format in ("classification", "seq2seq"):
            input_ids = [*input_ids[: max_length - 1], input_ids[-1]]
        else:
            input_ids, labels = input_ids[:max_length], labels[:max_length]
    if format == "seq2seq":
        limit = max_target_length or max_length
        if limit is not None and len(labels) > limit:
            if too_long != "truncate":
                return encoded, Fate.TOO_LONG
            fate, labels = Fate.TRUNCATED, labels[:limit]
    if format not in ("classification", "seq2seq", "text") and _no_target(labels):
        return encoded, Fate.NO_TARGET
    return {"input_ids": input_ids, "labels": labels}, fate


def _fit_pair(
    encoded: Encoded, *, max_length: int | None, too_long: TooLong
) -> tuple[Encoded, Fate]:
    """Apply the length policy to both answers of a pair, each with the prompt before it."""
    prompt = encoded.get("prompt_ids", [])
    sides = {name: encoded[name] for name in ("chosen_ids", "rejected_ids")}
    if sides["chosen_ids"] == sides["rejected_ids"]:
        return encoded, Fate.NO_TARGET
    if max_length is None or len(prompt) + max(map(len, sides.values())) <= max_length:
        return encoded, Fate.KEPT
    if too_long != "truncate":
        return encoded, Fate.TOO_LONG
    room = max_length - len(prompt)
    cut = {name: ids[: max(room, 0)] for name, ids in sides.items()}
    # Answers that differ behind the cut alone are the same now.
    left = cut["chosen_ids"] != cut["rejected_ids"] and ("prompt_ids" not in encoded or room > 0)
    return {**encoded, **cut}, Fate.TRUNCATED if left else Fate.NO_TARGET


def _no_target(labels: list[int]) -> bool:
    # Nothing predicts the first token of a row, so its label is no target.
    return all(label == IGNORE_INDEX for label in labels[1:])


_ROWS_AT_ONCE = 10_000


def measure_pairs(rows: Any) -> np.ndarray | None:
    """Count the tokens of both answers of each pair, with the prompt before each.

    Args:
        rows: A `datasets.Dataset`, or a list of rows.

    Returns:
        An int64 array ``[rows, 2]``; None if the rows are no pairs.

    >>> measure_pairs([{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": []}])
    array([[3, 1]])
    """
    names = rows.column_names if hasattr(rows, "with_format") else [*rows[0]] if len(rows) else []
    if "chosen_ids" not in names:
        return None
    answers = [_count_tokens(rows, name) for name in ("chosen_ids", "rejected_ids")]
    prompt = _count_tokens(rows, "prompt_ids") if "prompt_ids" in names else 0
    return np.stack(answers, axis=1) + np.reshape(prompt, (-1, 1))


def measure_lengths(rows: Any, *, column: str = "input_ids") -> np.ndarray:
    """Count the tokens of each row; of a pair, those of both answers.

    Args:
        rows: A `datasets.Dataset`, or a list of rows.
        column: Which column holds them, if they are no pairs.

    Returns:
        An int64 array with one number for each row.
    """
    pairs = measure_pairs(rows)
    return _count_tokens(rows, column) if pairs is None else pairs.sum(axis=1)


def _count_tokens(rows: Any, column: str) -> np.ndarray:
    if not hasattr(rows, "with_format"):
        return np.asarray([len(row[column]) for row in rows], dtype=np.int64)
    found = [np.zeros(0, dtype=np.int64)]
    for values in _chunks(rows, column):
        found.append(np.diff(values.offsets.to_numpy()).astype(np.int64))
    return np.concatenate(found)


def measure_targets(rows: Any, *, task: Task) -> np.ndarray:
    """Count the targets of each row, as training counts them.

    Args:
        rows: A `datasets.Dataset`, or a list of rows.
        task: A causal LM predicts nothing at the first position; a class or a pair is one target.

    Returns:
        An int64 array with one number for each row.

    >>> measure_targets([{"labels": [5, -100, 7]}], task="causal_lm")
    array([1])
    >>> measure_targets([{"labels": [5, -100, 7]}], task="seq2seq")
    array([2])
    """
    if task == "classification" or task in PAIR_TASKS:
        return np.ones(len(rows), dtype=np.int64)
    first = 1 if task == "causal_lm" else 0
    if not hasattr(rows, "with_format"):
        counts = [sum(label != IGNORE_INDEX for label in row["labels"][first:]) for row in rows]
        return np.asarray(counts, dtype=np.int64)
    found = [np.zeros(0, dtype=np.int64)]
    for values in _chunks(rows, "labels"):
        ends = values.offsets.to_numpy()
        is_target = values.values.to_numpy(zero_copy_only=False) != IGNORE_INDEX
        if first:
            is_target = is_target.copy()
            is_target[ends[:-1][np.diff(ends) > 0]] = False
        found.append(np.diff(np.concatenate([[0], np.cumsum(is_target)])[ends]).astype(np.int64))
    return np.concatenate(found)


def _chunks(rows: Any, column: str) -> Any:
    """The column's Arrow arrays, with offsets into values that begin at 0."""
    import pyarrow as pa

    table = rows.select_columns([column]).with_format("arrow")
    batches = table.iter(batch_size=_ROWS_AT_ONCE)
    total = -(-len(rows) // _ROWS_AT_ONCE)
    for batch in with_progress(batches, what="measuring rows", total=total):
        for chunk in batch[column].chunks:
            yield pa.concat_arrays([chunk])


def pack_blocks(documents: Iterable[list[int]], *, block_size: int) -> Iterator[list[int]]:
    """Yield blocks of at most `block_size` tokens.

    >>> list(pack_blocks([[1, 2, 3], [4, 5], [6]], block_size=3))
    [[1, 2, 3], [3, 4, 5], [5, 6]]
    """
    block: list[int] = []
    for document in documents:
        start = 0
        while start < len(document):
            taken = document[start : start + block_size - len(block)]
            block += taken
            start += len(taken)
            if len(block) == block_size:
                yield block
                block = block[-1:]
    if len(block) > 1:
        yield block
