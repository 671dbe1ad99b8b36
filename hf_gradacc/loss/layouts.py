"""How a micro-batch's tokens are laid out for the model: padded rows, one packed row, targets only.

Pure functions on collated inputs, run on the CPU right before a micro-batch is copied to its
device. None of them changes a loss by more than rounding; `loss.shortcuts` checks that on the
actual model before any is used.

Send only chosen rows of the hidden states through a model's LM head.

Most of a fine-tuning batch is prompt and padding whose logits nobody needs. A forward pre-hook on
the output embeddings takes the other rows out; no model code is patched, and what a model does to
its logits (soft-capping, scaling, biases) still happens to those that are left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = [
    "find_head",
    "is_right_padded",
    "keep_targets",
    "kept_rows",
    "pack_rows",
    "seen_rows",
    "without_mask",
]


def is_right_padded(mask: Tensor) -> bool:
    """Return whether every row of a mask is ones, then zeros.

    >>> is_right_padded(torch.tensor([[1, 1, 1], [1, 0, 0]]))
    True
    >>> is_right_padded(torch.tensor([[1, 1, 1], [0, 1, 1]]))
    False
    """
    if mask.ndim != 2 or mask.shape[1] == 0:
        return False
    real = mask.ne(0)
    return bool(real[:, 0].all()) and not bool(real[:, 1:].gt(real[:, :-1]).any())


def without_mask(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out a mask that no real token needs.

    In a causal model a token sees only what stands before it, so padding on the right reaches
    padding alone. Without a mask SDPA takes its ``is_causal`` path, which needs no ``[seq, seq]``
    mask and skips half of the work. Masks of any other shape are kept.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or not is_right_padded(mask):
        return dict(inputs)
    return {key: value for key, value in inputs.items() if key != "attention_mask"}


def keep_targets(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Find the positions whose prediction enters a causal LM's loss, and their labels.

    Args:
        inputs: ``labels`` ``[batch, seq]``, not shifted; or ``shift_labels`` of that shape.

    Returns:
        The inputs with ``shift_labels`` ``[1, targets]`` (and ``labels`` the same, since models
        compute a loss only where they are given ``labels``), and the positions ``[targets]`` in
        the flattened ``[batch * seq]`` hidden states. The inputs unchanged and None if they have no
        labels or no target.

    >>> inputs, positions = keep_targets({"labels": torch.tensor([[5, 6, 7], [-100, -100, 8]])})
    >>> inputs["shift_labels"].tolist(), positions.tolist()
    ([[6, 7, 8]], [0, 1, 4])
    """
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    if not isinstance(shifted, Tensor):
        if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
            return dict(inputs), None
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    flat = shifted.reshape(-1)
    positions = flat.ne(IGNORE_INDEX).nonzero().squeeze(-1)
    if len(positions) == 0:
        return dict(inputs), None
    kept = flat[positions].unsqueeze(0)
    return {**inputs, "labels": kept, "shift_labels": kept}, positions


def pack_rows(inputs: Mapping[str, Any], *, varlen: bool = False) -> dict[str, Any]:
    """Lay the rows of a padded batch end to end as one row, without padding.

    ``position_ids`` restart with each sequence; that is how Transformers' attentions tell
    sequences apart where no mask is given. The first label of each sequence is taken out, or the
    last token of the one before would be asked to predict it.

    Args:
        inputs: ``input_ids`` ``[batch, seq]``, ``attention_mask`` alike if there is padding, and
            other tensors of that shape.
        varlen: Add the boundaries as flash attention's variable-length kernels take them, so that
            it need not read them back from the device.

    Returns:
        The same features as ``[1, tokens]``, without ``attention_mask``.

    Raises:
        ValueError: If a feature belongs to neither tokens nor the whole batch, so that nobody
            knows where in the row it goes.

    >>> packed = pack_rows({"input_ids": torch.tensor([[4, 5, 6], [7, 8, 0]]),
    ...                     "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    ...                     "labels": torch.tensor([[4, 5, 6], [7, 8, -100]])})
    >>> packed["input_ids"].tolist(), packed["position_ids"].tolist(), packed["labels"].tolist()
    ([[4, 5, 6, 7, 8]], [[0, 1, 2, 0, 1]], [[-100, 5, 6, -100, 8]])
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.ne(0)
    lengths = real.sum(dim=1)
    packed: dict[str, Any] = {}
    for key, value in inputs.items():
        if key in ("attention_mask", "position_ids"):
            continue
        if not isinstance(value, Tensor) or value.ndim == 0:
            packed[key] = value
            continue
        if value.shape != ids.shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, the tokens {tuple(ids.shape)}: it cannot "
                f"be laid out as one row."
            )
        if key == "labels":
            value = value.clone()
            value[torch.arange(len(ids)), real.long().argmax(dim=1)] = IGNORE_INDEX
        packed[key] = value[real].unsqueeze(0)
    ends = lengths.cumsum(0)
    starts = torch.repeat_interleave(ends - lengths, lengths)
    packed["position_ids"] = (torch.arange(int(ends[-1])) - starts).unsqueeze(0)
    if varlen:
        bounds = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        packed |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        packed |= {"max_length_q": longest, "max_length_k": longest}
    return packed


def find_head(model: nn.Module) -> nn.Module | None:
    """Find the module that turns hidden states into logits, None if the model names none."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


@contextlib.contextmanager
def kept_rows(
    head: nn.Module | None,
    rows: Tensor | None,
    *,
    read: Callable[[Tensor], Tensor | None] | None = None,
) -> Iterator[None]:
    """Let only some positions through a head while the context lasts.

    The backward pass has to run inside too, in case it computes the forward again (gradient
    checkpointing). Nothing of it stays on the model.

    Args:
        head: Takes hidden states ``[batch, seq, hidden]``; see `find_head`.
        rows: Positions ``[kept]`` in the flattened ``[batch * seq]`` hidden states. The head then
            gives logits ``[1, kept, vocab]``. None keeps all.
        read: Called first with the hidden states. Returns what the head is given ``[kept, hidden]``
            in place of those positions, or None.
    """
    if head is None or rows is None:
        yield
        return

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        known = None if read is None else read(hidden)
        if known is not None:
            return (known.unsqueeze(0), *rest)
        flat = hidden.reshape(-1, hidden.shape[-1])
        # Of a model over several devices, the layers in front may be on another one.
        return (flat.index_select(0, rows.to(flat.device)).unsqueeze(0), *rest)

    # In front of all other hooks: those of FSDP or LoRA then see fewer rows and nothing else.
    handle = head.register_forward_pre_hook(keep, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def seen_rows(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what goes into a head, flattened to ``[rows, hidden]``, to compare two layouts."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().reshape(-1, args[0].shape[-1]))

    handle = head.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()
