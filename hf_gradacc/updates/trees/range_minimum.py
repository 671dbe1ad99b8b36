"""The least of neighbouring numbers, of any run of them, in constant time."""

from __future__ import annotations

import numpy as np

__all__ = ["RangeMinimum"]


class RangeMinimum:
    """Answers what the least of a run of numbers is, from a table of runs of 1, 2, 4, 8 and so on.

    Args:
        values: The numbers.

    >>> least = RangeMinimum(np.array([5, 3, 4, 9]))
    >>> least(2, 4), least.of_each(np.array([0, 3]), np.array([3, 4])).tolist()
    (4, [3, 9])
    """

    def __init__(self, values: np.ndarray) -> None:
        self.table = [values]
        width = 1
        while 2 * width <= len(values):
            last = self.table[-1]
            self.table.append(np.minimum(last[:-width], last[width:]))
            width *= 2

    def __call__(self, start: int, stop: int) -> int:
        """Return the least of one run, which is not empty."""
        level = (stop - start).bit_length() - 1
        row = self.table[level]
        return int(min(row[start], row[stop - (1 << level)]))

    def of_each(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Return the least of each of many runs ``[runs]``, none of them empty."""
        levels = np.frexp((stops - starts).astype(float))[1] - 1
        least = np.zeros(len(starts), dtype=np.int64)
        for level in np.unique(levels).tolist():
            which = levels == level
            row, width = self.table[level], 1 << level
            least[which] = np.minimum(row[starts[which]], row[stops[which] - width])
        return least
