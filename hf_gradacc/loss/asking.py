"""Hold a model in eval mode for a while, leave it as it was, and say what that mode hides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["find_mixing", "held_in_eval_mode"]


@contextlib.contextmanager
def held_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a block with a model in eval mode.

    NLLB-MoE's routers write ``expert_capacity`` in every eval forward and train with it from then
    on: after a look at three short rows they would drop most tokens of a micro-batch. It is put
    back.
    """
    was_training = model.training
    routers: list[Any] = [m for m in model.modules() if hasattr(m, "expert_capacity")]
    capacities = [router.expert_capacity for router in routers]
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for router, capacity in zip(routers, capacities, strict=True):
            router.expert_capacity = capacity


def find_mixing(model: nn.Module) -> list[str]:
    """Say so of models whose rows influence each other in training, unseen in evaluation mode."""
    warnings = []
    config = getattr(model, "config", None)
    if getattr(config, "moe_eval_capacity_token_fraction", None) is not None:
        warnings.append(
            f"each expert takes {getattr(config, 'expert_capacity', None)} tokens of a micro-batch "
            "(expert_capacity) and drops the rest, so rows influence each other: no cut gives "
            "exactly the whole update."
        )
    was_training = model.training
    model.train()  # a vision tower may pin its own to evaluation mode
    num_norms = sum(isinstance(m, _BatchNorm) and m.training for m in model.modules())
    model.train(was_training)
    if num_norms:
        warnings.append(
            f"{num_norms} BatchNorm layers normalize by the rows of a micro-batch, so rows "
            "influence each other: no cut gives exactly the whole update. Keep them in evaluation "
            "mode, or use a model that normalizes each row by itself (LayerNorm, GroupNorm)."
        )
    return warnings
