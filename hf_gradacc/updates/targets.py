"""What counts as a target: the denominator of a micro-batch's mean loss.

A loss is a mean over its own targets. Which positions those are differs: a causal LM predicts
label ``t + 1`` at position ``t``, so a row's first label is never a target; an encoder-decoder or
a masked LM predicts every label it is given; a classifier has one target per sequence. Loader
workers count all of them (`TargetCounts`, plain integers); which one is right is found out by
asking the model once (`hf_gradacc.loss.asking.probe`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.updates.batch import count_rows, find_main_input, labels_of

__all__ = [
    "IGNORE_INDEX",
    "TargetCounts",
    "TargetRule",
    "can_have_target",
    "count_all_targets",
    "count_input_tokens",
    "count_row_targets",
    "count_targets",
    "has_target",
]

IGNORE_INDEX = -100
"""The label that torch's cross entropy leaves out; Hugging Face uses it everywhere."""


class TargetRule(StrEnum):
    """Which positions a loss takes its mean over."""

    NEXT_TOKEN = "next_token"
    """``labels[:, 1:] != -100``: causal language models."""
    SAME_TOKEN = "same_token"
    """``labels != -100``: encoder-decoders, masked LMs, token classification."""
    SEQUENCE = "sequence"
    """One per row that has a label: classification, question answering, multiple choice."""
    INPUT_TOKEN = "input_token"
    """Every token fed in: models that derive their targets from the input."""
    NEXT_INPUT_TOKEN = "next_input_token"
    """Every token fed in but each row's first."""


@dataclass(frozen=True)
class TargetCounts:
    """How many targets a micro-batch has under each `TargetRule`."""

    next_token: int = 0
    same_token: int = 0
    sequence: int = 0
    input_token: int = 0
    next_input_token: int = 0

    def under(self, rule: TargetRule) -> int:
        """Return the count under one rule."""
        return int(getattr(self, rule.value))


def count_targets(
    inputs: Mapping[str, Any],
    rule: TargetRule,
    *,
    main_input: str = "input_ids",
    num_sequences: int | None = None,
) -> int:
    """Count a collated micro-batch's targets under one rule.

    Args:
        inputs: What the model's forward takes.
        rule: What the loss takes its mean over.
        main_input: The feature that holds the sequence.
        num_sequences: Its sequences, if there are not as many as rows (two rows of each pair).

    >>> labels = torch.tensor([[5, 6, 7], [-100, -100, 8]])
    >>> [count_targets({"input_ids": labels, "labels": labels}, rule) for rule in TargetRule]
    [3, 4, 2, 6, 4]
    """
    return count_all_targets(
        inputs,
        num_sequences=count_rows(inputs, main_input) if num_sequences is None else num_sequences,
        num_input_tokens=count_input_tokens(inputs, main_input=main_input),
    ).under(rule)


def count_input_tokens(inputs: Mapping[str, Any], *, main_input: str = "input_ids") -> int:
    """Count the tokens a collated micro-batch feeds in, without padding as far as a mask says so.

    A main input of floats (images, audio) counts once per row if there is no mask of its shape.
    """
    main = find_main_input(inputs, main_input)
    if main is None:
        return 0
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == main.shape:
        return int(mask.ne(0).sum())
    return int(main.shape[0]) if main.is_floating_point() else main.numel()


def count_all_targets(
    inputs: Mapping[str, Any], *, num_sequences: int, num_input_tokens: int
) -> TargetCounts:
    """Count a collated micro-batch's targets under every rule.

    Args:
        inputs: What the model's forward takes; labels under ``shift_labels``, a name that
            `labels_of` finds, or ``start_positions``, if any.
        num_sequences: Rows of the micro-batch.
        num_input_tokens: Tokens fed in, without padding.
    """
    labels = labels_of(inputs)[1]
    sequences = num_sequences
    next_token = same_token = 0
    shift_labels = inputs.get("shift_labels")
    if isinstance(shift_labels, Tensor):
        next_token = same_token = int(shift_labels.ne(IGNORE_INDEX).sum())
    elif isinstance(labels, Tensor) and not labels.is_floating_point():
        if labels.ndim >= 2:
            same_token = int(labels.ne(IGNORE_INDEX).sum())
            next_token = int(labels[..., 1:].ne(IGNORE_INDEX).sum())
        elif labels.ndim == 1:
            sequences = int(labels.ne(IGNORE_INDEX).sum())
    starts = inputs.get("start_positions")
    if isinstance(starts, Tensor):
        # Transformers clamps answers outside of the (cut) text to the width and ignores them.
        width = inputs["input_ids"].shape[-1] if "input_ids" in inputs else None
        if width is not None:
            sequences = int(starts.reshape(num_sequences, -1)[:, 0].lt(width).sum())
    return TargetCounts(
        next_token=next_token,
        same_token=same_token,
        sequence=sequences,
        input_token=num_input_tokens,
        next_input_token=num_input_tokens - num_sequences,
    )


def can_have_target(row: Any, *, rule: TargetRule | None = None) -> bool:
    """Return whether a dataset row can contribute to the loss, before it is collated.

    Only rows whose own labels rule it out are answered with False; where the collator makes the
    labels, the answer is True.

    >>> can_have_target({"input_ids": [1, 2], "labels": [-100, -100]})
    False
    >>> can_have_target({"input_ids": [1, 2], "labels": [7, -100]}, rule=TargetRule.NEXT_TOKEN)
    False
    >>> can_have_target({"labels": torch.tensor([[7, 8]])}, rule=TargetRule.NEXT_TOKEN)
    True
    """
    labels = _labels_of_row(row) if isinstance(row, Mapping) else None
    if labels is None:
        return True
    if isinstance(labels, Tensor) or hasattr(labels, "tolist"):
        labels = labels.tolist()
    return _is_any_a_target(labels, start=1 if rule is TargetRule.NEXT_TOKEN else 0)


def _is_any_a_target(labels: Any, *, start: int) -> bool:
    """Look for a target in labels of any nesting; positions are counted in the innermost.

    A row may carry a leading dimension (``processor(..., return_tensors="pt")``), or be a batch
    that is ready made. Labels that are neither numbers nor lists of them are the collator's matter.
    """
    if not isinstance(labels, list | tuple):
        return bool(labels != IGNORE_INDEX)
    if labels and isinstance(labels[0], list | tuple):
        return any(_is_any_a_target(part, start=start) for part in labels)
    return any(label != IGNORE_INDEX for label in labels[start:])


def _labels_of_row(row: Mapping[str, Any]) -> Any:
    """Return the labels of a dataset row; under another name than ``labels`` one for each token."""
    if "labels" in row:
        return row["labels"]
    named = [value for key, value in row.items() if "label" in key or "target" in key]
    if len(named) != 1:
        return None
    is_array = getattr(named[0], "ndim", 0) == 1
    is_list = isinstance(named[0], list) and bool(named[0]) and isinstance(named[0][0], int)
    return named[0] if is_array or is_list else None


def has_target(inputs: Mapping[str, Any]) -> bool:
    """Return whether a collated batch can tell anything about how its loss counts."""
    labels = labels_of(inputs)[1]
    if labels is None or labels.is_floating_point():
        return True
    return bool(labels.ne(IGNORE_INDEX).any())


def count_row_targets(row: Mapping[str, Any], *, shifted: bool) -> int | None:
    """Count the targets of an uncollated row; None if it carries no labels, or other than numbers.

    Args:
        row: A dataset row; ``labels`` a list, an array or a tensor of token labels.
        shifted: True if the loss shifts labels, so that the first is never a target.
    """
    labels = _labels_of_row(row)
    if labels is None:
        return None
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return None  # boxes and classes of a detection, lists of unequal length
    if values.ndim == 0:
        return int(values.ne(IGNORE_INDEX))
    return int(values[..., 1 if shifted else 0 :].ne(IGNORE_INDEX).sum())
