"""What a recipe's updates will look like, known from lengths alone: no weights are loaded."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_gradacc.data.lengths import measure_lengths, measure_pairs, measure_targets
from hf_gradacc.data.section import Task
from hf_gradacc.tracking.preview import first_ids
from hf_gradacc.updates.loader import ModelFacts, UpdateLoader, load_updates
from hf_gradacc.updates.planner import plan_micro_batches

__all__ = ["RecipePlan", "Spread", "WayToPlan", "plan_recipe"]

MOST_STREAMED_ROWS = 2000
MOST_UPDATES_CUT = 200
"""Updates whose micro-batches are planned; the rest is alike, and a plan should take seconds."""


@dataclass(frozen=True)
class Spread:
    """Smallest, mean and largest of a number over updates."""

    least: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: Any) -> Spread:
        """Take the spread of some numbers.

        >>> Spread.of([1, 2, 6])
        Spread(least=1.0, mean=3.0, most=6.0)
        """
        array = np.asarray(values, dtype=float)
        return cls(float(array.min()), float(array.mean()), float(array.max()))


@dataclass(frozen=True)
class WayToPlan:
    """One way to cut the same updates.

    Attributes:
        name: What it does.
        micro_batches: Micro-batches in an update, of one rank.
        padding_fraction: Padding tokens over computed tokens.
        largest: Tokens of the largest micro-batch, padding included.
        chosen: Whether the recipe plans this way.
    """

    name: str
    micro_batches: Spread
    padding_fraction: float
    largest: int
    chosen: bool = False


@dataclass(frozen=True)
class RecipePlan:
    """The updates of a recipe.

    Attributes:
        num_sequences: Rows of the training set, or of the sample read from a stream.
        is_sample: Whether they are a sample of a stream.
        world_size: Ranks planned for.
        lengths: Input tokens of each row; of both answers of a pair.
        targets: Target tokens of each row; one for a class, and for a pair.
        updates_per_epoch: Updates in the first epoch.
        num_updates: Updates of the whole run.
        sequences_per_update: The effective batch.
        targets_per_update: `tokens_per_update`.
        inputs_per_update: `input_tokens_per_update`.
        last_update: Sequences in the epoch's last update.
        updates_cut: Updates of the epoch whose micro-batches were planned.
        ways: The same updates cut in several ways.
        longest: Row numbers of the longest rows, longest first.
        starts: The first tokens of each of them.
        max_tokens: `max_tokens_per_micro_batch`, where it is a number.
    """

    num_sequences: int
    is_sample: bool
    world_size: int
    lengths: np.ndarray
    targets: np.ndarray
    updates_per_epoch: int
    num_updates: int
    sequences_per_update: Spread
    targets_per_update: Spread
    inputs_per_update: Spread
    last_update: int
    updates_cut: int
    ways: tuple[WayToPlan, ...]
    longest: tuple[int, ...]
    starts: tuple[list[int], ...]
    max_tokens: int | None

    @property
    def chosen(self) -> WayToPlan:
        """The way the recipe plans."""
        return next(way for way in self.ways if way.chosen)

    def figures(self) -> dict[str, Any]:
        """Return the plan as plain values, the lengths of rows as their sums."""
        values = {name: value for name, value in asdict(self).items() if name not in _OF_EACH_ROW}
        return values | {
            "num_input_tokens": int(self.lengths.sum()),
            "num_targets": int(self.targets.sum()),
        }


_OF_EACH_ROW = ("lengths", "targets", "longest")


def plan_recipe(
    rows: Any,
    *,
    arguments: Any,
    task: Task,
    model: ModelFacts | None = None,
    world_size: int = 1,
    on_accelerator: bool = False,
    lockstep: bool = False,
) -> RecipePlan:
    """Draw the updates of the first epoch, and cut them in several ways.

    Training builds its loaders with the same function, `load_updates`, so what is planned here is
    what the ranks will run.

    Args:
        rows: The training set, map-style or a stream.
        arguments: The `GradAccArguments` of the recipe.
        task: The recipe's `model.task`, which decides what a target is.
        model: What of the model decides the cut; of none in particular by default.
        world_size: Ranks to plan for.
        on_accelerator: Whether one more micro-batch costs what it costs on a GPU.
        lockstep: Whether ranks wait for each other in every micro-batch (FSDP).
    """
    is_sample = not hasattr(rows, "__len__")
    if is_sample:
        rows = list(itertools.islice(rows, MOST_STREAMED_ROWS))
        arguments = _changed(arguments, train_sampling_strategy="sequential")
    model = model or ModelFacts(encoder_decoder=task == "seq2seq")
    lengths, targets = measure_lengths(rows), measure_targets(rows, task=task)
    # An encoder-decoder computes its labels as well.
    costs = lengths + measure_lengths(rows, column="labels") if model.encoder_decoder else lengths
    costs = np.where(targets > 0, costs, 0)  # what has no target is left out of an update
    tokens, pairs = costs, measure_pairs(rows)
    if pairs is not None:  # both answers are padded to the longer one
        costs = 2 * pairs.max(axis=1)

    def load(arguments: Any) -> UpdateLoader:
        loader = load_updates(
            rows,
            list,
            arguments,
            model=model,
            effective_batch_size=arguments.resolve_effective_batch_size(world_size),
            max_sequences=arguments.per_device_train_batch_size,
            world_size=world_size,
            on_accelerator=on_accelerator,
            lockstep=lockstep,
            lengths=costs,
            target_counts=targets.tolist(),
        )
        loader.collator.packed = arguments.layout == "packed"
        return loader

    sampler: Any = load(arguments).batch_sampler
    members = sampler.membership(0)
    per_epoch = len(members)
    epochs = arguments.num_train_epochs
    num_updates = arguments.max_steps if arguments.max_steps > 0 else math.ceil(epochs * per_epoch)
    budget = arguments.max_tokens_per_micro_batch
    longest = np.argsort(-lengths, kind="stable")[:5].tolist()
    return RecipePlan(
        num_sequences=len(lengths),
        is_sample=is_sample,
        world_size=world_size,
        lengths=lengths,
        targets=targets,
        updates_per_epoch=per_epoch,
        num_updates=num_updates,
        sequences_per_update=Spread.of([len(update) for update in members]),
        targets_per_update=Spread.of([targets[update].sum() for update in members]),
        inputs_per_update=Spread.of([lengths[update].sum() for update in members]),
        last_update=len(members[-1]),
        updates_cut=min(per_epoch, MOST_UPDATES_CUT),
        ways=_ways(load, arguments, costs=costs, tokens=tokens, packs=pairs is None),
        longest=tuple(longest),
        starts=tuple(first_ids(rows[index])[:24] for index in longest),
        max_tokens=budget if isinstance(budget, int) else None,
    )


def _changed(arguments: Any, **changes: Any) -> Any:
    """Return arguments that differ in some options, without checking them again."""
    changed = copy.copy(arguments)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _ways(
    load: Callable[[Any], UpdateLoader],
    arguments: Any,
    *,
    costs: np.ndarray,
    tokens: np.ndarray,
    packs: bool = True,
) -> tuple[WayToPlan, ...]:
    """Cut the updates as the stock Trainer does, and in each way that their rows allow."""
    size = arguments.per_device_train_batch_size
    budget, packed = arguments.max_tokens_per_micro_batch, arguments.layout == "packed"
    padded = {"layout": "padded"}
    by_size = load(_changed(arguments, max_tokens_per_micro_batch=None, **padded))
    ours = _cut(by_size, costs, tokens)
    max_tokens = budget or max(size * max(share, default=0) for share, _, _ in ours)
    by_tokens = load(_changed(arguments, max_tokens_per_micro_batch=max_tokens, **padded))
    # A packed recipe without a budget counts rows.
    as_asked = {} if packed else {"max_tokens_per_micro_batch": max_tokens, "layout": "packed"}
    laid_out = load(_changed(arguments, **as_asked))
    limit = f"{by_tokens.collator.max_tokens:,} tokens"
    if budget == "auto":
        limit = f"{limit} (then tuned)"
    packed_limit = f"{size} rows" if packed and budget is None else limit
    ways = (
        _way(f"{size} rows, as drawn (stock)", _cut_like_stock(by_size, costs, tokens, size=size)),
        _way(f"{size} rows, sorted", ours, chosen=budget is None and not packed),
        _way(
            f"{limit}, sorted", _cut(by_tokens, costs, tokens), chosen=bool(budget) and not packed
        ),
    )
    if not packs:
        return ways
    laid_end_to_end = _cut(laid_out, costs, tokens)
    return (*ways, _way(f"{packed_limit}, packed", laid_end_to_end, chosen=packed, packed=True))


Cut = list[tuple[list[int], list[list[int]], int]]
"""For each rank in each update: what its rows cost, which of them share a micro-batch, and how many
tokens they hold."""


def _cut(loader: UpdateLoader, costs: np.ndarray, tokens: np.ndarray) -> Cut:
    """Cut the first updates of all ranks as the workers of their loaders will."""
    sampler: Any = loader.batch_sampler
    collator = loader.collator
    found: Cut = []
    for shares in itertools.islice(sampler.shares(0), MOST_UPDATES_CUT):
        for share in shares:
            lengths = [int(cost) for cost in costs[list(share)] if cost]
            at_random = collator.measures_noise(share.update)
            cut = collator.cut(lengths, at_random=at_random)
            found.append((lengths, cut, int(tokens[list(share)].sum())))
    return found


def _cut_like_stock(
    loader: UpdateLoader, costs: np.ndarray, tokens: np.ndarray, *, size: int
) -> Cut:
    """Deal rows to ranks in turn and cut them in the order drawn."""
    sampler: Any = loader.batch_sampler
    found: Cut = []
    for members in sampler.membership(0)[:MOST_UPDATES_CUT]:
        for rank in range(sampler.world_size):
            share = members[rank :: sampler.world_size]
            lengths = costs[share].tolist()
            plan = plan_micro_batches(lengths, max_sequences=size, keep_order=True)
            found.append((lengths, plan, int(tokens[share].sum())))
    return found


def _way(name: str, cut: Cut, *, chosen: bool = False, packed: bool = False) -> WayToPlan:
    def computed(share: list[int], piece: list[int]) -> int:
        lengths = [share[i] for i in piece]
        return sum(lengths) if packed else len(lengths) * max(lengths)

    sizes = [computed(share, piece) for share, plan, _ in cut for piece in plan]
    real = sum(tokens for _, _, tokens in cut)
    return WayToPlan(
        name=name,
        micro_batches=Spread.of([len(plan) for _, plan, _ in cut]),
        padding_fraction=(sum(sizes) - real) / max(sum(sizes), 1),
        largest=max(sizes, default=0),
        chosen=chosen,
    )
