"""Losses of a causal language model, written out."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

__all__ = ["focal", "smoothed", "targets_of"]


def targets_of(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the logits ``[rows * (seq - 1), vocab]`` and what each is to predict."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()


def smoothed(model: Any, batch: Any) -> Tensor:
    """Return the loss under label smoothing by a tenth."""
    return functional.cross_entropy(*targets_of(model, batch), label_smoothing=0.1)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of ``(1 - p)**2`` times the cross-entropy."""
    nll = functional.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-nll).exp()) ** 2 * nll).sum() / labels.ne(-100).sum()
