"""The state an update starts from, so that a failed attempt leaves nothing behind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["RandomState", "Rollback"]

_SMALL_BUFFER_BYTES = 2**20


class RandomState:
    """State of all generators a forward may use: torch's, the device's, numpy's, Python's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._backend: Any = getattr(torch, device.type, None) if device.type != "cpu" else None
        self._torch = torch.get_rng_state()
        # The state of a device's generator is on the host: nothing waits here.
        self._on_device = self._backend.get_rng_state(device) if self._backend else None
        self._numpy = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        """Set every generator back to its state."""
        torch.set_rng_state(self._torch)
        if self._backend is not None:
            self._backend.set_rng_state(self._on_device, self._device)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


class Rollback:
    """The state in which an update began: random states, and buffers that the forward changes.

    Weights, optimizer and counters need no copy, since nothing touches them before the optimizer
    steps. Few models change a buffer in their forward (batch normalization does). For the first
    update all small buffers are copied; later only those that it changed.

    Args:
        model: The model that the buffers belong to.
        device: The device it runs on.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        # Quantized models keep their weights in buffers, which are too large to copy.
        self._watched: list[Tensor] = [
            buffer
            for buffer in model.buffers()
            if buffer.device.type != "meta"
            and buffer.numel() * buffer.element_size() <= _SMALL_BUFFER_BYTES
        ]
        self._is_first = True
        self._random = RandomState(device)
        self._copies: list[tuple[Tensor, Tensor]] = []

    def mark(self) -> None:
        """Store the present state, for `restore`."""
        self._random = RandomState(self._device)
        self._copies = [(buffer, buffer.detach().clone()) for buffer in self._watched]

    def restore(self) -> None:
        """Restore the state that `mark` stored."""
        self._random.restore()
        with torch.no_grad():
            for buffer, copy in self._copies:
                buffer.copy_(copy)

    def settle(self) -> None:
        """Record that the update went through; after the first one, find which buffers changed."""
        if self._is_first:
            # By value: batch normalization does not raise the version counter of its statistics.
            self._watched = [b for b, copy in self._copies if not _same_bits(b, copy)]
            self._is_first = False


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return bool(torch.equal(left.nan_to_num(), right.nan_to_num()))
