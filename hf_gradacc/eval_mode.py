"""Hold a model in eval mode for a while, and leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["held_in_eval_mode"]


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
