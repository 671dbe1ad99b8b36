"""The Trainer's many-rank side: what DDP, FSDP2 and ZeRO each want of an update."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.trainer_pt_utils import nested_gather

from hf_gradacc.errors import ConfigError
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.ranks.collectives import agree_on_inputs, keep_ranks_apart, share_running_statistics
from hf_gradacc.ranks.engine import Engine, count_over_ranks, end_group_at_exit
from hf_gradacc.tracking.phases import PhaseClock
from hf_gradacc.trainer.zero import ZeroUpdates
from hf_gradacc.updates.collator import UpdateCollator, make_micro_batch
from hf_gradacc.updates.recut import can_slice, cut_again, even_out
from hf_gradacc.updates.update import MicroBatch, Update, UpdateStats

__all__ = ["RankedUpdates"]


class RankedUpdates(ZeroUpdates):
    """Overrides that let ranks run an update together, each its own share."""

    _collator: UpdateCollator | None = None
    _facts: LossFacts | None = None
    _probe_inputs: Any = None
    _reduces_now = True
    _tr_loss: Tensor
    _engine = Engine()
    _clock: PhaseClock

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = PhaseClock(self.args.device)
        for problem in self._find_unknown_engines():
            raise ConfigError(problem)
        end_group_at_exit()

    def _find_unknown_engines(self) -> Iterator[str]:
        """Yield what would train a wrong gradient, or one that nobody has compared."""
        if self.is_deepspeed_enabled:
            yield from self._find_deepspeed_problems()
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            yield (
                "FSDP1 is deprecated in transformers and was never compared with the gradient of "
                'the whole batch here: set fsdp_config = {"version": 2}.'
            )
        if self.is_fsdp_enabled and self.args.torch_compile:
            yield (
                "torch_compile = True with FSDP: the model is asked how its loss counts outside of "
                "the compiled wrapper that gathers its weights. Leave out one of the two."
            )
        if self.is_distributed_loading_by_transformers and self.args.world_size > 1:
            yield (
                "the model was sharded while it was loaded (distributed_config), which accelerate "
                "does not reduce and nobody has compared with the gradient of the whole batch: "
                'load it whole and set fsdp = True and fsdp_config = {"version": 2}.'
            )

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds a part of the weights only."""
        return bool(self.is_fsdp_enabled or (self.is_deepspeed_enabled and self._zero_stage == 3))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """See what the ranks are driven by, once the model is wrapped."""
        self._engine = Engine.of(self)
        self._clock = PhaseClock(self.args.device)  # the last run may have ended in mid-update
        model, loader = super()._prepare_for_training(*args, **kwargs)
        keep_ranks_apart(model)
        return model, loader

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Take losses not yet logged from all ranks; stock adds rank 0's own to the mean."""
        self._tr_loss = nested_gather(self._tr_loss, self.args.parallel_mode).mean()
        return super()._finalize_training(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the same running statistics on all ranks."""
        if self.args.world_size > 1:
            share_running_statistics(self.model)
        return super().evaluation_loop(*args, **kwargs)

    def _count_update(self, update: Update) -> tuple[Update, UpdateStats]:
        """Count an update over all ranks; where ranks run in step, give each as many passes."""
        assert self._facts is not None
        rule, engine = self._facts.rule, self._engine
        with self._meeting_ranks():
            total, planned = count_over_ranks(
                update.stats(rule), engine=engine, device=self.args.device
            )
        if not planned or total.num_targets == 0:
            return update, total
        if min(planned) == 0 and self._probe_inputs is None:  # a stream nobody could look into
            self._probe_inputs = agree_on_inputs(update)
        update = even_out(
            update,
            max(planned),
            halve=self._halve,
            rule=rule,
            spare=self._probe_inputs,
            copies=1 if self._collator is None else self._collator.copies,
        )
        return update, dataclasses.replace(total, num_micro_batches=max(planned) * len(planned))

    def _meeting_ranks(self) -> contextlib.AbstractContextManager[None]:
        """Count as reduction what waits for other ranks, where there are any."""
        alone = self.args.world_size == 1
        return contextlib.nullcontext() if alone else self._clock.within("reduction")

    def _halve(self, micro_batch: MicroBatch) -> list[MicroBatch]:
        """Cut a micro-batch in two, both trimmed as the collator would have made them."""
        if not can_slice(micro_batch):
            return [micro_batch]
        collator = self._collator
        count = make_micro_batch
        if collator is not None:
            count = partial(
                make_micro_batch,
                main_input=collator.main_input,
                encoder_decoder=collator.encoder_decoder,
            )

        def cut(lengths: list[int]) -> list[list[int]]:
            middle = (len(lengths) + 1) // 2
            order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
            return [order[:middle], order[middle:]]

        alike = collator is not None and collator.pad_alike
        return list(cut_again(Update([micro_batch]), cut, count=count, alike=alike))

    @contextlib.contextmanager
    def _hold_gradients(self, model: nn.Module) -> Iterator[None]:
        """Keep a backward from reducing gradients, except the one that is meant to.

        DDP never reduces: `reduction` does, after the last micro-batch. FSDP2 and ZeRO reduce in
        the last backward.
        """
        if self._update_engine is not None:
            self._update_engine.reduces_now = self._reduces_now
            yield
            return
        if self.args.world_size == 1 or (self._engine.lockstep and self._reduces_now):
            yield
            return
        with self.accelerator.no_sync(model):
            yield
