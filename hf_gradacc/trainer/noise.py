"""Measure the gradient noise scale on some updates, from the gradients of their micro-batches."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from hf_gradacc.errors import ConfigError
from hf_gradacc.ranks.collectives import sum_over_ranks
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.tracking.install import record_event
from hf_gradacc.tracking.noise_meter import NoiseRecord
from hf_gradacc.trainer.checkpoints.position import restored
from hf_gradacc.updates.dealing import measures_noise
from hf_gradacc.updates.update import MicroBatch, Update

__all__ = ["NoiseListener"]


class NoiseListener:
    """Takes the gradients of an update whose micro-batches were cut at random, and measures noise.

    Args:
        every: ``noise_scale_every``; None or 0 measures nothing.

    Attributes:
        record: The measurements, kept with every checkpoint; None if nothing is measured.
        is_listening: The update in progress is measured.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self.record = NoiseRecord() if every else None
        self.is_listening = False
        self._num_local_sequences = 0

    def check_engine(self, engine: Engine) -> None:
        """Refuse to measure under engines in which autograd never sees whole gradients.

        Raises:
            ConfigError: If ``noise_scale_every`` is set where ranks run in lockstep.
        """
        if self.every and engine.lockstep:
            raise ConfigError(
                f"noise_scale_every = {self.every} cannot be measured under FSDP, ZeRO and tensor "
                f"parallelism, where autograd never sees whole gradients: leave it out, or run "
                f"with DDP."
            )

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Continue with the measurements of a checkpoint, or start without any."""
        if self.record is not None:
            self.record.restore(saved)

    def take_over(self, trainer: Any, saved: dict[str, Any] | None) -> None:
        """Take the record that the stock code may have put in place of ours, and restore it."""
        if self.record is not None:
            record: NoiseRecord = restored(trainer, NoiseRecord)
            self.record = record
            self.restore(saved)

    def begin(self, model: nn.Module, update: Update) -> None:
        """Start measuring an attempt at an update; an earlier attempt is dropped."""
        self.is_listening = self.record is not None and measures_noise(
            update.index, every=self.every
        )
        if self.is_listening and self.record is not None:
            self._num_local_sequences = sum(mb.num_sequences for mb in update)
            self.record.meter.before_update(model.parameters())

    def add_gradient(
        self, micro_batch: MicroBatch, *, num_targets: int, weight: float, trainer: Any
    ) -> None:
        """Add the gradient of one micro-batch, right after its backward.

        Args:
            micro_batch: The micro-batch.
            num_targets: Its targets.
            weight: What its loss was multiplied by; for a sum, its targets.
            trainer: The trainer; its loss scale is read.
        """
        if self.is_listening and self.record is not None and not micro_batch.weightless:
            self.record.meter.after_micro_batch(
                num_targets=num_targets, weight=weight * _grad_scale(trainer)
            )

    def end(self, trainer: Any, model: nn.Module, *, num_summed: int = 1) -> None:
        """Finish a measurement, after the update's gradient was reduced over ranks.

        Args:
            trainer: The trainer; its device and loss scale are read.
            model: Its gradients are the update's.
            num_summed: Targets whose losses were summed and not averaged; else 1.
        """
        if self.is_listening and self.record is not None:
            self.record.meter.after_update(
                model.parameters(),
                num_sequences=self._num_local_sequences,
                sum_over_ranks=partial(sum_over_ranks, device=trainer.args.device),
                grad_scale=_grad_scale(trainer) * num_summed,
            )
        self.is_listening = False

    def metrics(self) -> dict[str, float]:
        """Return the smoothed noise scale for a log row."""
        return {} if self.record is None else self.record.meter.metrics()

    def tell_verdict(self, trainer: Any) -> None:
        """Record at the end whether the batch was too small, right, or larger than useful."""
        verdict = None if self.record is None else self.record.meter.verdict()
        if verdict is not None:
            record_event(
                trainer, "noise_scale_verdict", text=verdict.text, alert=False, word=verdict.word
            )


def _grad_scale(trainer: Any) -> float:
    """Return the factor that gradients are multiplied by in fp16 training; else 1."""
    scaler = trainer.accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())
