"""The state of models whose weights are dealt to ranks: torch's distributed checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import PreTrainedModel

__all__ = ["load_optimizer_state", "local_part", "model_class_of", "save_optimizer_state"]


def save_optimizer_state(model: PreTrainedModel, optimizer: Optimizer, folder: str) -> None:
    """Write the state of an optimizer, each rank its part, under the names of the weights."""
    from transformers.distributed.checkpoint import save_optimizer_distributed

    with _raising_the_cause():
        save_optimizer_distributed(model, optimizer, folder)


def load_optimizer_state(model: PreTrainedModel, optimizer: Optimizer, folder: str) -> None:
    """Read what `save_optimizer_state` wrote, however the weights are dealt now."""
    from transformers.distributed.checkpoint import load_optimizer_distributed

    with _raising_the_cause():
        load_optimizer_distributed(model, optimizer, folder)


def model_class_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class a model was written as: FSDP2 makes one of its own in front of it."""
    classes = [c for c in type(model).__mro__ if issubclass(c, PreTrainedModel)]
    return next(c for c in classes if not issubclass(c, FSDPModule))


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, or the tensor itself if it is whole."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


@contextlib.contextmanager
def _raising_the_cause() -> Iterator[None]:
    """Raise what a rank failed with; torch wraps it in what is no `Exception`, on all ranks."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause if isinstance(cause, Exception) else RuntimeError(str(error)) from error
