"""Tell what hangs from what gets little of a busy machine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["HUNG_AFTER_SECONDS", "Watch", "crowding"]

HUNG_AFTER_SECONDS = 1800.0
"""For processes that nobody watches; less than pytest's own limit, so that they say what they
were at. A minute's work takes ten on two cores with a load of 20.
"""

_STILL_SECONDS = 0.5  # idle threads wake up now and then


def crowding() -> float:
    """How many processes want each core, 1 at least: how much longer a wait may take."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Watch:
    """Watches processes by the CPU time they use, which others on the machine do not change.

    Processes that wait for each other use none; one in an endless loop uses too much.

    Args:
        pids: Of the processes.
        still_after: Seconds without progress after which they count as hung.
        busy_after: CPU seconds of all of them together after which they count as looping.
    """

    def __init__(
        self, pids: Sequence[int], *, still_after: float = 120, busy_after: float = 800
    ) -> None:
        self.pids, self.still_after, self.busy_after = pids, still_after, busy_after
        self._seen, self._seen_at = 0.0, time.monotonic()

    def why_lost(self) -> str:
        """Say why the processes will never end, empty if they may."""
        used, now = sum(map(_cpu_seconds, self.pids)), time.monotonic()
        if used > self.busy_after:
            return f"used {used:.0f} s of CPU time"
        if used < self._seen or used >= self._seen + _STILL_SECONDS:  # fewer, or further
            self._seen, self._seen_at = used, now
        elif now - self._seen_at > self.still_after:
            return f"used no CPU time for {self.still_after:.0f} s"
        return ""


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children, ended or not; where nobody says, the clock."""
    if not Path("/proc/self/stat").exists():
        return time.monotonic()
    try:
        # The name in parentheses may hold anything; then state is the first field.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_cpu_seconds(int(child)) for child in children)
