"""What DDP would do by itself: it is kept from waiting for other ranks, and from holding memory.

Gradients are summed by `ranks.reduction`. The wrapper stays, since users and libraries look for it
(``model.module``, ``accelerator.no_sync``). Its reducer goes: that holds a flat copy of the whole
gradient from the moment the model is wrapped.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from hf_gradacc.errors import ConfigError

__all__ = ["bucket_bytes_of", "free_buckets", "has_collectives", "keep_ranks_apart"]

_BUCKET_BYTES = 25 * 2**20
"""As DDP's own default: small enough to begin early, large enough to fill a link."""


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
                "are summed outside of DDP, once per update. Leave it out; nothing is lost."
            )
        if module._comm_hooks:
            names = ", ".join(hook.__name__ for hook, _ in module._comm_hooks)
            raise ConfigError(
                f"the DDP communication hook {names} would never be called here: gradients are "
                f"summed outside of DDP, once per update, in the precision they were added up "
                f"in. Leave the hook out (accelerate: comm_hook = 'no')."
            )
        module.forward_sync_buffers = False


def bucket_bytes_of(model: nn.Module) -> int:
    """Return how many bytes of gradients to send at once: ``ddp_bucket_cap_mb``, or 25 MiB."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return int(getattr(module, "bucket_bytes_cap", _BUCKET_BYTES))
    return _BUCKET_BYTES


def has_collectives(model: nn.Module) -> bool:
    """Return whether ranks meet inside of a backward: then nothing else may be sent from there."""
    return any(isinstance(module, SyncBatchNorm) for module in model.modules())


def free_buckets(model: nn.Module) -> None:
    """Delete DDP's reducer: the memory of a whole gradient, and a hook on each parameter.

    Under ``no_sync``, which each of our backwards runs under, DDP asks its reducer for nothing.
    Whoever runs a forward of the wrapper outside of it gets another one, see `_Absent`.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and not module._use_python_reducer:
            absent: Any = _Absent(module)
            module.reducer = module.logger = absent


class _Absent:
    """Stands where DDP's reducer or its logger was, and makes both again if they are asked for.

    torch 2.13, `DistributedDataParallel._ddp_init_helper`: it makes them without a collective.
    """

    def __init__(self, ddp: Any) -> None:
        self._ddp = ddp

    def _rebuild_buckets(self) -> bool:
        """Answer what every forward asks: there are no buckets in another order."""
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling look for such names
            raise AttributeError(name)
        ddp = self._ddp
        if isinstance(ddp.reducer, _Absent):
            parameters, is_sparse = ddp._build_params_for_reducer()
            names = ddp._build_debug_param_to_name_mapping(parameters)
            ddp._ddp_init_helper(parameters, is_sparse, names, ddp.static_graph)
        return getattr(ddp.logger if name in dir(ddp.logger) else ddp.reducer, name)
