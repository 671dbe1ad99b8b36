"""Hold a model in eval mode for a while, and know what does not show there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["find_mixing", "held_in_eval_mode"]


def find_mixing(model: nn.Module) -> list[str]:
    """Say so where rows of a micro-batch influence each other, but only while training."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            found.append(
                f"{name} ({type(module).__name__}) normalizes by the rows of a micro-batch, so "
                f"rows influence each other: no cut gives exactly the whole update."
            )
            break
    config: Any = getattr(model, "config", None)
    if getattr(config, "moe_eval_capacity_token_fraction", None) is not None:
        found.append(
            f"each expert takes {config.expert_capacity} tokens of a micro-batch "
            f"(expert_capacity) and drops the rest, so rows influence each other: no cut gives "
            f"exactly the whole update."
        )
    return found


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
