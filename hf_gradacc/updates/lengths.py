"""How many tokens a dataset row will cost, before any collator has seen it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["measure_length", "sequences_of_rows", "tokens_of_rows"]

_ANSWERS = ("chosen", "rejected", "reference", "completion")
"""What TRL's collators put behind a prompt, in the order of their blocks."""


def measure_length(row: Any, *, main_input: str = "input_ids", add_labels: bool = False) -> int:
    """Measure how many tokens a dataset row will cost, 0 if that is unknown.

    Args:
        row: A dataset row.
        main_input: The feature that holds the sequence.
        add_labels: Count the labels as well, as an encoder-decoder's decoder does.

    >>> measure_length({"input_ids": [1, 2, 3]})
    3
    >>> measure_length({"input_ids": [[1, 2], [1, 2, 3]]})  # two choices, padded to the longer
    6
    >>> measure_length({"input_ids": np.ones((1, 7), dtype=int)})  # a leading dimension
    7
    >>> measure_length({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]})  # 2 × 4
    8
    """
    if isinstance(row, Mapping) and main_input not in row:
        return _measure_preference(row)
    value = row.get(main_input) if isinstance(row, Mapping) else None
    return _count(value) + (_count(row.get("labels")) if add_labels else 0)


def tokens_of_rows(rows: Sequence[Any], *, main_input: str = "input_ids") -> list[Any] | None:
    """Return the token ids of dataset rows, one sequence each; None if any has other than that.

    >>> tokens_of_rows([{"input_ids": [1, 2]}, {"input_ids": np.array([3])}])
    [[1, 2], array([3])]
    >>> tokens_of_rows([{"input_ids": [[1, 2], [3]]}])
    """
    tokens = [row.get(main_input) if isinstance(row, Mapping) else None for row in rows]
    return tokens if all(map(_is_of_tokens, tokens)) else None


def sequences_of_rows(
    rows: Sequence[Any], *, main_input: str = "input_ids", rows_per_sequence: int | None = 1
) -> list[list[Any]] | None:
    """Return the token ids of the collated rows that each dataset row becomes; None if unknown.

    Rows of preferences become one for each answer, with the prompt before it.

    Args:
        rows: Dataset rows.
        main_input: The feature that holds the sequence.
        rows_per_sequence: Collated rows of each, see `slice_rows`.

    >>> sequences_of_rows([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    [[[1, 2]], [[3]]]
    >>> pair = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    >>> sequences_of_rows([pair], rows_per_sequence=2)
    [[[1, 2], [1, 3]]]
    """
    if rows_per_sequence is None:
        return None
    tokens = tokens_of_rows(rows, main_input=main_input)
    if tokens is not None:
        return [[one] for one in tokens] if rows_per_sequence == 1 else None
    found = [_answers(row)[:rows_per_sequence] if isinstance(row, Mapping) else [] for row in rows]
    return found if all(len(each) == rows_per_sequence for each in found) else None


def _answers(row: Mapping[str, Any]) -> list[list[int]]:
    """Return the answers of a row of TRL's preference trainers, each with the prompt before it."""
    prompt, *answers = (row.get(f"{name}_ids") for name in ("prompt", *_ANSWERS))
    prompt = [] if prompt is None else prompt
    given = [answer for answer in answers if answer is not None]
    if not all(map(_is_of_tokens, (prompt, *given))):
        return []
    return [[*map(int, prompt), *map(int, answer)] for answer in given]


def _is_of_tokens(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 1 and (not value.is_floating_point() or value.numel() == 0)
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        return False
    try:  # a list, of numbers of any library; an array of numpy, of Arrow, of Python itself
        first = np.asarray(value[:1])
    except (TypeError, ValueError, LookupError):
        return False
    return first.ndim == 1 and (first.dtype.kind in "iu" or first.size == 0)


def _count(value: Any) -> int:
    """Count the tokens of one row's feature: of all its choices, or of a batch that is ready made.

    Features of floats (audio, images) count by their first dimension.
    """
    if not hasattr(value, "__len__") or isinstance(value, (str, bytes)):
        return 0
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim == 0:
            return 0
        is_float = (
            value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
        )
        return len(value) if is_float else math.prod(value.shape[:2])
    if len(value) and isinstance(value[0], (Sequence, Tensor, np.ndarray)) and np.ndim(value[0]):
        return len(value) * max(len(choice) for choice in value)
    return len(value)


def _measure_preference(row: Mapping[str, Any]) -> int:
    """Measure a row of TRL's preference trainers: its answers, each with the prompt before it."""
    parts = (row.get(f"{name}_ids") for name in ("prompt", "chosen", "rejected", "completion"))
    prompt, *answers = (0 if ids is None else len(ids) for ids in parts)
    answers = [prompt + length for length in answers if length]
    return len(answers) * max(answers, default=0)
