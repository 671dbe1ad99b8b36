"""Build the loader of updates from a dataset, and choose the rows to ask the model with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import datasets
import numpy as np
from torch.utils.data import IterableDataset

from hf_gradacc.collator import UpdateCollator, make_micro_batch
from hf_gradacc.dealing import deal_by_cost, deal_rows
from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.loader import UpdateLoader, UpdateStream, make_generator, read_row, take_until
from hf_gradacc.row_lengths import measure_length
from hf_gradacc.sampler import UpdateSampler
from hf_gradacc.targets import count_row_targets, may_have_target
from hf_gradacc.update import Update

__all__ = [
    "GroupedBatches",
    "build_loader",
    "choose_probe_rows",
    "deal_update",
    "describe",
    "is_stream",
]


def is_stream(dataset: Any) -> bool:
    """Say whether rows can only be had in the dataset's own order."""
    return isinstance(dataset, (IterableDataset, datasets.IterableDataset))


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
    in_step: bool = False,
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
        in_step: Ranks wait for each other in every micro-batch.
        **options: Passed on to ``torch.utils.data.DataLoader``.

    Raises:
        DataError: If the dataset is empty.
    """
    count = partial(_count_targets, collator=collator)

    def length_of(row: Any) -> int:
        # What has no target is left out before planning.
        return collator.measure([row])[0] if may_have_target(row, rule=collator.rule) else 0

    collator.num_ranks = world_size
    deal = partial(
        deal_update,
        collator,
        # A layer costs 24 h² per token and 4 h more for each token it attends to (forward FLOPs).
        attention_length=6 * hidden_size if hidden_size else None,
        in_step=in_step,
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
            keep_incomplete=incomplete_update == "keep",
            rank=rank,
            world_size=world_size,
            seed=seed,
            noise_scale_every=collator.noise_scale_every,
        )
        return UpdateLoader.over_stream(stream, collate_fn=collator, **options)
    update_sampler = UpdateSampler(
        len(dataset) if sampler is None else len(sampler),
        effective_batch_size=effective_batch_size,
        tokens_per_update=tokens_per_update,
        target_counts=None if tokens_per_update is None else [count(r) for r in _rows(dataset)],
        seed=seed,
        shuffle=shuffle,
        order=None if sampler is None else partial(_order_of, sampler),
        incomplete_update=incomplete_update,
        rank=rank,
        world_size=world_size,
        lengths=_known_lengths(dataset, length_of) if world_size > 1 else None,
        deal=deal,
        noise_scale_every=collator.noise_scale_every,
    )
    return UpdateLoader.over_dataset(
        dataset, sampler=update_sampler, collate_fn=collator, **options
    )


def _count_targets(row: Any, collator: UpdateCollator) -> int:
    """Count a row's targets by its labels; without any, all of its tokens are."""
    shifted = not collator.encoder_decoder
    targets = count_row_targets(row, shifted=shifted) if isinstance(row, Mapping) else None
    return measure_length(row, main_input=collator.main_input) if targets is None else targets


def _order_of(sampler: Any, epoch: int) -> list[int]:
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return list(sampler)


def _rows(dataset: Any) -> Iterator[Any]:
    return (read_row(dataset, i) for i in range(len(dataset)))


def _known_lengths(dataset: Any, length_of: Callable[[Any], int]) -> np.ndarray | None:
    """Measure rows where reading them all is cheap: columns in memory and plain lists."""
    if isinstance(dataset, (datasets.Dataset, list)):
        return np.fromiter((length_of(row) for row in _rows(dataset)), dtype=np.int64)
    return None


def deal_update(
    collator: UpdateCollator,
    lengths: Sequence[int],
    num_ranks: int,
    *,
    attention_length: int | None = None,
    in_step: bool = False,
) -> list[list[int]]:
    """Deal an update to ranks by what its rows cost in the layout they will have.

    It goes by settings and rows alone, never by a budget that tunes itself or shrank: those may
    differ between ranks, which would then no longer deal alike.

    Args:
        collator: Plans the shares later.
        lengths: Tokens of each row.
        num_ranks: Ranks that share the update.
        attention_length: See `deal_rows`.
        in_step: See `deal_rows`.
    """
    if collator.pad_alike or not any(lengths):
        return deal_by_cost([int(length > 0) for length in lengths], num_ranks)
    if collator.packed:
        attends = attention_length or 0
        costs = [length * (attends + length if attends else 1) for length in lengths]
        return deal_by_cost(costs, num_ranks)
    max_tokens = collator.max_tokens
    if collator.tunes_budget:
        max_tokens = max(1024, 4 * max(lengths, default=0))
    return deal_rows(
        lengths,
        num_ranks,
        max_tokens=max_tokens,
        max_sequences=collator.max_sequences,
        overhead_tokens=collator.overhead_tokens,
        attention_length=attention_length,
        in_step=in_step,
    )


def choose_probe_rows(
    loader: UpdateLoader,
    collator: UpdateCollator,
    *,
    tokens_per_update: int | None = None,
    count: int = 3,
) -> list[Any]:
    """Choose a few short rows to ask the model with, as unlike each other as there are.

    A weight shows only between rows of different length, label and number of targets. A dataset
    may be sorted by any of them, so rows are looked at from all over it.

    Raises:
        DataError: If no row of a map dataset has a target.
        ConfigError: If tokens are to be counted that show only once rows are collated.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, UpdateStream):
        candidates = [row for row in dataset.peek(16) if may_have_target(row)]
    else:
        dataset, n = dataset.dataset, len(dataset)
        spread = dict.fromkeys([*range(min(n, 8)), *(n * k // 8 for k in range(1, 8)), n - 1])
        candidates = [row for row in (dataset[i] for i in spread) if may_have_target(row)]
        candidates = candidates or list(
            itertools.islice(filter(may_have_target, _rows(dataset)), count)
        )
        if not candidates:
            raise DataError(
                f"none of the {n} training rows has a target: every label is -100, so there is "
                f"nothing to learn. Check how the prompt is masked and how rows are cut."
            )
    unknown = {"max_tokens_per_micro_batch": collator.max_tokens}
    if not any(_count_targets(row, collator) for row in candidates):
        unknown["tokens_per_update"] = tokens_per_update
    if candidates and not any(collator.measure(candidates)) and any(unknown.values()):
        asked = " and ".join(f"{name} = {value}" for name, value in unknown.items() if value)
        raise ConfigError(
            f"{asked}: rows do not say how many tokens they hold before the data collator has made "
            f"them ({describe(candidates[0])}). Tokenize the dataset first, or count sequences: "
            f"per_device_train_batch_size and effective_batch_size."
        )
    traits = [_traits(row, collator.main_input) for row in candidates]
    chosen: list[int] = []
    while len(chosen) < min(count, len(candidates)):
        rest = [i for i in range(len(candidates)) if i not in chosen]
        chosen.append(
            max(
                rest, key=lambda i: (_unlike(traits[i], [traits[j] for j in chosen]), -traits[i][0])
            )
        )
    return [candidates[i] for i in sorted(chosen, key=lambda i: traits[i][0])]


def _traits(row: Any, main_input: str) -> tuple[int, int | None, str]:
    """Give length, number of targets and, of a row that has one label, that label."""
    labels = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    is_many = hasattr(labels, "__len__") and getattr(labels, "ndim", 1) > 0
    is_many = is_many and not isinstance(labels, str)
    targets = count_row_targets(row, shifted=True) if is_many else None
    return measure_length(row, main_input=main_input), targets, "" if is_many else str(labels)


def _unlike(one: tuple[Any, ...], others: list[tuple[Any, ...]]) -> int:
    """Count in how many traits a row differs from all others."""
    return sum(all(one[k] != other[k] for other in others) for k in range(len(one)))


class GroupedBatches(IterableDataset[Update]):
    """Make updates of the micro-batches of somebody else's loader.

    For trainers that override ``get_train_dataloader``: the plan is theirs, the weights are exact
    all the same.
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
        batches = iter(self.loader)
        for index in itertools.count():
            group = list(itertools.islice(batches, self.size))
            if not group:
                return
            micro_batches = [make_micro_batch(b, main_input=self.main_input) for b in group]
            yield Update(micro_batches, self.epoch, index)

    def as_loader(self) -> UpdateLoader:
        """Wrap into a DataLoader, which resuming knows how to fast-forward."""
        return UpdateLoader(self, batch_size=None, collate_fn=_identity)


def describe(row: Any) -> str:
    """Say what a dataset row is, for an error."""
    return f"the keys {sorted(row)}" if isinstance(row, Mapping) else f"type {type(row).__name__}"


def _identity(update: Any) -> Any:
    return update
