"""Run an update: weigh its micro-batches; if it runs out of memory, cut it finer and start over.

A micro-batch's loss is a mean over its own ``n_i`` targets. Weighted by ``n_i / N``, with ``N`` all
targets of the update on all ranks,

    Σ_i (n_i / N) · mean_i  =  (1 / N) · Σ over all targets

which is the mean of the whole batch at once, and its gradient is that of the whole batch. The cut
never changes it, so an update that runs out of memory is rolled back, cut finer, and run again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_gradacc.errors import MemoryBudgetError, RankFailedError
from hf_gradacc.loss.coupling import Coupling
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.ranks.collectives import agree_on_inputs, largest_over_ranks, sum_over_ranks
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.ranks.outcome import UpdateOutcome
from hf_gradacc.safety.out_of_memory import (
    advice_on_pieces,
    free_memory,
    is_out_of_memory,
    message_of,
    single_row_error,
)
from hf_gradacc.safety.precision import Float32Gradients
from hf_gradacc.safety.rollback import Rollback
from hf_gradacc.tracking.install import record_event
from hf_gradacc.tracking.phases import PhaseClock
from hf_gradacc.trainer.foreign_metrics import ForeignMetrics
from hf_gradacc.trainer.loss.asking import padding_style
from hf_gradacc.trainer.loss.passes import TwoPasses
from hf_gradacc.trainer.loss.terms import sizes_of
from hf_gradacc.trainer.noise import NoiseListener
from hf_gradacc.trainer.overrides import may_write_weights
from hf_gradacc.trainer.step import MicroBatchStep
from hf_gradacc.updates.batch import pad_columns
from hf_gradacc.updates.budget import TokenBudget
from hf_gradacc.updates.collator import UpdateCollator, make_micro_batch
from hf_gradacc.updates.loader import ModelFacts
from hf_gradacc.updates.recut import can_slice, cut_again, cut_to_limit, even_out, planned_lengths
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.trees.pairs import halve_trees, trees_of_sequences
from hf_gradacc.updates.trees.plan import GrownTrees
from hf_gradacc.updates.update import MicroBatch, Update, UpdateStats, start_copy

__all__ = ["UpdateResult", "UpdateRunner"]

logger = logging.get_logger(__name__)


@dataclass
class UpdateResult:
    """The result of an update.

    Attributes:
        update: This rank's share as it ran in the end.
        stats: What the update held, over all ranks.
        loss: Its mean loss, scaled so that the stock average over ranks is that mean.
        local_loss: This rank's part of it.
        outcome: What the ranks agreed on.
    """

    update: Update
    stats: UpdateStats
    loss: Tensor
    local_loss: Tensor
    outcome: UpdateOutcome


@dataclass
class _Failure:
    """Why an attempt at an update failed on this rank. Holds no traceback, and so no activations.

    Attributes:
        outcome: What this rank tells the others; None if nothing failed.
        message: The allocator's message.
        error: What this rank raises, after it has told the others.
    """

    outcome: UpdateOutcome | None = None
    message: str = ""
    error: Exception | None = None


class UpdateRunner:
    """Runs updates on one wrapped model.

    Args:
        step: Holds the weight of the micro-batch that runs.
        engine: How the ranks work together.
        clock: Measures what the time is spent on.
        budget: The tokens a micro-batch may compute.
        noise: Measures the gradient noise scale.
        metrics: Keeps what the trainer behind the mixin collects.
        rollback: The state that an update begins from.
        float32: The weights whose gradients are summed in float32; None if there are none.
        spare: Collated rows to run with a weight of zero, if ranks run in lockstep and this rank
            has none of its own.
    """

    def __init__(
        self,
        *,
        step: MicroBatchStep,
        engine: Engine,
        clock: PhaseClock,
        budget: TokenBudget,
        noise: NoiseListener,
        metrics: ForeignMetrics,
        rollback: Rollback,
        float32: Float32Gradients | None,
        spare: Any,
    ) -> None:
        self.step = step
        self.engine = engine
        self.clock = clock
        self.budget = budget
        self.noise = noise
        self.metrics = metrics
        self.rollback = rollback
        self.float32 = float32
        self._spare = spare
        self._passes: TwoPasses | None = None
        self._running: MicroBatch | None = None
        self._num_weighed = 0
        self._sizes_of_all = [0.0]

    def run(self, trainer: Any, model: nn.Module, loaded: Update) -> UpdateResult:
        """Run this rank's share of an update; leave the update's exact gradient in ``.grad``.

        Args:
            trainer: The trainer; its ``facts`` are known.
            model: The wrapped model.
            loaded: The share as the loader gave it.

        Returns:
            The result. An update without any target leaves no gradient.

        Raises:
            MemoryBudgetError: If one sequence alone does not fit into memory.
            RankFailedError: If another rank failed for another reason.
        """
        update, stats = self._weigh(trainer, loaded, keeps=self.step.keeps)
        if stats.num_targets == 0:
            zero = torch.zeros((), device=trainer.args.device)
            _skip_optimizer(trainer, update)
            return UpdateResult(update, stats, zero, zero, UpdateOutcome())
        self.rollback.mark()
        self._passes = self._two_passes(trainer.facts.coupling)
        tried: list[str] = []
        while True:
            # Checked in each attempt: one micro-batch that did not fit may be several by now.
            if trainer.args.accumulate_grads_in_fp32 or stats.num_micro_batches > 1:
                self._sum_in_float32()
            elif self.float32 is not None and not self.float32.is_rounded:
                self._sum_in_float32()  # clipping would round it
            loss: Tensor | None = None
            self.engine.begin_attempt(model)
            if not trainer.facts.is_plain:
                trainer._loss_settler.begin_attempt()
            failure = _Failure()
            if self._passes is None or self._goes_ahead(trainer, model, update, failure):
                with self._catching(trainer, failure):
                    if self._passes is not None:
                        self._passes.couple(trainer, model)
                    if self._can_measure_noise(trainer.facts):
                        self.noise.begin(model, update)
                    loss = self.run_micro_batches(trainer, model, update.micro_batches, stats)
            if failure.outcome is not None:
                free_memory(model)  # at once: this rank may still owe the others its gradients
            outcome = failure.outcome or UpdateOutcome(stop=trainer.stop_signals.received)
            with self._meeting_ranks():
                outcome = self.engine.agree(outcome, loss=loss)
            if not outcome.failed:
                break
            self.rollback.restore()
            free_memory(model)
            self._react(trainer, outcome, failure, tried)
            update, stats = self._weigh(trainer, loaded, keeps=False)
        assert loss is not None
        if not trainer.facts.is_plain:
            trainer._loss_settler.end_update(trainer.facts.coupling)
        self.rollback.settle()
        self.budget.note_success()
        trainer.stop_signals.agreed = outcome.stop
        if self.engine.world_size > 1:
            with self._meeting_ranks():
                self.engine.reduce()
        if self.noise.is_listening:
            is_sum = trainer.facts.weighing == "sum"
            self.noise.end(trainer, model, num_summed=stats.num_targets if is_sum else 1)
        scale = self.engine.layout.num_parts // self.engine.factor
        return UpdateResult(update, stats, loss * scale, loss, outcome)

    def run_micro_batches(
        self,
        trainer: Any,
        model: nn.Module,
        micro_batches: Sequence[MicroBatch],
        stats: UpdateStats,
    ) -> Tensor:
        """Run forward and backward of micro-batches, each weighted by its share of the targets.

        Gradients add up in ``.grad``; they are not summed over ranks yet.

        Returns:
            Their part of the update's mean loss.

        Raises:
            LossError: If a subclass's ``training_step`` did not weigh its loss.
        """
        facts, step = trainer.facts, type(trainer).training_step
        factor, collects = self.engine.factor, self.metrics.collects(trainer)
        loss = torch.zeros((), device=trainer.args.device)
        counts = self._own_counts(facts, micro_batches, loss.device)
        own = self.step.own
        if own is not None:
            own.begin_update()
        self.step.kept = self.step.weights = self.step.lost = None
        if any(mb.beginning for mb in micro_batches) and may_write_weights(trainer):
            self.step.watch_weights()
        for i, micro_batch in enumerate(micro_batches):
            self._running = micro_batch
            divisor = math.inf
            if not micro_batch.weightless:
                divisor = facts.divisor(
                    micro_batch,
                    of=self._sizes_of_all[0],
                    num_micro_batches=self._num_weighed,
                    factor=factor,
                )
            is_last = i + 1 == len(micro_batches)
            # The stock step divides the loss by it.
            after = self.engine.end_backward if is_last else None
            closing: Callable[[], contextlib.AbstractContextManager[None]] | None = None
            if micro_batch.beginning and (
                is_last or micro_batches[i + 1].beginning != micro_batch.beginning
            ):
                # The backward of what is kept is then the last one of the update.
                closing = partial(self.engine.hold_gradients, model, is_last=is_last)
            self.step.begin(divisor, micro_batch, after=after, closing=closing)
            trainer.loss_is_scaled_for_ga = False
            count = None if counts is None else counts[i]
            if facts.terms:
                trainer._loss_settler.weights = self._weights_of_terms(trainer, micro_batch)
            with (
                self.metrics.keeping(micro_batch) if collects else contextlib.nullcontext(),
                self.engine.hold_gradients(model, is_last=is_last and closing is None),
                contextlib.nullcontext() if own is None else own.weighing(model, divisor),
                contextlib.nullcontext()
                if self._passes is None
                else self._passes.second(trainer, micro_batch, divisor=divisor),
            ):
                part = step(trainer, model, micro_batch.inputs, count)
            if closing is not None:
                self.step.end_group()
            if own is not None:
                part = own.weigh(part, divisor)
            else:
                self.step.check_weighed(type(trainer))
            loss = loss + part.to(loss.device)
            if self.noise.is_listening:
                num_targets = micro_batch.targets.under(facts.rule)
                is_sum = facts.weighing == "sum"
                self.noise.add_gradient(
                    micro_batch,
                    num_targets=num_targets,
                    weight=num_targets
                    if is_sum
                    else facts.size_of(micro_batch) / self._sizes_of_all[0],
                    trainer=trainer,
                )
            if not is_last:
                trainer.control = trainer.callback_handler.on_substep_end(
                    trainer.args, trainer.state, trainer.control
                )
        return loss

    def _can_measure_noise(self, facts: LossFacts) -> bool:
        """Return whether the noise scale is defined: not of means that weigh alike, say."""
        is_asked = self.noise.record is not None
        return is_asked and self.step.own is None and facts.weighing in ("mean", "sum")

    # ---- two passes ----------------------------------------------------------------------------

    def _two_passes(self, coupling: Coupling | None) -> TwoPasses | None:
        """Return what runs the first pass, the same for each update; None if one is enough."""
        if coupling is None:
            return None
        if self._passes is not None and self._passes.coupling is coupling:
            return self._passes
        return TwoPasses(coupling, self.step, self.engine)

    def _goes_ahead(
        self, trainer: Any, model: nn.Module, update: Update, failure: _Failure
    ) -> bool:
        """Run the first pass, and return whether it went through on all ranks."""
        assert self._passes is not None
        with self._catching(trainer, failure):
            counts = self._own_counts(trainer.facts, update.micro_batches, trainer.args.device)
            self._passes.gather(trainer, model, update.micro_batches, counts, self._note_running)
        self.rollback.restore()
        has_failed = failure.outcome is not None
        with self._meeting_ranks():
            return not largest_over_ranks(int(has_failed), device=trainer.args.device)

    def _note_running(self, micro_batch: MicroBatch) -> None:
        self._running = micro_batch

    def _meeting_ranks(self) -> contextlib.AbstractContextManager[None]:
        """Count the time inside as reduction, if there are other ranks to wait for."""
        alone = self.engine.world_size == 1
        return contextlib.nullcontext() if alone else self.clock.within("reduction")

    def _sum_in_float32(self) -> None:
        if self.float32 is not None:
            self.float32.begin()

    # ---- weighing ------------------------------------------------------------------------------

    def _own_counts(
        self, facts: LossFacts, micro_batches: Sequence[MicroBatch], device: torch.device
    ) -> Any:
        """Return each micro-batch's own targets on the device, if the loss is told them."""
        if not facts.wants_own_count and self.engine.layout.row_parts == 1:
            return None
        # Copied at once: the host would wait for each by itself.
        per_micro_batch = [mb.targets.under(facts.rule) for mb in micro_batches]
        return start_copy(torch.tensor(per_micro_batch), device)

    def _weights_of_terms(
        self, trainer: Any, micro_batch: MicroBatch
    ) -> dict[str, float | Tensor] | None:
        """Return what each term of a micro-batch is multiplied by; None if it has no weight."""
        if micro_batch.weightless:
            return None
        sizes = sizes_of(trainer, micro_batch)
        return {
            term.name: term.weight(size, of=total)
            for term, size, total in zip(
                trainer.facts.terms, sizes, self._sizes_of_all, strict=True
            )
        }

    def _weigh(self, trainer: Any, update: Update, *, keeps: bool) -> tuple[Update, UpdateStats]:
        """Cut an update to the cap, drop micro-batches without a target, count over all ranks.

        Beginnings are kept if `keeps` says so, and nothing reads or runs a micro-batch by itself.
        """
        rule, collator = trainer.facts.rule, trainer.update_collator
        if self.budget.cap is not None:
            update = cut_to_limit(
                update,
                collator,
                max_tokens=self.budget.cap,
                encoder_decoder=ModelFacts.of(trainer.model).encoder_decoder,
                **padding_style(trainer),
            )
        if not keeps or self.step.own is not None or trainer.facts.coupling is not None:
            for micro_batch in update:
                if micro_batch.beginning:
                    micro_batch.without_beginning()
        # Those that weigh nothing are left out: the mean over nothing is NaN.
        if trainer.facts.terms or trainer.facts.class_weights is not None:
            update = update.keeping([mb for mb in update if any(sizes_of(trainer, mb))])
        else:
            update = update.with_targets(rule)
        with self._meeting_ranks():
            stats, planned = self.engine.count(update.stats(rule))
        self._sizes_of_all = self._add_up_sizes(trainer, update, stats)
        self._num_weighed = stats.num_micro_batches
        if planned and stats.num_targets:
            update = self._even_out(update, planned, rule, collator)
            stats = replace(stats, num_micro_batches=max(planned) * len(planned))
            if trainer.facts.weighing == "micro_batch":
                real = torch.tensor([sum(not mb.weightless for mb in update)])
                self._num_weighed = int(sum_over_ranks(real, device=trainer.args.device))
        if trainer.facts.pad_to_one_width and stats.num_targets:
            self._pad_to_one_width(trainer, update)
        return update, stats

    def _add_up_sizes(self, trainer: Any, update: Update, stats: UpdateStats) -> list[float]:
        """Add up over all ranks what losses are divided by; a collective if not by targets."""
        if trainer.facts.class_weights is None and not trainer.facts.terms:
            return [stats.num_targets]
        device = trainer.args.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        local = torch.zeros(max(len(trainer.facts.terms), 1), dtype=dtype)
        for micro_batch in update:
            local += torch.tensor(sizes_of(trainer, micro_batch), dtype=dtype)
        with self._meeting_ranks():
            sums: list[float] = sum_over_ranks(
                self.engine.layout.once(local), device=device
            ).tolist()
        return sums

    def _even_out(
        self,
        update: Update,
        planned: Sequence[int],
        rule: TargetRule,
        collator: UpdateCollator | None,
    ) -> Update:
        """Bring this rank to as many micro-batches as the rank that has planned the most."""
        if min(planned) == 0 and self._spare is None:  # a stream that cannot be read ahead
            self._spare = agree_on_inputs(update)
        return even_out(
            update,
            max(planned),
            halve=partial(_halve, collator=collator),
            rule=rule,
            spare=self._spare,
            rows_per_sequence=1 if collator is None else collator.rows_per_sequence,
        )

    def _pad_to_one_width(self, trainer: Any, update: Update) -> None:
        """Pad all micro-batches to one width, the same on all ranks: padding changes this loss."""
        mine = [mb for mb in update if "input_ids" in mb.inputs]
        widths = [mb.inputs["input_ids"].shape[-1] for mb in mine]
        width = largest_over_ranks(max(widths, default=0), device=trainer.args.device)
        for micro_batch in mine:
            micro_batch.inputs = pad_columns(micro_batch.inputs, width, **padding_style(trainer))

    # ---- failures ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _catching(self, trainer: Any, failure: _Failure) -> Iterator[None]:
        """Turn an error that can be undone into an outcome that the other ranks are told."""
        self._running = None
        can_roll_back = self.engine.can_roll_back
        try:
            yield
        except Exception as error:
            if not can_roll_back and is_out_of_memory(error):
                raise MemoryBudgetError(
                    f"out of memory: {message_of(error)}\n"
                    f"  Under FSDP, DeepSpeed and tensor parallelism other ranks are by now "
                    f"waiting inside a collective, so the update cannot be undone. Go on from the "
                    f"last checkpoint with a smaller max_tokens_per_micro_batch."
                ) from error
            recovers = trainer.args.recover_from_out_of_memory and is_out_of_memory(error)
            if not recovers and (self.engine.world_size == 1 or not can_roll_back):
                raise
            if not recovers:
                failure.error, failure.outcome = error, UpdateOutcome(broken=1)
            else:
                # Only its message: the error's traceback would keep all activations alive.
                failure.message = message_of(error)
                failure.outcome = self._describe_failure(trainer.update_collator)
        finally:
            # Of an attempt that failed.
            self.step.kept = self.step.weights = self.step.lost = None

    def _describe_failure(self, collator: UpdateCollator | None) -> UpdateOutcome:
        micro_batch = self._running
        if micro_batch is None:
            return UpdateOutcome(out_of_memory=1)
        lengths = planned_lengths(micro_batch)
        packed = collator is not None and collator.packed
        cost = sum(lengths) if packed else len(lengths) * max(lengths)
        if micro_batch.trees is not None:
            cost = micro_batch.trees.num_computed + micro_batch.trees.kept
        num_rows = micro_batch.num_sequences if can_slice(micro_batch) else 1
        cap = self.budget.propose(cost, num_rows=num_rows)
        if cap is None:
            row = micro_batch.rows[0] if micro_batch.rows else -1
            return UpdateOutcome(out_of_memory=1, row_length=max(lengths), row=row)
        return UpdateOutcome(out_of_memory=1, cap=cap, cost=cost)

    def _react(
        self, trainer: Any, outcome: UpdateOutcome, failure: _Failure, tried: list[str]
    ) -> None:
        """Lower the budget, the same on all ranks; raise if that cannot help."""
        if outcome.broken:
            raise failure.error or RankFailedError(
                "another rank failed in this update; its log says why. This rank stops, too."
            )
        if outcome.stale:
            logger.warning_once(
                "a gradient changed after the last backward of an update had begun to send it to "
                "the other ranks: by another backward, or by code that writes into .grad. The "
                "update runs again, and gradients are sent after it from now on."
            )
            return
        if not outcome.cap:
            # Try again with empty caches: memory may only have been fragmented.
            if tried and tried[-1].endswith("alone"):
                raise single_row_error(
                    length=outcome.row_length, row=outcome.row, tried=tried, message=failure.message
                )
            tried.append("the row alone")
            return
        self.budget.shrink_to(outcome.cap, cost=outcome.cost)
        tried.append(f"micro-batches of at most {outcome.cap:,} tokens")
        text = (
            f"out of memory on a micro-batch of {outcome.cost:,} tokens: the update was rolled "
            f"back and runs again with at most {outcome.cap:,} per micro-batch."
        )
        if advice := advice_on_pieces(failure.message):
            text += f" {advice}"
        logger.warning(text)
        record_event(trainer, "out_of_memory", text=text, max_tokens=outcome.cap, cost=outcome.cost)


def _skip_optimizer(trainer: Any, update: Update) -> None:
    """Make the stock loop skip its optimizer step."""
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    logger.warning_once(
        f"update {update.index} of epoch {update.epoch} has no target in any of its sequences: "
        f"it is skipped and the optimizer does not step. `skipped_updates` counts such updates."
    )


def _halve(micro_batch: MicroBatch, *, collator: UpdateCollator | None) -> list[MicroBatch]:
    """Cut a micro-batch in two, each trimmed as the collator would trim it; trees stay trees."""
    if not can_slice(micro_batch):
        return [micro_batch]
    count = make_micro_batch
    if collator is not None:
        count = partial(make_micro_batch, **collator.counting)

    def cut(lengths: list[int]) -> list[list[int]]:
        middle = (len(lengths) + 1) // 2
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [order[:middle], order[middle:]]

    def cut_trees(
        sequences: list[list[Any]] | None, lengths: list[int]
    ) -> tuple[list[list[int]], list[GrownTrees | None]]:
        if sequences is None or micro_batch.trees is None or collator is None:
            return cut(lengths), [None, None]
        halves = halve_trees(micro_batch.trees, len(sequences))
        cost = collator.tree_cost
        return halves, [trees_of_sequences([sequences[i] for i in half], cost) for half in halves]

    return list(
        cut_again(
            Update([micro_batch]),
            cut,
            cut_rows=None if micro_batch.trees is None else cut_trees,
            count=count,
            pad_to_one_width=collator is not None and collator.pad_to_one_width,
        )
    )
