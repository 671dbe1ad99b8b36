"""What a rank does that measures the noise of its updates."""

from __future__ import annotations

from typing import Any

from .reference import float64_everywhere
from .tiny import make_trainer, ragged_rows

ROWS = ragged_rows(16, seed=41)


def measure_as_rank(out: str) -> list[list[float]]:
    """A job for `support.ranks`: the measurements of a short run that changes no weight."""
    options: dict[str, Any] = {"effective_batch_size": 7, "per_device_train_batch_size": 1}
    trainer = make_trainer(
        out, ROWS, noise_scale_every=1, learning_rate=0.0, max_steps=1, seed=42, **options
    )
    with float64_everywhere():
        trainer.train()
    measurements: list[list[float]] = trainer._noise_listener.record.meter.state()
    return measurements
