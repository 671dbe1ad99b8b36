"""The DataLoader whose items are updates, over map datasets and over streams."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_gradacc.dealing import deal_at_random, is_measured
from hf_gradacc.errors import DataError
from hf_gradacc.reading import as_only_reader, read, state_of
from hf_gradacc.sampler import Deal, Share, UpdateSampler

__all__ = ["IndexedRows", "Rows", "UpdateLoader", "UpdateStream", "read_row"]


class Rows(list[Any]):
    """Dataset rows of one share, with where they came from.

    Attributes:
        position: Where a stream stands behind them: ``rows`` read in this pass and, if the stream
            can seek, its ``state``.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        *,
        indices: Sequence[int],
        epoch: int,
        update: int,
        position: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(rows)
        self.indices = list(indices)
        self.epoch = epoch
        self.update = update
        self.position = position


class IndexedRows(Dataset[Any]):
    """A map dataset that is asked for whole shares and remembers their indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, share: Share) -> Rows:
        """Fetch all rows of a share at once where the dataset can do that."""
        try:
            if share and hasattr(self.dataset, "__getitems__"):
                rows = self.dataset.__getitems__(list(share))
            else:
                rows = [self.dataset[i] for i in share]
        except Exception:
            rows = [read_row(self.dataset, i) for i in share]  # to name the one that fails
        return Rows(rows, indices=share, epoch=share.epoch, update=share.update)


def read_row(dataset: Any, index: int) -> Any:
    """Read a row; one that cannot be read is an error that names it."""
    try:
        return dataset[index]
    except Exception as error:
        what = f"row {index} of the training dataset cannot be read"
        raise DataError(f"{what}: {type(error).__name__}: {error}") from error


class UpdateStream(IterableDataset[Rows]):
    """Cut a stream into updates; every rank reads it whole and keeps its own part.

    Membership then depends neither on ranks nor on workers. A new pass begins a new update, so no
    gradient leaks from one epoch into the next.

    Args:
        dataset: Any iterable over rows.
        take: Called with the rows of the update so far; True once it is complete.
        length_of: Tokens of a row, to balance ranks by.
        deal: See `UpdateSampler`.
        keep_incomplete: Whether the rows left at the end make an update.
        rank: This rank.
        world_size: Number of ranks.
        seed: Of the order in which a measured update is dealt.
        noise_scale_every: As in `UpdateSampler`.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        *,
        take: Callable[[list[Any]], bool],
        length_of: Callable[[Any], int],
        deal: Deal,
        keep_incomplete: bool = True,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        noise_scale_every: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.take = take
        self.length_of = length_of
        self.deal = deal
        self.keep_incomplete = keep_incomplete
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.noise_scale_every = noise_scale_every
        self.epoch = 0
        self._start: tuple[int, int, dict[str, Any]] | None = None
        self._begun: Iterator[Any] | None = None
        self._first_epoch: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A pass that has begun stays here; a worker that is not a fork begins one of its own.
        return {**self.__dict__, "_begun": None}

    def peek(self, count: int) -> list[Any]:
        """Look at the first rows. The first pass then goes on behind them.

        A generator or an open file gives its rows once, and would be short of these.
        """
        rows = iter(self.dataset)
        first = list(itertools.islice(rows, count))
        if not hasattr(self.dataset, "set_epoch"):  # such streams are told their epoch, then begin
            self._begun = itertools.chain(first, rows)
        return first

    def _begin(self) -> Iterator[Any]:
        """Begin a pass over the dataset's rows, or go on with the one that `peek` began."""
        begun, self._begun = self._begun, None
        return iter(self.dataset) if begun is None else begun

    def __len__(self) -> int:
        """Count the updates, if the dataset knows its length and updates have a fixed size."""
        size = getattr(self.take, "keywords", {}).get("effective_batch_size")
        if size is None:
            raise TypeError("a stream whose updates are drawn by tokens has no length")
        full, rest = divmod(len(self.dataset), size)  # type: ignore[arg-type]
        return full + int(rest > 0 and self.keep_incomplete)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to streams that shuffle by it (``datasets.IterableDataset``)."""
        if self._first_epoch not in (None, epoch):
            self._begun = None  # it was used up by a worker's copy
        self._first_epoch = epoch if self._first_epoch is None else self._first_epoch
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def start_at(self, epoch: int, *, updates: int, position: dict[str, Any] | None) -> None:
        """Begin a pass behind updates that are done.

        The skipped updates are handed out empty, because whoever resumes a DataLoader asks for
        them and throws them away; no row of theirs is collated. A stream that can seek is not
        read up to there either.

        Args:
            epoch: The pass this is about; others begin at their beginning.
            updates: How many updates are done.
            position: What the last of them carried.
        """
        self._start = (epoch, updates, position or {})

    def _share(self, members: list[Any], first: int, update: int) -> Rows:
        mine: Sequence[int] = range(len(members))
        if is_measured(update, every=self.noise_scale_every):
            seed = (self.seed, self.epoch, update)
            mine = deal_at_random(len(members), self.world_size, seed=seed)[self.rank]
        elif self.world_size > 1:
            lengths = [self.length_of(row) for row in members]
            mine = sorted(self.deal(lengths, self.world_size)[self.rank])
        return Rows(
            (members[i] for i in mine),
            indices=[first + i for i in mine],
            epoch=self.epoch,
            update=update,
            position={"rows": first + len(members), "state": state_of(self.dataset)},
        )

    def _skip(self, updates: int, position: dict[str, Any]) -> Iterator[Any]:
        """Give the rows behind a position."""
        if position.get("state") is not None:
            self.dataset.load_state_dict(position["state"])  # type: ignore[attr-defined]
            return iter(self.dataset)
        rows = self._begin()
        for _ in range(updates if "rows" not in position else 0):
            members = [next(rows)]  # no position is known: draw the updates again
            while not self.take(members):
                members.append(next(rows))
        return itertools.islice(rows, position.get("rows", 0), None)

    def __iter__(self) -> Iterator[Rows]:
        first = update = 0
        if self._start is not None and self._start[0] == self.epoch:
            _, skipped, position = self._start
            for update in range(skipped):
                yield Rows((), indices=(), epoch=self.epoch, update=update)
            first, update = position.get("rows", 0), skipped
            with as_only_reader():
                rows = self._skip(skipped, position)
        else:
            with as_only_reader():
                rows = self._begin()
        members: list[Any] = []
        for row in read(rows, first=first, epoch=self.epoch):
            members.append(row)
            if self.take(members):
                yield self._share(members, first, update)
                first, update, members = first + len(members), update + 1, []
        if members and self.keep_incomplete:
            yield self._share(members, first, update)


class UpdateLoader(DataLoader[Any]):
    """A DataLoader that yields one `Update` per optimizer step.

    It is not handed to ``accelerator.prepare``: membership is already cut by rank, and preparing
    would move all micro-batches of an update to the device at once.
    """

    @classmethod
    def over_dataset(
        cls, dataset: Any, *, sampler: UpdateSampler, collate_fn: Any, **options: Any
    ) -> UpdateLoader:
        """Load updates of a map dataset."""
        return cls(IndexedRows(dataset), batch_sampler=sampler, collate_fn=collate_fn, **options)

    @classmethod
    def over_stream(cls, stream: UpdateStream, *, collate_fn: Any, **options: Any) -> UpdateLoader:
        """Load updates of a stream.

        One worker at most reads it, since several would each make updates of their own; and it
        does not persist, since a new pass has to hear of its epoch.
        """
        if options.get("num_workers", 0) > 0:
            options["num_workers"] = 1
            options["persistent_workers"] = False
        return cls(stream, batch_size=None, collate_fn=collate_fn, **options)

    def set_epoch(self, epoch: int) -> None:
        """Tell sampler or stream which epoch comes next; the stock training loop calls this."""
        parts: tuple[Any, ...] = (self.batch_sampler, self.dataset)
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        # A generator of our own: creating an iterator must not move torch's global one.
        if self.generator is not None:
            self.generator.manual_seed(self.generator.initial_seed())


def fixed_size(rows: list[Any], *, effective_batch_size: int) -> bool:
    """Complete an update after a number of sequences."""
    return len(rows) >= effective_batch_size


def take_until(
    *, effective_batch_size: int | None, tokens_per_update: int | None, count: Callable[[Any], int]
) -> Callable[[list[Any]], bool]:
    """Make the rule that says when a stream's update is complete."""
    if tokens_per_update is None:
        assert effective_batch_size is not None
        return partial(fixed_size, effective_batch_size=effective_batch_size)
    return _TokensReached(tokens_per_update, count)


class _TokensReached:
    """Complete an update once its rows hold enough target tokens."""

    def __init__(self, tokens_per_update: int, count: Callable[[Any], int]) -> None:
        self.tokens_per_update = tokens_per_update
        self.count = count
        self.reached = 0

    def __call__(self, rows: list[Any]) -> bool:
        # Only the row that came last is counted anew.
        self.reached = (self.reached if len(rows) > 1 else 0) + self.count(rows[-1])
        return self.reached >= self.tokens_per_update


def make_generator(seed: int) -> torch.Generator:
    """Make the generator that seeds loader workers."""
    return torch.Generator().manual_seed(seed)
