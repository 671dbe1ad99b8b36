"""Weighted means: a cross entropy with class weights is a mean over the weights of its targets.

``cross_entropy(logits, labels, weight=w)`` divides by ``sum(w[labels])``, not by the number of
labels (torch, `torch.nn.CrossEntropyLoss`). The weights are read off the call itself while the
model is asked, so nothing has to be declared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hf_gradacc.updates.batch import labels_of
from hf_gradacc.updates.targets import IGNORE_INDEX, TargetRule

__all__ = ["ClassWeights", "WeightedCall", "WeightedCalls"]


@dataclass(frozen=True)
class ClassWeights:
    """The weight of each class in a mean over targets.

    Attributes:
        weights: By class.
        ignore_index: The label that is left out.
    """

    weights: tuple[float, ...]
    ignore_index: int = IGNORE_INDEX

    def total(self, inputs: Mapping[str, Any], rule: TargetRule) -> float:
        """Add up the weights of the targets of collated inputs: what their mean is divided by.

        Args:
            inputs: What the model's forward takes, with labels.
            rule: Which labels are targets.

        >>> weights = ClassWeights((1.0, 5.0))
        >>> weights.total({"labels": torch.tensor([0, 1, 1, -100])}, TargetRule.SEQUENCE)
        11.0
        """
        labels = inputs.get("shift_labels")
        if not isinstance(labels, Tensor):
            labels = labels_of(inputs)[1]
            if rule is TargetRule.NEXT_TOKEN and labels is not None:
                labels = labels[..., 1:]
        return 0.0 if labels is None else self.of(labels)

    def of(self, labels: Tensor) -> float:
        """Add up the weights of some labels; one that is no class has none."""
        kept = labels[labels.ne(self.ignore_index)].cpu()
        kept = kept[(kept >= 0) & (kept < len(self.weights))]
        return float(torch.tensor(self.weights, dtype=torch.float64)[kept].sum())


@dataclass(frozen=True)
class WeightedCall:
    """A mean that torch was asked to take with class weights.

    Attributes:
        weights: Of its classes.
        total: What it was divided by.
    """

    weights: ClassWeights
    total: float


class WeightedCalls(TorchFunctionMode):
    """Sees the weighted means that are taken while it is entered.

    >>> with WeightedCalls() as calls:
    ...     logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
    ...     loss = functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 5.0]))
    >>> calls.only
    WeightedCall(weights=ClassWeights(weights=(1.0, 5.0), ignore_index=-100), total=6.0)
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: list[WeightedCall] = []

    @property
    def only(self) -> WeightedCall | None:
        """The weighted mean, if there was exactly one."""
        return self._found[0] if len(self._found) == 1 else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Look at a call, and let it through."""
        kwargs = kwargs or {}
        if func in (functional.cross_entropy, functional.nll_loss):
            self._look(*args, **kwargs)
        return func(*args, **kwargs)

    def _look(
        self,
        input: Any,
        target: Any,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: int = IGNORE_INDEX,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        is_mean = reduction == "mean" and reduce is not False and size_average is not False
        if not is_mean or not isinstance(weight, Tensor) or target.is_floating_point():
            return  # of probabilities, torch takes the mean over rows
        values = tuple(weight.detach().double().cpu().tolist())
        if len(set(values)) < 2 or not all(map(math.isfinite, values)):
            return
        weights = ClassWeights(values, ignore_index)
        self._found.append(WeightedCall(weights, weights.of(target.detach())))
