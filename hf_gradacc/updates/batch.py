"""Take collated inputs apart: rows of a batch, and the padding around them.

Works on whatever mapping a collator returns. A tensor or list whose first dimension is the number
of rows is cut by rows; everything else is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PAD_VALUES",
    "can_slice_rows",
    "count_rows",
    "count_rows_per_sequence",
    "find_main_input",
    "first_rows",
    "labels_of",
    "order_blocks",
    "pad_columns",
    "slice_rows",
    "tokens_of_batch",
    "trim_padding",
    "widen",
]

_DECODER = ("labels", "decoder_input_ids", "decoder_attention_mask")
PAD_VALUES = {"labels": -100, "shift_labels": -100, "attention_mask": 0, "token_type_ids": 0}


def find_main_input(inputs: Any, name: str = "input_ids") -> Tensor | None:
    """Find the tensor that holds the sequences: `name`, or the first one of two dimensions."""
    if not isinstance(inputs, Mapping):
        return None
    main = inputs.get(name)
    if isinstance(main, Tensor) and main.ndim >= 1:
        return main
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim >= 2:
            return value
    return next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim >= 1), None)


def labels_of(inputs: Mapping[str, Any]) -> tuple[str, Tensor | None]:
    """Find the labels of a collated batch: ``labels``, or the one integer tensor so named.

    A loss of your own may call them ``targets`` or ``lm_labels``. What the loss does with them is
    asked, not guessed from the name.

    Returns:
        Name and tensor, or ``("labels", None)``.

    >>> labels_of({"input_ids": torch.ones(2, 3), "target_ids": torch.ones(2, 3).long()})[0]
    'target_ids'
    """
    if "labels" in inputs:
        labels = inputs["labels"]
        return "labels", labels if isinstance(labels, Tensor) else None
    named = [
        (key, value)
        for key, value in inputs.items()
        if ("label" in key or "target" in key)
        and key != "shift_labels"
        and isinstance(value, Tensor)
        and value.dtype in (torch.int32, torch.int64)
    ]
    return named[0] if len(named) == 1 else ("labels", None)


def count_rows(inputs: Any, name: str = "input_ids") -> int:
    """Count the sequences of a collated batch, 0 if it holds no tensor."""
    main = find_main_input(inputs, name)
    return 0 if main is None else int(main.shape[0])


def count_rows_per_sequence(
    inputs: Any, num_sequences: int, *, name: str = "input_ids"
) -> int | None:
    """Count the collated rows that one dataset row became; None if they share rows.

    TRL's preference collators make two of each: all chosen answers, then all rejected ones.
    Padding-free collators make one row of all.

    >>> count_rows_per_sequence({"input_ids": torch.zeros(6, 2)}, 3)
    2
    """
    total = count_rows(inputs, name)
    if num_sequences == 0 or total == 0 or total % num_sequences:
        return None
    return total // num_sequences


def can_slice_rows(inputs: Any, num_sequences: int, *, rows_per_sequence: int | None = 1) -> bool:
    """Return whether every tensor of a collated batch belongs to its rows one by one.

    Images often do not: a vision model's patches of all rows lie in one tensor.

    Args:
        inputs: Collated batch.
        num_sequences: Sequences it was made of.
        rows_per_sequence: Collated rows of each; None if they cannot be told apart.

    >>> can_slice_rows({"input_ids": torch.zeros(2, 3), "pixel_values": torch.zeros(24, 8)}, 2)
    False
    """
    if rows_per_sequence is None:
        return False
    total = num_sequences * rows_per_sequence
    return (
        isinstance(inputs, Mapping)
        and count_rows(inputs) == total
        and all(
            value.ndim == 0 or value.shape[0] in (num_sequences, total)
            for value in inputs.values()
            if isinstance(value, Tensor)
        )
    )


def slice_rows(
    inputs: Mapping[str, Any], rows: Sequence[int], *, rows_per_sequence: int = 1
) -> dict[str, Any]:
    """Cut some rows out of a collated batch, in the order given.

    Args:
        inputs: Collated batch.
        rows: Which sequences.
        rows_per_sequence: Collated rows of each sequence; sequence ``i`` of ``n`` is at ``i``,
            ``n + i``, ...

    >>> slice_rows({"input_ids": torch.arange(6).view(3, 2)}, [2, 0])["input_ids"].tolist()
    [[4, 5], [0, 1]]
    >>> pairs = {"input_ids": torch.arange(4).view(4, 1)}
    >>> slice_rows(pairs, [1], rows_per_sequence=2)["input_ids"].tolist()
    [[1], [3]]
    """
    total = count_rows(inputs)
    n = total // rows_per_sequence
    places_in_blocks = [i + n * block for block in range(rows_per_sequence) for i in rows]
    index = {n: list(rows), total: places_in_blocks}
    cut: dict[str, Any] = {}
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim >= 1 and value.shape[0] in index:
            places = torch.as_tensor(index[value.shape[0]], dtype=torch.int64)
            cut[key] = value[places.to(value.device)]
        elif isinstance(value, list) and len(value) in index:
            cut[key] = [value[i] for i in index[len(value)]]
        else:
            cut[key] = value
    return cut


def first_rows(
    inputs: Mapping[str, Any], num_sequences: int, *, rows_per_sequence: int = 1
) -> dict[str, Any]:
    """Keep the first rows of a batch: slice them out, or mask the labels of the others.

    If the images of all rows lie in one tensor, rows cannot be removed. Without labels they do not
    enter the loss.

    >>> first_rows({"input_ids": torch.ones(2, 2), "labels": torch.ones(2, 2).long(),
    ...             "pixel_values": torch.zeros(9, 4)}, 1)["labels"].tolist()
    [[1, 1], [-100, -100]]
    """
    if can_slice_rows(
        inputs, count_rows(inputs) // rows_per_sequence, rows_per_sequence=rows_per_sequence
    ):
        return slice_rows(inputs, range(num_sequences), rows_per_sequence=rows_per_sequence)
    name, labels = labels_of(inputs)
    if labels is None or labels.is_floating_point():
        return slice_rows(inputs, range(num_sequences), rows_per_sequence=rows_per_sequence)
    masked = labels.clone()
    masked[num_sequences:] = -100
    return {**inputs, name: masked}


def tokens_of_batch(inputs: Any) -> list[Tensor] | None:
    """Return the token ids of each collated row, without its padding.

    Returns:
        Tensors of one dimension; None if there are no rows of tokens, or one has padding in its
        midst. What stands behind such a hole is at another distance in the model than in the row
        without it.

    >>> ids, mask = torch.tensor([[1, 2, 0], [0, 3, 4]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    >>> [row.tolist() for row in tokens_of_batch({"input_ids": ids, "attention_mask": mask})]
    [[1, 2], [3, 4]]
    >>> tokens_of_batch({"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])})
    """
    if not isinstance(inputs, Mapping):
        return None
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return None
    if mask is None:
        return list(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    real = mask.ne(0)
    starts = real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(1)
    if bool((starts > 1).any()):
        return None
    return [row[of_row] for row, of_row in zip(ids, real, strict=True)]


def order_blocks(
    inputs: Mapping[str, Any], sizes: Sequence[int], *, rows_per_sequence: int
) -> dict[str, Any]:
    """Restore the block order of sequences of several rows after batches were concatenated.

    Args:
        inputs: Concatenated batches, each with its own `rows_per_sequence` blocks.
        sizes: Sequences of each batch.
        rows_per_sequence: Collated rows of each sequence.

    >>> both = {"input_ids": torch.tensor([[1], [-1], [2], [3], [-2], [-3]])}
    >>> order_blocks(both, [1, 2], rows_per_sequence=2)["input_ids"].tolist()
    [[1], [2], [3], [-1], [-2], [-3]]
    """
    if rows_per_sequence == 1:
        return dict(inputs)
    starts = [rows_per_sequence * sum(sizes[:part]) for part in range(len(sizes))]
    order = [
        start + block * size + i
        for block in range(rows_per_sequence)
        for start, size in zip(starts, sizes, strict=True)
        for i in range(size)
    ]
    return {
        key: value[torch.as_tensor(order).to(value.device)]
        if isinstance(value, Tensor) and value.ndim >= 1 and value.shape[0] == len(order)
        else value
        for key, value in inputs.items()
    }


def _has_targets_outside(labels: Any, start: int, stop: int) -> bool:
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return False
    return bool(labels[..., :start].ne(-100).any() or labels[..., stop:].ne(-100).any())


def trim_padding(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the columns at either edge that are padding in every row.

    Columns are judged by ``attention_mask``; every tensor whose second dimension has its width is
    cut alike. Labels of an encoder-decoder have their own width and are judged by ``-100``. What
    is cut is contiguous, as from a collator: losses of Transformers call ``labels.view(-1)``.
    """
    trimmed = dict(inputs)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim >= 2:
        # [rows, seq] or, with choices, [rows, choices, seq]
        used = mask.reshape(-1, mask.shape[-1]).ne(0).any(0).nonzero()
        if len(used):
            start, stop, width = int(used[0]), int(used[-1]) + 1, mask.shape[-1]
            # A decoder's labels may be as wide as its encoder's input by chance.
            others = _DECODER if _has_targets_outside(inputs.get("labels"), start, stop) else ()
            for key, value in inputs.items():
                has_columns = isinstance(value, Tensor) and (
                    value.ndim == mask.ndim or key == "position_ids"  # [3, rows, seq] of Qwen-VL
                )
                if has_columns and value.shape[-1] == width and key not in others:
                    trimmed[key] = value[..., start:stop].contiguous()
    for key in _DECODER:
        labels = inputs.get("labels")
        value = trimmed.get(key)
        if not isinstance(labels, Tensor) or labels.ndim != 2 or not isinstance(value, Tensor):
            continue
        if isinstance(mask, Tensor) and labels.shape[-1] == mask.shape[-1]:
            continue
        used = labels.ne(-100).any(0).nonzero()
        if len(used) and value.shape == labels.shape:
            trimmed[key] = value[:, : int(used[-1]) + 1].contiguous()
    return trimmed


def pad_columns(
    inputs: Mapping[str, Any], width: int, *, pad_token_id: int = 0, left: bool = False
) -> dict[str, Any]:
    """Widen a collated batch to `width` columns with padding.

    Args:
        inputs: Collated batch with ``input_ids`` ``[..., seq]``.
        width: Columns wanted; at least as many as there are.
        pad_token_id: Fills ``input_ids`` and every tensor that is not known otherwise.
        left: True to put the padding in front.
    """
    main = inputs["input_ids"]
    have = main.shape[-1]
    if width <= have:
        return dict(inputs)
    missing = (width - have, 0) if left else (0, width - have)
    fills = {labels_of(inputs)[0]: -100, **PAD_VALUES, "input_ids": pad_token_id}
    padded: dict[str, Any] = {}
    for key, value in inputs.items():
        has_columns = isinstance(value, Tensor) and (
            value.ndim == main.ndim or key == "position_ids"
        )
        if has_columns and value.shape[-1] == have:
            fill = fills.get(key, 0)
            padded[key] = torch.nn.functional.pad(value, missing, value=fill)
        else:
            padded[key] = value
    return padded


def widen(value: Tensor, shape: Sequence[int], *, fill: Any, left: bool) -> Tensor:
    """Pad every dimension but the first to `shape`."""
    missing = [want - have for want, have in zip(shape, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    padding: list[int] = []
    for extra in reversed(missing):
        padding += [extra, 0] if left else [0, extra]
    return torch.nn.functional.pad(value, padding, value=fill)
