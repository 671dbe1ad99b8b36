"""Label smoothing that keeps what else is in a model's loss.

The stock Trainer takes the labels away from the model and computes a smoothed loss itself. The
model's own loss is never computed then, so a router loss is lost, and whether to shift labels is
guessed from the class name. Here the model keeps its labels and its loss, and the difference that
smoothing makes is added:

    smoothed = (1 - ε)·nll + ε·uniform     so     loss + ε·(uniform - nll)

with ``nll`` the mean of ``-log p(target)`` and ``uniform`` the mean over the vocabulary of
``-log p``, both over targets (Szegedy et al. 2016, arXiv 1512.00567).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = ["smoothing_correction"]


def smoothing_correction(
    logits: Tensor, labels: Tensor, *, epsilon: float, shifted: bool
) -> Tensor:
    """Compute what label smoothing adds to a mean cross entropy.

    Args:
        logits: ``[batch, seq, vocab]`` or ``[batch, classes]``. With virtual tokens in front
            (prompt tuning) ``seq`` is longer than that of the labels.
        labels: ``[batch, seq]`` or ``[batch]``; ``-100`` is left out.
        epsilon: The smoothing factor, 0 to 1.
        shifted: Whether the model's own loss predicts label ``t + 1`` at position ``t``.

    Returns:
        A scalar to add to the loss.
    """
    labels = labels.to(logits.device)  # the head may be on another one than the inputs
    if logits.ndim == 3 and labels.ndim == 2:
        extra = logits.shape[1] - labels.shape[1]
        if extra > 0:
            # The last virtual token predicts the first label: align at the right, and shift.
            labels = torch.nn.functional.pad(labels, (extra, 0), value=IGNORE_INDEX)
            shifted = True
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
    is_target = labels.ne(IGNORE_INDEX)
    logits, labels = logits[is_target], labels[is_target]
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    log_probs = torch.log_softmax(logits, dim=-1, dtype=dtype)
    nll = -log_probs.gather(-1, labels.unsqueeze(-1)).mean()
    uniform = -log_probs.mean(-1).mean()
    return epsilon * (uniform - nll)
