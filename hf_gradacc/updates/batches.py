"""The train loader as everybody but the training loop sees it: batches, as the stock one has them.

The training loop takes whole updates from an `UpdateLoader`. Whoever else asks a trainer for its
train loader looks at a batch, counts steps for a schedule, or wraps it in a loader of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset

from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.loader import UpdateLoader
from hf_gradacc.updates.stream import is_stream
from hf_gradacc.updates.update import Update

__all__ = ["BatchLoader", "GroupedBatches", "count_batches", "updates_of"]


class BatchLoader(DataLoader[Any]):
    """Micro-batches by hand, updates for the training loop.

    Iterating gives what one forward takes, as the data collator made it, on the trainer's device.
    The length counts the batches that ``gradient_accumulation_steps`` of make an update, see
    `count_batches`. All attributes of a DataLoader are those that the stock loader would have.

    Args:
        updates: The loader of updates.
        dataset: The rows.
        device: Where batches go.
        steps_per_update: The option ``gradient_accumulation_steps``.
        world_size: Ranks that share an update.
        total_batch_size: Rows that one counted batch stands for, over all ranks.
        sampler: A user's own order of the rows.
        shuffle: Whether they are shuffled without one.
        **options: Passed on to ``torch.utils.data.DataLoader``.

    Attributes:
        updates: The loader of updates.
        total_batch_size: Rows that one counted batch stands for, over all ranks.
        iteration: The pass that comes next, by which rows are shuffled.
    """

    def __init__(
        self,
        updates: UpdateLoader,
        dataset: Any,
        *,
        device: Any,
        steps_per_update: int,
        world_size: int,
        total_batch_size: int,
        sampler: Any = None,
        shuffle: bool = True,
        **options: Any,
    ) -> None:
        if not is_stream(dataset):
            options |= {"shuffle": shuffle} if sampler is None else {"sampler": sampler}
        super().__init__(dataset, **options)
        self.updates = updates
        self.device = device
        self.total_batch_size = total_batch_size
        self.iteration = 0
        self._steps_per_update = steps_per_update
        self._world_size = world_size

    @property
    def total_dataset_length(self) -> int:
        """Count the rows of the dataset."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        sampler = self.updates.batch_sampler
        rows: int = len(self.dataset) if sampler is None else sampler.num_sequences  # type: ignore
        return count_batches(
            rows,
            batch_size=self.batch_size or 1,
            world_size=self._world_size,
            num_updates=len(self.updates),
            steps_per_update=self._steps_per_update,
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the pass that comes next."""
        self.iteration = epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.updates.set_epoch(self.iteration)
        for update in self.updates:
            for micro_batch in update:
                yield _remember(send_to_device(micro_batch.inputs, self.device), update)
        self.iteration += 1


def count_batches(
    num_rows: int, *, batch_size: int, world_size: int, num_updates: int, steps_per_update: int
) -> int:
    """Count batches so that every ``steps_per_update`` of them, rounded up, are an update.

    Where a batch times these steps is the update, this is the length of the stock loader. Where
    another option says how large an update is, steps are 1, and it is the number of updates.

    Args:
        num_rows: Rows of a pass.
        batch_size: Rows of a batch on one rank.
        world_size: Ranks that share an update.
        num_updates: Updates of a pass.
        steps_per_update: The option ``gradient_accumulation_steps``.

    >>> count_batches(66, batch_size=4, world_size=1, num_updates=5, steps_per_update=4)
    17
    >>> count_batches(66, batch_size=4, world_size=1, num_updates=4, steps_per_update=1)
    4
    """
    batches = math.ceil(math.ceil(num_rows / batch_size) / world_size)
    return min(batches, num_updates * steps_per_update)


def updates_of(loader: Any) -> Any:
    """Return the loader of updates behind a train loader; itself if there is none."""
    return loader.updates if isinstance(loader, BatchLoader) else loader


class _Remembering(dict[str, Any]):
    """A batch that knows its update; a plain dict cannot be told."""

    of_update: Update


def _remember(batch: Any, update: Update) -> Any:
    """Let a batch name the update it is cut from, in case it is grouped into updates again."""
    if type(batch) is dict:
        batch = _Remembering(batch)
    with contextlib.suppress(AttributeError):
        batch.of_update = update
    return batch


class GroupedBatches(IterableDataset[Update]):
    """Group the batches of a user's own loader into updates.

    For trainers that override ``get_train_dataloader``: they make the plan, and the weights are
    exact as before. Batches of a `BatchLoader`, passed on by a loader around it, become the updates
    they were cut from.
    """

    def __init__(self, loader: Any, *, micro_batches_per_update: int, main_input: str) -> None:
        self.loader = loader
        self.size = micro_batches_per_update
        self.main_input = main_input
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.loader) // self.size)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        self.epoch = epoch
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Update]:
        batches: Iterator[Any] = iter(self.loader)
        for index in itertools.count():
            first = list(itertools.islice(batches, 1))
            if not first:
                return
            update: Update | None = getattr(first[0], "of_update", None)
            if update is None:
                rest = list(itertools.islice(batches, self.size - 1))
            else:
                rest, batches = _take_of(update, batches)
            known = update.micro_batches if update is not None else []
            yield Update(
                [
                    make_micro_batch(
                        batch,
                        main_input=self.main_input,
                        rows_per_sequence=known[0].rows_per_sequence if known else 1,
                    )
                    for batch in first + rest
                ],
                self.epoch,
                index,
            )

    def as_loader(self) -> UpdateLoader:
        """Wrap into a DataLoader, which resuming knows how to fast-forward."""
        return UpdateLoader(self, batch_size=None, collate_fn=_identity)


def _take_of(update: Update, batches: Iterator[Any]) -> tuple[list[Any], Iterator[Any]]:
    """Take the batches that come next and are of an update; return them and what follows."""
    taken: list[Any] = []
    for batch in batches:
        if getattr(batch, "of_update", None) is not update:
            return taken, itertools.chain([batch], batches)
        taken.append(batch)
    return taken, batches


def _identity(update: Any) -> Any:
    return update
