"""How the ranks of a run share an update: one process, DDP, or weights sharded by FSDP2.

An engine decides when gradients are held back, sums the counts of the ranks' shares, and reduces.
Under DDP ranks run alone: each accumulates gradients locally, and they are summed once, from inside
of its last backward on (`ranks.reduction`). So ranks may run different numbers of micro-batches, or
none. FSDP2 and ZeRO
(`ranks.deepspeed`) gather weights in each forward and average gradients in the backward that
reduces them. So all ranks run the largest number that any rank has planned;
`updates.recut.even_out` cuts the others' shares finer.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from transformers.utils import logging

from hf_gradacc.errors import ConfigError
from hf_gradacc.ranks.collectives import sum_over_ranks, trainable
from hf_gradacc.ranks.ddp import bucket_bytes_of, free_buckets, has_collectives, keep_ranks_apart
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.ranks.outcome import UpdateOutcome
from hf_gradacc.ranks.reduction import Reduction
from hf_gradacc.ranks.sequence_parallel import can_attend_in_ring
from hf_gradacc.updates.update import UpdateStats

__all__ = [
    "DataParallel",
    "Engine",
    "FullySharded",
    "OneProcess",
    "end_group_at_exit",
    "make_engine",
]

logger = logging.get_logger(__name__)

_SECONDS_TO_REST = 0.1


class Engine:
    """How the ranks of a run work together. The Trainer calls it at fixed places of every update.

    Args:
        accelerator: The Trainer's `Accelerator`.
        args: The Trainer's arguments.
        layout: Which ranks train the same rows; None if each trains its own.

    Attributes:
        lockstep: Forward and backward contain collectives, and gradients come out of them as an
            average over replicas. Otherwise ranks run alone.
        shards_weights: Each rank holds only a part of the weights.
        deals_in_lockstep: Rows are dealt to ranks for a run in which ranks wait for each other in
            every micro-batch.
        can_differentiate_outside: The bare model can compute a gradient, without its wrapper.
        keeps_beginnings: A backward may run beside those of micro-batches.
        splits_layers: Several ranks may compute each layer together (``tp_size``).
        splits_rows_by: The setting that lets several ranks compute each row together.
    """

    lockstep = False
    shards_weights = False
    deals_in_lockstep = False
    can_differentiate_outside = True
    keeps_beginnings = False
    splits_layers = False
    splits_rows_by = ""

    def __init__(self, accelerator: Any, args: Any, layout: RankLayout | None = None) -> None:
        self.accelerator = accelerator
        self.args = args
        self.world_size: int = args.world_size
        self.layout = layout or RankLayout(args.process_index, args.world_size)

    @property
    def factor(self) -> int:
        """The factor for a loss: the engine divides gradients by it."""
        return self.layout.num_replicas if self.lockstep else 1

    @property
    def can_roll_back(self) -> bool:
        """Whether a forward or backward may be aborted: not if it contains collectives."""
        return not self.lockstep

    @property
    def searches_loss_scale(self) -> bool:
        """Whether an overflow may come from a loss scale that is still being searched."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1.0

    def find_problems(self) -> Iterator[str]:
        """Yield settings that train a wrong gradient, or one that was never compared."""
        yield from ()

    @property
    def reduces_each_micro_batch(self) -> bool:
        """Whether the user asked for it: accelerate's ``sync_each_batch``."""
        return bool(self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False))

    def find_notes(self) -> Iterator[str]:
        """Yield settings that have no effect."""
        if self.reduces_each_micro_batch and self.world_size > 1:
            yield (
                "gradient_accumulation_kwargs: sync_each_batch = True has no effect without FSDP: "
                "gradients are reduced once per update. More often would save no memory under DDP "
                "and ZeRO-1, and ZeRO-2 and 3 reduce in each backward anyway."
            )

    def before_wrapping(self, checkpoint: str | None, *, is_wrapped: bool) -> None:
        """Prepare for the model to be wrapped.

        Args:
            checkpoint: The folder that training resumes from.
            is_wrapped: An earlier call of ``train()`` has wrapped the model.
        """

    def after_wrapping(self, model: nn.Module, *, has_own_step: bool = False) -> None:
        """Keep a forward from waiting for other ranks, unless the engine needs it.

        Args:
            model: The wrapped model.
            has_own_step: Its ``training_step`` runs a backward of its own, or several.
        """
        keep_ranks_apart(model)

    def count(self, local: UpdateStats) -> tuple[UpdateStats, list[int]]:
        """Sum what the replicas' shares hold, and collect how many micro-batches each has planned.

        One collective: each replica writes its number of micro-batches into its own element.

        Returns:
            The sums, and the numbers by replica; no numbers if ranks may run different ones.
        """
        counts = local.counts()
        planned = torch.zeros(self.layout.num_replicas if self.lockstep else 0, dtype=counts.dtype)
        if self.lockstep:
            planned[self.layout.replica] = local.num_micro_batches
        vector = torch.cat([counts, planned])
        if self.layout.ranks_per_replica > 1:
            vector = self.layout.once(vector)
        total = sum_over_ranks(vector, device=self.args.device)
        return UpdateStats.from_counts(total[: len(counts)]), total[len(counts) :].tolist()

    def begin_attempt(self, model: nn.Module) -> None:
        """Begin an attempt at an update. Micro-batches outside of one are reduced by nobody."""

    def hold_gradients(
        self, model: nn.Module, *, is_last: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Keep a backward from reducing gradients, unless it is the one that must.

        Args:
            model: The wrapped model.
            is_last: It is the update's last backward on this rank.
        """
        return contextlib.nullcontext()

    def end_backward(self) -> None:
        """Note that the stock step has run the update's last backward on this rank."""

    def agree(self, outcome: UpdateOutcome, *, loss: Tensor | None) -> UpdateOutcome:
        """Exchange the outcome of the attempt with all ranks; return the worst.

        One collective. Every rank calls it, also after a failure.
        """
        if self.world_size == 1:
            return outcome
        return outcome.agree(device=self.args.device, loss=loss)[0]

    def reduce(self) -> None:
        """Sum the update's gradients over ranks, unless a backward has done that."""

    def gathering_whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """Let the stock code save a whole model."""
        return contextlib.nullcontext()

    def clip(self, model: nn.Module, stock_clip: Callable[[nn.Module], Any]) -> Any:
        """Clip the update's gradient."""
        return stock_clip(model)

    def grad_norm(
        self, model: nn.Module, norm: Any, stock_norm: Callable[[nn.Module, Any], Any]
    ) -> Any:
        """Return the norm of the update's gradient before clipping, None if it is unknown."""
        return stock_norm(model, norm)


class OneProcess(Engine):
    """One rank: nothing is held back, and nothing is reduced."""

    keeps_beginnings = True


class DataParallel(Engine):
    """DDP. Gradients are summed once per update, outside of DDP, see `ranks.reduction`."""

    keeps_beginnings = True
    _reduction: Reduction
    _places: list[int]

    def after_wrapping(self, model: nn.Module, *, has_own_step: bool = False) -> None:
        """Free DDP's buckets, and choose whether gradients may be sent from a backward.

        Not if it may be the first of several, or has collectives of its own.
        """
        super().after_wrapping(model)
        free_buckets(model)
        self._reduction = Reduction(
            bucket_bytes=bucket_bytes_of(model),
            is_early=not (has_own_step or has_collectives(model)),
        )

    def begin_attempt(self, model: nn.Module) -> None:
        """Begin to note which gradients come, and when."""
        self._reduction.begin(trainable(model))

    @contextlib.contextmanager
    def hold_gradients(self, model: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Never let DDP reduce; send gradients from the last backward ourselves."""
        listening = self._reduction.listening() if is_last else contextlib.nullcontext()
        with self.accelerator.no_sync(model), listening:
            yield

    def end_backward(self) -> None:
        """Send the gradients that were not sent from inside of the backward."""
        self._reduction.end_backward()

    def agree(self, outcome: UpdateOutcome, *, loss: Tensor | None) -> UpdateOutcome:
        """Agree in one collective, which also finds the parameters with a gradient on any rank."""
        is_stale, places = self._reduction.finish(failed=outcome.failed)
        worst, self._places = replace(outcome, stale=int(is_stale)).agree(
            device=self.args.device, loss=loss, places=places
        )
        if worst.failed:
            self._reduction.abandon(is_stale=bool(worst.stale))
        return worst

    def reduce(self) -> None:
        """Wait for the sums, in the precision that gradients were accumulated in."""
        self._reduction.complete(self._places)


class FullySharded(Engine):
    """FSDP2, which reduces in the last backward of an update, or in each if it is asked to.

    Up to the last backward, each rank holds whole gradients. Reduced in each, it holds its shard of
    them. The sum is the same: a mean over ranks of each micro-batch, added up.
    """

    lockstep = True
    shards_weights = True
    deals_in_lockstep = True
    can_differentiate_outside = False
    splits_rows_by = "cp_size"

    @property
    def factor(self) -> int:
        """The factor for a loss: weights are split between all ranks, those of one row too."""
        return self.layout.num_parts

    def find_problems(self) -> Iterator[str]:
        """Yield settings of FSDP that were never compared with the whole batch."""
        if not self.accelerator.is_fsdp2:
            yield (
                "FSDP1 is deprecated in transformers and was never compared with the gradient of "
                'the whole batch here: set fsdp_config = {"version": 2}.'
            )
        if self.layout.cp_size > 1 and not can_attend_in_ring(self.args.device):
            yield (
                f"cp_size = {self.layout.cp_size}: torch's ring attention has no kernel for CPUs "
                f"(_scaled_dot_product_flash_attention_for_cpu). Train on GPUs, or split rows by "
                f"sp_size with deepspeed."
            )
        if self.args.torch_compile:
            yield (
                "torch_compile = True with FSDP: the model is asked how its loss counts outside of "
                "the compiled wrapper that gathers its weights. Leave out one of the two."
            )

    def find_notes(self) -> Iterator[str]:
        """Yield nothing: ``sync_each_batch`` is heard."""
        yield from ()

    @contextlib.contextmanager
    def gathering_whole_weights(self) -> Iterator[None]:
        """Let ``Trainer.save_model`` gather the weights also where checkpoints are in parts.

        With ``state_dict_type="SHARDED_STATE_DICT"`` it saves no model, without a word
        (transformers 5.23.0).
        """
        plugin = self.accelerator.state.fsdp_plugin
        asked, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            plugin.state_dict_type = asked

    def hold_gradients(
        self, model: nn.Module, *, is_last: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Hold back gradients in every backward but the last, unless each is to reduce them."""
        if is_last or self.world_size == 1 or self.reduces_each_micro_batch:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)


def make_engine(
    accelerator: Any,
    args: Any,
    *,
    layout: RankLayout | None = None,
    is_fsdp: bool,
    is_deepspeed: bool,
    is_sharded_by_loading: bool,
) -> Engine:
    """Choose the engine of a run; refuse settings that it cannot train exactly.

    Args:
        accelerator: The Trainer's `Accelerator`.
        args: The Trainer's arguments.
        layout: Which ranks train the same rows; None if each trains its own.
        is_fsdp: The Trainer runs under FSDP.
        is_deepspeed: It runs under DeepSpeed.
        is_sharded_by_loading: The model was sharded by transformers while it was loaded.

    Raises:
        ConfigError: If a setting trains a wrong gradient, or one that was never compared.
    """
    engine: Engine
    if is_deepspeed:
        from hf_gradacc.ranks.deepspeed import DeepSpeed

        engine = DeepSpeed(accelerator, args, layout)
    elif is_sharded_by_loading and args.world_size > 1:
        from hf_gradacc.ranks.tensor_parallel import ShardedByLoading

        engine = ShardedByLoading(accelerator, args, layout)
    elif is_fsdp:
        engine = FullySharded(accelerator, args, layout)
    elif args.world_size > 1:
        engine = DataParallel(accelerator, args, layout)
    else:
        engine = OneProcess(accelerator, args, layout)
    for problem in (*_find_unsplit(engine), *engine.find_problems()):
        raise ConfigError(problem)
    for note in engine.find_notes():
        logger.warning_once(note)
    return engine


def _find_unsplit(engine: Engine) -> Iterator[str]:
    """Yield what a layout asks for and the engine cannot do: its ranks would train as replicas."""
    layout = engine.layout
    if layout.tp_size > 1 and not engine.splits_layers:
        yield (
            f"tp_size = {layout.tp_size}: this engine gives every rank whole layers. Split them in "
            f"loading, without fsdp and deepspeed: from_pretrained(..., distributed_config = "
            f"DistributedConfig(tp_size = {layout.tp_size})), with fsdp_size for the other ranks "
            f"(transformers 5.19 or later)."
        )
    if layout.cp_size > 1 and engine.splits_rows_by != "cp_size":
        yield (
            f"cp_size = {layout.cp_size}: context parallelism is a part of FSDP2. Set fsdp = True "
            f'and fsdp_config = {{"version": 2}}, with a model that is loaded whole.'
        )
    if layout.sp_size > 1 and engine.splits_rows_by != "sp_size":
        yield (
            f"sp_size = {layout.sp_size}: sequence parallelism is a part of DeepSpeed. Set "
            f"deepspeed to a configuration of ZeRO, with a model that is loaded whole."
        )


def end_group_at_exit() -> None:
    """Give gloo's threads time to finish before Python ends.

    Such a thread frees the tensors of the last collective. If Python has ended by then, it aborts
    the process: in 19 of 400 exits right after a collective, on a loaded machine
    (pytorch/pytorch#179291). The launcher then ends the other ranks, which may be saving.
    """
    if dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend():
        atexit.register(_end_group, os.getpid())


def _end_group(process: int) -> None:
    # A forked child has the group but not its threads, and would wait for them forever.
    if os.getpid() != process:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    # That ends no thread while a wrapped model holds the group: 9 of 400 exits still aborted. Once
    # the threads may run Python, they need microseconds to finish.
    time.sleep(_SECONDS_TO_REST)
