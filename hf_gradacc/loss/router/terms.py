"""The router losses of transformers as sums: what a micro-batch adds to that of its update.

A balancing loss multiplies two means over tokens: which share of them chose an expert, and how
probable that expert was. No weight makes pieces of a product add up. But the shares have no
gradient. Once those of the whole update are known, the loss is linear in the probabilities, which
are sums over tokens, and its pieces add up exactly.

Losses are known by their name and the names of their parameters; models are written by copying, so
each of these few is found in many of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "ROUTER_LOSSES",
    "Balance",
    "BalanceForm",
    "Mean",
    "MeanForm",
    "RouterForm",
    "RouterTerm",
    "reader_of",
]


class RouterForm(Protocol):
    """What all micro-batches have in common in one call of a router loss. Can be pickled.

    Attributes:
        kind: Its name in the log: ``router_loss`` or ``router_z_loss``.
    """

    @property
    def kind(self) -> str: ...  # noqa: D102

    @property
    def size(self) -> int:
        """How many numbers the sums of a micro-batch are."""

    def value(self, whole: Tensor) -> Tensor:
        """Return the loss of a whole update, given its sums."""

    def loads(self, whole: Tensor) -> Tensor | None:
        """Return the share of the choices that fell on each expert ``[layers, experts]``."""


class RouterTerm(Protocol):
    """One call of a router loss, on the tokens of one micro-batch."""

    @property
    def form(self) -> RouterForm:
        """What all micro-batches have in common."""

    def sums(self) -> Tensor:
        """Return what adds up over micro-batches and ranks: a vector, in float64 if there is."""

    def part(self, whole: Tensor) -> Tensor:
        """Return this micro-batch's part of the loss, given the sums of the whole update."""


@dataclass(frozen=True)
class BalanceForm:
    """``experts * sum_e f[e] * P[e]``, over the tokens of all layers.

    Its sums: how many tokens chose each expert of each layer, the probability of each expert, and
    the number of tokens.
    """

    num_layers: int
    num_experts: int
    kind: str = "router_loss"

    @property
    def size(self) -> int:
        """How many numbers the sums of a micro-batch are."""
        return (self.num_layers + 1) * self.num_experts + 1

    def chosen(self, whole: Tensor) -> Tensor:
        """Return how many tokens chose each expert ``[layers, experts]``."""
        return whole[: self.num_layers * self.num_experts].view(-1, self.num_experts)

    def slope(self, whole: Tensor) -> Tensor:
        """Return what the loss grows by with each probability of an expert ``[experts]``."""
        return self.chosen(whole).sum(0) * (self.num_experts / whole[-1].square())

    def value(self, whole: Tensor) -> Tensor:
        """Return the loss of a whole update."""
        return (self.slope(whole) * whole[-1 - self.num_experts : -1]).sum()

    def loads(self, whole: Tensor) -> Tensor:
        """Return the share of the choices that fell on each expert ``[layers, experts]``."""
        chosen = self.chosen(whole)
        return chosen / chosen.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Balance:
    """The loss of Mixtral, and of nearly all others, on one micro-batch.

    Attributes:
        form: What all micro-batches have in common.
        logits: Of each layer, ``[tokens, experts]``.
        top_k: A token chooses so many of the most probable experts.
        mask: ``[batch, seq]``, zero for tokens that do not count; None if all do.
    """

    form: BalanceForm
    logits: Sequence[Tensor]
    top_k: int
    mask: Tensor | None = None

    def sums(self) -> Tensor:
        """Return what adds up over micro-batches and ranks."""
        chosen: list[Tensor] = []
        rest: Tensor | None = None
        for probability in self._probabilities():
            weights = self._weights(probability)
            choices = probability.topk(self.top_k, dim=-1).indices.reshape(-1)
            counts = weights.new_zeros(self.form.num_experts)
            counts.scatter_add_(0, choices, weights.repeat_interleave(self.top_k))
            chosen.append(_wide(counts))
            own = torch.cat([_wide(_summed(probability, weights)), _wide(weights.sum()[None])])
            rest = own if rest is None else rest + own
        assert rest is not None
        return torch.cat([*chosen, rest])

    def part(self, whole: Tensor) -> Tensor:
        """Return ``experts / T^2 * sum_e chosen[e] * (probability of e, summed over own tokens)``.

        ``chosen`` and ``T``, the number of tokens, are those of the whole update.
        """
        total: Tensor | None = None
        for probability in self._probabilities():
            summed = _summed(probability, self._weights(probability))
            own = (summed * self.form.slope(whole).to(summed)).sum()
            total = own if total is None else total + own
        assert total is not None
        return total

    def _probabilities(self) -> Iterator[Tensor]:
        device = self.logits[0].device  # layers may lie on several
        return (layer.to(device).softmax(-1) for layer in self.logits)

    def _weights(self, probability: Tensor) -> Tensor:
        if self.mask is None:
            return torch.ones(len(probability), dtype=torch.float32, device=probability.device)
        return self.mask.reshape(-1).to(device=probability.device, dtype=torch.float32)


@dataclass(frozen=True)
class MeanForm:
    """A mean over rows or tokens. Its sums: the sum, its count, how many tokens chose each expert.

    Attributes:
        kind: Its name in the log.
        num_experts: 0 if it does not look at what was chosen.
    """

    kind: str
    num_experts: int = 0

    @property
    def size(self) -> int:
        """How many numbers the sums of a micro-batch are."""
        return 2 + self.num_experts

    def value(self, whole: Tensor) -> Tensor:
        """Return the mean over a whole update."""
        return whole[0] / whole[1]

    def loads(self, whole: Tensor) -> Tensor | None:
        """Return the share of the choices that fell on each expert ``[1, experts]``."""
        return (whole[2:] / whole[2:].sum())[None] if self.num_experts else None


@dataclass(frozen=True)
class Mean:
    """A router loss that adds up by itself, but over its own count.

    Attributes:
        form: What all micro-batches have in common.
        own: The mean over this micro-batch.
        count: What it is a mean over: rows or tokens, padding among them.
        chosen: How many tokens chose each expert ``[experts]``; None if it does not look at that.
    """

    form: MeanForm
    own: Tensor
    count: int
    chosen: Tensor | None = None

    def sums(self) -> Tensor:
        """Return what adds up over micro-batches and ranks."""
        total = _wide(self.own.detach())[None] * self.count
        chosen = total[:0] if self.chosen is None else _wide(self.chosen.detach())
        return torch.cat([total, torch.full_like(total, self.count), chosen])

    def part(self, whole: Tensor) -> Tensor:
        """Return the mean, weighted by this micro-batch's share of the count."""
        return self.own * (self.count / whole[1]).to(self.own)


def _summed(probability: Tensor, weights: Tensor) -> Tensor:
    return (probability.float() * weights.unsqueeze(-1)).sum(0)


def _wide(value: Tensor) -> Tensor:
    """In float64: tokens of an update are more than float32 can count. MPS has none."""
    return value if value.device.type == "mps" else value.double()


# ---- the losses, by what they are called with --------------------------------------------------


def _mixtral(
    gate_logits: Any, num_experts: int, top_k: int = 2, attention_mask: Tensor | None = None
) -> RouterTerm | None:
    """Each token's `top_k` most probable experts (in NLLB-MoE, too)."""
    if not isinstance(gate_logits, tuple):
        return None
    form = BalanceForm(len(gate_logits), num_experts)
    return Balance(form, gate_logits, top_k, attention_mask)


def _switch(router_probs: Tensor, expert_indices: Tensor) -> RouterTerm:
    """Switch Transformers balance each row by itself: a mean over rows, of ``f · P`` in each."""
    num_experts = router_probs.shape[-1]
    chosen = torch.nn.functional.one_hot(expert_indices.long(), num_experts)
    chosen = chosen.to(router_probs.dtype)
    rows = (chosen.mean(-2) * router_probs.mean(-2)).sum(-1) * num_experts
    form = MeanForm("router_loss", num_experts)
    return Mean(form, rows.mean(), len(rows), chosen.flatten(0, -2).sum(0))


def _z_loss(router_logits: Tensor) -> RouterTerm:
    """Keep logits small: a mean over tokens, padding among them."""
    squares = router_logits.logsumexp(-1).square()
    return Mean(MeanForm("router_z_loss"), squares.mean(), squares.numel())


_READERS: dict[str, tuple[Callable[..., RouterTerm | None], ...]] = {
    "load_balancing_loss_func": (_mixtral, _switch),
    "router_z_loss_func": (_z_loss,),
}

ROUTER_LOSSES = frozenset(_READERS)
"""What models call their router losses."""


def reader_of(name: str, function: Any) -> Callable[..., RouterTerm | None] | None:
    """Return what reads the calls of a router loss; None if it is none that is known.

    Args:
        name: What the model calls it.
        function: The function; it is told from others by the names of its parameters.
    """
    for reader in _READERS.get(name, ()):
        try:
            if list(inspect.signature(function).parameters) == list(
                inspect.signature(reader).parameters
            ):
                return reader
        except (TypeError, ValueError):  # no Python function
            return None
    return None
