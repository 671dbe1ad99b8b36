"""Progress without a terminal: a line every half minute, where a bar would fill a log file."""

from __future__ import annotations

import sys
import time

from hf_gradacc.text import duration

__all__ = ["EVERY_SECONDS", "ProgressLines", "has_terminal"]

EVERY_SECONDS = 30.0


def has_terminal() -> bool:
    """Whether standard error, where bars are drawn, is a terminal."""
    return sys.stderr.isatty()


class ProgressLines:
    """Says how far a run is, at most once in half a minute.

    Args:
        total: Updates of the run.
        done: Those of an earlier start, which took none of this one's time.
        now: Seconds by a clock that never goes back.

    >>> lines = ProgressLines(100, done=0, now=0.0)
    >>> lines.at(10, now=5.0) is None
    True
    >>> lines.at(60, now=30.0)
    'at update 60 of 100 (60%) after 30 s, about 20 s left'
    """

    def __init__(self, total: int, *, done: int, now: float | None = None) -> None:
        self.total, self._first = total, done
        self._begun = self._told = time.monotonic() if now is None else now
        self._batches = 0

    def at(self, step: int, *, now: float | None = None) -> str | None:
        """Describe how far training is; None if it was told lately.

        Args:
            step: Updates done.
            now: As above.
        """
        now = time.monotonic() if now is None else now
        if not self._is_due(now):
            return None
        text = f"at update {step:,} of {self.total:,} ({step / self.total:.0%}) "
        text += f"after {duration(now - self._begun)}"
        done = step - self._first
        if done > 0:
            text += f", about {duration((now - self._begun) * (self.total - step) / done)} left"
        return text

    def evaluating(self, num_batches: int | None, *, now: float | None = None) -> str | None:
        """Count a batch of an evaluation, and describe how far that is; None as in `at`.

        Args:
            num_batches: Of the whole evaluation, if it is known.
            now: As above.
        """
        self._batches += 1
        if not self._is_due(time.monotonic() if now is None else now):
            return None
        of = f" of {num_batches:,}" if num_batches else ""
        return f"evaluating: batch {self._batches:,}{of}"

    def end_evaluation(self) -> None:
        """Count the next evaluation's batches from one."""
        self._batches = 0

    def _is_due(self, now: float) -> bool:
        is_due = now - self._told >= EVERY_SECONDS
        self._told = now if is_due else self._told
        return is_due
