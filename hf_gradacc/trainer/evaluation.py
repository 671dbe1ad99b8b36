"""Evaluation: the loss per target whatever the batch size, in pieces if a batch does not fit.

The stock Trainer repeats each batch's mean loss once per sequence and averages, so `eval_loss`
moves with ``per_device_eval_batch_size``. Here it is ``Σ loss·n / Σ n`` over batches and ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers.trainer_pt_utils import nested_concat
from transformers.utils import logging

from hf_gradacc.loss.asking.rows import rows_per_sequence_in
from hf_gradacc.loss.terms import LossTerms
from hf_gradacc.loss.trees.hooks import computing_these
from hf_gradacc.loss.trees.layout import Trees, lay_out_trees
from hf_gradacc.ranks.collectives import share_first, share_running_statistics, sum_over_ranks
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.safety.out_of_memory import (
    free_memory,
    is_out_of_memory,
    message_of,
    single_row_error,
)
from hf_gradacc.safety.rollback import RandomState, devices_of
from hf_gradacc.trainer.loss.settle import collecting
from hf_gradacc.trainer.loss.terms import sums_of_terms
from hf_gradacc.updates.batch import count_rows, first_rows, slice_rows, tokens_of_batch
from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.lengths import measure_length
from hf_gradacc.updates.limits import Limits
from hf_gradacc.updates.targets import TargetRule, count_targets, has_target
from hf_gradacc.updates.trees.plan import trees_of
from hf_gradacc.updates.update import MicroBatch

__all__ = ["EvalLoss", "Evaluation", "count_real_rows", "perplexity"]

logger = logging.get_logger(__name__)

_WHOLE = "loss"

Predict = Callable[..., Any]
"""The stock ``prediction_step(model, inputs, prediction_loss_only, ignore_keys)``."""


class Evaluation:
    """The sums of one evaluation, and how many rows are known to fit.

    Attributes:
        rows_per_sequence: Collated rows of each sequence; 1 if there is one rank, which need not
            know.
    """

    def __init__(self) -> None:
        self.rows_per_sequence = 1
        self._loss: EvalLoss | None = None
        self._returned: list[tuple[MicroBatch, LossTerms]] = []  # of the batch that ran last
        self._num_rows_that_fit: int | None = None  # None for all of them
        self._rows_per_sequence_when_cut = 1

    def run(self, trainer: Any, stock_loop: Callable[[], Any], loader: Any, prefix: str) -> Any:
        """Report the loss per target over all batches and ranks, and its perplexity.

        Training goes on with the random state it had. What an evaluation draws depends on more than
        that state: workers that persist are given their seed in the first evaluation of a process
        alone, and in a resumed run that is another one.

        Args:
            trainer: The trainer.
            stock_loop: The stock ``evaluation_loop``, arguments included.
            loader: What it evaluates on.
            prefix: Its ``metric_key_prefix``.

        Returns:
            What the stock loop returns, with its loss replaced.
        """
        is_alone = trainer.args.world_size == 1
        self._loss = EvalLoss()
        self.rows_per_sequence = 1 if is_alone else rows_per_sequence_in(loader)
        before = RandomState(*devices_of(trainer.model, trainer.args.device))
        try:
            if not is_alone:
                share_running_statistics(trainer.model)
            with _each_row_once(trainer):
                output = stock_loop()
                more = _more_metrics(trainer, prefix)
            terms = [] if trainer.facts is None else [term.name for term in trainer.facts.terms]
            means = self._loss.means(terms or [_WHOLE], device=trainer.args.device)
        finally:
            self._loss = None
            if trainer.is_in_train:
                before.restore()
        output.metrics.update(more)
        if means and f"{prefix}_loss" in output.metrics:
            output.metrics[f"{prefix}_loss"] = loss = sum(means.values())
            if terms:
                output.metrics.update({f"{prefix}_loss/{name}": means[name] for name in means})
            elif trainer.facts is not None and trainer.facts.rule is not TargetRule.SEQUENCE:
                output.metrics[f"{prefix}_perplexity"] = perplexity(loss)
        return output

    def predict(
        self,
        trainer: Any,
        stock_step: Predict,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: Any,
        *,
        engine: Engine,
        ask: Callable[[nn.Module, Any], Any],
    ) -> Any:
        """Run the stock step, and add its loss, weighted by its targets, to the evaluation's sum.

        Args:
            trainer: The trainer.
            stock_step: The stock ``prediction_step``.
            model: As for the stock step.
            inputs: Likewise.
            prediction_loss_only: Likewise.
            ignore_keys: Likewise.
            engine: How the ranks work together.
            ask: Asks the model how its loss counts, if training has not.

        Returns:
            Loss, logits and labels, as the stock step.
        """

        def step(rows: Any, *, loss_only: bool) -> Any:
            return self._in_pieces(trainer, engine, stock_step, model, rows, loss_only, ignore_keys)

        if self._loss is None or not isinstance(inputs, Mapping):
            return step(inputs, loss_only=prediction_loss_only)
        is_labelled = bool(trainer.label_names) and all(
            inputs.get(name) is not None for name in trainer.label_names
        )
        if is_labelled and trainer.facts is None:
            asked = inputs if has_target(inputs) else None
            if engine.lockstep:  # all ranks ask together, so they ask the same
                asked = share_first(asked)
            if asked is not None:
                ask(model, asked)
        rows_per_sequence = self.rows_per_sequence
        micro_batch = make_micro_batch(inputs, rows_per_sequence=rows_per_sequence)
        result = step(inputs, loss_only=prediction_loss_only)
        loss, real = result[0], count_real_rows(trainer, micro_batch.num_sequences)
        if loss is None:
            return result
        if real < micro_batch.num_sequences or (engine.lockstep and _is_filled(trainer)):
            # Accelerate filled this rank's last batch with rows of the first: leave them out.
            real_rows = first_rows(inputs, real, rows_per_sequence=rows_per_sequence)
            micro_batch = make_micro_batch(real_rows, rows_per_sequence=rows_per_sequence)
            if real or engine.lockstep:  # under FSDP and ZeRO, every rank must run the forward
                again = first_rows(inputs, max(real, 1), rows_per_sequence=rows_per_sequence)
                loss = step(again, loss_only=True)[0]
        if trainer.facts is not None and trainer.facts.terms:
            for part, terms in self._returned:
                self._loss.add_terms(sums_of_terms(trainer, terms, part))
        elif trainer.facts is not None:
            size = trainer.facts.size_of(micro_batch)
            self._loss.add(loss, size=size, is_sum=trainer.facts.weighing == "sum")
        elif not is_labelled:  # preferences, before any training: a mean over rows
            self._loss.add(loss, size=micro_batch.num_sequences)
        return result

    def _in_pieces(
        self,
        trainer: Any,
        engine: Engine,
        stock_step: Predict,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: Any,
    ) -> Any:
        """Run the stock step; on fewer rows at a time after it ran out of memory."""
        while True:
            rows_per_sequence = self._rows_per_sequence_when_cut
            num_rows = count_rows(inputs) // rows_per_sequence if isinstance(inputs, Mapping) else 0
            size = min(num_rows, self._num_rows_that_fit or num_rows)
            parts = [inputs]
            if size < num_rows:
                parts = [
                    slice_rows(
                        inputs,
                        range(start, min(start + size, num_rows)),
                        rows_per_sequence=rows_per_sequence,
                    )
                    for start in range(0, num_rows, size)
                ]
            results: list[Any] = []
            try:
                with collecting(trainer._loss_settler) as returned:
                    for part in parts:
                        with _sharing_prefixes(trainer, part):
                            results.append(
                                stock_step(model, part, prediction_loss_only, ignore_keys)
                            )
                self._returned = [
                    (make_micro_batch(part, rows_per_sequence=rows_per_sequence), terms)
                    for part, terms in zip(parts, returned, strict=False)
                    if terms is not None
                ]
                return results[0] if len(results) == 1 else self._join(trainer, parts, results)
            except Exception as error:
                if num_rows == 0 or not _can_split(trainer, engine, error):
                    raise
                if self._num_rows_that_fit is None:
                    # Preferences lie in blocks, chosen rows before rejected ones.
                    loader = trainer.callback_handler.eval_dataloader
                    self._rows_per_sequence_when_cut = rows_per_sequence = rows_per_sequence_in(
                        loader
                    )
                    num_rows, size = num_rows // rows_per_sequence, size // rows_per_sequence
                if rows_per_sequence > 1 and not prediction_loss_only:
                    raise  # the predictions of such a trainer do not belong to single rows
                message = message_of(error)
            results = []
            free_memory()
            if size <= 1:
                length = max(
                    measure_length({"input_ids": row}) for row in inputs.get("input_ids", [[0]])
                )
                raise single_row_error(
                    length=length, row=None, tried=[], message=message, evaluation=True
                )
            self._num_rows_that_fit = max(1, size // 2)
            logger.warning(
                f"evaluation ran out of memory on {size} rows: it goes on with "
                f"{self._num_rows_that_fit} at a time. The results are the same; "
                f"per_device_eval_batch_size = {self._num_rows_that_fit} avoids the failed attempt."
            )

    def _join(self, trainer: Any, parts: list[Any], results: list[Any]) -> tuple[Any, Any, Any]:
        """Join the results of pieces: the loss per target, predictions row by row."""
        losses = [loss for loss, _, _ in results]
        loss: Tensor | None = None
        if losses[0] is not None:
            counts = [self._size_of(trainer, part) for part in parts]
            total = sum(counts)
            is_sum = trainer.facts is not None and trainer.facts.weighing == "sum"
            # A piece without a target has a loss of NaN and no weight.
            weighted = [
                a * (1 if is_sum else n / total) for a, n in zip(losses, counts, strict=True) if n
            ]
            loss = sum(weighted[1:], start=weighted[0]) if weighted else losses[0]
        joined = [results[0][1], results[0][2]]
        for _, *more in results[1:]:
            for i, tensors in enumerate(more):
                if tensors is not None:
                    joined[i] = nested_concat(joined[i], tensors, padding_index=-100)
        return loss, joined[0], joined[1]

    def _size_of(self, trainer: Any, part: Any) -> float:
        num_sequences = count_rows(part) // self._rows_per_sequence_when_cut
        if trainer.facts is None or trainer.facts.terms:
            return num_sequences
        if trainer.facts.class_weights is not None:
            return float(trainer.facts.class_weights.total(part, trainer.facts.rule))
        return count_targets(part, trainer.facts.rule, num_sequences=num_sequences)


@contextlib.contextmanager
def _sharing_prefixes(trainer: Any, inputs: Any) -> Iterator[None]:
    """Compute rows that begin alike as trees inside, if training has found that the model may.

    Rows of a benchmark often do: several answers to one question, one system prompt for all.
    """
    trees = _trees_in(trainer, inputs)
    if trees is None:
        yield
        return
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    with computing_these(trainer.shortcuts.bodies, trees, ids, mask):
        yield


def _trees_in(trainer: Any, inputs: Any) -> Trees | None:
    """Lay out the rows of an evaluation batch as trees; None if they cost less as they are."""
    collator, taken = trainer.update_collator, trainer.shortcuts
    if collator is None or taken is None or not taken.bodies or not isinstance(inputs, Mapping):
        return None
    if not trainer._asked.holds(trainer):  # a callback has changed the model since
        return None
    if not collator.takes_trees:  # rows have proved faster on this device, see `LayoutTurns`
        return None
    names = ("input_ids", "attention_mask")
    # The loader has moved the batch already, and counting its targets has waited for the device.
    rows: dict[str, Any] = {
        name: value.cpu() if isinstance(value := inputs.get(name), Tensor) else value
        for name in names
    }
    tokens = tokens_of_batch(rows)
    if not tokens:
        return None
    # No wider than the padded rows are, so that it needs no more memory.
    grown = trees_of(tokens, collator.tree_cost, Limits(max_tokens=rows["input_ids"].numel()))
    if grown is None:
        return None
    return lay_out_trees(
        rows["input_ids"], rows["attention_mask"], grown.rows, by_rows=grown.by_rows
    )


def _more_metrics(trainer: Any, prefix: str) -> dict[str, float]:
    """What the trainer's `eval_metrics` measure in an evaluation; nothing in a prediction."""
    found: dict[str, float] = {}
    for measure in trainer.eval_metrics if prefix == "eval" else ():
        found |= {f"{prefix}_{name}": value for name, value in measure(trainer).items()}
    return found


@contextlib.contextmanager
def _each_row_once(trainer: Any) -> Iterator[None]:
    """Let predictions be gathered from one rank of each tensor-parallel group.

    All of its ranks have predicted the same rows. Stock gathers them from each: of 7 rows in
    batches of 2, on two ranks, it returns 13.
    """
    accelerator, size = trainer.accelerator, trainer.rank_layout.tp_size
    if size == 1:
        yield
        return
    gather, num_ranks = accelerator.gather, trainer.rank_layout.world_size

    def once(tensor: Tensor) -> Tensor:
        rows = len(tensor) // num_ranks
        return tensor.view(num_ranks, rows, *tensor.shape[1:])[::size].flatten(0, 1)

    accelerator.gather = lambda data: recursively_apply(once, gather(data))
    try:
        yield
    finally:
        del accelerator.gather


def count_real_rows(trainer: Any, num_rows: int) -> int:
    """Count the rows of this rank's evaluation batch that are not repeated to fill it up."""
    if not _is_filled(trainer):
        return num_rows
    remainder = trainer.accelerator.gradient_state.remainder
    return min(num_rows, max(0, remainder - num_rows * trainer.rank_layout.evaluating))


def _is_filled(trainer: Any) -> bool:
    """Return whether the evaluation batch of some rank holds repeated rows."""
    state = trainer.accelerator.gradient_state
    return (
        trainer.rank_layout.num_evaluating > 1 and state.end_of_dataloader and state.remainder > 0
    )


def _can_split(trainer: Any, engine: Engine, error: Exception) -> bool:
    """Return whether fewer rows may help, and no other rank waits inside the forward."""
    return (
        bool(getattr(trainer.args, "recover_from_out_of_memory", True))
        and engine.can_roll_back
        and is_out_of_memory(error)
    )


class EvalLoss:
    """Running sums of losses weighted by their targets, or by what those weigh.

    >>> total = EvalLoss()
    >>> total.add(torch.tensor(2.0), size=1)
    >>> total.add(torch.tensor(1.0), size=3)
    >>> total.means(["loss"], device=torch.device("cpu"))
    {'loss': 1.25}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, float | Tensor] = {}

    def add(self, loss: Tensor, *, size: float, is_sum: bool = False) -> None:
        """Add one batch's loss, a mean or a sum, without synchronizing with the device."""
        if size:  # the mean over no target is NaN
            total = _in_double(loss.detach()) * (1 if is_sum else size)
            self.add_terms({_WHOLE: (total, size)})

    def add_terms(self, sums: Mapping[str, tuple[Tensor, float | Tensor]]) -> None:
        """Add the terms of one batch: the sum of each, and what it is to be divided by."""
        for name, (total, size) in sums.items():
            total = _in_double(total)
            before = self._sums.get(name)
            self._sums[name] = total if before is None else before + total
            self._sizes[name] = self._sizes.get(name, 0.0) + size

    def means(self, names: list[str], *, device: torch.device) -> dict[str, float]:
        """Return each mean over all ranks, without those that had no target; one collective."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        local = [[float(of.get(name, 0.0)) for name in names] for of in (self._sums, self._sizes)]
        sums, sizes = sum_over_ranks(torch.tensor(local, dtype=dtype), device=device).tolist()
        return {
            name: total / size
            for name, total, size in zip(names, sums, sizes, strict=True)
            if size > 0
        }


def _in_double(value: Tensor) -> Tensor:
    """CPU and CUDA have float64; MPS has not."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``; infinity if that overflows.

    >>> perplexity(0.0)
    1.0
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
