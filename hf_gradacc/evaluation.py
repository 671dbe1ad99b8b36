"""Evaluation loss per target token, whatever the evaluation batch size.

The stock Trainer repeats each batch's mean loss once per sequence and averages, so `eval_loss`
moves with ``per_device_eval_batch_size``. Here it is ``Σ loss·n / Σ n`` over batches and ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_gradacc.reduction import sum_over_ranks

__all__ = ["EvalLoss"]


class EvalLoss:
    """Running sum of losses weighted by targets.

    >>> total = EvalLoss()
    >>> total.add(torch.tensor(2.0), num_targets=1)
    >>> total.add(torch.tensor(1.0), num_targets=3)
    >>> total.mean(torch.device("cpu"))
    1.25
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._num_targets = 0

    def add(self, loss: Tensor, *, num_targets: int) -> None:
        """Take in one batch's mean loss. The sum stays on the device: no synchronization."""
        if num_targets == 0:
            return  # the mean over nothing is NaN
        # CPU and CUDA have float64; MPS has not.
        dtype = torch.float32 if loss.device.type == "mps" else torch.float64
        weighted = loss.detach().to(dtype) * num_targets
        self._sum = weighted if self._sum is None else self._sum + weighted
        self._num_targets += num_targets

    def mean(self, device: torch.device) -> float | None:
        """Give the loss per target over all ranks, None if there was no target."""
        local = 0.0 if self._sum is None else float(self._sum)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        total = sum_over_ranks(
            torch.tensor([local, float(self._num_targets)], dtype=dtype), device=device
        )
        return float(total[0] / total[1]) if total[1] > 0 else None


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows.

    >>> perplexity(0.0)
    1.0
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
