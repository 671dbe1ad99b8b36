"""Ask for gradients where losses say nothing: those of an untrained head are all alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["compare_gradients"]


def compare_gradients(
    parts: Sequence[Mapping[str, Any]],
    counts: Sequence[int],
    gradient_of: Callable[[Mapping[str, Any], int], Tensor],
    *,
    tolerance: float,
) -> list[str]:
    """Compare the gradient of rows together with the weighted mean of those of each.

    Args:
        parts: The rows collated together, then each by itself.
        counts: Targets of each part.
        gradient_of: Gives the gradient ``[numbers]`` of a part of so many targets.
        tolerance: How far apart rounding may bring them, relative.

    Returns:
        A warning if they differ, else nothing.
    """
    pairs = [(part, n) for part, n in zip(parts, counts, strict=True) if n > 0]
    if len(pairs) < len(parts) or sum(counts[1:]) != counts[0]:
        return []
    try:
        together, *alone = (gradient_of(part, n).double() * (n / counts[0]) for part, n in pairs)
    except (RuntimeError, TypeError):
        return []  # no gradient flows in evaluation mode (cuDNN's RNNs), or none at all
    size = float(together.norm())
    error = float((together - sum(alone)).norm()) / size if size else 0.0
    if error <= tolerance or not math.isfinite(error):
        return []
    return [
        f"the gradient of {len(alone)} rows together differs from the weighted mean of the "
        f"gradient of each by {error:.1e} (relative; rounding explains {tolerance:.0e}). Rows of "
        "a batch influence each other, or the loss is no mean over its targets (class weights are "
        "none): how an update is cut will show in its gradient."
    ]
