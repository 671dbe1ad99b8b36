"""The state an update starts from, so that a failed attempt leaves nothing behind."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["AttributeState", "BufferState", "RandomState", "Rollback"]

_SMALL_BUFFER_BYTES = 2**20
_MOST_ITEMS = 1024


class RandomState:
    """State of all generators a forward may use: torch's, the device's, numpy's, Python's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._backend: Any = getattr(torch, device.type, None) if device.type != "cpu" else None
        self._torch = torch.get_rng_state()
        # The state of a device's generator is on the host: nothing waits here.
        self._on_device: Any = self._backend.get_rng_state(device) if self._backend else None
        self._numpy: Any = np.random.get_state()
        self._python = random.getstate()

    def has_moved(self) -> bool:
        """Return whether any generator was used since."""
        now = RandomState(self._device)
        return (
            not torch.equal(self._torch, now._torch)
            or (self._backend is not None and not torch.equal(self._on_device, now._on_device))
            or self._numpy[2:] != now._numpy[2:]
            or not np.array_equal(self._numpy[1], now._numpy[1])
            or self._python != now._python
        )

    def restore(self) -> None:
        """Set every generator back to its state."""
        torch.set_rng_state(self._torch)
        if self._backend is not None:
            self._backend.set_rng_state(self._on_device, self._device)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


class BufferState:
    """A model's buffers as they are: which tensor each is, and what is in it.

    By name and not by object: a forward may change a buffer in place (batch normalization), or put
    another tensor in its place (``self.count = self.count + 1``).

    Args:
        model: The model.
        names: Which buffers to look after; None for all. Quantized models keep their weights in
            buffers, so large ones are remembered by object alone.
    """

    def __init__(self, model: nn.Module, names: set[str] | None = None) -> None:
        self._kept = [
            (module, key, buffer, _copy(buffer))
            for prefix, module in model.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is not None and (names is None or f"{prefix}.{key}" in names)
        ]
        self._names = {id(module): prefix for prefix, module in model.named_modules()}

    def restore(self) -> None:
        """Put every buffer back."""
        with torch.no_grad():
            for module, key, buffer, copy in self._kept:
                module._buffers[key] = buffer
                if copy is not None:
                    buffer.copy_(copy)

    def changed(self) -> set[str]:
        """Return the names of the buffers that are not as they were.

        By value: batch normalization does not move the version counter of its statistics.
        """
        return {
            f"{self._names[id(module)]}.{key}"
            for module, key, buffer, copy in self._kept
            if module._buffers.get(key) is not buffer
            or (copy is not None and not _same_bits(buffer, copy))
        }


class AttributeState:
    """What objects keep in plain attributes: numbers, text, and lists, sets and dicts of them.

    A counter of forwards, a list of losses seen. Attributes that hold anything else, or more than
    a thousand things, are left alone.

    Args:
        objects: Whose attributes to look after.
        leave_out: Names of attributes to leave alone.
    """

    def __init__(self, objects: Iterable[Any], *, leave_out: Container[str] = ()) -> None:
        self._kept = [
            (
                vars(item),
                {key: _kept(value) for key, value in vars(item).items() if key not in leave_out},
            )
            for item in objects
        ]
        self._leave_out = leave_out

    def restore(self) -> None:
        """Put every attribute back, and remove new ones."""
        for attributes, kept in self._kept:
            added = [key for key in attributes if key not in kept and key not in self._leave_out]
            for key in added:
                if _kept(attributes[key]) is not None:
                    del attributes[key]
            for key, value in kept.items():
                if value is not None:
                    attributes[key] = value.restored()


class Rollback:
    """The state in which an update began: random states, and buffers that the forward changes.

    Weights, optimizer and counters need no copy, since nothing touches them before the optimizer
    steps. Few models change a buffer in their forward. Which ones do is seen in the first update,
    for which all small ones are copied; later only those are.

    Args:
        model: The model that the buffers belong to.
        device: The device it runs on.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._names: set[str] | None = None  # all of them, until the first update has shown
        self._random = RandomState(device)
        self._buffers: BufferState | None = None

    def mark(self) -> None:
        """Store the present state, for `restore`."""
        self._random = RandomState(self._device)
        is_due = self._names is None or bool(self._names)
        self._buffers = BufferState(self._model, self._names) if is_due else None

    def restore(self) -> None:
        """Restore the state that `mark` stored."""
        self._random.restore()
        if self._buffers is not None:
            self._buffers.restore()

    def settle(self) -> None:
        """Note that the update went through: from its first one learn which buffers change."""
        if self._names is None and self._buffers is not None:
            self._names = self._buffers.changed()


@dataclass(frozen=True)
class _Kept:
    """An attribute's value as it was; a container together with what was in it."""

    value: Any
    items: tuple[Any, ...] | None = None

    def restored(self) -> Any:
        if self.items is None:
            return self.value
        self.value.clear()
        if isinstance(self.value, dict):
            self.value.update((key, item.restored()) for key, item in self.items)
        elif isinstance(self.value, set):
            self.value.update(self.items)
        else:
            self.value.extend(item.restored() for item in self.items)
        return self.value


def _kept(value: Any, depth: int = 3) -> _Kept | None:
    """Keep a plain value; None for one that is not, or too large to look through."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return _Kept(value)
    if isinstance(value, set | dict | list | deque) and len(value) <= _MOST_ITEMS and depth:
        if isinstance(value, set):
            return _Kept(value, tuple(value))
        if isinstance(value, dict):
            pairs = [(key, _kept(item, depth - 1)) for key, item in value.items()]
            return _Kept(value, tuple((key, item or _Kept(value[key])) for key, item in pairs))
        return _Kept(value, tuple(_kept(item, depth - 1) or _Kept(item) for item in value))
    return None


def _copy(buffer: Tensor) -> Tensor | None:
    """Copy a small buffer; None for one that is large, or has no values."""
    is_small = buffer.numel() * buffer.element_size() <= _SMALL_BUFFER_BYTES
    return buffer.detach().clone() if is_small and buffer.device.type != "meta" else None


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return bool(torch.equal(left.nan_to_num(), right.nan_to_num()))
