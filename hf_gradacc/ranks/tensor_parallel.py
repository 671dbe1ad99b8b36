"""Models that transformers splits while it loads them: by layers, by weights, or both.

``from_pretrained(distributed_config=...)`` gives each rank its part of every weight (a `DTensor`)
and puts the collectives into the model itself: tensor parallelism into its layers, FSDP2 around
them. The stock Trainer leaves such a model unwrapped. Ranks run in lockstep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter

from hf_gradacc.errors import ConfigError
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.ranks.layout import RankLayout

__all__ = ["ShardedByLoading", "gradients_apart", "reduced_in_backward"]

_PARTIAL = "replicated_with_grad_allreduce"
"""The style of weights whose gradient transformers sums over a tensor-parallel group by a hook."""


class ShardedByLoading(Engine):
    """Tensor parallelism, FSDP2 and both, as ``distributed_config`` sets them up.

    FSDP2 divides gradients by the number of replicas. Tensor parallelism divides nothing: every
    rank of a replica computes the whole loss of the replica's rows.
    """

    lockstep = True
    shards_weights = True
    can_differentiate_outside = False
    splits_layers = True

    def __init__(self, accelerator: Any, args: Any, layout: RankLayout | None = None) -> None:
        super().__init__(accelerator, args, layout)
        self.deals_in_lockstep = self.layout.num_replicas > 1
        self._fsdp_modules: list[FSDPModule] = []
        self._splits_sums = False

    def find_notes(self) -> Iterator[str]:
        """Yield nothing: ``sync_each_batch`` is heard."""
        yield from ()

    def after_wrapping(self, model: nn.Module, *, has_own_step: bool = False) -> None:
        """See what transformers has put into the model.

        Args:
            model: The model, which is not wrapped.
            has_own_step: Its ``training_step`` runs a backward of its own, or several.

        Raises:
            ConfigError: If torch divides the gradients of experts twice.
        """
        self._fsdp_modules = [
            module for module in model.modules() if isinstance(module, FSDPModule)
        ]
        config = _distributed_config(model)
        _refuse_experts_divided_twice(model, config)
        # With copies of the shards, only their sum over the copies waits: gradients stay split.
        self._splits_sums = (
            self.reduces_each_micro_batch
            or getattr(config, "dp_replicate_size", 1) > 1
            or _has_partial_weights(model, config)
        )

    @contextlib.contextmanager
    def hold_gradients(self, model: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Hold back what may wait for the last backward, and add up what may not.

        Adapters put on such a model are no DTensors, and the stock Trainer averages their gradients
        over ranks when it is told that an update ends (``_sync_replicated_trainable_parameters``).
        """
        state = self.accelerator.gradient_state
        is_update_over = state.sync_gradients
        state._set_sync_gradients(is_last)
        for module in self._fsdp_modules:
            if self._splits_sums:
                module.set_requires_all_reduce(is_last, recurse=False)
            else:
                module.set_requires_gradient_sync(is_last, recurse=False)
        try:
            with gradients_apart(model):
                yield
        finally:
            for module in self._fsdp_modules:
                module.set_requires_gradient_sync(True, recurse=False)
            state._set_sync_gradients(is_update_over)


@contextlib.contextmanager
def gradients_apart(model: nn.Module) -> Iterator[None]:
    """Keep what a weight's gradient has added up so far out of a backward that reduces it.

    Qwen3's norms of queries and keys are whole on every rank, and each rank sees a part of their
    gradient. Transformers sums the parts in a hook of each backward, over all that ``.grad`` holds:
    of several micro-batches, the first would be summed again with each later one. In the stock
    Trainer four micro-batches on two ranks make these gradients 4.5 times too large.
    """
    earlier: list[tuple[Parameter, Tensor]] = []
    for p in model.parameters():
        if p.grad is not None and reduced_in_backward(p):
            earlier.append((p, p.grad))
            p.grad = None
    try:
        yield
    finally:
        for p, gradient in earlier:
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)


def reduced_in_backward(parameter: Parameter) -> bool:
    """Return whether a hook of transformers sums a weight's gradient in every backward.

    The stock Trainer has a hook of its own on weights that are whole on every rank. That one waits
    for the end of the update, and averages once what has been added up.
    """
    hooks: Any = parameter._post_accumulate_grad_hooks
    waits = bool(getattr(parameter, "_replicated_grad_hook_registered", False))
    return len(hooks or ()) > int(waits)


def _distributed_config(model: nn.Module) -> Any:
    """Return the ``distributed_config`` that a model was loaded with; None if it is not known."""
    configs = (getattr(m, "config", None) for m in model.modules())
    found = (getattr(config, "distributed_config", None) for config in configs)
    return next((config for config in found if config is not None), None)


def _has_partial_weights(model: nn.Module, config: Any) -> bool:
    """Return whether weights inside of FSDP2 have such a hook: then every backward has to reduce.

    There the hook is on the weights that FSDP2 puts together for a forward. Their gradient, held
    back, would be summed again in every later backward, where nobody outside can keep it apart.
    """
    plans = (getattr(module, "_tp_plan", None) for module in model.modules())
    splits_layers = getattr(config, "tp_size", 1) > 1
    found = (plan for plan in plans if isinstance(plan, dict))
    return splits_layers and any(_PARTIAL in plan.values() for plan in found)


def _refuse_experts_divided_twice(model: nn.Module, config: Any) -> None:
    """Refuse what torch divides by the number of replicas before and after it sums.

    Experts that live whole on one rank each (``ep_size`` = all ranks) are reduced by a group of one
    with a divisor of its own. For float32 and bfloat16 torch divides once, for other dtypes a
    second time (``foreach_reduce`` in ``_fsdp_collectives.py``, torch 2.13).
    """
    if getattr(config, "ep_size", 1) == 1 or config.efsdp_size > 1 or config.dp_size == 1:
        return
    if any(p.dtype not in (torch.float32, torch.bfloat16) for p in model.parameters()):
        raise ConfigError(
            f"distributed_config: ep_size = {config.ep_size} leaves every expert on one rank, and "
            f"torch divides the gradients of such experts twice unless they are float32 or "
            f"bfloat16. Load the model with dtype = torch.bfloat16, or use a smaller ep_size."
        )
