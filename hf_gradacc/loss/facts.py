"""What the probe finds out about a loss, and how close two losses have to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hf_gradacc.updates.targets import TargetRule

__all__ = ["Compared", "LossFacts", "LossOf", "differ", "rounding_of"]

Compared = Literal["loss", "rows_gradient", "shortcut", "isolation", "update_gradient"]
"""What two evaluations are compared by; `rounding_of` says how far apart they may be.

- ``loss``: the loss of rows together and of each by itself, with padding and without.
- ``rows_gradient``: the gradient of the last parameters, of rows together and of each by itself.
- ``shortcut``: a loss or hidden states computed another way.
- ``isolation``: hidden states computed the same way beside other neighbours, which may not reach
  them. Rounding is zero but for a mixture of experts, whose batches are then composed otherwise.
- ``update_gradient``: all of an update's gradient, accumulated and at once (`verify_parity`).
"""

# Relative. Most losses of transformers are computed in float32 even if the model is float64.
_ROUNDING: dict[str, dict[torch.dtype, float]] = {
    kind: dict(
        zip((torch.float64, torch.float32, torch.float16, torch.bfloat16), limits, strict=True)
    )
    for kind, limits in {
        "loss": (5e-7, 2e-5, 2e-2, 4e-2),
        "rows_gradient": (5e-5, 2e-3, 1e-1, 1e-1),
        "shortcut": (1e-6, 5e-5, 5e-3, 3e-2),
        "isolation": (1e-7, 1e-5, 1e-3, 5e-3),
        "update_gradient": (1e-6, 1e-4, 2e-2, 5e-2),
    }.items()
}


LossOf = Callable[[Mapping[str, Any], "int | None"], float]
"""Gives the loss of collated inputs; the second argument is what to pass as the count."""


@dataclass(frozen=True)
class LossFacts:
    """What the probe found out about a loss.

    Attributes:
        rule: What it takes its mean over.
        wants_own_count: It must be called with ``num_items_in_batch`` set to its own targets to be
            a mean; otherwise it is called with None.
        pad_to_one_width: Padding changes its value, so an update's micro-batches need one width.
        rule_error: Relative difference between the loss of rows together and the weighted mean of
            the loss of each.
        padding_error: Relative difference that padding made.
        warnings: In plain words, what is not exact and by how much.
    """

    rule: TargetRule
    wants_own_count: bool = False
    pad_to_one_width: bool = False
    rule_error: float = 0.0
    padding_error: float = 0.0
    warnings: tuple[str, ...] = ()


def rounding_of(dtype: torch.dtype, kind: Compared = "loss") -> float:
    """Return how far apart two evaluations may be by rounding alone, relative.

    Args:
        dtype: What the model computes in; one that is not in the table counts as float32.
        kind: What is compared.

    >>> rounding_of(torch.bfloat16), rounding_of(torch.float32, "update_gradient")
    (0.04, 0.0001)
    """
    limits = _ROUNDING[kind]
    return limits.get(dtype, limits[torch.float32])


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
