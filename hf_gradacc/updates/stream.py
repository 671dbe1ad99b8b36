"""Read a stream the same way in every process, and find out whether it can seek."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import IterableDataset

from hf_gradacc.compat import streams_can_seek
from hf_gradacc.errors import DataError
from hf_gradacc.updates.dealing import deal_at_random, measures_noise
from hf_gradacc.updates.draws.stream import SeededStream
from hf_gradacc.updates.sampler import Deal, SortRows

__all__ = [
    "Rows",
    "UpdateStream",
    "as_only_reader",
    "fixed_size",
    "is_arrow_table",
    "is_stream",
    "read",
    "state_of",
    "take_until",
]


def read(rows: Iterator[Any], *, first: int, epoch: int) -> Iterator[Any]:
    """Yield a stream's rows, each read inside of `as_only_reader`.

    Args:
        rows: The stream.
        first: How many rows of this pass were read before.
        epoch: The number of this pass.

    Raises:
        DataError: If the stream fails; says how far it was read.
    """
    for done in itertools.count(first):
        with as_only_reader():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                what = f"the training stream failed after {done} rows of epoch {epoch}"
                raise DataError(f"{what}: {type(error).__name__}: {error}") from error
        yield row


@contextlib.contextmanager
def as_only_reader() -> Iterator[None]:
    """Hide from a stream that a loader worker reads it: the one worker reads all rows.

    ``datasets`` draws a worker's shuffle buffer from other random numbers than it draws without
    workers, even if there is but one: the rows of an update would depend on it.
    """
    worker: Any = torch.utils.data._utils.worker
    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info


def state_of(dataset: Any) -> dict[str, Any] | None:
    """Return the position of a ``datasets.IterableDataset``, None if it cannot seek exactly."""
    if not _can_seek(dataset):
        return None
    try:
        state: dict[str, Any] = json.loads(json.dumps(dataset.state_dict()))
    except (TypeError, ValueError):
        return None
    return state


def _can_seek(dataset: Any) -> bool:
    """Return whether a stream gives the same rows after seeking as without.

    A shuffle buffer does not: it is refilled with other rows, so such a stream is read again.
    """
    if not streams_can_seek():
        return False
    parts = [getattr(dataset, "_ex_iterable", None)]
    if parts[0] is None or not hasattr(dataset, "load_state_dict"):
        return False
    while parts:
        part = parts.pop()
        if "BufferShuffled" in type(part).__name__:
            return False
        for value in vars(part).values():
            nested = value if isinstance(value, list) else [value]
            parts += [v for v in nested if hasattr(v, "_init_state_dict")]
    return True


def is_stream(dataset: Any) -> bool:
    """Return whether rows can only be read in the dataset's own order."""
    return isinstance(dataset, IterableDataset) or _is_of_datasets(dataset, "IterableDataset")


def is_arrow_table(dataset: Any) -> bool:
    """Return whether a dataset is a ``datasets.Dataset``, whose columns can be read by themselves.

    >>> is_arrow_table([{"input_ids": [1, 2]}])
    False
    """
    return _is_of_datasets(dataset, "Dataset")


def _is_of_datasets(dataset: Any, kind: str) -> bool:
    """Look for a class of ``datasets`` without importing it: who has one of its has imported it.

    It takes a second to load and is not installed everywhere that rows are plain lists.
    """
    library = sys.modules.get("datasets")
    return library is not None and isinstance(dataset, getattr(library, kind))


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


class UpdateStream(IterableDataset[Rows]):
    """Cut a stream into updates; every rank reads it whole and keeps its own part.

    Membership then depends neither on ranks nor on workers. A new pass begins a new update, so no
    gradient leaks from one epoch into the next.

    Args:
        dataset: Any iterable over rows.
        take: Called with the rows of the update so far; True once it is complete.
        length_of: Tokens of a row, to balance ranks by.
        deal: See `UpdateSampler`.
        sort: Likewise.
        keep_incomplete: Whether the rows left at the end make an update.
        rank: This rank.
        world_size: Number of ranks.
        seed: Of the order in which a measured update is dealt, and of what a stream draws.
        noise_scale_every: As in `UpdateSampler`.

    Attributes:
        first_rows: The first rows, once `peek` has looked at them.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        *,
        take: Callable[[list[Any]], bool],
        length_of: Callable[[Any], int],
        deal: Deal,
        sort: SortRows | None = None,
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
        self.sort = sort
        self.keep_incomplete = keep_incomplete
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.noise_scale_every = noise_scale_every
        self.epoch = 0
        self._start: tuple[int, int, dict[str, Any]] | None = None
        self._begun: Iterator[Any] | None = None
        self._first_epoch: int | None = None
        self.first_rows: list[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A pass that has begun stays here; a worker that is not a fork begins one of its own.
        return {**self.__dict__, "_begun": None}

    def peek(self, count: int) -> list[Any]:
        """Look at the first rows. The first pass then goes on behind them.

        A generator or an open file gives its rows only once, so these would be lost.
        """
        if self._begun is not None and self.first_rows is not None:
            return self.first_rows
        rows = self._seeded()
        first = self.first_rows = list(itertools.islice(rows, count))
        if not hasattr(self.dataset, "set_epoch"):  # such streams are told their epoch, then begin
            self._begun = itertools.chain(first, rows)
        return first

    def take_over(self, other: UpdateStream) -> None:
        """Go on with the pass that another loader of the same rows looked into, and never began."""
        if other.dataset is self.dataset and other._begun is not None:
            self._begun, other._begun = other._begun, None
            self.first_rows = other.first_rows

    def _begin(self) -> Iterator[Any]:
        """Begin a pass over the dataset's rows, or go on with the one that `peek` began."""
        begun, self._begun = self._begun, None
        return self._seeded() if begun is None else begun

    def _seeded(self, first: int = 0) -> Iterator[Any]:
        return SeededStream(self.dataset, seed=self.seed, epoch=self.epoch, first=first)

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
        """Begin a pass after updates that are done.

        The skipped updates are yielded empty: code that resumes a DataLoader asks for them and
        throws them away. None of their rows is collated. A stream that can seek does not read them
        either.

        Args:
            epoch: The pass this is about; others begin at their beginning.
            updates: How many updates are done.
            position: What the last of them carried.
        """
        self._start = (epoch, updates, position or {})

    def _share(self, members: list[Any], first: int, update: int) -> Rows:
        mine: Sequence[int] = range(len(members))
        if measures_noise(update, every=self.noise_scale_every):
            seed = (self.seed, self.epoch, update)
            mine = deal_at_random(len(members), self.world_size, seed=seed)[self.rank]
        elif self.world_size > 1:
            lengths = [self.length_of(row) for row in members]
            sort = () if self.sort is None else (partial(self.sort, members),)
            mine = sorted(self.deal(lengths, self.world_size, *sort)[self.rank])
        return Rows(
            (members[i] for i in mine),
            indices=[first + i for i in mine],
            epoch=self.epoch,
            update=update,
            position={"rows": first + len(members), "state": state_of(self.dataset)},
        )

    def _skip(self, updates: int, position: dict[str, Any]) -> Iterator[Any]:
        """Return the rows behind a position."""
        if position.get("state") is not None:
            self.dataset.load_state_dict(position["state"])  # type: ignore[attr-defined]
            return self._seeded(position.get("rows", 0))
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
