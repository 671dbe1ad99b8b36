"""The metrics that other people's trainers collect: one true mean per update, and per evaluation.

TRL's trainers put a value per micro-batch into ``_metrics["train"]`` or ``_metrics["eval"]`` and
log the mean of the list. For that they gather over ranks in every ``compute_loss``, where ranks
that run different numbers of micro-batches would wait forever. Here each micro-batch keeps to
itself, and its values are taken out, weighted (see `metric_weights`) and put back as one value per
update when a row is about to be logged, with a single collective.

Means of a trainer's own metrics over an update: each weighted by what it is a mean over.

TRL's trainers append one value per micro-batch to lists, and log the plain mean of each list. That
is a mean of means: on rows of 3 and 30 tokens it tells the token accuracy of neither.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.refusals import refuse_by_name
from hf_gradacc.updates.batch import count_rows
from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.update import MicroBatch, Update

__all__ = ["AveragedMetrics", "WeightedValues", "add_value", "count_per_metric", "means_of"]

_ROWS = TargetRule.SEQUENCE


@dataclass
class _Taken:
    """What one call of ``compute_loss`` collected."""

    values: dict[str, list[float]]
    num_tokens: float
    inputs: Any


@dataclass
class _Sums:
    """What an update, or an evaluation, adds up to on this rank."""

    values: WeightedValues = field(default_factory=dict)
    num_tokens: float = 0.0

    def add(self, taken: _Taken, *, num_targets: float, inputs: Any) -> None:
        counts = count_per_metric(inputs)
        for key, values in taken.values.items():
            for value in values:
                weight = counts.get(key, num_targets) / len(values)
                add_value(self.values, key, float(value), weight=weight)
        self.num_tokens += taken.num_tokens


class AveragedMetrics(Trainer):
    """Overrides that make a trainer's own metrics independent of the cut.

    Attributes:
        _taken: Where ``compute_loss`` leaves what it collected; None to let it be.
        _metrics_of: What each micro-batch of this update collected, by its identity: one that
            runs again, after running out of memory, replaces what it said before.
        _unlogged: This rank's updates since the last log row.
    """

    _taken: list[_Taken] | None = None
    _metrics_of: dict[int, _Taken]
    _unlogged: list[_Sums]
    _eval_sums: _Sums | None = None
    _metrics: dict[str, Any]
    _total_train_tokens = 0
    _facts: LossFacts | None = None
    _eval_copies: int
    _update: Update

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_by_name(self)
        self._metrics_of, self._unlogged = {}, []

    @property
    def _collects(self) -> bool:
        """Whether this trainer keeps lists of metrics the way TRL's do."""
        metrics = getattr(self, "_metrics", None)
        return isinstance(metrics, dict) and {"train", "eval"} <= set(metrics)

    # ---- taking out what a forward collects ----------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Take what this forward collects out of the trainer's lists."""
        if self._taken is None or not self._collects:
            return super().compute_loss(model, inputs, *args, **kwargs)
        lists, total = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in lists}
        try:
            with _without_gathering(self.accelerator):
                result = super().compute_loss(model, inputs, *args, **kwargs)
            values = {key: v for own in self._metrics.values() for key, v in own.items()}
            values.pop("num_tokens", None)  # a running total, no mean
            num_tokens = self._total_train_tokens - total
            self._taken.append(_Taken(values, num_tokens, inputs))
        finally:
            self._metrics, self._total_train_tokens = lists, total
        return result

    @contextlib.contextmanager
    def _taking(self) -> Iterator[list[_Taken]]:
        before, self._taken = self._taken, []
        try:
            yield self._taken
        finally:
            self._taken = before

    def _ask(self, model: nn.Module, inputs: Any) -> LossFacts:
        """Ask the model without a trace in the metrics."""
        with self._taking():
            return super()._ask(model, inputs)

    # ---- training ------------------------------------------------------------------------------

    def _run_micro_batch(self, model: nn.Module, micro_batch: MicroBatch, targets: int) -> Tensor:
        """Keep what this micro-batch collects."""
        with self._taking() as taken:
            loss = super()._run_micro_batch(model, micro_batch, targets)
        if taken:
            taken[-1].inputs = None  # on the device; the micro-batch has its own on the host
            self._metrics_of[id(micro_batch)] = taken[-1]
        return loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Add up what the update's micro-batches collected, as they ran in the end."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if isinstance(inputs, Update) and self._collects and self._facts is not None:
            sums = _Sums()
            ran = self._update if self._global_stats.num_targets else ()
            for micro_batch in ran:
                taken = self._metrics_of.get(id(micro_batch))
                if taken is not None and not micro_batch.weightless:
                    own = micro_batch.targets.under(self._facts.rule)
                    sums.add(taken, num_targets=own, inputs=micro_batch.inputs)
            self._metrics_of = {}
            self._unlogged.append(sums)
        return loss

    def _forget_update(self) -> None:
        """Forget the metrics of an update that trained nothing."""
        super()._forget_update()
        if self._unlogged:
            self._unlogged[-1] = _Sums()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Hand the updates' means to the trainer before it logs or evaluates."""
        if self.control.should_log or self.control.should_evaluate:
            self._settle()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Hand over what has not been logged yet."""
        self._settle()
        return super()._finalize_training(*args, **kwargs)

    def _settle(self) -> None:
        """Put one value per update into the trainer's lists: the mean over all ranks."""
        if not self._collects:
            return
        ranks = self._gather(self._unlogged)
        self._unlogged = []
        for update in zip(*ranks, strict=True):
            for key, value in means_of([own.values for own in update]).items():
                self._metrics["train"][key].append(value)
        num_tokens = sum(own.num_tokens for rank in ranks for own in rank)
        if num_tokens:
            self._total_train_tokens += num_tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _gather(self, own: Any) -> list[Any]:
        """Give what every rank has."""
        if self.args.world_size == 1:
            return [own]
        ranks: list[Any] = [None] * self.args.world_size
        dist.all_gather_object(ranks, own)
        return ranks

    # ---- evaluation ----------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Hand over one mean per metric, over all rows and ranks."""
        if not self._collects:
            return super().evaluation_loop(*args, **kwargs)
        self._eval_sums = _Sums()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            ranks = self._gather(self._eval_sums)
        finally:
            self._eval_sums = None
        for key, value in means_of([own.values for own in ranks]).items():
            self._metrics["eval"][key] = [value]
        if self._total_train_tokens:
            self._metrics["eval"]["num_tokens"] = [self._total_train_tokens]
        return output

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep what the rows of this batch collect, each row once."""
        if self._eval_sums is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        with self._taking() as taken:
            result = super().prediction_step(model, inputs, *args, **kwargs)
        # Rows that only fill up the batch, and attempts that ran out of memory, come before the
        # rows as they count.
        missing = self._count_real_rows(count_rows(inputs) // self._eval_copies)
        while taken and missing > 0:
            last = taken.pop()
            micro_batch = make_micro_batch(last.inputs, copies=self._eval_copies)
            own = micro_batch.targets.under(self._facts.rule if self._facts else _ROWS)
            self._eval_sums.add(last, num_targets=own, inputs=last.inputs)
            missing -= micro_batch.num_sequences
        return result


@contextlib.contextmanager
def _without_gathering(accelerator: Any) -> Iterator[None]:
    """Let each rank see its own values alone."""

    def own(values: Any, *args: Any, **kwargs: Any) -> Any:
        return values

    names = ("gather", "gather_for_metrics")
    for name in names:
        setattr(accelerator, name, own)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)


WeightedValues = dict[str, tuple[float, float]]
"""Sum of value × weight, and sum of weights; for a ``min_`` or ``max_`` the extreme, and 1."""


def count_per_metric(inputs: Any) -> dict[str, float]:
    """Count what the metrics of TRL's preference trainers are means over.

    Only those that are not means over sequences are named.

    Args:
        inputs: Collated inputs. With ``completion_mask`` ``[rows, seq]`` they are those of KTO if
            there is a ``label`` ``[rows]``, else those of DPO: chosen rows, then rejected ones.

    >>> count_per_metric({"completion_mask": torch.tensor([[0, 1, 1], [0, 0, 1]])})
    {'entropy': 3.0, 'mean_token_accuracy': 2.0, 'logits/chosen': 2.0, 'logits/rejected': 1.0}
    """
    mask = inputs.get("completion_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor):
        return {}
    tokens = mask[:, 1:].ne(0).sum(1)
    label = inputs.get("label")
    if not isinstance(label, Tensor):
        chosen, rejected = (float(half.sum()) for half in tokens.chunk(2))
        return {
            "entropy": chosen + rejected,
            "mean_token_accuracy": chosen,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
        }
    counts: dict[str, float] = {"entropy": float(tokens.sum())}
    for side, rows in (("chosen", label.to(torch.bool)), ("rejected", ~label.to(torch.bool))):
        counts[f"logits/{side}"] = float(tokens[rows].sum())
        counts[f"rewards/{side}"] = counts[f"logps/{side}"] = float(rows.sum())
    return counts


def add_value(to: WeightedValues, key: str, value: float, *, weight: float) -> None:
    """Take in one value of a metric, in place.

    >>> sums = {}
    >>> add_value(sums, "accuracy", 1.0, weight=3)
    >>> add_value(sums, "accuracy", 0.0, weight=1)
    >>> means_of([sums])
    {'accuracy': 0.75}
    """
    if weight == 0:
        return  # the mean over nothing
    before = to.get(key)
    if key.startswith(("min_", "max_")):
        choose = min if key.startswith("min_") else max
        to[key] = (value if before is None else choose(before[0], value), 1.0)
    else:
        total, weights = before or (0.0, 0.0)
        to[key] = (total + value * weight, weights + weight)


def means_of(parts: Iterable[WeightedValues]) -> dict[str, float]:
    """Give each metric's mean over all parts: micro-batches of one rank, or ranks.

    >>> means_of([{"max_reward": (2.0, 1.0), "a": (3.0, 2.0)}, {"max_reward": (4.0, 1.0)}])
    {'max_reward': 4.0, 'a': 1.5}
    """
    sums: WeightedValues = {}
    for part in parts:
        for key, (total, weight) in part.items():
            add_value(sums, key, total / weight, weight=weight)
    means = {key: total / weight for key, (total, weight) in sums.items()}
    sides = [means.get(f"rewards/{side}", math.nan) for side in ("chosen", "rejected")]
    if not any(map(math.isnan, sides)):
        # KTO's sides have weights of their own, and a micro-batch may hold one side alone.
        means["rewards/margins"] = sides[0] - sides[1]
    return means
