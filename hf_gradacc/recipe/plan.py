"""What a recipe's updates will look like, known from lengths alone: no weights are loaded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_gradacc.data.lengths import measure_lengths, measure_targets
from hf_gradacc.data.section import Task
from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.planner import count_padding, plan_micro_batches
from hf_gradacc.updates.sampler import UpdateSampler

__all__ = ["RecipePlan", "Spread", "WayToPlan", "plan_recipe"]

MOST_STREAMED_ROWS = 2000


OVERHEAD_ON_CPU, OVERHEAD_ON_GPU = 64, 1024
"""What one more micro-batch costs, in computed tokens, as the trainer reckons."""


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
        lengths: Input tokens of each row.
        targets: Target tokens (or, for classification, sequences) of each row.
        updates_per_epoch: Updates in the first epoch.
        num_updates: Updates of the whole run.
        sequences_per_update: The effective batch.
        targets_per_update: `tokens_per_update`.
        inputs_per_update: `input_tokens_per_update`.
        last_update: Sequences in the epoch's last update.
        updates_cut: Updates of the epoch whose micro-batches were planned.
        ways: The same updates cut in several ways.
        longest: Row numbers of the longest rows, longest first.
        budget: `max_tokens_per_micro_batch`, where it is a number.
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
    budget: int | None

    @property
    def chosen(self) -> WayToPlan:
        """The way the recipe plans."""
        return next(way for way in self.ways if way.chosen)


def plan_recipe(
    rows: Any, *, arguments: Any, task: Task, world_size: int = 1, on_gpu: bool = False
) -> RecipePlan:
    """Draw the updates of the first epoch, and cut them in several ways.

    Args:
        rows: The training set, map-style or a stream.
        arguments: The `GradAccArguments` of the recipe.
        task: The recipe's `model.task`, which decides what a target is.
        world_size: Ranks to plan for.
        on_gpu: Whether one more micro-batch costs what it costs on a GPU.
    """
    is_sample = not hasattr(rows, "__len__")
    if is_sample:
        rows = list(itertools.islice(rows, MOST_STREAMED_ROWS))
    lengths, targets = measure_lengths(rows), measure_targets(rows, task=task)
    drop = not arguments.keeps_incomplete_update
    sampler = UpdateSampler(
        len(lengths),
        effective_batch_size=arguments.resolve_effective_batch_size(world_size),
        tokens_per_update=arguments.tokens_per_update,
        target_counts=None if arguments.tokens_per_update is None else targets.tolist(),
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        incomplete_update="drop" if drop else "keep",
        world_size=world_size,
        lengths=lengths,
    )
    members = sampler.membership(0)
    per_epoch = len(members)
    epochs = arguments.num_train_epochs
    num_updates = arguments.max_steps if arguments.max_steps > 0 else math.ceil(epochs * per_epoch)
    budget = arguments.max_tokens_per_micro_batch
    cut = members[:MOST_UPDATES_CUT]
    # An encoder-decoder computes its labels as well.
    costs = lengths + measure_lengths(rows, column="labels") if task == "seq2seq" else lengths
    shares = [[costs[share].tolist() for share in sampler.deal(update)] for update in cut]
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
        updates_cut=len(cut),
        ways=_ways(
            [share for update in shares for share in update if share],
            budget=budget if isinstance(budget, int) else None,
            size=arguments.per_device_train_batch_size,
            packed=arguments.layout == "packed",
            facts={
                "num_ranks": world_size,
                "overhead_tokens": OVERHEAD_ON_GPU if on_gpu else OVERHEAD_ON_CPU,
            },
        ),
        longest=tuple(np.argsort(-lengths, kind="stable")[:5].tolist()),
        budget=budget if isinstance(budget, int) else None,
    )


def _ways(
    shares: Sequence[list[int]],
    *,
    budget: int | None,
    size: int,
    packed: bool,
    facts: dict[str, int],
) -> tuple[WayToPlan, ...]:
    """Cut every share in each way; shares are the lengths one rank has in one update."""
    tokens = budget or size * max(max(share) for share in shares)

    def cut(
        *, max_sequences: int | None = None, max_tokens: int | None = None, packed: bool = False
    ) -> list[list[list[int]]]:
        # Training's own, which cuts no other way.
        collator = UpdateCollator(list, max_sequences=max_sequences, max_tokens=max_tokens)
        for name, value in {**facts, "packed": packed}.items():
            setattr(collator, name, value)
        return [collator.cut(share) for share in shares]

    random = [plan_micro_batches(s, max_sequences=size, keep_order=True) for s in shares]
    by_size, by_tokens = cut(max_sequences=size), cut(max_tokens=tokens)
    laid_out = cut(max_tokens=tokens, packed=True)
    return (
        _way(f"{size} rows, as drawn (stock)", shares, random),
        _way(f"{size} rows, sorted", shares, by_size, chosen=budget is None and not packed),
        _way(f"{tokens:,} tokens, sorted", shares, by_tokens, chosen=bool(budget) and not packed),
        WayToPlan(
            name=f"{tokens:,} tokens, packed",
            micro_batches=Spread.of([len(plan) for plan in laid_out]),
            padding_fraction=0.0,
            largest=max(
                sum(share[i] for i in piece)
                for share, plan in zip(shares, laid_out, strict=True)
                for piece in plan
            ),
            chosen=packed,
        ),
    )


def _way(
    name: str,
    shares: Sequence[list[int]],
    plans: Sequence[list[list[int]]],
    *,
    chosen: bool = False,
) -> WayToPlan:
    padding = sum(count_padding(share, plan) for share, plan in zip(shares, plans, strict=True))
    real = sum(sum(share) for share in shares)
    largest = max(
        len(piece) * max(share[i] for i in piece)
        for share, plan in zip(shares, plans, strict=True)
        for piece in plan
    )
    spread = Spread.of([len(plan) for plan in plans])
    return WayToPlan(name, spread, padding / (padding + real), largest, chosen)
