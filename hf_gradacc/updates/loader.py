"""The DataLoader whose items are updates, over map datasets and over streams.

`load_updates` goes from a run's options to its loader. Training calls it, and so does
`hf-gradacc plan`: what a plan says is what the loaders of a run yield.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hf_gradacc.errors import DataError
from hf_gradacc.updates.budget import FIRST_BUDGET
from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.dealing_updates import deal_update
from hf_gradacc.updates.draws.rows import ReadsByRow
from hf_gradacc.updates.lengths import measure_length
from hf_gradacc.updates.loading import LoadingNow
from hf_gradacc.updates.planner import OVERHEAD_ON_ACCELERATOR
from hf_gradacc.updates.sampler import Share, UpdateSampler
from hf_gradacc.updates.stream import (
    Rows,
    UpdateStream,
    is_arrow_table,
    is_stream,
    take_until,
)
from hf_gradacc.updates.targets import can_have_target, count_row_targets
from hf_gradacc.updates.trees.cost import TreeCost
from hf_gradacc.updates.trees.grouping import families_of, refuse_grouping
from hf_gradacc.updates.trees.order import PrefixOrder, sort_rows

if TYPE_CHECKING:
    from hf_gradacc.arguments import GradAccArguments

__all__ = [
    "IndexedRows",
    "ModelFacts",
    "UpdateLoader",
    "build_loader",
    "count_targets_of",
    "load_updates",
    "make_generator",
    "read_row",
    "read_rows",
]


class IndexedRows(Dataset[Any]):
    """A map dataset that is asked for whole shares and remembers their indices.

    Args:
        dataset: The rows.
        seed: Seed of what the dataset draws for a row, see `ReadsByRow`.
        rows_repeat: See `UpdateCollator`.
        num_workers: Workers of the loader.

    Attributes:
        loading: What each worker reads now.
    """

    def __init__(
        self, dataset: Any, *, seed: int = 0, rows_repeat: bool = False, num_workers: int = 0
    ) -> None:
        self.dataset = dataset
        self.loading = LoadingNow(num_workers)
        self.rows_repeat = rows_repeat
        self._reads = ReadsByRow(dataset, seed=seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, share: Share) -> Rows:
        """Fetch all rows of a share at once where the dataset can do that."""
        self.loading.begin(share.update, share)
        rows = self._reads(
            share,
            epoch=share.epoch,
            salt=share.update + 1 if self.rows_repeat else 0,
            read_all=self._read_all,
            read_one=self._read_one,
        )
        return Rows(rows, indices=share, epoch=share.epoch, update=share.update)

    def _read_all(self, indices: Sequence[int]) -> list[Any]:
        try:
            if indices and hasattr(self.dataset, "__getitems__"):
                return list(self.dataset.__getitems__(list(indices)))
            return [self._read_noted(i) for i in indices]
        except Exception:
            return [read_row(self.dataset, i) for i in indices]  # to name the one that fails

    def _read_noted(self, index: int) -> Any:
        self.loading.reads(index)
        return self.dataset[index]

    def _read_one(self, index: int) -> Any:
        self.loading.reads(index)
        return read_row(self.dataset, index)


def read_row(dataset: Any, index: int) -> Any:
    """Read a row; if that fails, raise an error that names the row."""
    try:
        return dataset[index]
    except Exception as error:
        what = f"row {index} of the training dataset cannot be read"
        raise DataError(f"{what}: {type(error).__name__}: {error}") from error


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
        seed = getattr(collate_fn, "seed", 0)
        rows = IndexedRows(
            dataset,
            seed=seed,
            rows_repeat=getattr(collate_fn, "rows_repeat", False),
            num_workers=options.get("num_workers", 0),
        )
        return cls(rows, batch_sampler=sampler, collate_fn=collate_fn, **options)

    @classmethod
    def over_stream(cls, stream: UpdateStream, *, collate_fn: Any, **options: Any) -> UpdateLoader:
        """Load updates of a stream.

        At most one worker reads it, since several would each make updates of their own. The worker
        does not persist, since each pass has to be told its epoch.
        """
        if options.get("num_workers", 0) > 0:
            options["num_workers"] = 1
            options["persistent_workers"] = False
        return cls(stream, batch_size=None, collate_fn=collate_fn, **options)

    @property
    def collator(self) -> UpdateCollator:
        """What makes updates of rows, in a loader that `build_loader` built."""
        assert isinstance(self.collate_fn, UpdateCollator)
        return self.collate_fn

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the sampler or stream; the stock training loop calls this."""
        parts: tuple[Any, ...] = (self.batch_sampler, self.dataset)
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        # A generator of our own: creating an iterator must not move torch's global one.
        if self.generator is not None:
            self.generator.manual_seed(self.generator.initial_seed())


def make_generator(seed: int) -> torch.Generator:
    """Make the generator that seeds loader workers."""
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class ModelFacts:
    """What of a model decides how rows are measured, dealt and cut; its weights do not.

    Attributes:
        main_input: The feature that holds the sequence.
        encoder_decoder: Labels cost tokens of their own.
        hidden_size: Width, which says how much attention weighs in a row's cost; None if unknown.
    """

    main_input: str = "input_ids"
    encoder_decoder: bool = False
    hidden_size: int | None = None

    @classmethod
    def of(cls, model: Any) -> ModelFacts:
        """Read them off any model; one on torch's meta device will do."""
        config = getattr(model, "config", None)
        return cls(
            main_input=getattr(model, "main_input_name", "input_ids"),
            encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
            hidden_size=getattr(config, "hidden_size", None),
        )


def load_updates(
    dataset: Any,
    data_collator: Callable[[list[Any]], Any],
    arguments: GradAccArguments,
    *,
    model: ModelFacts,
    effective_batch_size: int | None,
    max_sequences: int,
    rank: int = 0,
    world_size: int = 1,
    on_accelerator: bool = False,
    lockstep: bool = False,
    sampler: Any = None,
    lengths: Sequence[int] | np.ndarray | None = None,
    target_counts: Sequence[int] | None = None,
    by_tokens: PrefixOrder | None = None,
    **options: Any,
) -> UpdateLoader:
    """Build the loader of a run's updates from its options.

    Args:
        dataset: Map dataset, list, or stream.
        data_collator: Makes tensors of rows.
        arguments: The run's options.
        model: What of the model decides the cut.
        effective_batch_size: Sequences in an update, over all ranks; None if tokens decide.
        max_sequences: Most sequences in a micro-batch, if there is no token budget.
        rank: This rank.
        world_size: Ranks that share an update.
        on_accelerator: Whether it trains elsewhere than on CPUs.
        lockstep: Ranks wait for each other in every micro-batch.
        sampler: A user's own sampler of indices, instead of shuffling by seed.
        lengths: See `build_loader`.
        target_counts: See `build_loader`.
        by_tokens: See `build_loader`.
        **options: Passed on to ``torch.utils.data.DataLoader``.

    Raises:
        ConfigError: If rows are to be drawn together, and cannot be.
        DataError: If the dataset is empty.
    """
    budget: Any = arguments.max_tokens_per_micro_batch
    collator = UpdateCollator(
        data_collator,
        # A token budget replaces the count of sequences, whose default of 8 nobody chose.
        max_sequences=None if budget is not None else max_sequences,
        # "auto" tunes itself from here: see `hf_gradacc.updates.budget`.
        max_tokens=FIRST_BUDGET if budget == "auto" else budget,
        main_input=model.main_input,
        encoder_decoder=model.encoder_decoder,
        seed=arguments.seed,
    )
    if budget == "auto":
        collator.share_budget()
    if on_accelerator:
        collator.overhead_tokens = OVERHEAD_ON_ACCELERATOR
    collator.noise_scale_every = arguments.noise_scale_every
    if arguments.layout == "shared_prefix":
        collator.least_saving = 0.0
    if arguments.group_by_prefix:
        refuse_grouping(dataset, sampler=sampler, effective_batch_size=effective_batch_size)
    return build_loader(
        dataset,
        collator,
        effective_batch_size=effective_batch_size,
        tokens_per_update=arguments.tokens_per_update,
        incomplete_update="keep" if arguments.keeps_incomplete_update else "drop",
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        shuffle=arguments.train_sampling_strategy != "sequential",
        sampler=sampler,
        rank=rank,
        world_size=world_size,
        hidden_size=model.hidden_size,
        lockstep=lockstep,
        lengths=lengths,
        target_counts=target_counts,
        group_by_prefix=arguments.group_by_prefix,
        by_tokens=by_tokens,
        **options,
    )


def build_loader(
    dataset: Any,
    collator: UpdateCollator,
    *,
    effective_batch_size: int | None,
    tokens_per_update: int | None,
    incomplete_update: Literal["keep", "drop"],
    seed: int,
    shuffle: bool = True,
    sampler: Any = None,
    rank: int = 0,
    world_size: int = 1,
    hidden_size: int | None = None,
    lockstep: bool = False,
    lengths: Sequence[int] | np.ndarray | None = None,
    target_counts: Sequence[int] | None = None,
    group_by_prefix: bool = False,
    by_tokens: PrefixOrder | None = None,
    **options: Any,
) -> UpdateLoader:
    """Build the DataLoader whose items are updates.

    Args:
        dataset: Map dataset, list, or stream.
        collator: Makes updates of rows, and knows which of them are measured.
        effective_batch_size: Sequences in an update, over all ranks.
        tokens_per_update: Target tokens an update must reach, instead.
        incomplete_update: What to do with a short last update.
        seed: Seed of the shuffling.
        shuffle: False keeps the dataset's order.
        sampler: A user's own sampler of indices, instead of shuffling by seed.
        rank: This rank.
        world_size: Ranks that share an update.
        hidden_size: Width of the model, which says how much attention weighs in a row's cost.
        lockstep: Ranks wait for each other in every micro-batch.
        lengths: Tokens that each row costs, 0 without a target, if they are known without reading
            the dataset's rows one by one.
        target_counts: Targets of each row, likewise.
        group_by_prefix: Draw rows that begin alike together, see `Families`.
        by_tokens: The dataset's rows by their tokens, for several loaders of it.
        **options: Passed on to ``torch.utils.data.DataLoader``.

    Raises:
        ConfigError: If rows to be drawn together have no token ids.
        DataError: If the dataset is empty.
    """
    # No closures: workers that are no forks (Python 3.14's default) get both by pickle.
    count = partial(count_targets_of, collator=collator)
    length_of = partial(_length_of, collator=collator)
    collator.num_ranks = world_size
    # A layer costs 24 h² per token and 4 h more for each token it attends to (forward FLOPs).
    attention_length = 6 * hidden_size if hidden_size else None
    # Of a square of attention, what stands before is half.
    tree_cost = TreeCost(attention_length and 2 * attention_length, by_rows=True)
    collator.tree_cost = tree_cost
    collator.rows_repeat = sampler is not None
    deal = partial(
        deal_update,
        collator,
        attention_length=attention_length,
        tree_cost=tree_cost,
        lockstep=lockstep,
    )
    options["generator"] = make_generator(seed)
    if is_stream(dataset):
        take = take_until(
            effective_batch_size=effective_batch_size,
            tokens_per_update=tokens_per_update,
            count=count,
        )
        stream = UpdateStream(
            dataset,
            take=take,
            length_of=length_of,
            deal=deal,
            sort=partial(sort_rows, main_input=collator.main_input),
            keep_incomplete=incomplete_update == "keep",
            rank=rank,
            world_size=world_size,
            seed=seed,
            noise_scale_every=collator.noise_scale_every,
        )
        return UpdateLoader.over_stream(stream, collate_fn=collator, **options)
    if tokens_per_update is not None and target_counts is None:
        target_counts = [count(row) for row in read_rows(dataset)]
    if world_size > 1 and lengths is None:
        lengths = _known_lengths(dataset, length_of)
    by_tokens = by_tokens or PrefixOrder(dataset, main_input=collator.main_input)
    families = None
    if group_by_prefix:
        updates_per_epoch = len(dataset) / (effective_batch_size or len(dataset))
        if tokens_per_update is not None and target_counts is not None:
            updates_per_epoch = sum(target_counts) / tokens_per_update
        families = families_of(
            dataset,
            by_tokens,
            main_input=collator.main_input,
            read=partial(_read_first, IndexedRows(dataset, seed=collator.seed)),
            updates_per_epoch=updates_per_epoch,
        )
    update_sampler = UpdateSampler(
        len(dataset) if sampler is None else len(sampler),
        effective_batch_size=effective_batch_size,
        tokens_per_update=tokens_per_update,
        target_counts=target_counts,
        seed=seed,
        shuffle=shuffle,
        order=None if sampler is None else partial(_order_of, sampler),
        families=families,
        incomplete_update=incomplete_update,
        rank=rank,
        world_size=world_size,
        lengths=lengths,
        deal=deal,
        sort=by_tokens,
        noise_scale_every=collator.noise_scale_every,
    )
    return UpdateLoader.over_dataset(
        dataset, sampler=update_sampler, collate_fn=collator, **options
    )


def count_targets_of(row: Any, collator: UpdateCollator) -> int:
    """Count a row's targets by its labels; without any, all of its tokens are."""
    shifted = not collator.encoder_decoder
    targets = count_row_targets(row, shifted=shifted) if isinstance(row, Mapping) else None
    return measure_length(row, main_input=collator.main_input) if targets is None else targets


def _order_of(sampler: Any, epoch: int) -> list[int]:
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return list(sampler)


def read_rows(dataset: Any) -> Iterator[Any]:
    """Read all rows of a map dataset in its own order, one at a time."""
    return (read_row(dataset, i) for i in range(len(dataset)))


def _read_first(rows: IndexedRows, indices: Sequence[int]) -> Rows:
    """Read rows as the first epoch will: what is drawn for one is the same on all ranks."""
    return rows.__getitems__(Share(indices, epoch=0, update=0))


def _length_of(row: Any, *, collator: UpdateCollator) -> int:
    """Measure a row; one without a target is left out before planning, and counts nothing."""
    return collator.measure([row])[0] if can_have_target(row, rule=collator.rule) else 0


def _known_lengths(dataset: Any, length_of: Callable[[Any], int]) -> np.ndarray | None:
    """Measure rows where reading them all is cheap: columns in memory and plain lists."""
    if isinstance(dataset, list) or is_arrow_table(dataset):
        return np.fromiter((length_of(row) for row in read_rows(dataset)), dtype=np.int64)
    return None
