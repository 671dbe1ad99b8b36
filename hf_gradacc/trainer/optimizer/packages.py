"""What optimizers of other packages need of a run, beyond what stock gives them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from hf_gradacc.errors import CheckpointError

__all__ = ["projectors_readable", "refuse_lost_state", "use_averages"]

_PROJECTORS = {
    "apollo_torch.random_projector": "GradientProjector",
    "apollo_torch.svd_projector": "GaLoreProjector",
    "galore_torch.galore_projector": "GaLoreProjector",
}


def use_averages(optimizer: Any) -> None:
    """Put the weights in place that a schedule-free optimizer evaluates with; others have none.

    Stock does so before an evaluation, and whoever steps next puts the others back. Without it a
    model would be saved, or another one loaded into it, with weights that are only trained on.
    """
    swap = getattr(optimizer, "eval", None)
    if callable(swap):
        swap()


@contextlib.contextmanager
def projectors_readable() -> Iterator[None]:
    """Let a checkpoint be read whose optimizer keeps an object beside its tensors.

    GaLore and APOLLO keep the projection of each gradient so, and ``torch.load`` refuses classes
    that nobody has vouched for.
    """
    known = [
        getattr(sys.modules[module], name)
        for module, name in _PROJECTORS.items()
        if module in sys.modules
    ]
    with torch.serialization.safe_globals(known) if known else contextlib.nullcontext():
        yield


def refuse_lost_state(optimizer_class: str, checkpoint: str) -> None:
    """Refuse to go on with an optimizer whose moments no checkpoint holds.

    Raises:
        CheckpointError: Naming it, and the ways out.
    """
    if optimizer_class == "GrokAdamW":
        raise CheckpointError(
            f"{checkpoint} cannot be gone on from: GrokAdamW keeps its moments by the parameters "
            f"of one process, so they are lost with it.\n  Train in one go, use another optimizer, "
            f"or begin a new run from the weights: from_pretrained({checkpoint!r})."
        )
