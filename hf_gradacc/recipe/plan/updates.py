"""What a recipe's updates will look like, known from lengths alone: no weights are loaded."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_gradacc.data.lengths import measure_lengths, measure_pairs, measure_targets
from hf_gradacc.data.section import Task
from hf_gradacc.recipe.plan.ways import (
    MOST_UPDATES_CUT,
    RowsToPlan,
    Spread,
    WayToPlan,
    changed,
    plan_grouping,
    plan_ways,
)
from hf_gradacc.tracking.preview import first_ids
from hf_gradacc.updates.loader import ModelFacts, UpdateLoader, load_updates
from hf_gradacc.updates.trees.order import PrefixOrder

__all__ = ["RecipePlan", "plan_recipe"]

MOST_STREAMED_ROWS = 2000


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
        inputs_per_update: `input_tokens_per_update`; labels too, if a decoder computes them.
        last_update: Sequences in the epoch's last update.
        updates_cut: Updates of the epoch whose micro-batches were planned.
        ways: The same updates cut in several ways.
        longest: Row numbers of the longest rows, longest first.
        starts: The first tokens of each of them.
        max_tokens: `max_tokens_per_micro_batch`, where it is a number.
        why_not_shared: What is known before a run to speak against sharing prefixes, if anything.
        grouping: Tokens computed in an update without `group_by_prefix` and with it; None if that
            changes nothing.
        is_grouped: Whether the recipe draws rows together that begin alike.
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
    why_not_shared: str = ""
    grouping: tuple[float, float] | None = None
    is_grouped: bool = False

    @property
    def chosen(self) -> WayToPlan:
        """The way the recipe plans."""
        return next(way for way in self.ways if way.chosen)

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch, whether or not the model allows the way chosen."""
        return max(way.largest for way in self.ways if way.chosen or way.stands_in)

    @property
    def largest_as_rows(self) -> int:
        """Tokens of the rows of a micro-batch, at most: those of shared prefixes once a row."""
        return max(way.largest_as_rows for way in self.ways if way.chosen or way.stands_in)

    @property
    def depends_on_model(self) -> bool:
        """Whether the model decides between two ways: no weights are loaded, so none has tried."""
        return any(way.stands_in for way in self.ways)

    @property
    def sharing(self) -> WayToPlan | None:
        """The way in which common prefixes are computed once; None if there are hardly any."""
        return next((way for way in self.ways if way.shared_fraction), None)

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
    trees_by_rows: bool = True,
    keeps_beginnings: bool = False,
    why_not_shared: str = "",
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
        trees_by_rows: How the model would attend to rows that begin alike, see `TreeCost`.
        keeps_beginnings: Whether the run would keep what several micro-batches begin with.
        why_not_shared: What is known before a run to speak against computing them as trees.
    """
    is_sample = not hasattr(rows, "__len__")
    if is_sample:
        rows = list(itertools.islice(rows, MOST_STREAMED_ROWS))
        sequential = {"train_sampling_strategy": "sequential", "group_by_prefix": False}
        arguments = changed(arguments, **sequential)
    model = model or ModelFacts(encoder_decoder=task == "seq2seq")
    lengths, targets = measure_lengths(rows), measure_targets(rows, task=task)
    # An encoder-decoder computes its labels as well.
    decoded = measure_lengths(rows, column="labels") if model.encoder_decoder else None
    costs = lengths if decoded is None else lengths + decoded
    costs = np.where(targets > 0, costs, 0)  # what has no target is left out of an update
    tokens, pairs = costs, measure_pairs(rows)
    if pairs is not None:  # both answers are padded to the longer one
        costs = 2 * pairs.max(axis=1)

    by_tokens = PrefixOrder(rows, main_input=model.main_input)

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
            by_tokens=by_tokens,
        )
        loader.collator.packed = arguments.layout == "packed"
        return loader

    to_plan = RowsToPlan(
        rows,
        costs,
        tokens,
        decoded,
        are_pairs=pairs is not None,
        trees_by_rows=trees_by_rows,
        keeps_beginnings=keeps_beginnings,
        may_share=not model.encoder_decoder,
        why_not_shared=why_not_shared,
    )
    sampler: Any = load(arguments).batch_sampler
    members = sampler.membership(0)
    per_epoch = len(members)
    epochs = arguments.num_train_epochs
    num_updates = arguments.max_steps if arguments.max_steps > 0 else math.ceil(epochs * per_epoch)
    budget = arguments.max_tokens_per_micro_batch
    may_group = (
        arguments.train_sampling_strategy != "sequential"
        and arguments.noise_scale_every is None
        and arguments.resolve_effective_batch_size(world_size) != 1
    )
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
        inputs_per_update=Spread.of([tokens[update].sum() for update in members]),
        last_update=len(members[-1]),
        updates_cut=min(per_epoch, MOST_UPDATES_CUT),
        ways=plan_ways(load, arguments, to_plan),
        longest=tuple(longest),
        starts=tuple(first_ids(rows[index])[:24] for index in longest),
        max_tokens=budget if isinstance(budget, int) else None,
        why_not_shared=why_not_shared,
        grouping=plan_grouping(load, arguments, to_plan) if may_group else None,
        is_grouped=arguments.group_by_prefix,
    )
