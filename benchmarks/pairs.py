"""Times of two ways that take turns, so that a neighbour of the machine slows both of a pair."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from transformers import TrainerCallback

__all__ = ["StepSeconds", "spread_of"]


class StepSeconds(TrainerCallback):
    """Keeps the seconds of each update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def spread_of(ratios: Any) -> str:
    """Write the ratios of pairs as a median, with the smallest and the largest.

    >>> spread_of([1.0, 1.5, 2.0])
    '1.50 (1.00 to 2.00)'
    """
    ratios = np.asarray(ratios)
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
