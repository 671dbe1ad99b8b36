"""Which updates the gradient noise scale is measured on, and listening to their micro-batches."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from hf_gradacc.errors import ConfigError
from hf_gradacc.ranks.collectives import sum_over_ranks
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.tracking.install import record_event
from hf_gradacc.tracking.noise_meter import NoiseRecord
from hf_gradacc.trainer.position import restored
from hf_gradacc.updates.dealing import measures_noise
from hf_gradacc.updates.update import MicroBatch, Update

__all__ = ["NoiseListener"]


class NoiseListener:
    """Listens to the gradients of an update whose micro-batches were cut at random.

    Args:
        every: ``noise_scale_every``; None or 0 measures nothing.

    Attributes:
        record: The measurements, kept with every checkpoint; None if nothing is measured.
        is_listening: The update in progress is one that is measured.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self.record = NoiseRecord() if every else None
        self.is_listening = False
        self._num_local_sequences = 0

    def check_engine(self, engine: Engine) -> None:
        """Refuse to measure where autograd never sees whole gradients.

        Raises:
            ConfigError: If a scale was asked for under FSDP or ZeRO.
        """
        if self.every and engine.lockstep:
            raise ConfigError(
                f"noise_scale_every = {self.every} cannot be measured under FSDP and ZeRO, where "
                f"autograd never sees whole gradients: leave it out, or run with DDP."
            )

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Go on with the measurements of a checkpoint, or without any."""
        if self.record is not None:
            self.record.restore(saved)

    def take_over(self, trainer: Any, saved: dict[str, Any] | None) -> None:
        """Find the record again after stock may have put a new one in its place; restore it."""
        if self.record is not None:
            record: NoiseRecord = restored(trainer, NoiseRecord)
            self.record = record
            self.restore(saved)

    def begin(self, model: nn.Module, update: Update) -> None:
        """Listen to an attempt at an update, and to that attempt only."""
        self.is_listening = self.record is not None and measures_noise(
            update.index, every=self.every
        )
        if self.is_listening and self.record is not None:
            self._num_local_sequences = sum(mb.num_sequences for mb in update)
            self.record.meter.before_update(model.parameters())

    def hear(self, micro_batch: MicroBatch, *, num_targets: int, total: int, trainer: Any) -> None:
        """Take in the gradient of one micro-batch as its backward has left it.

        Args:
            micro_batch: The micro-batch.
            num_targets: Its targets.
            total: Targets of the update over all ranks.
            trainer: The trainer, which knows the loss scale.
        """
        if self.is_listening and self.record is not None and not micro_batch.weightless:
            self.record.meter.after_micro_batch(
                num_targets=num_targets, weight=num_targets / total * _grad_scale(trainer)
            )

    def end(self, trainer: Any, model: nn.Module) -> None:
        """Close a measurement once the update's gradient is whole."""
        if self.is_listening and self.record is not None:
            self.record.meter.after_update(
                model.parameters(),
                num_sequences=self._num_local_sequences,
                sum_over_ranks=partial(sum_over_ranks, device=trainer.args.device),
                grad_scale=_grad_scale(trainer),
            )
        self.is_listening = False

    def metrics(self) -> dict[str, float]:
        """Give the smoothed noise scale for a log row."""
        return {} if self.record is None else self.record.meter.metrics()

    def tell_verdict(self, trainer: Any) -> None:
        """Say at the end whether the batch was too small, right, or larger than useful."""
        verdict = None if self.record is None else self.record.meter.verdict()
        if verdict is not None:
            record_event(
                trainer, "noise_scale_verdict", text=verdict.text, alert=False, word=verdict.word
            )


def _grad_scale(trainer: Any) -> float:
    """Give what gradients are multiplied with while fp16 is trained."""
    scaler = trainer.accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())
