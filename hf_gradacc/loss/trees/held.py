"""Take tokens several times, some of them kept from a graph of their own.

What comes back to a token from many places is added up in float32 or wider: the sum over all rows
that share it is one of many small parts, and over all micro-batches if it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Held", "hold", "in_front", "repeat", "repeat_behind"]


@dataclass(frozen=True)
class Held:
    """A tensor of kept tokens, cut off from the graph that it came out of.

    Attributes:
        state: Its values ``[tokens, ...]``.
        source: The tensor itself; None if no gradient goes back.
        leaf: Of its shape, where gradients of micro-batches add up, in float32 or wider. It has no
            values of its own, and takes no memory.
    """

    state: Tensor
    source: Tensor | None = None
    leaf: Tensor | None = None


def hold(states: Tensor) -> Held:
    """Cut a tensor off from its graph, and make room for gradients if it has one."""
    if not states.requires_grad:
        return Held(states)
    wide = torch.promote_types(states.dtype, torch.float32)
    room = torch.zeros((), dtype=wide, device=states.device).expand(states.shape)
    return Held(states.detach(), states, room.requires_grad_())


def in_front(kept: Held, own: Tensor) -> Tensor:
    """Put kept tokens in front of each row ``[rows, tokens, ...]``."""
    apply: Any = _InFront.apply
    whole: Tensor = apply(kept.leaf, kept.state, own)
    return whole


class _InFront(torch.autograd.Function):
    """What comes back to the kept tokens is added up over the rows."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor | None, state: Tensor, own: Tensor) -> Tensor:
        ctx.num_kept = len(state)
        return torch.cat((state.expand(len(own), *state.shape), own), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor]:
        total = None
        if ctx.needs_input_grad[0]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            total = grad[:, : ctx.num_kept].sum(0, dtype=wide)
        return total, None, grad[:, ctx.num_kept :]


def repeat(states: Tensor, places: Tensor) -> Tensor:
    """Take rows of a tensor, some of them several times, along its first dimension.

    As ``index_select``, but what comes back to a row from many places is added up in float32 or
    wider: the sum over all rows that share a token is one of many small parts.
    """
    taken: Tensor = _Repeat.apply(states, places)  # type: ignore[no-untyped-call]
    return taken


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_tokens = len(states)
        return states.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _add_up(grad, places, ctx.num_tokens).to(grad.dtype), None


def repeat_behind(kept: Held, states: Tensor, places: Tensor) -> Tensor:
    """As `repeat`, of kept tokens and those behind them, laid end to end."""
    apply: Any = _RepeatBehind.apply
    taken: Tensor = apply(kept.leaf, kept.state, states, places)
    return taken


class _RepeatBehind(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor | None, state: Tensor, states: Tensor, places: Tensor
    ) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_kept, ctx.num_tokens = len(state), len(state) + len(states)
        return torch.cat((state, states)).index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, None]:
        (places,) = ctx.saved_tensors
        total = _add_up(grad, places, ctx.num_tokens)
        kept, own = total[: ctx.num_kept], total[ctx.num_kept :].to(grad.dtype)
        # Apart: a view would hold on to the sums of this micro-batch's own tokens.
        return kept.clone() if ctx.needs_input_grad[0] else None, None, own, None


def _add_up(grad: Tensor, places: Tensor, num_tokens: int) -> Tensor:
    """Add up what comes back to each token, in float32 or wider."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros((num_tokens, *grad.shape[1:]), dtype=wide, device=grad.device)
    return total.index_add_(0, places, grad.to(wide))
