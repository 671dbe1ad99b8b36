"""The Trainer's loss side: the weight rule, label smoothing, evaluation per target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_gradacc.errors import ConfigError, LossError
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.probe_rows import copies_in
from hf_gradacc.loss.smoothing import smoothing_correction
from hf_gradacc.ranks.collectives import (
    agree_on_inputs,
    all_reduce_gradients,
    share_first,
    trainable,
)
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.trainer.asks import AskedModel
from hf_gradacc.trainer.evaluation import EvalLoss, SplitEvaluation, perplexity
from hf_gradacc.trainer.ranks import RankedUpdates
from hf_gradacc.updates.batch import first_rows, pad_columns
from hf_gradacc.updates.collator import UpdateCollator, make_micro_batch
from hf_gradacc.updates.targets import TargetRule, has_target
from hf_gradacc.updates.update import MicroBatch, Update, UpdateStats

__all__ = ["ExactLoss"]

logger = logging.get_logger(__name__)


class ExactLoss(AskedModel, SplitEvaluation, RankedUpdates):
    """Overrides that make the accumulated gradient that of the whole update."""

    control: Any
    label_smoother: Any
    _collator: UpdateCollator | None = None
    _probe_inputs: Any = None
    _facts: LossFacts | None = None
    _eval_loss: EvalLoss | None = None
    _eval_copies = 1
    _global_stats = UpdateStats()
    _has_grad_anywhere: list[bool]
    _own_step: Callable[..., Tensor] | None = None  # a subclass's `training_step`
    _divisor = 1.0
    _weight_was_used = False

    # ---- the weight rule -----------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a whole update; leave its exact gradient behind.

        Args:
            model: The wrapped model.
            inputs: An `Update`, this rank's share.
            num_items_in_batch: Unused; the update carries its counts.

        Returns:
            The update's mean loss, scaled so that the stock average over ranks gives it.
        """
        if not isinstance(inputs, Update):
            return super().training_step(model, inputs, num_items_in_batch)
        self._facts = self._facts or self._ask(model, agree_on_inputs(inputs))
        update = self._weigh(inputs)
        if self._global_stats.num_targets == 0:
            self._skip_optimizer(update)
            return torch.zeros((), device=self.args.device)
        loss = self._run_update(model, update, self._global_stats.num_targets)
        if self._engine.sums:
            with self._meeting_ranks():
                all_reduce_gradients(trainable(model), has_grad_anywhere=self._has_grad_anywhere)
        return loss * (self.args.world_size // self._engine.factor)

    def _weigh(self, update: Update) -> Update:
        """Count what the update holds over all ranks; leave out what holds no target."""
        assert self._facts is not None
        update = update.with_targets(self._facts.rule)
        update, total = self._count_update(update)
        self._global_stats = total
        if self._facts.pads_alike and total.num_targets > 0:
            self._align_widths(update)
        return update

    def _run_update(self, model: nn.Module, update: Update, num_targets: int) -> Tensor:
        """Run this rank's micro-batches; gradients add up in ``.grad``, not yet over ranks."""
        loss = torch.zeros((), device=self.args.device)
        for i, micro_batch in enumerate(update):
            self._reduces_now = i + 1 == len(update)
            loss = loss + self._run_micro_batch(model, micro_batch, num_targets)
            if i + 1 < len(update):
                self.control = self.callback_handler.on_substep_end(
                    self.args, self.state, self.control
                )
        return loss

    def _run_micro_batch(self, model: nn.Module, micro_batch: MicroBatch, targets: int) -> Tensor:
        """Forward and backward of one micro-batch, weighted by its share of the targets."""
        assert self._facts is not None
        own = micro_batch.targets.under(self._facts.rule)
        # The stock step divides the loss by this. A Python float: float32 would cost 6e-8.
        divisor = math.inf if micro_batch.weightless else targets / (own * self._engine.factor)
        self.current_gradient_accumulation_steps = divisor
        self.loss_is_scaled_for_ga = False
        self._weight_was_used = False
        count = torch.tensor(own, device=self.args.device) if self._facts.wants_own_count else None
        step = self._step_micro_batch if self._own_step is None else self._own_step
        # Gradients are summed over ranks once, after the last micro-batch; see `reduction`.
        with self._hold_gradients(model):
            loss = step(model, micro_batch.inputs, count)
        if not self._weight_was_used:
            raise LossError(
                f"{type(self).__name__}.training_step did not weigh this micro-batch, so its "
                f"gradient would be {divisor:.3g} times too large.\n"
                f"  Call super().training_step(model, inputs, num_items_in_batch) in it, or divide "
                f"the loss by self.current_gradient_accumulation_steps before its backward."
            )
        return loss

    def _step_micro_batch(self, model: nn.Module, inputs: Any, count: Tensor | None) -> Tensor:
        """Run the stock step, and what other trainers behind the mixin make of it."""
        return super().training_step(model, inputs, count)

    @property
    def current_gradient_accumulation_steps(self) -> float:
        """What a loss is to be divided by. Reading it is taken for doing so."""
        self._weight_was_used = True
        return self._divisor

    @current_gradient_accumulation_steps.setter
    def current_gradient_accumulation_steps(self, divisor: float) -> None:
        self._divisor = divisor

    def _skip_optimizer(self, update: Update) -> None:
        """Make this step do nothing: no gradient, and no optimizer step on nothing."""
        self.accelerator.gradient_state._set_sync_gradients(False)
        logger.warning_once(
            f"update {update.index} of epoch {update.epoch} has no target in any of its sequences: "
            f"it is skipped and the optimizer does not step. `skipped_updates` counts such updates."
        )

    def _align_widths(self, update: Update) -> None:
        """Pad all micro-batches to one width, over all ranks too: this model sees padding."""
        widths = [mb.inputs["input_ids"].shape[-1] for mb in update if "input_ids" in mb.inputs]
        width = torch.tensor(max(widths, default=0), device=self.args.device)
        if self.args.world_size > 1:
            dist.all_reduce(width, op=dist.ReduceOp.MAX)
        for micro_batch in update:
            if "input_ids" in micro_batch.inputs:
                micro_batch.inputs = pad_columns(
                    micro_batch.inputs, int(width), **self._padding_style
                )

    # ---- the loss ------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Add label smoothing to the model's own loss instead of replacing that loss."""
        smoother = None if self._has_own_loss() else self.label_smoother
        if smoother is None or self.compute_loss_func is not None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if inputs["labels"].is_floating_point():
            raise ConfigError(
                f"label_smoothing_factor = {smoother.epsilon}: there is nothing to smooth in "
                f"labels of {inputs['labels'].dtype}, which are no classes (regression, or several "
                f"labels at once). Leave it out."
            )
        self.label_smoother = None
        try:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        finally:
            self.label_smoother = smoother
        if self._facts is None:  # the model is just being asked how its own loss counts
            return (loss, outputs) if return_outputs else loss
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
        loss = loss + smoothing_correction(
            logits,
            inputs.get("shift_labels", inputs["labels"]),
            epsilon=smoother.epsilon,
            shifted=self._facts.rule is TargetRule.NEXT_TOKEN and "shift_labels" not in inputs,
        )
        return (loss, outputs) if return_outputs else loss

    @classmethod
    def _has_own_loss(cls) -> bool:
        """Say whether a trainer behind the mixin computes the loss, and smooths labels or not."""
        behind = cls.__mro__[cls.__mro__.index(ExactLoss) : cls.__mro__.index(Trainer)]
        return any(
            "compute_loss" in vars(c) for c in behind if not c.__module__.startswith("hf_gradacc")
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor | None:
        """Tell a loss its own count if it must have it, and nothing otherwise."""
        if self._facts is None or not self._facts.wants_own_count or not batch_samples:
            return None
        own = sum(make_micro_batch(b).targets.under(self._facts.rule) for b in batch_samples)
        return torch.tensor(own, device=device)

    # ---- evaluation ----------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Report the loss per target over all batches and ranks, and its perplexity."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._eval_loss, self._engine = EvalLoss(), Engine.of(self)
        loader = args[0] if args else kwargs.get("dataloader")
        self._eval_copies = copies_in(loader) if self.args.world_size > 1 else 1
        try:
            output = super().evaluation_loop(*args, **kwargs)
            loss = self._eval_loss.mean(self.args.device)
        finally:
            self._eval_loss = None
        if loss is not None and f"{prefix}_loss" in output.metrics:
            output.metrics[f"{prefix}_loss"] = loss
            if self._facts is not None and self._facts.rule is not TargetRule.SEQUENCE:
                output.metrics[f"{prefix}_perplexity"] = perplexity(loss)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Run the stock step, and keep its loss with the number of its targets."""
        if self._eval_loss is None or not isinstance(inputs, Mapping):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        labelled = bool(self.label_names) and all(
            inputs.get(name) is not None for name in self.label_names
        )
        if labelled and self._facts is None:
            asked = inputs if has_target(inputs) else None
            if self._engine.lockstep:  # all ranks ask together, so they ask the same
                asked = share_first(asked)
            self._facts = None if asked is None else self._ask(model, asked)
        copies = self._eval_copies
        micro_batch = make_micro_batch(inputs, copies=copies)
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss, real = result[0], self._count_real_rows(micro_batch.num_sequences)
        if loss is None:
            return result
        if real < micro_batch.num_sequences or (self._engine.lockstep and self._is_filled):
            # Accelerate filled this rank's last batch with rows of the first: leave them out.
            own_rows = first_rows(inputs, real, copies=copies)
            micro_batch = make_micro_batch(own_rows, copies=copies)
            if real or self._engine.lockstep:  # in step, no rank may sit out a forward
                again = first_rows(inputs, max(real, 1), copies=copies)
                loss = super().prediction_step(model, again, True, ignore_keys)[0]
        if self._facts is not None:
            own = micro_batch.targets.under(self._facts.rule)
            self._eval_loss.add(loss, num_targets=own)
        elif not labelled:  # preferences, before any training: a mean over rows
            self._eval_loss.add(loss, num_targets=micro_batch.num_sequences)
        return result

    def _count_real_rows(self, num_rows: int) -> int:
        """Count the rows of an evaluation batch that are not repeated to fill it up."""
        if not self._is_filled:
            return num_rows
        remainder = self.accelerator.gradient_state.remainder
        return min(num_rows, max(0, remainder - num_rows * self.args.process_index))

    @property
    def _is_filled(self) -> bool:
        """Whether the evaluation batch of some rank holds repeated rows."""
        state = self.accelerator.gradient_state
        return self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0
