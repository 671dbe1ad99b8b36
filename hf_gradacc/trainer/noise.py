"""The Trainer's view of its own batch: the gradient noise scale, measured now and then."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_gradacc.errors import ConfigError
from hf_gradacc.ranks.collectives import sum_over_ranks
from hf_gradacc.tracking.install import record_event
from hf_gradacc.tracking.noise_meter import NoiseRecord
from hf_gradacc.trainer.loss import ExactLoss
from hf_gradacc.updates.dealing import is_measured
from hf_gradacc.updates.update import MicroBatch, Update

__all__ = ["MeasuredNoise"]


class MeasuredNoise(ExactLoss):
    """Overrides that listen to the gradients of an update that was cut at random."""

    _noise: NoiseRecord | None = None
    _listening = False
    _num_local_sequences = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "noise_scale_every", None):
            self._noise = NoiseRecord()
            self.add_callback(self._noise)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to measure where autograd never sees whole parameters."""
        model, loader = super()._prepare_for_training(*args, **kwargs)
        every = self.args.noise_scale_every
        if every and self._engine.lockstep:
            raise ConfigError(
                f"noise_scale_every = {every} cannot be measured under FSDP and ZeRO, where "
                f"autograd never sees whole gradients: leave it out, or run with DDP."
            )
        return model, loader

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Go on with the measurements of the checkpoint, or without any."""
        if self._noise is not None:
            self._noise.restore(None)
        position = super()._init_training_state(*args, **kwargs)
        if self._noise is not None:
            self._noise.restore(self.state.stateful_callbacks.get(NoiseRecord.__name__))
        return position

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Close a measurement once the update's gradient is whole."""
        self._listening = False
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._listening and self._noise is not None:
            self._noise.meter.after_update(
                model.parameters(),
                num_sequences=self._num_local_sequences,
                sum_over_ranks=partial(sum_over_ranks, device=self.args.device),
                grad_scale=self._grad_scale,
            )
        return loss

    def _run_update(self, model: nn.Module, update: Update, num_targets: int) -> Tensor:
        """Listen to an attempt at the update, and to that attempt only."""
        self._listening = is_measured(update.index, every=self.args.noise_scale_every)
        if self._listening and self._noise is not None:
            self._num_local_sequences = sum(mb.num_sequences for mb in update)
            self._noise.meter.before_update(model.parameters())
        return super()._run_update(model, update, num_targets)

    def _run_micro_batch(self, model: nn.Module, micro_batch: MicroBatch, targets: int) -> Tensor:
        """Take in the gradient of one micro-batch as its backward has left it."""
        loss = super()._run_micro_batch(model, micro_batch, targets)
        if self._listening and self._noise is not None and self._facts is not None:
            own = micro_batch.targets.under(self._facts.rule)
            weight = own / targets * self._grad_scale
            self._noise.meter.after_micro_batch(num_targets=own, weight=weight)
        return loss

    @property
    def _grad_scale(self) -> float:
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Put the smoothed noise scale beside the effective batch."""
        if self._noise is not None and "loss" in logs and "learning_rate" in logs:
            logs.update(self._noise.meter.metrics())
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Say at the end whether the batch was too small, right, or larger than useful."""
        verdict = None if self._noise is None else self._noise.meter.verdict()
        if verdict is not None:
            record_event(
                self, "noise_scale_verdict", text=verdict.text, alert=False, word=verdict.word
            )
        return super()._finalize_training(*args, **kwargs)
