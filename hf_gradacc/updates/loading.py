"""What each loader worker is reading now, so that one that hangs can be told with its row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import get_worker_info

__all__ = ["LoadingNow"]

_MOST_ROWS = 16
"""Rows of a share that are kept; a line has no room for more."""


class LoadingNow:
    """A table in memory that loader workers and the main process share, a line for each worker.

    Args:
        num_workers: Workers of the loader; 0 if the main process reads.
    """

    def __init__(self, num_workers: int) -> None:
        self._table = torch.full((max(num_workers, 1), 4 + _MOST_ROWS), -1, dtype=torch.int64)
        self._reader = "loader worker {}" if num_workers else "the main process"
        if num_workers:
            self._table.share_memory_()  # type: ignore[no-untyped-call]

    def begin(self, update: int, rows: Sequence[int]) -> None:
        """Note that this worker begins with a share of an update of the epoch."""
        first = list(rows[:_MOST_ROWS])
        known = torch.tensor([update, -1, len(rows), len(first), *first])
        self._line()[: len(known)] = known

    def reads(self, row: int) -> None:
        """Note the row that this worker reads now."""
        self._line()[1] = row

    def describe(self, update: int) -> str:
        """Say which worker has an update, and the row, or rows, that it reads."""
        for worker, line in enumerate(self._table.tolist()):
            if line[0] != update:
                continue
            reader = self._reader.format(worker)
            _, row, count, num_kept, *rows = line
            if row >= 0:
                return f"{reader} reads row {row}"
            more = f" and {count - num_kept} more" if count > num_kept else ""
            return f"{reader} reads rows {', '.join(map(str, rows[:num_kept]))}{more}"
        return "no loader worker has begun with it"

    def _line(self) -> torch.Tensor:
        info = get_worker_info()
        return self._table[0 if info is None else info.id % len(self._table)]
