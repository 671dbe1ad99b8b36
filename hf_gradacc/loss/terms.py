"""A loss that is a sum of terms, each with a count of its own.

A multi-task loss, cross entropy beside distillation, or a preference loss with a mean over tokens
added to a mean over pairs: no single count makes the losses of micro-batches add up to that of
their update. Named apart, each term is divided by its own count over the whole update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.errors import LossError

__all__ = ["LossTerm", "LossTerms"]


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss, and what it is divided by.

    Attributes:
        value: A scalar tensor: a mean over `count`, or a sum that is to be divided by it.
        count: How many things of this micro-batch it goes over, such as pairs, or what they weigh.
        is_sum: The value is not divided by the count yet.
    """

    value: Tensor
    count: float | Tensor
    is_sum: bool = False


class LossTerms(dict[str, Any]):
    """What ``compute_loss`` or ``compute_loss_func`` may return in place of a loss.

    A term is a scalar tensor, and the model is asked what it is a mean over, as it is for any loss;
    or a `LossTerm`, which says its count. A weight between terms is multiplied into their values.
    The loss of an update is the sum of its terms, each divided by its own count over all
    micro-batches and ranks. Each is logged as ``loss/<name>``.

    Counts have to be known before the first backward of an update. A trainer may return those of
    its `LossTerm` from ``count_terms(inputs)``, by name, for the collated inputs of a micro-batch.
    Otherwise a forward of each micro-batch goes ahead to collect them.

    >>> of_pairs = LossTerm(torch.tensor(6.0), count=3, is_sum=True)
    >>> float(LossTerms(tokens=torch.tensor(2.0), pairs=of_pairs).own_loss())
    4.0

    Raises:
        LossError: If there is no term, or one is no scalar tensor.
    """

    def __init__(self, terms: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        super().__init__({**(terms or {}), **more})
        if not self:
            raise LossError("LossTerms() has no term: name at least one, as in tokens=loss.")
        for name, term in self.items():
            value = term.value if isinstance(term, LossTerm) else term
            if not isinstance(value, Tensor) or value.numel() != 1:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise LossError(
                    f"LossTerms: {name!r} is {found}, and must be a scalar tensor: a mean or a "
                    f"sum. Put one with a count into LossTerm(value, count)."
                )

    def value_of(self, name: str) -> Tensor:
        """Return a term as it was computed: a mean or a sum."""
        term = self[name]
        value: Tensor = term.value if isinstance(term, LossTerm) else term
        return value.reshape(())

    def count_of(self, name: str) -> float | Tensor | None:
        """Return a term's own count; None if it was not said."""
        term = self[name]
        return term.count if isinstance(term, LossTerm) else None

    def is_sum(self, name: str) -> bool:
        """Return whether a term is yet to be divided by the count that was said."""
        term = self[name]
        return isinstance(term, LossTerm) and term.is_sum

    def own_value(self, name: str) -> Tensor:
        """Return a term of this micro-batch by itself, divided by its own count."""
        value = self.value_of(name)
        if not self.is_sum(name):
            return value
        count = self.count_of(name)
        return value / torch.as_tensor(count, device=value.device).clamp(min=1)

    def own_loss(self) -> Tensor:
        """Return the loss of this micro-batch by itself."""
        device = self.value_of(next(iter(self))).device
        parts = [self.own_value(name).to(device) for name in self]
        return sum(parts[1:], start=parts[0])

    def weighed(self, weights: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
        """Return each term times its weight, without those that weigh nothing.

        The mean over nothing is NaN, which no weight of zero would make 0.

        Raises:
            LossError: If terms have other names than those that were asked before training.
        """
        if set(self) != set(weights):
            raise LossError(
                f"LossTerms has the terms {sorted(self)}, but had {sorted(weights)} when it was "
                f"asked before training: return the same names each time, a term that is not there "
                f"with a count of 0."
            )
        return {
            name: self.value_of(name) * weight
            for name, weight in weights.items()
            if isinstance(weight, Tensor) or weight
        }

    def __truediv__(self, other: Any) -> Any:
        """Say why this is no loss yet: somebody's code was handed it instead of a tensor."""
        raise LossError(
            "LossTerms was returned where a plain loss was expected: by a compute_loss that this "
            "package did not call, or now and not when the loss was asked before training. Define "
            "compute_loss in a class with GradAccMixin, or pass compute_loss_func, and return "
            "LossTerms each time."
        )
