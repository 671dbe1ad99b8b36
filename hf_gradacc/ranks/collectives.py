"""What ranks exchange: one vector of counts per update, and the gradients, once.

Under DDP each rank accumulates gradients locally. They are summed here after the last micro-batch,
not by DDP's hooks during its backward. So ranks may run different numbers of micro-batches, or
none, and a failure inside a backward leaves no rank waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from hf_gradacc.errors import ConfigError
from hf_gradacc.updates.update import Update

__all__ = [
    "agree_on_inputs",
    "all_reduce_gradients",
    "gather_objects",
    "keep_ranks_apart",
    "largest_over_ranks",
    "share_first",
    "share_of_first_rank",
    "share_running_statistics",
    "sum_over_ranks",
    "trainable",
    "wait_for_ranks",
]

_BUCKET_BYTES = 64 * 2**20


def sum_over_ranks(vector: Tensor, *, device: torch.device) -> Tensor:
    """Sum a small vector over all ranks, in one collective. The result is on the host."""
    if _is_alone():
        return vector
    on_device = vector.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def trainable(model: nn.Module) -> list[Parameter]:
    """List the trained parameters, in the same order on every rank."""
    return [p for p in model.parameters() if p.requires_grad]


def keep_ranks_apart(model: nn.Module) -> None:
    """Keep DDP's forward from waiting for other ranks.

    DDP broadcasts rank 0's buffers in its first forward, and again in every forward whose
    backward it reduces. A rank without a micro-batch in that update runs no forward, and the
    others would wait for it forever. All ranks got rank 0's buffers when DDP was made.

    Raises:
        ConfigError: If DDP has a static graph or a communication hook, which need its reduction.
    """
    for module in model.modules():
        if not isinstance(module, DistributedDataParallel):
            continue
        if module.static_graph:
            raise ConfigError(
                "ddp_static_graph = True prepares a reduction that is never run here: gradients "
                "are summed once per update, outside of DDP. Leave it out; nothing is lost."
            )
        if module._comm_hooks:
            names = ", ".join(hook.__name__ for hook, _ in module._comm_hooks)
            raise ConfigError(
                f"the DDP communication hook {names} would never be called here: gradients are "
                f"summed once per update, outside of DDP, in the precision they were added up "
                f"in. Leave the hook out (accelerate: comm_hook = 'no')."
            )
        module.forward_sync_buffers = False


def share_running_statistics(model: nn.Module) -> None:
    """Give every rank the running statistics of rank 0, as DDP would in each forward.

    Training does not use them. Evaluation does, and checkpoints hold those of rank 0.
    """
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, src=0)


def all_reduce_gradients(
    parameters: Sequence[Parameter], *, has_grad_anywhere: Sequence[bool]
) -> None:
    """Sum the gradients of parameters over ranks, in place.

    A parameter without a gradient on this rank counts as zero. One without a gradient on any rank
    keeps None, as in one process: with zeros, an optimizer would decay its weight.

    Args:
        parameters: The same parameters in the same order on every rank.
        has_grad_anywhere: Which of them have a gradient on any rank; see `UpdateOutcome.agree`.
    """
    used = [p for p, has in zip(parameters, has_grad_anywhere, strict=True) if has]
    for p in used:
        if p.grad is None:
            # Not the weight's dtype: gradients of bf16 weights may be float32, see `precision`.
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
    for bucket in _bucket(used):
        grads = [p.grad for p in bucket if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        for grad, summed in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def _bucket(parameters: list[Parameter]) -> Iterable[list[Parameter]]:
    """Group neighbours of one dtype, to send a few large messages instead of many small ones."""
    bucket: list[Parameter] = []
    size = 0
    for p in parameters:
        assert p.grad is not None
        grad_bytes = p.grad.numel() * p.grad.element_size()
        other_kind = bucket and (
            bucket[0].grad is not None
            and (bucket[0].grad.dtype, bucket[0].device) != (p.grad.dtype, p.device)
        )
        if bucket and (other_kind or size + grad_bytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += grad_bytes
    if bucket:
        yield bucket


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


def largest_over_ranks(number: int, *, device: torch.device) -> int:
    """Return the largest of the ranks' numbers. One small collective."""
    if _is_alone():
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def wait_for_ranks() -> None:
    """Wait until every rank has called this."""
    if not _is_alone():
        dist.barrier()


def _is_alone() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
