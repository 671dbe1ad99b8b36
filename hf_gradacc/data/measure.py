"""Lengths and targets of prepared rows, read by columns: a million rows take a second or two."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_gradacc.data.progress import with_progress
from hf_gradacc.recipe_sections import Task
from hf_gradacc.targets import IGNORE_INDEX

__all__ = ["measure_lengths", "measure_targets"]

_ROWS_AT_ONCE = 10_000


def measure_lengths(rows: Any, *, column: str = "input_ids") -> np.ndarray:
    """Count the tokens of each row.

    Args:
        rows: A `datasets.Dataset`, or a list of rows.
        column: Which column holds them.

    Returns:
        An int64 array with one number for each row.
    """
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
        task: A causal LM predicts nothing at the first position; a class is one target.

    Returns:
        An int64 array with one number for each row.

    >>> measure_targets([{"labels": [5, -100, 7]}], task="causal_lm")
    array([1])
    >>> measure_targets([{"labels": [5, -100, 7]}], task="seq2seq")
    array([2])
    """
    if task == "classification":
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
