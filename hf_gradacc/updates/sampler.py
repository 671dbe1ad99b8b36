"""Membership: which sequences make up update *u*, and which of them this rank trains.

Integers only. Membership depends on the seed, the epoch and the effective batch, never on the
number of ranks, on loader workers or on how much memory there is: that is what lets a run move
to other hardware and keep its loss curve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.updates.dealing import deal_at_random, deal_by_cost, measures_noise
from hf_gradacc.updates.trees.families import Families
from hf_gradacc.updates.trees.prefixes import Sorted

__all__ = ["Deal", "Share", "SortRows", "UpdateSampler", "bound_updates_by_tokens", "count_updates"]

Deal = Callable[..., list[list[int]]]
"""Lengths of an update's rows, and the number of ranks: to indices for each rank. Where rows can be
sorted by their tokens, a function that does so comes third."""
SortRows = Callable[[Sequence[Any]], Sorted | None]
"""Rows of an update, or their indices: to the rows by their tokens; None if they have none."""


class Share(list[int]):
    """The dataset indices that one rank trains in one update, and which update that is."""

    def __init__(self, indices: Sequence[int], *, epoch: int, update: int) -> None:
        super().__init__(indices)
        self.epoch = epoch
        self.update = update

    def __reduce__(self) -> tuple[Callable[..., Share], tuple[list[int], int, int]]:
        # `list` subclasses lose keyword arguments when pickled to a loader worker.
        return _rebuild_share, (list(self), self.epoch, self.update)


def _rebuild_share(indices: list[int], epoch: int, update: int) -> Share:
    return Share(indices, epoch=epoch, update=update)


class UpdateSampler:
    """Batch sampler whose batches are updates.

    Hand it to ``DataLoader(batch_sampler=...)`` together with an `UpdateCollator`, and one item of
    the loader is one update.

    Args:
        num_sequences: Rows of the dataset, or of `order` where that is given.
        effective_batch_size: Sequences in an update, over all ranks.
        target_counts: Target tokens of each row; with `tokens_per_update` instead of
            `effective_batch_size`, sequences are drawn in seeded order until an update holds at
            least that many target tokens.
        tokens_per_update: See `target_counts`.
        seed: Seed of the shuffling. Each epoch shuffles anew.
        shuffle: False keeps the dataset's order.
        order: Called with the epoch, gives the order of indices itself (a user's own sampler).
            It must give the same order on every rank.
        families: Rows to draw together, see `Families`, instead of each by itself.
        incomplete_update: What to do with an epoch's last update if it is short.
        rank: This rank.
        world_size: Number of ranks.
        lengths: Tokens of each row, to balance ranks by; without it rows are dealt in turn.
        deal: Called with the lengths of an update's rows and the number of ranks; gives each rank
            its part, as `deal_rows` does. Default: by length.
        sort: Sorts an update's rows by their tokens, for a `deal` that knows what they share.
        noise_scale_every: Every so many updates of an epoch, deal at random instead of by cost,
            and give the rows of a share in random order: their noise is measured.

    Raises:
        ConfigError: If not exactly one of the two sizes is given, or one is below 1.
        DataError: If there is no sequence, or "drop" leaves no update.

    >>> sampler = UpdateSampler(5, effective_batch_size=2, shuffle=False)
    >>> list(sampler)
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        num_sequences: int,
        *,
        effective_batch_size: int | None = None,
        target_counts: Sequence[int] | None = None,
        tokens_per_update: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        order: Callable[[int], Sequence[int]] | None = None,
        families: Families | None = None,
        incomplete_update: Literal["keep", "drop"] = "keep",
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] | np.ndarray | None = None,
        deal: Deal | None = None,
        sort: SortRows | None = None,
        noise_scale_every: int | None = None,
    ) -> None:
        if (effective_batch_size is None) == (tokens_per_update is None):
            raise ConfigError(
                f"effective_batch_size = {effective_batch_size} and tokens_per_update = "
                f"{tokens_per_update}: give exactly one of them."
            )
        size = effective_batch_size if tokens_per_update is None else tokens_per_update
        if size is not None and size < 1:
            raise ConfigError(f"an update of size {size} is empty: use at least 1.")
        if num_sequences < 1:
            raise DataError("the training dataset is empty: it has 0 rows.")
        if tokens_per_update is not None and target_counts is None:
            raise ConfigError("tokens_per_update needs target_counts, the targets of each row.")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank = {rank} is not one of the {world_size} ranks.")
        self.num_sequences = num_sequences
        self.effective_batch_size = effective_batch_size
        self.tokens_per_update = tokens_per_update
        self.seed = seed
        self.shuffle = shuffle
        self.incomplete_update = incomplete_update
        self.rank = rank
        self.world_size = world_size
        self.noise_scale_every = noise_scale_every
        self.epoch = 0
        self.families = families
        self._order = self._draw_families if families else order
        self._drawn: tuple[int, np.ndarray] | None = None
        self._target_counts = None if target_counts is None else np.asarray(target_counts)
        self._lengths = None if lengths is None else np.asarray(lengths, dtype=np.int64)
        self._deal = deal or deal_by_cost
        self._sort = sort
        if len(self) == 0:
            raise DataError(
                f"incomplete_update = 'drop' leaves no update: the dataset has {num_sequences:,} "
                f"rows and one update wants {size:,}. Use 'keep' and leave dataloader_drop_last "
                f"out, or take more rows or a smaller update."
            )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next; the DataLoader's owner calls it."""
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """Return the epoch's order of dataset indices, the same on every rank."""
        if self._order is not None:
            if self._drawn is None or self._drawn[0] != epoch:
                # Once: a user's sampler without a seed would draw another order each time.
                self._drawn = epoch, np.asarray(self._order(epoch), dtype=np.int64)
            return self._drawn[1]
        if not self.shuffle:
            return np.arange(self.num_sequences)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_sequences)

    def _draw_families(self, epoch: int) -> np.ndarray:
        assert self.families is not None
        size, weights = self.effective_batch_size, None
        if self.tokens_per_update is not None:
            size, weights = self.tokens_per_update, self._target_counts
        assert size is not None
        return self.families.draw(self.seed, epoch, size=size, weights=weights)

    def bounds(self, order: np.ndarray) -> np.ndarray:
        """Return the positions in `order` at which updates begin, and the end of the last one."""
        drop = self.incomplete_update == "drop"
        if self.tokens_per_update is not None:
            assert self._target_counts is not None
            return bound_updates_by_tokens(
                self._target_counts[order], self.tokens_per_update, drop_incomplete=drop
            )
        assert self.effective_batch_size is not None
        bounds = np.arange(0, len(order) + 1, self.effective_batch_size)
        if not drop and bounds[-1] != len(order):
            bounds = np.append(bounds, len(order))
        return bounds

    def num_updates(self, epoch: int) -> int:
        """Count an epoch's updates. With `tokens_per_update` epochs differ a little."""
        if self.tokens_per_update is None:
            full, rest = divmod(self.num_sequences, self.effective_batch_size or 1)
            return full + int(rest > 0 and self.incomplete_update == "keep")
        return len(self.bounds(self.order(epoch))) - 1

    def membership(self, epoch: int) -> list[list[int]]:
        """Return the sequences of every update of an epoch, over all ranks."""
        order = self.order(epoch)
        bounds = self.bounds(order)
        return [order[a:b].tolist() for a, b in itertools.pairwise(bounds)]

    def deal(self, members: Sequence[int]) -> list[list[int]]:
        """Give each rank its part of an update's sequences, in the order they were drawn."""
        if self.world_size == 1:
            return [list(members)]
        if self._lengths is None:
            return [list(members[rank :: self.world_size]) for rank in range(self.world_size)]
        lengths = self._lengths[np.asarray(members, dtype=np.int64)].tolist()
        sort = () if self._sort is None else (partial(self._sort, members),)
        shares = self._deal(lengths, self.world_size, *sort)
        return [[members[i] for i in sorted(share)] for share in shares]

    def __len__(self) -> int:
        return self.num_updates(self.epoch)

    def shares(self, epoch: int) -> Iterator[list[Share]]:
        """Yield the shares of all ranks, update by update."""
        order = self.order(epoch)
        bounds = self.bounds(order)
        for update, (start, stop) in enumerate(itertools.pairwise(bounds)):
            members = order[start:stop].tolist()
            if measures_noise(update, every=self.noise_scale_every):
                seed = (self.seed, epoch, update)
                dealt = deal_at_random(len(members), self.world_size, seed=seed)
                shares = [[members[i] for i in share] for share in dealt]
            else:
                shares = self.deal(members)
            yield [Share(share, epoch=epoch, update=update) for share in shares]

    def __iter__(self) -> Iterator[Share]:
        return (shares[self.rank] for shares in self.shares(self.epoch))


def bound_updates_by_tokens(
    target_counts: np.ndarray, tokens_per_update: int, *, drop_incomplete: bool = False
) -> np.ndarray:
    """Cut a sequence of target counts where each piece first reaches `tokens_per_update`.

    Args:
        target_counts: Integer array ``[sequences]``, in the order they are drawn.
        tokens_per_update: Target tokens an update must reach.
        drop_incomplete: Leave out a last piece that does not reach it.

    Returns:
        Positions ``[updates + 1]``: update *u* holds positions ``bounds[u]`` to
        ``bounds[u + 1] - 1``.

    >>> bound_updates_by_tokens(np.array([4, 4, 4, 9, 1]), 8).tolist()
    [0, 2, 4, 5]
    """
    cumulated = np.cumsum(target_counts)
    bounds, reached = [0], 0
    while bounds[-1] < len(target_counts):
        # First position at which this update's own count has reached the goal.
        stop = int(np.searchsorted(cumulated, reached + tokens_per_update)) + 1
        if stop > len(target_counts):
            if not drop_incomplete:
                bounds.append(len(target_counts))
            break
        bounds.append(stop)
        reached = int(cumulated[stop - 1])
    return np.asarray(bounds)


def count_updates(
    sampler: UpdateSampler, *, num_train_epochs: float, max_steps: int
) -> tuple[int, int, int]:
    """Count epochs, the updates of the longest one, and the updates of the whole run.

    Epochs differ where updates are drawn by tokens, so they are counted one by one.

    Args:
        sampler: Knows membership.
        num_train_epochs: Passes over the data; the last may be a fraction.
        max_steps: Updates to run instead, if positive.
    """
    if sampler.tokens_per_update is None:
        per_epoch = sampler.num_updates(0)
        if max_steps > 0:
            return math.ceil(max_steps / per_epoch), per_epoch, max_steps
        return math.ceil(num_train_epochs), per_epoch, math.ceil(num_train_epochs * per_epoch)
    counts: list[int] = []
    while sum(counts) < max_steps if max_steps > 0 else len(counts) < num_train_epochs:
        counts.append(sampler.num_updates(len(counts)))
    if max_steps > 0:
        return len(counts), max(counts), max_steps
    last = math.ceil((num_train_epochs - len(counts) + 1) * counts[-1])
    return len(counts), max(counts), sum(counts[:-1]) + last
