"""How the processes of a run share an update: alone, under DDP, or with weights sharded by FSDP2.

An engine says when gradients are held back, sums what the ranks' shares hold, and reduces. Under
DDP ranks run alone: gradients are accumulated locally and summed once, after the last micro-batch,
so ranks may run different numbers of them, or none. FSDP2 and ZeRO (`ranks.deepspeed`) gather
weights in each forward and average gradients in the backward that reduces them, so all ranks run
the largest number any of them has planned; `updates.recut.even_out` cuts the others' shares finer.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_gradacc.errors import ConfigError
from hf_gradacc.ranks.collectives import (
    all_reduce_gradients,
    keep_ranks_apart,
    sum_over_ranks,
    trainable,
)
from hf_gradacc.ranks.outcome import UpdateOutcome
from hf_gradacc.updates.update import UpdateStats

__all__ = [
    "DataParallel",
    "Engine",
    "FullySharded",
    "OneProcess",
    "end_group_at_exit",
    "make_engine",
]

_SECONDS_TO_REST = 0.1


class Engine:
    """What drives the ranks of a run. The Trainer asks it at fixed places of every update.

    Args:
        accelerator: The Trainer's `Accelerator`.
        args: The Trainer's arguments.

    Attributes:
        lockstep: Forward and backward contain collectives, and gradients come out of them as an
            average over ranks. Otherwise ranks run alone.
        shards_weights: A rank holds a part of the weights only.
    """

    lockstep = False
    shards_weights = False

    def __init__(self, accelerator: Any, args: Any) -> None:
        self.accelerator = accelerator
        self.args = args
        self.world_size: int = args.world_size

    @property
    def factor(self) -> int:
        """What a loss is multiplied by, because the engine divides gradients by it."""
        return self.world_size if self.lockstep else 1

    @property
    def can_roll_back(self) -> bool:
        """Whether a forward or backward may be left in the middle: not with collectives in it."""
        return not self.lockstep

    @property
    def searches_loss_scale(self) -> bool:
        """Whether an overflow may be due to a loss scale that falls by itself."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1.0

    def find_problems(self) -> Iterator[str]:
        """Yield what would train a wrong gradient, or one that nobody has compared."""
        yield from ()

    def before_wrapping(self, checkpoint: str | None, *, is_wrapped: bool) -> None:
        """Get ready for the model to be wrapped.

        Args:
            checkpoint: The folder that training goes on from.
            is_wrapped: An earlier call of ``train()`` has wrapped the model.
        """

    def after_wrapping(self, model: nn.Module) -> None:
        """Let no forward wait for other ranks beyond what the engine itself does."""
        keep_ranks_apart(model)

    def count(self, local: UpdateStats) -> tuple[UpdateStats, list[int]]:
        """Sum what the ranks' shares hold, and tell how many micro-batches each has planned.

        One collective: each rank writes its number of micro-batches into a place of its own.

        Returns:
            The sums, and the numbers by rank; no numbers where ranks need not run equally many.
        """
        counts = local.counts()
        planned = torch.zeros(self.world_size if self.lockstep else 0, dtype=counts.dtype)
        if self.lockstep:
            planned[self.args.process_index] = local.num_micro_batches
        total = sum_over_ranks(torch.cat([counts, planned]), device=self.args.device)
        return UpdateStats.from_counts(total[: len(counts)]), total[len(counts) :].tolist()

    def hold_gradients(
        self, model: nn.Module, *, is_last: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Keep a backward from reducing gradients, except the one that is meant to.

        Args:
            model: The wrapped model.
            is_last: It is the update's last backward on this rank.
        """
        return contextlib.nullcontext()

    def agree(
        self, outcome: UpdateOutcome, *, loss: Tensor | None, model: nn.Module
    ) -> UpdateOutcome:
        """Hear what became of the update on all ranks, and tell what became of it here.

        One collective, which every rank reaches whatever happened to it.
        """
        if self.world_size == 1:
            return outcome
        return outcome.agree(device=self.args.device, loss=loss)[0]

    def reduce(self, model: nn.Module) -> None:
        """Sum the update's gradients over ranks, unless a backward has done so."""

    def clip(self, model: nn.Module, stock_clip: Callable[[nn.Module], Any]) -> Any:
        """Clip the update's gradient."""
        return stock_clip(model)

    def grad_norm(
        self, model: nn.Module, norm: Any, stock_norm: Callable[[nn.Module, Any], Any]
    ) -> Any:
        """Give the norm of the update's gradient before clipping, if it is known."""
        return stock_norm(model, norm)


class OneProcess(Engine):
    """One rank: nothing is held back, and nothing is reduced."""


class DataParallel(Engine):
    """DDP. Gradients are summed once per update, outside of DDP, see `ranks.collectives`."""

    _has_grad_anywhere: list[bool]

    def hold_gradients(
        self, model: nn.Module, *, is_last: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Never let DDP reduce: `reduce` does, after the last micro-batch."""
        return self.accelerator.no_sync(model)

    def agree(
        self, outcome: UpdateOutcome, *, loss: Tensor | None, model: nn.Module
    ) -> UpdateOutcome:
        """Agree in one collective, which also tells which parameters have a gradient anywhere."""
        has_grad = [p.grad is not None for p in trainable(model)]
        worst, self._has_grad_anywhere = outcome.agree(
            device=self.args.device, loss=loss, has_grad=has_grad
        )
        return worst

    def reduce(self, model: nn.Module) -> None:
        """Sum gradients in the precision they were added up in."""
        all_reduce_gradients(trainable(model), has_grad_anywhere=self._has_grad_anywhere)


class FullySharded(Engine):
    """FSDP2, which reduces in the last backward of an update."""

    lockstep = True
    shards_weights = True

    def find_problems(self) -> Iterator[str]:
        """Yield what of FSDP nobody has compared with the whole batch."""
        if not self.accelerator.is_fsdp2:
            yield (
                "FSDP1 is deprecated in transformers and was never compared with the gradient of "
                'the whole batch here: set fsdp_config = {"version": 2}.'
            )
        if self.args.torch_compile:
            yield (
                "torch_compile = True with FSDP: the model is asked how its loss counts outside of "
                "the compiled wrapper that gathers its weights. Leave out one of the two."
            )

    def hold_gradients(
        self, model: nn.Module, *, is_last: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Hold all backwards but the last."""
        if is_last or self.world_size == 1:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)


def make_engine(
    accelerator: Any, args: Any, *, is_fsdp: bool, is_deepspeed: bool, is_sharded_by_loading: bool
) -> Engine:
    """Choose the engine of a run, and refuse what it could not train exactly.

    Args:
        accelerator: The Trainer's `Accelerator`.
        args: The Trainer's arguments.
        is_fsdp: The Trainer runs under FSDP.
        is_deepspeed: It runs under DeepSpeed.
        is_sharded_by_loading: The model was sharded by transformers while it was loaded.

    Raises:
        ConfigError: If a setting would train a wrong gradient, or one nobody has compared.
    """
    engine: Engine
    if is_deepspeed:
        from hf_gradacc.ranks.deepspeed import DeepSpeed

        engine = DeepSpeed(accelerator, args)
    elif is_fsdp:
        engine = FullySharded(accelerator, args)
    elif args.world_size > 1:
        engine = DataParallel(accelerator, args)
    else:
        engine = OneProcess(accelerator, args)
    if is_sharded_by_loading and args.world_size > 1:
        raise ConfigError(
            "the model was sharded while it was loaded (distributed_config), which accelerate "
            "does not reduce and nobody has compared with the gradient of the whole batch: "
            'load it whole and set fsdp = True and fsdp_config = {"version": 2}.'
        )
    for problem in engine.find_problems():
        raise ConfigError(problem)
    return engine


def end_group_at_exit() -> None:
    """Have gloo's threads come to rest before Python ends.

    Such a thread frees tensors of the last collective, and is aborted if Python has gone by then:
    19 of 400 exits right after one on a loaded machine (pytorch/pytorch#179291). A launcher that
    sees a process abort ends the others, which may be saving.
    """
    if dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend():
        atexit.register(_end_group, os.getpid())


def _end_group(process: int) -> None:
    # A forked child has the group, but not its threads, and would wait for them.
    if os.getpid() != process:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    # That ends no thread as long as a wrapped model holds the group (9 of 400 were aborted still).
    # What they have left to do is a matter of microseconds, once they may run Python.
    time.sleep(_SECONDS_TO_REST)
