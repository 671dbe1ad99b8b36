"""The metrics that trainers behind the mixin collect: one true mean per update and evaluation.

TRL's trainers put a value per micro-batch into ``_metrics["train"]`` or ``_metrics["eval"]``, older
ones into ``_stored_metrics``, and log the plain mean of the list. That is a mean of means: over
rows of 3 and 30 tokens it is not the accuracy per token. They also gather over ranks in every
``compute_loss``, and ranks that run different numbers of micro-batches would wait there forever.
Here no micro-batch gathers. Its values are taken out and weighted by what each is a mean over.
Before a row is logged, a single collective turns them into one value per update.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.ranks.collectives import gather_objects
from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.update import MicroBatch

__all__ = ["ForeignMetrics", "WeightedValues", "add_value", "count_per_metric", "means_of"]


@dataclass
class _Taken:
    """What one call of ``compute_loss`` collected."""

    values: dict[str, list[float]]
    num_tokens: float
    inputs: Any


@dataclass
class _Sums:
    """The sums of an update, or of an evaluation, on this rank."""

    values: WeightedValues = field(default_factory=dict)
    num_tokens: float = 0.0

    def add(self, taken: _Taken, *, num_targets: float, inputs: Any) -> None:
        counts = count_per_metric(inputs)
        for key, values in taken.values.items():
            for value in values:
                weight = counts.get(key, num_targets) / len(values)
                add_value(self.values, key, float(value), weight=weight)
        self.num_tokens += taken.num_tokens


class ForeignMetrics:
    """Computes the metrics of a trainer behind the mixin, so that the cut does not change them.

    Attributes:
        taken: Where ``compute_loss`` puts what it collected; None to leave it in the trainer.
    """

    def __init__(self) -> None:
        self.taken: list[_Taken] | None = None
        # What each micro-batch of this update collected, by its identity: if one runs again after
        # running out of memory, its new values replace the old ones.
        self._of_micro_batch: dict[int, _Taken] = {}
        # This rank's updates since the last log row.
        self._unlogged: list[_Sums] = []
        self._of_evaluation: _Sums | None = None

    @staticmethod
    def collects(trainer: Any) -> bool:
        """Return whether a trainer keeps lists of metrics the way TRL's do."""
        return _name_of_lists(trainer) is not None

    # ---- taking out what a forward collects ----------------------------------------------------

    def compute_loss(self, trainer: Any, stock_loss: Callable[[], Any], inputs: Any) -> Any:
        """Take what this forward collects out of the trainer's lists."""
        with self._collecting(trainer, inputs):
            return stock_loss()

    @contextlib.contextmanager
    def _collecting(self, trainer: Any, inputs: Any) -> Iterator[None]:
        """Take what is collected inside out of the trainer's lists; gather nothing."""
        name = _name_of_lists(trainer)
        if self.taken is None or name is None:
            yield
            return
        lists, total = getattr(trainer, name), getattr(trainer, "_total_train_tokens", 0)
        collected: dict[str, Any] = defaultdict(lambda: defaultdict(list))
        setattr(trainer, name, collected)
        try:
            with _without_gathering(trainer.accelerator):
                yield
            values = {key: v for own in collected.values() for key, v in own.items()}
            values.pop("num_tokens", None)  # a running total, not a mean
            num_tokens = getattr(trainer, "_total_train_tokens", 0) - total
            if values or num_tokens:
                self.taken.append(_Taken(values, num_tokens, inputs))
        finally:
            setattr(trainer, name, lists)
            trainer._total_train_tokens = total

    @contextlib.contextmanager
    def taking(self) -> Iterator[list[_Taken]]:
        """Take what forwards inside collect out of the trainer's lists, and yield it."""
        before, self.taken = self.taken, []
        try:
            yield self.taken
        finally:
            self.taken = before

    # ---- training ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def keeping(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Keep what a micro-batch collects, for `end_update`."""
        with self.taking() as taken:
            yield
        if taken:
            taken[-1].inputs = None  # on the device; the micro-batch has its own on the host
            self._of_micro_batch[id(micro_batch)] = taken[-1]

    def end_update(
        self, trainer: Any, micro_batches: Iterable[MicroBatch], rule: TargetRule
    ) -> None:
        """Add up what the update's micro-batches collected, as they ran in the end."""
        if not self.collects(trainer):
            return
        sums = _Sums()
        for micro_batch in micro_batches:
            taken = self._of_micro_batch.get(id(micro_batch))
            if taken is not None and not micro_batch.weightless:
                num_targets = micro_batch.targets.under(rule)
                sums.add(taken, num_targets=num_targets, inputs=micro_batch.inputs)
        self._of_micro_batch = {}
        self._unlogged.append(sums)

    def forget_update(self) -> None:
        """Forget the metrics of an update that trained nothing."""
        if self._unlogged:
            self._unlogged[-1] = _Sums()

    def hand_over(self, trainer: Any) -> None:
        """Put one value per update into the trainer's lists, the mean over all ranks."""
        name = _name_of_lists(trainer)
        if name is None:
            return
        lists = getattr(trainer, name)
        ranks = gather_objects(self._unlogged)
        self._unlogged = []
        for update in zip(*ranks, strict=True):
            for key, value in means_of([own.values for own in update]).items():
                lists["train"][key].append(value)
        num_tokens = sum(own.num_tokens for rank in ranks for own in rank)
        if num_tokens:
            trainer._total_train_tokens += num_tokens
            lists["train"]["num_tokens"] = [trainer._total_train_tokens]

    # ---- evaluation ----------------------------------------------------------------------------

    def evaluate(self, trainer: Any, evaluate: Callable[[], Any]) -> Any:
        """Run an evaluation; put each metric's mean over all rows and ranks into the lists."""
        name = _name_of_lists(trainer)
        if name is None:
            return evaluate()
        self._of_evaluation = _Sums()
        try:
            output = evaluate()
            ranks = gather_objects(self._of_evaluation)
        finally:
            self._of_evaluation = None
        for key, value in means_of([own.values for own in ranks]).items():
            getattr(trainer, name)["eval"][key] = [value]
        if getattr(trainer, "_total_train_tokens", 0):
            getattr(trainer, name)["eval"]["num_tokens"] = [trainer._total_train_tokens]
        return output

    @contextlib.contextmanager
    def keeping_evaluation(
        self,
        trainer: Any,
        inputs: Any,
        *,
        num_rows: Callable[[], int],
        rows_per_sequence: int,
        rule: Callable[[], TargetRule],
    ) -> Iterator[None]:
        """Keep what the rows of an evaluation batch collect, each row once.

        TRL's older trainers of pairs collect in ``prediction_step``, the others in
        ``compute_loss`` inside of it.

        Args:
            trainer: The trainer.
            inputs: The batch.
            num_rows: Returns the number of rows of the batch that count. Called after it ran.
            rows_per_sequence: Collated rows of each sequence.
            rule: Returns what counts as a target. Called after the batch ran.
        """
        if self._of_evaluation is None:
            yield
            return
        in_step = _name_of_lists(trainer) == "_stored_metrics"
        with (
            self.taking() as taken,
            self._collecting(trainer, inputs) if in_step else contextlib.nullcontext(),
        ):
            yield
        # The rows that count come last, after rows that only fill up the batch, and after attempts
        # that ran out of memory.
        missing = num_rows()
        while taken and missing > 0:
            last = taken.pop()
            micro_batch = make_micro_batch(last.inputs, rows_per_sequence=rows_per_sequence)
            num_targets = micro_batch.targets.under(rule())
            self._of_evaluation.add(last, num_targets=num_targets, inputs=last.inputs)
            missing -= micro_batch.num_sequences


def _name_of_lists(trainer: Any) -> str | None:
    """Return the attribute that holds a trainer's lists of metrics; None if it has none."""
    metrics = getattr(trainer, "_metrics", None)
    if isinstance(metrics, dict) and {"train", "eval"} <= set(metrics):
        return "_metrics"
    return "_stored_metrics" if hasattr(trainer, "store_metrics") else None


@contextlib.contextmanager
def _without_gathering(accelerator: Any) -> Iterator[None]:
    """Let an accelerator gather nothing: each rank sees its own values only."""

    def own(values: Any, *args: Any, **kwargs: Any) -> Any:
        return values

    names = [name for name in ("gather", "gather_for_metrics") if name not in vars(accelerator)]
    for name in names:  # one inside of another leaves it to that one
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
    """Add one value of a metric, in place.

    >>> sums = {}
    >>> add_value(sums, "accuracy", 1.0, weight=3)
    >>> add_value(sums, "accuracy", 0.0, weight=1)
    >>> means_of([sums])
    {'accuracy': 0.75}
    """
    if weight == 0:
        return  # a mean over nothing
    before = to.get(key)
    if key.startswith(("min_", "max_")):
        choose = min if key.startswith("min_") else max
        to[key] = (value if before is None else choose(before[0], value), 1.0)
    else:
        total, weights = before or (0.0, 0.0)
        to[key] = (total + value * weight, weights + weight)


def means_of(parts: Iterable[WeightedValues]) -> dict[str, float]:
    """Return each metric's mean over all parts: micro-batches of one rank, or ranks.

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
        # KTO weights each side by its own rows, and a micro-batch may hold only one side.
        means["rewards/margins"] = sides[0] - sides[1]
    return means
