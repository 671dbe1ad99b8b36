"""The inputs a loss is asked with, and whether its answers add up. No model here.

Let ``T`` be the loss of rows together and ``L_i`` that of row ``i`` with its ``n_i`` targets. A
loss is a mean over its targets if ``T = sum(n_i * L_i) / sum(n_i)``, and a sum if
``T = sum(L_i)``. The same holds for gradients. There are three ways to get ``L_i``:

* **alone**: the row by itself, without padding. Shows whether padding matters, too.
* **copies**: as many copies of the row as there are rows. The forward has the shape that the rows
  together have, so it is rounded alike and draws the same random numbers.
* **masks**: the rows together, with the labels of all others masked. The forward is the same bit
  for bit, and only the loss's own mean can differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.loss.asking.answers import Answer
from hf_gradacc.loss.facts import Weighing, differ
from hf_gradacc.updates.batch import labels_of, pad_columns
from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = [
    "first_label_alone",
    "has_token_labels",
    "misfit",
    "most_columns",
    "rotate",
    "split_targets",
    "vary_padding",
    "vary_targets",
]

_SHORT = 3
"""Tokens of a row cut short: a convolution or a window then reaches into the padding."""

_MARGINS = (3, 1)
"""Columns of padding beside the longest row, as far as the model can take them."""

_PLAIN = {"input_ids", "attention_mask", "labels", "token_type_ids"}


def misfit(
    together: Answer, parts: Sequence[Answer], counts: Sequence[float], weighing: Weighing
) -> tuple[float, float]:
    """Measure how far the answers of parts are from adding up to that of all.

    Args:
        together: Of all rows.
        parts: Of each part; those without a target may be NaN.
        counts: Targets of each part, or what they weigh.
        weighing: ``mean`` or ``sum``.

    Returns:
        The relative error of the loss, and of its gradient: 0 if there is none.

    >>> misfit(Answer(2.0), [Answer(1.0), Answer(3.0)], [2, 2], "mean")
    (0.0, 0.0)
    >>> misfit(Answer(3.5), [Answer(1.0), Answer(2.5)], [1, 2], "sum")
    (0.0, 0.0)
    """
    if weighing == "mean":
        total = sum(counts)
        pairs = [(n / total, part) for n, part in zip(counts, parts, strict=True) if n]
    else:  # a row without a target may have a loss, as an empty transcript has
        pairs = [
            (1.0, part)
            for n, part in zip(counts, parts, strict=True)
            if n or math.isfinite(part.loss)
        ]
    loss_error = differ(together.loss, sum(weight * part.loss for weight, part in pairs))
    gradients = [part.gradient for _, part in pairs]
    if together.gradient is None or any(gradient is None for gradient in gradients):
        return loss_error, 0.0
    expected = sum(weight * part.gradient for weight, part in pairs if part.gradient is not None)
    size = float(together.gradient.norm())
    if not math.isfinite(size):
        return loss_error, 0.0
    error = float((together.gradient - expected).norm())
    return loss_error, error / size if size else (0.0 if error == 0 else math.inf)


def has_token_labels(inputs: Mapping[str, Any]) -> bool:
    """Return whether labels are classes ``[rows, seq]`` that may be masked one by one."""
    labels = labels_of(inputs)[1]
    return (
        labels is not None
        and labels.ndim == 2
        and not labels.is_floating_point()
        and "shift_labels" not in inputs
    )


def split_targets(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mask all labels but those of one row; if only one row has any, its last one and the others.

    >>> parts = split_targets({"labels": torch.tensor([[-100, 5, 6, 7]])})
    >>> [part["labels"].tolist() for part in parts]
    [[[-100, 5, 6, -100]], [[-100, -100, -100, 7]]]
    """
    name, labels = labels_of(inputs)
    assert labels is not None
    is_target = labels.ne(IGNORE_INDEX)
    index = torch.arange(len(labels), device=labels.device).unsqueeze(1)
    rows = [is_target & (index == i) for i in range(len(labels))]
    if int(is_target.any(1).sum()) == 1:
        last = torch.zeros_like(is_target)
        row, column = is_target.nonzero()[-1].tolist()
        last[row, column] = True
        rows = [is_target & ~last, last]
    return [{**inputs, name: labels.masked_fill(~kept, IGNORE_INDEX)} for kept in rows]


def first_label_alone(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the inputs with no label at all, and with each row's first alone; None without any.

    A loss that shifts finds nothing in either.
    """
    name, labels = labels_of(inputs)
    if labels is None or not has_token_labels(inputs):
        return None
    valid = labels[labels.ne(IGNORE_INDEX)]
    if len(valid) == 0:
        return None
    none = torch.full_like(labels, IGNORE_INDEX)
    first = none.clone()
    first[..., 0] = valid[0]
    return {**inputs, name: none}, {**inputs, name: first}


def rotate(indices: Sequence[int]) -> list[list[int]]:
    """Return every rotation of some rows: each stands in each place once.

    What a place is given, such as a random number, then reaches every row, as it does in copies.

    >>> rotate([0, 1, 2])
    [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    """
    return [[*indices[k:], *indices[:k]] for k in range(len(indices))]


def vary_padding(
    inputs: Mapping[str, Any],
    *,
    pad_token_id: int,
    max_width: int | None = None,
    longest: int | None = None,
) -> dict[str, Any]:
    """Cut the first row to a few tokens and widen all, if these are plain rows padded on the right.

    Beside a very short row much is padding, and what leaks out of it shows. The longest row is
    padded, too, so rows without any padding ask by the way whether padding matters.

    Args:
        inputs: Collated rows; others than those are left as they are.
        pad_token_id: To fill rows with.
        max_width: Most columns the model can take, None if there is no limit.
        longest: Cut each row to so many tokens, around its first target; None to cut none.

    >>> ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    >>> vary_padding(batch, pad_token_id=0)["labels"].tolist()
    [[5, 6, 7, -100, -100, -100, -100], [9, 10, 11, 12, -100, -100, -100]]
    >>> vary_padding(batch, pad_token_id=0, longest=2)["labels"].tolist()
    [[5, 6, -100, -100, -100], [9, 10, -100, -100, -100]]
    """
    if not _is_padded_right(inputs):
        return dict(inputs)
    mask = inputs["attention_mask"]
    lengths = mask.sum(1).tolist()
    cut = [min(length, longest or length) for length in lengths]
    cut[0] = min(_SHORT, cut[0])
    parts = []
    for i, (length, kept) in enumerate(zip(lengths, cut, strict=True)):
        start = 0 if i == 0 else _start_of_window(inputs, i, length, kept)
        parts.append(
            {
                key: value[i : i + 1, start : start + kept]
                if isinstance(value, Tensor) and value.shape == mask.shape
                else value
                for key, value in inputs.items()
            }
        )
    width = mask.shape[1] if longest is None else max(cut)
    if width == max(cut):
        width += next((n for n in _MARGINS if width + n <= most_columns(max_width)), 0)
    parts = [pad_columns(part, width, pad_token_id=pad_token_id) for part in parts]
    return {
        key: torch.cat([part[key] for part in parts])
        if isinstance(value, Tensor) and value.shape == mask.shape
        else value
        for key, value in inputs.items()
    }


def most_columns(max_width: int | None) -> float:
    """Return how wide rows may be asked with.

    A column beyond the learned positions breaks a GPU's whole process, so there is a margin:
    RoBERTa's positions begin at 2.

    Args:
        max_width: Positions the model has learned, None if there is no limit.
    """
    return math.inf if max_width is None else max_width - 8


def _is_padded_right(inputs: Mapping[str, Any]) -> bool:
    """Return whether these are two or more rows of text alone, padded on the right."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    return (
        set(inputs) <= _PLAIN
        and isinstance(ids, Tensor)
        and isinstance(mask, Tensor)
        and ids.ndim == 2
        and ids.shape == mask.shape
        and len(ids) > 1
        and bool(mask[:, :1].eq(1).all())
        and bool(mask[0, :_SHORT].all())
        and bool(mask[1:].sum(1).max() > _SHORT)
        and bool((mask[:, 1:] <= mask[:, :-1]).all())
    )


def _start_of_window(inputs: Mapping[str, Any], row: int, length: int, kept: int) -> int:
    """Return where a window of a row begins, so that it holds half a window of targets."""
    labels = inputs.get("labels")
    if kept == length or not isinstance(labels, Tensor):
        return 0
    if labels.shape != inputs["input_ids"].shape:
        return 0
    targets = labels[row, 1:].ne(IGNORE_INDEX).nonzero()
    first = int(targets[0]) if len(targets) else 0
    return max(0, min(first - kept // 2, length - kept))


def vary_targets(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make rows differ in their number of targets, and only one keep its first label.

    If all rows have equally many targets, a mean over tokens equals a mean over rows; if all or
    none has its first label, a loss that shifts its labels looks like one that does not; if every
    token is a target, a loss over labels looks like one over its input.

    Args:
        inputs: Collated rows; labels other than `has_token_labels` are left as they are.

    >>> labels = torch.tensor([[-100, 5, 6, 7], [-100, 8, 9, 4]])
    >>> varied = vary_targets({"input_ids": labels.clamp(min=1), "labels": labels})
    >>> varied["labels"].tolist()
    [[-100, 5, -100, -100], [5, 8, 9, 4]]
    """
    name, labels = labels_of(inputs)
    if labels is None or not has_token_labels(inputs) or len(labels) < 2:
        return dict(inputs)
    known = labels[labels.ne(IGNORE_INDEX)]
    if len(known) == 0:
        return dict(inputs)
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    free, is_per_token = labels.ne(IGNORE_INDEX), False
    if isinstance(ids, Tensor) and ids.shape == labels.shape:
        is_per_token = True
        free = torch.ones_like(free)
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            free = mask.ne(0)
    places = [row.nonzero().squeeze(-1).tolist() for row in free[:, 1:]]
    room = [len(row) for row in places]
    counts = labels[:, 1:].ne(IGNORE_INDEX).sum(1).tolist()
    # Any label that some row has is one the loss can take, be it a token or a class.
    filled = torch.where(labels.ne(IGNORE_INDEX), labels, known[0])
    varied = labels.clone()
    if len(set(counts)) < len(counts) or 0 in counts or (is_per_token and counts == room):
        counts = _unequal_counts(room, all_may_be_full=not is_per_token)
        varied[:] = IGNORE_INDEX
        for i, count in enumerate(counts):
            kept = torch.tensor(places[i][:count], dtype=torch.int64, device=labels.device) + 1
            varied[i, kept] = filled[i, kept]
    most = counts.index(max(counts))
    # A row that has no other target keeps its first label, too.
    keeps_first = torch.tensor([i == most or not n for i, n in enumerate(counts)])
    keeps_first = keeps_first.to(labels.device) & free[:, 0]
    varied[:, 0] = filled[:, 0].where(keeps_first, IGNORE_INDEX)
    return {**inputs, name: varied}


def _unequal_counts(room: Sequence[int], *, all_may_be_full: bool) -> list[int]:
    """Spread numbers of targets over rows that have room for so many, as unequal as they can be.

    >>> _unequal_counts([3, 3, 3], all_may_be_full=True)
    [1, 2, 3]
    >>> _unequal_counts([2, 3, 5], all_may_be_full=False)
    [1, 2, 5]
    """
    counts, before = [0] * len(room), 0
    for place, i in enumerate(sorted(range(len(room)), key=lambda i: room[i])):
        share = room[i] * place // (len(room) - 1)
        before = counts[i] = min(max(before + 1, share), room[i])
    if not all_may_be_full and counts == list(room):
        for i in sorted(range(len(room)), key=lambda i: -counts[i]):
            fewer = [n - (j == i) for j, n in enumerate(counts)]
            if min(fewer) > 0 and len(set(fewer)) == len(set(counts)):
                return fewer
    return counts
