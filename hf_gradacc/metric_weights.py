"""Means of a trainer's own metrics over an update: each weighted by what it is a mean over.

TRL's trainers append one value per micro-batch to lists, and log the plain mean of each list. That
is a mean of means: on rows of 3 and 30 tokens it tells the token accuracy of neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["WeightedValues", "add_value", "count_per_metric", "means_of"]

WeightedValues = dict[str, tuple[float, float]]
"""Sum of value × weight, and sum of weights; for a ``min_`` or ``max_`` the extreme, and 1."""


def count_per_metric(inputs: Any) -> dict[str, float]:
    """Count what the metrics of TRL's preference trainers are means over.

    Only those that are not means over sequences are named.

    Args:
        inputs: Collated inputs. With ``completion_mask`` ``[rows, seq]`` they are those of KTO if
            there is a ``label`` ``[rows]``, else those of DPO: chosen rows, then rejected ones.

    >>> count_per_metric({"completion_mask": torch.tensor([[0, 1, 1], [0, 0, 1]])})
    {'entropy': 3.0, 'mean_token_accuracy': 2.0, 'logits/chosen': 2.0, 'logits/rejected': 1.0}
    """
    mask = inputs.get("completion_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor):
        return {}
    tokens = mask[:, 1:].ne(0).sum(1)
    label = inputs.get("label")
    if not isinstance(label, Tensor):
        chosen, rejected = (float(half.sum()) for half in tokens.chunk(2))
        return {
            "entropy": chosen + rejected,
            "mean_token_accuracy": chosen,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
        }
    counts: dict[str, float] = {"entropy": float(tokens.sum())}
    for side, rows in (("chosen", label.to(torch.bool)), ("rejected", ~label.to(torch.bool))):
        counts[f"logits/{side}"] = float(tokens[rows].sum())
        counts[f"rewards/{side}"] = counts[f"logps/{side}"] = float(rows.sum())
    return counts


def add_value(to: WeightedValues, key: str, value: float, *, weight: float) -> None:
    """Take in one value of a metric, in place.

    >>> sums = {}
    >>> add_value(sums, "accuracy", 1.0, weight=3)
    >>> add_value(sums, "accuracy", 0.0, weight=1)
    >>> means_of([sums])
    {'accuracy': 0.75}
    """
    if weight == 0:
        return  # the mean over nothing
    before = to.get(key)
    if key.startswith(("min_", "max_")):
        choose = min if key.startswith("min_") else max
        to[key] = (value if before is None else choose(before[0], value), 1.0)
    else:
        total, weights = before or (0.0, 0.0)
        to[key] = (total + value * weight, weights + weight)


def means_of(parts: Iterable[WeightedValues]) -> dict[str, float]:
    """Give each metric's mean over all parts: micro-batches of one rank, or ranks.

    >>> means_of([{"max_reward": (2.0, 1.0), "a": (3.0, 2.0)}, {"max_reward": (4.0, 1.0)}])
    {'max_reward': 4.0, 'a': 1.5}
    """
    sums: WeightedValues = {}
    for part in parts:
        for key, (total, weight) in part.items():
            add_value(sums, key, total / weight, weight=weight)
    means = {key: total / weight for key, (total, weight) in sums.items()}
    sides = [means.get(f"rewards/{side}", math.nan) for side in ("chosen", "rejected")]
    if not any(map(math.isnan, sides)):
        # KTO's sides have weights of their own, and a micro-batch may hold one side alone.
        means["rewards/margins"] = sides[0] - sides[1]
    return means
