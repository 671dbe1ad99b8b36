"""Where the time of an update goes: data, forward and backward, reduction, optimizer.

The phases follow each other without a gap, so they add up to ``step_seconds``. On CUDA a change of
phase is an event in the device's stream, read when a row is logged: the host never waits for it,
and what is measured is the device's time, in which waiting for data is the time it had nothing to
do. Elsewhere it is the host's clock.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch

__all__ = ["PHASE_KEYS", "DeviceEvent", "Phase", "PhaseClock"]

Phase = Literal["data", "forward_backward", "reduction", "optimizer"]


PHASE_KEYS: dict[Phase, str] = {
    "data": "data_seconds",
    "forward_backward": "forward_backward_seconds",
    "reduction": "reduction_seconds",
    "optimizer": "optimizer_seconds",
}
"""Each phase and its key in a log row."""


_MOST_SPANS = 256
"""Spans kept unread; more than this only between log rows that are far apart."""


class DeviceEvent(Protocol):
    """What is used of `torch.cuda.Event`."""

    def record(self) -> None:
        """Mark this place in the stream."""

    def query(self) -> bool:
        """Return whether the device has come this far."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds from here to there."""


class PhaseClock:
    """Say which phase begins; ask for the sums when a row is logged.

    Args:
        device: Whose time is measured.
        make_event: Makes events of the device; by default `torch.cuda.Event`, on CUDA only.

    >>> clock = PhaseClock(torch.device("cpu"))
    >>> clock.enter("data")
    >>> clock.enter("forward_backward")
    >>> with clock.within("reduction"):
    ...     pass
    >>> clock.stop()
    >>> sorted(clock.take())
    ['data_seconds', 'forward_backward_seconds', 'optimizer_seconds', 'reduction_seconds']
    """

    def __init__(
        self, device: torch.device, *, make_event: Callable[[], DeviceEvent] | None = None
    ) -> None:
        if make_event is None and device.type == "cuda":
            make_event = _timed_event
        self._make_event = make_event
        self._current: tuple[Phase, float | DeviceEvent] | None = None
        self._spans: list[tuple[Phase, DeviceEvent, DeviceEvent]] = []
        self._begin_window()

    @property
    def phase(self) -> Phase | None:
        """The phase that runs, None between updates."""
        return None if self._current is None else self._current[0]

    def enter(self, phase: Phase) -> None:
        """End the phase that runs and begin another at the same moment."""
        self._change(phase)

    @contextlib.contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Count what runs inside as `phase`, then go on with the phase around it."""
        around = self._current
        if around is None:  # not inside an update that is timed: somebody calls our parts himself
            yield
            return
        self._change(phase)
        try:
            yield
        finally:
            self._change(around[0])

    def stop(self) -> None:
        """End the update: until the next phase begins, time counts for none."""
        self._change(None)
        self._num_updates += 1
        if len(self._spans) > _MOST_SPANS:
            self._read(wait=False)

    def drop(self) -> None:
        """Forget the phase that runs: no update came of it."""
        self._current = None

    def take(self) -> dict[str, float]:
        """Return each phase's seconds per update since the last call, {} if there was no update."""
        self._read(wait=True)
        row = {}
        if self._num_updates:
            row = {PHASE_KEYS[name]: sum_ / self._num_updates for name, sum_ in self._sums.items()}
        self._begin_window()
        return row

    def _begin_window(self) -> None:
        self._sums: dict[Phase, float] = dict.fromkeys(PHASE_KEYS, 0.0)
        self._num_updates = 0

    def _change(self, phase: Phase | None) -> None:
        now: float | DeviceEvent
        if self._make_event is None:
            now = time.perf_counter()
        else:
            now = self._make_event()
            now.record()
        if self._current is not None:
            name, began = self._current
            if isinstance(began, float) and isinstance(now, float):
                self._sums[name] += now - began
            elif not isinstance(began, float) and not isinstance(now, float):
                self._spans.append((name, began, now))
        self._current = None if phase is None else (phase, now)

    def _read(self, *, wait: bool) -> None:
        """Add up spans of the device: all of them, or those it has passed already."""
        if wait and self._spans:
            self._spans[-1][2].synchronize()
        num_read = 0
        for name, began, ended in self._spans:
            if not ended.query():
                break
            self._sums[name] += began.elapsed_time(ended) / 1e3
            num_read += 1
        del self._spans[:num_read]


def _timed_event() -> DeviceEvent:
    event: DeviceEvent = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event
