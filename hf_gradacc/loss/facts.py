"""What the probe finds out about a loss, and how close two losses have to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_gradacc.updates.targets import TargetRule

__all__ = ["LossFacts", "LossOf", "differ", "rounding_of"]

# How far two evaluations of the same loss may differ through rounding alone, relative. Most losses
# of transformers are computed in float32 even if the model is float64.
_ROUNDING = {torch.float64: 5e-7, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 4e-2}


LossOf = Callable[[Mapping[str, Any], "int | None"], float]
"""Gives the loss of collated inputs; the second argument is what to pass as the count."""


@dataclass(frozen=True)
class LossFacts:
    """What the probe found out about a loss.

    Attributes:
        rule: What it takes its mean over.
        wants_own_count: It must be called with ``num_items_in_batch`` set to its own targets to be
            a mean; otherwise it is called with None.
        pads_alike: Padding changes its value, so an update's micro-batches need one width.
        rule_error: Relative difference between the loss of rows together and the weighted mean of
            the loss of each.
        padding_error: Relative difference that padding made.
        warnings: In plain words, what is not exact and by how much.
    """

    rule: TargetRule
    wants_own_count: bool = False
    pads_alike: bool = False
    rule_error: float = 0.0
    padding_error: float = 0.0
    warnings: tuple[str, ...] = ()


def rounding_of(dtype: torch.dtype) -> float:
    """Return by how much rounding may move the loss of a model computing in `dtype`, relative."""
    return _ROUNDING.get(dtype, _ROUNDING[torch.float32])


def differ(a: float, b: float) -> float:
    """Relative difference; two NaNs are alike, one NaN is not.

    >>> differ(2.0, 1.5)
    0.25
    """
    if math.isnan(a) and math.isnan(b):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if a == b else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-12)
