"""Measure the gradient noise scale while training, without a copy of any gradient."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_gradacc.tracking.noise_scale import (
    NoiseMeasurement,
    NoiseScale,
    Verdict,
    judge_batch,
    measure_from_sums,
    smooth_noise_scale,
)

__all__ = ["NoiseRecord", "NoiseScaleMeter"]

KEEP = 200
"""Measurements kept: at a decay of 0.95 older ones would weigh less than 4e-5 of the newest."""


class NoiseScaleMeter:
    """Take the squared norm of each micro-batch's gradient as autograd hands it over.

    A hook on a leaf parameter sees a backward's gradient, summed over all uses of the parameter,
    before it is added to ``.grad``. So a norm costs one read of a gradient that is in the cache
    anyway, no memory, and no wait: sums stay on the device until the update is over. Hooks are
    there only during a measured update; at all other times the meter costs nothing.

    Exact wherever autograd accumulates once per backward: DDP, gradient checkpointing without
    reentry, tied weights. Not with FSDP, whose parameters autograd never sees whole, and not for
    weights tied across reentrant checkpoints.

    Args:
        decay: See `smooth_noise_scale`.

    Use, inside a measured update whose micro-batches were cut at random::

        meter.before_update(parameters)
        for micro_batch in update:
            ...  # backward of weight * mean loss
            meter.after_micro_batch(num_targets=n_i, weight=n_i / N)
        ...  # gradients summed over ranks
        meter.after_update(parameters, num_sequences=S, sum_over_ranks=sum_over_ranks)
    """

    def __init__(self, *, decay: float = 0.95) -> None:
        self.decay = decay
        self.measurements: deque[NoiseMeasurement] = deque(maxlen=KEEP)
        self._handles: list[Any] = []
        self._norms: list[Tensor] = []
        self._weighted_squares: Tensor | float = 0.0
        self._squared_targets = 0
        self._num_targets = 0
        self._num_micro_batches = 0

    def before_update(self, parameters: Iterable[Parameter]) -> None:
        """Begin to listen."""
        self.abandon()
        for p in parameters:
            if p.requires_grad:
                handle = p.register_hook(self._add_gradient)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def _add_gradient(self, gradient: Tensor) -> None:
        self._norms.append(_norm(gradient))

    def after_micro_batch(self, *, num_targets: int, weight: float) -> None:
        """Take in a micro-batch whose backward has just run.

        Args:
            num_targets: ``n_i``.
            weight: What its mean loss was multiplied with before backward, loss scaling included.
        """
        if not self._norms:
            return
        # Σ n_i² |g_i|², undoing the weight that autograd saw.
        squares = _sum_of_squares(self._norms) * (num_targets / weight) ** 2
        self._weighted_squares = self._weighted_squares + squares
        self._norms.clear()
        self._squared_targets += num_targets**2
        self._num_targets += num_targets
        self._num_micro_batches += 1

    def after_update(
        self,
        parameters: Iterable[Parameter],
        *,
        num_sequences: int,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        grad_scale: float = 1.0,
    ) -> NoiseMeasurement | None:
        """Close a measured update: every rank calls it, after gradients were summed over ranks.

        Args:
            parameters: Those of `before_update`; their ``.grad`` is the update's, not yet clipped.
            num_sequences: Sequences on this rank.
            sum_over_ranks: Adds a float64 vector up over all ranks; None on one process.
            grad_scale: What the ``.grad`` are still multiplied with (fp16's loss scale).

        Returns:
            The measurement, None if the update had fewer than two micro-batches or a
            non-finite gradient.
        """
        grads = [p.grad for p in parameters if p.requires_grad and p.grad is not None]
        norms = [_norm(grad) for grad in grads]
        mine = torch.tensor(
            [
                float(self._weighted_squares),
                self._squared_targets,
                self._num_micro_batches,
                self._num_targets,
                num_sequences,
            ],
            dtype=torch.float64,
        )
        self.abandon()
        total = mine if sum_over_ranks is None else sum_over_ranks(mine)
        weighted, squared_targets, num_micro_batches, num_targets, sequences = total.tolist()
        if num_micro_batches < 2 or not norms:
            return None
        measurement = measure_from_sums(
            weighted,
            int(squared_targets),
            int(num_micro_batches),
            float(_sum_of_squares(norms)) / grad_scale**2,
            int(num_targets),
            int(sequences),
        )
        if not torch.tensor([measurement.noise, measurement.signal]).isfinite().all():
            return None
        self.measurements.append(measurement)
        return measurement

    def abandon(self) -> None:
        """Stop listening and forget the update in progress, as after a rollback."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._norms = [], []
        self._weighted_squares, self._squared_targets = 0.0, 0
        self._num_targets, self._num_micro_batches = 0, 0

    @property
    def scale(self) -> NoiseScale | None:
        """The smoothed noise scale, None before the first measurement."""
        if not self.measurements:
            return None
        return smooth_noise_scale(list(self.measurements), decay=self.decay)

    def metrics(self) -> dict[str, float]:
        """Return the log row's keys; what is not known yet, or infinite, is left out."""
        scale = self.scale
        if scale is None:
            return {}
        row = {
            "gradient_noise_scale": scale.target_tokens,
            "gradient_noise_scale_sequences": scale.sequences,
            "gradient_noise_scale_low": scale.low,
            "gradient_noise_scale_high": scale.high,
        }
        return {key: v for key, v in row.items() if v is not None and v != float("inf")}

    def verdict(self) -> Verdict | None:
        """Judge the updates measured so far; None before the first."""
        scale = self.scale
        if scale is None:
            return None
        sizes = [m.num_targets for m in self.measurements]
        return judge_batch(scale, tokens_per_update=sum(sizes) / len(sizes))

    def state(self) -> list[list[float]]:
        """Return what has to survive in a checkpoint, as plain numbers."""
        return [list(astuple(m)) for m in self.measurements]

    def load_state(self, state: list[list[float]]) -> None:
        """Undo `state`."""
        self.measurements = deque(
            (NoiseMeasurement(a, b, *map(int, counts)) for a, b, *counts in state), maxlen=KEEP
        )


def _norm(gradient: Tensor) -> Tensor:
    """Add up in float32 at least: a bf16 sum of squares would stop growing."""
    narrow = gradient.dtype.itemsize < 4
    return torch.linalg.vector_norm(gradient, dtype=torch.float32 if narrow else None)


def _sum_of_squares(norms: list[Tensor]) -> Tensor:
    """Join norms, possibly from several devices, on the first one's."""
    device = norms[0].device
    return torch.stack([norm.to(device).double() for norm in norms]).square().sum()


class NoiseRecord(TrainerCallback, ExportableState):
    """Keeps the measurements with every checkpoint."""

    def __init__(self) -> None:
        self.meter = NoiseScaleMeter()

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs; JSON only."""
        return {"args": {}, "attributes": {"measurements": self.meter.state()}}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Continue from what `state` gave, or begin anew."""
        self.meter = NoiseScaleMeter()
        if saved:
            self.meter.load_state(saved["attributes"]["measurements"])
