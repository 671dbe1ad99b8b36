"""What ranks exchange besides gradients: small vectors, objects, running statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase

from hf_gradacc.updates.update import Update, start_copy

__all__ = [
    "agree_on_inputs",
    "gather_objects",
    "gather_vectors",
    "largest_over_ranks",
    "share_first",
    "share_of_first_rank",
    "share_running_statistics",
    "sum_over_ranks",
    "trainable",
    "wait_for_ranks",
]


def sum_over_ranks(vector: Tensor, *, device: torch.device) -> Tensor:
    """Sum a small vector over all ranks, in one collective. The result is on the host."""
    if _is_alone():
        return vector
    on_device = start_copy(vector, device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def trainable(model: nn.Module) -> list[Parameter]:
    """List the trained parameters, in the same order on every rank."""
    return [p for p in model.parameters() if p.requires_grad]


def share_running_statistics(model: nn.Module) -> None:
    """Give every rank the running statistics of rank 0, as DDP would in each forward.

    Training does not use them. Evaluation does, and checkpoints hold those of rank 0.
    """
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, src=0)


def agree_on_inputs(update: Update) -> Any:
    """Return the same collated inputs on every rank, from a rank whose share has some.

    For streams that cannot be read ahead: the model is asked with the first update, and all ranks
    must ask with the same rows.
    """
    return share_first(update.micro_batches[0].inputs if len(update) else None)


def share_first(own: Any) -> Any:
    """Return on every rank the object of the first rank that has one; None if none has."""
    if _is_alone():
        return own
    shares = gather_objects(send_to_device(own, "cpu"))  # ranks use different devices
    return next((share for share in shares if share is not None), None)


def share_of_first_rank(own: Any) -> Any:
    """Return rank 0's object on every rank. It must be picklable."""
    if _is_alone():
        return own
    shared = [own]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def gather_objects(own: Any) -> list[Any]:
    """Return all ranks' objects on every rank, in the order of ranks. They must be picklable."""
    if _is_alone():
        return [own]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks


def gather_vectors(own: Tensor, *, device: torch.device) -> Tensor:
    """Return all ranks' vectors ``[ranks, n]`` on the host, in one collective."""
    if _is_alone():
        return own[None]
    on_device = start_copy(own, device)
    ranks = [torch.empty_like(on_device) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, on_device)
    return torch.stack(ranks).cpu()


def largest_over_ranks(number: int, *, device: torch.device) -> int:
    """Return the largest of the ranks' numbers. One small collective."""
    if _is_alone():
        return number
    largest = start_copy(torch.tensor(number), device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def wait_for_ranks() -> None:
    """Wait until every rank has called this."""
    if not _is_alone():
        dist.barrier()


def _is_alone() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
