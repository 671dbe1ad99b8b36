"""Ask for gradients where losses say nothing: those of an untrained head are all alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_gradacc.targets import TargetRule

__all__ = ["find_rule_by_gradients"]


def find_rule_by_gradients(
    inputs: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    counts: Mapping[TargetRule, Sequence[int]],
    gradient_of: Callable[[Mapping[str, Any], int], Tensor],
    *,
    tolerance: float,
) -> tuple[TargetRule | None, float]:
    """Find the rule under which the gradients of rows add up to that of all.

    Args:
        inputs: Rows collated together.
        rows: Each of them by itself.
        counts: Their targets under each rule, in the order in which rules are tried.
        gradient_of: Gives the gradient ``[numbers]`` of inputs that hold so many targets.
        tolerance: How far apart rounding may bring two gradients, relative.

    Returns:
        The rule and by how much it is off; None and the first rule's error if none fits. The first
        rule with an error of 0 where no gradient is to be had.
    """
    first, first_error = next(iter(counts)), math.inf
    for rule, own in counts.items():
        if sum(own) <= 0 or min(own) < 0:
            continue
        try:
            together = gradient_of(inputs, sum(own)).double()
            parts = [
                gradient_of(row, n).double() * (n / sum(own))
                for row, n in zip(rows, own, strict=True)
                if n
            ]
        except (RuntimeError, TypeError):
            return first, 0.0  # none flows in evaluation mode (cuDNN's RNNs), or none at all
        size = float(together.norm())
        error = float((together - sum(parts)).norm()) / size if size else 0.0
        if error <= tolerance or math.isnan(error):
            return rule, error
        first_error = error if rule is first else first_error
    return (None, first_error) if math.isfinite(first_error) else (first, 0.0)
