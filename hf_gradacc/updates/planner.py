"""How one rank's share of an update is cut into micro-batches.

Pure functions on integers. The cut never changes the gradient (see `hf_gradacc.trainer`), so the
planner is free to choose the cheapest one: sequences of like length together, little padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_gradacc.errors import ConfigError
from hf_gradacc.updates.limits import Limits

__all__ = [
    "OVERHEAD_ON_ACCELERATOR",
    "OVERHEAD_ON_CPU",
    "count_padding",
    "cut_sorted",
    "plan_micro_batches",
    "plan_packed_micro_batches",
]

OVERHEAD_ON_CPU = 64
"""What one more micro-batch costs on a CPU, in computed tokens: Python's way through the model."""

OVERHEAD_ON_ACCELERATOR = 1024
"""The same on a GPU, which would compute that many tokens while the kernels of one more
micro-batch are launched, however small it is. Both are estimates of a magnitude: they weigh padding
against the number of micro-batches and never touch the gradient."""


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int | None = None,
    max_sequences: int | None = None,
    keep_order: bool = False,
    overhead_tokens: int | None = None,
) -> list[list[int]]:
    """Cut sequences into micro-batches: as few as the limits allow, then as little padding.

    A micro-batch computes ``len(micro_batch) * longest`` tokens, padding included. Sequences are
    sorted by length, so each micro-batch is a run of neighbours. Every sub-run of a run that fits
    fits too, hence filling greedily gives the fewest micro-batches; among the cuts with that
    number, dynamic programming finds one that computes the fewest tokens. With `overhead_tokens`
    it finds the cheapest cut of all, where one more micro-batch may save more padding than it
    costs.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Most tokens a micro-batch may compute, padding included. A sequence longer
            than that is planned alone.
        max_sequences: Most sequences in a micro-batch.
        keep_order: Do not sort, only cut. For a cut that has to be random (the noise scale).
        overhead_tokens: What one more micro-batch costs, in computed tokens. None: more than any
            padding.

    Returns:
        Index lists that hold every index of `lengths` exactly once, the longest micro-batch
        first, so that a run out of memory shows at once.

    Raises:
        ConfigError: If a limit is below 1.

    >>> plan_micro_batches([3, 9, 4, 8], max_sequences=2)
    [[1, 3], [2, 0]]
    >>> plan_micro_batches([3, 9, 4, 8], max_tokens=9)
    [[1], [3], [2, 0]]
    >>> plan_micro_batches([3, 9, 4, 8], max_tokens=99), plan_micro_batches(
    ...     [3, 9, 4, 8], max_tokens=99, overhead_tokens=2
    ... )
    ([[1, 3, 2, 0]], [[1, 3], [2, 0]])
    """
    _check_limits(max_tokens=max_tokens, max_sequences=max_sequences)
    n = len(lengths)
    if n == 0:
        return []
    order = list(range(n)) if keep_order else sorted(range(n), key=lambda i: (-lengths[i], i))
    widths = [lengths[i] for i in order]
    if keep_order:
        cuts = _cut_in_order(widths, max_tokens, max_sequences or n)
    else:
        if overhead_tokens is None:
            overhead_tokens = sum(widths) + n * max(widths) + 1
        cuts = cut_sorted(widths, Limits(max_tokens, max_sequences, overhead_tokens))
    return [order[start:stop] for start, stop in cuts]


def _check_limits(**limits: int | None) -> None:
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} = {limit} leaves no room for a sequence: use at least 1.")


def _cut_in_order(
    widths: list[int], max_tokens: int | None, max_sequences: int
) -> list[tuple[int, int]]:
    """Cut a run from left to right, each piece as long as it may be."""
    cuts, start, widest = [], 0, 0
    for stop, width in enumerate(widths):
        widest = max(widest, width)
        rows = stop - start + 1
        if rows > 1 and (
            rows > max_sequences or (max_tokens is not None and rows * widest > max_tokens)
        ):
            cuts.append((start, stop))
            start, widest = stop, width
    cuts.append((start, len(widths)))
    return cuts


def cut_sorted(widths: Sequence[int], limits: Limits) -> list[tuple[int, int]]:
    """Cut a run sorted from long to short: fewest tokens, the overhead of each piece added.

    Args:
        widths: Tokens of each sequence, the longest first; at least one.
        limits: Of each piece.

    Returns:
        Where each piece starts and stops.
    """
    n = len(widths)
    # The first sequence of a piece is its longest, so the piece may hold `rows[start]` sequences.
    width = np.asarray(widths, dtype=np.int64)
    rows = np.full(n, min(n, limits.max_sequences or n), dtype=np.int64)
    if limits.max_tokens is not None:
        rows = np.minimum(rows, np.maximum(1, limits.max_tokens // np.maximum(width, 1)))
    # best[i]: cost of cutting widths[i:].
    best = np.zeros(n + 1, dtype=np.int64)
    take = np.zeros(n, dtype=np.int64)
    counts = np.arange(1, int(rows.max()) + 1, dtype=np.int64)
    for start in range(n - 1, -1, -1):
        most = min(int(rows[start]), n - start)
        costs = counts[:most] * width[start] + best[start + 1 : start + 1 + most]
        # Ties go to the longest piece.
        take[start] = most - int(np.argmin(costs[::-1]))
        best[start] = costs[take[start] - 1] + limits.overhead_tokens
    cuts, start = [], 0
    while start < n:
        stop = start + int(take[start])
        cuts.append((start, stop))
        start = stop
    return cuts


def plan_packed_micro_batches(
    lengths: Sequence[int], *, max_tokens: int | None = None, max_sequences: int | None = None
) -> list[list[int]]:
    """Cut sequences into micro-batches that will be laid end to end, so only their sum counts.

    First-fit decreasing: each sequence, from long to short, goes into the first micro-batch with
    room. It needs at most 11/9 of the fewest bins possible, plus one (Johnson 1973). With no token
    limit, sequences are dealt so that micro-batches come out alike.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Most tokens in a micro-batch; a longer sequence is planned alone.
        max_sequences: Most sequences in a micro-batch.

    Returns:
        Index lists that hold every index of `lengths` exactly once, the fullest first.

    Raises:
        ConfigError: If a limit is below 1.

    >>> plan_packed_micro_batches([3, 9, 4, 8, 2], max_tokens=12)
    [[1, 0], [3, 2], [4]]
    """
    _check_limits(max_tokens=max_tokens, max_sequences=max_sequences)
    n = len(lengths)
    if n == 0:
        return []
    max_sequences = n if max_sequences is None else max_sequences
    order = sorted(range(n), key=lambda i: (-lengths[i], i))
    if max_tokens is None:
        # Longest first to the emptiest that still has a place.
        bins: list[list[int]] = [[] for _ in range(-(-n // max_sequences))]
        loads = [0] * len(bins)
        for i in order:
            k = min(
                (k for k in range(len(bins)) if len(bins[k]) < max_sequences),
                key=lambda k: loads[k],
            )
            bins[k].append(i)
            loads[k] += lengths[i]
    else:
        bins, loads = [], []
        for i in order:
            for k, load in enumerate(loads):
                if load + lengths[i] <= max_tokens and len(bins[k]) < max_sequences:
                    break
            else:
                k = len(bins)
                bins.append([])
                loads.append(0)
            bins[k].append(i)
            loads[k] += lengths[i]
    return [bins[k] for k in sorted(range(len(bins)), key=lambda k: (-loads[k], k))]


def count_padding(lengths: Sequence[int], plan: Sequence[Sequence[int]]) -> int:
    """Count the padding tokens a padded plan computes and throws away.

    >>> count_padding([3, 9, 4, 8], [[1, 3], [2, 0]])
    2
    """
    computed = sum(len(piece) * max(lengths[i] for i in piece) for piece in plan if piece)
    return computed - sum(lengths[i] for piece in plan for i in piece)
