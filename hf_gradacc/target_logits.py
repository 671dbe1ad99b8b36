"""Send only chosen rows of the hidden states through a model's LM head.

Most of a fine-tuning batch is prompt and padding whose logits nobody needs. A forward pre-hook on
the output embeddings takes the other rows out; no model code is patched, and what a model does to
its logits (soft-capping, scaling, biases) still happens to those that are left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["find_head", "kept_rows", "seen_rows"]


def find_head(model: nn.Module) -> nn.Module | None:
    """Find the module that turns hidden states into logits, None if the model names none."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


@contextlib.contextmanager
def kept_rows(head: nn.Module | None, rows: Tensor | None) -> Iterator[None]:
    """Let only some positions into a head for as long as the context lasts.

    The backward pass has to run inside too, in case it computes the forward again (gradient
    checkpointing). Nothing of it stays on the model.

    Args:
        head: Takes hidden states ``[batch, seq, hidden]``; see `find_head`.
        rows: Positions ``[kept]`` in the flattened ``[batch * seq]`` hidden states, on the same
            device. The head then gives logits ``[1, kept, vocab]``. None keeps all.
    """
    if head is None or rows is None:
        yield
        return

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        flat = hidden.reshape(-1, hidden.shape[-1])
        return (flat.index_select(0, rows).unsqueeze(0), *rest)

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
