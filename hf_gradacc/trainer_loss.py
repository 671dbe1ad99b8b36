"""The Trainer's loss side: the weight rule, label smoothing, evaluation per target."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_gradacc.batching import count_rows, pad_columns, slice_rows
from hf_gradacc.collator import UpdateCollator, make_micro_batch
from hf_gradacc.engines import agree_on_inputs
from hf_gradacc.eval_mode import find_mixing, held_in_eval_mode
from hf_gradacc.evaluation import EvalLoss, perplexity
from hf_gradacc.probe import LossFacts, probe_loss
from hf_gradacc.probe_rows import ProbeRows, copies_in, find_padding_targets
from hf_gradacc.reduction import all_reduce_gradients, trainable
from hf_gradacc.smoothing import smoothing_correction
from hf_gradacc.targets import TargetRule, choose_rows_to_ask, has_target
from hf_gradacc.trainer_evaluation import SplitEvaluation
from hf_gradacc.trainer_ranks import RankedUpdates
from hf_gradacc.trainer_speed import FastSteps
from hf_gradacc.update import MicroBatch, Update, UpdateStats

logger = logging.get_logger(__name__)


class ExactLoss(FastSteps, SplitEvaluation, RankedUpdates):
    """Overrides that make the accumulated gradient that of the whole update."""

    control: Any
    label_smoother: Any
    _collator: UpdateCollator | None = None
    _probe_inputs: Any = None
    _probe_rows: ProbeRows | None = None
    _facts: LossFacts | None = None
    _eval_loss: EvalLoss | None = None
    _eval_copies = 1
    _global_stats = UpdateStats()
    _has_grad_anywhere: list[bool]

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
        count = torch.tensor(own, device=self.args.device) if self._facts.wants_own_count else None
        # Gradients are summed over ranks once, after the last micro-batch; see `reduction`.
        with self._hold_gradients(model):
            return super().training_step(model, micro_batch.inputs, count)

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

    # ---- asking the model ----------------------------------------------------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the prepared model how its loss counts, before the first update."""
        model, loader = super()._prepare_for_training(*args, **kwargs)
        self._facts = None  # the model may be another one than in the last call of train()
        if self._probe_inputs is not None:
            self._facts = self._ask(model, self._probe_inputs)
        return model, loader

    def _ask(self, model: nn.Module, inputs: Any) -> LossFacts:
        """Ask the model how its loss counts, see `probe_loss`, and say what is not exact."""
        if not isinstance(inputs, Mapping) or count_rows(inputs) == 0:
            return LossFacts(TargetRule.SEQUENCE)
        known = self._probe_rows if inputs is self._probe_inputs else None
        if known is None or known.copies == 1:
            inputs, known = slice_rows(inputs, choose_rows_to_ask(inputs)), None
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        config = getattr(bare, "config", None)

        def loss_of(part: Mapping[str, Any], count: int | None) -> float:
            own = None if count is None else torch.tensor(count, device=self.args.device)
            part = {k: v.clone() if isinstance(v, Tensor) else v for k, v in part.items()}
            with torch.no_grad(), self.compute_loss_context_manager():
                # A copy, since FSMT writes padding over the -100 of the labels it is given.
                loss = self.compute_loss(bare, self._prepare_inputs(part), num_items_in_batch=own)
            return float(loss)

        with torch.random.fork_rng(), held_in_eval_mode(bare):
            facts = probe_loss(
                inputs,
                loss_of,
                dtype=self._dtype_computed_in(bare),
                encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
                main_input=getattr(bare, "main_input_name", "input_ids"),
                max_width=getattr(config, "max_position_embeddings", None),
                has_router_loss=bool(getattr(config, "output_router_logits", False)),
                num_rows=None if known is None else len(known.rows),
                take=None if known is None else known.take,
                **self._padding_style,
            )
            if self._collator is not None:
                self._facts = facts  # label smoothing goes by them
                self._choose_shortcuts(bare, inputs, loss_of, facts=facts)
        padding = find_padding_targets(self._probe_rows)
        facts = dataclasses.replace(
            facts,
            pads_alike=facts.pads_alike or bool(padding),
            warnings=(*facts.warnings, *padding, *find_mixing(bare)),
        )
        for warning in facts.warnings:
            logger.warning_once(f"{type(bare).__name__}: {warning}")
        if self._collator is not None:
            self._collator.rule, self._collator.pad_alike = facts.rule, facts.pads_alike
        return facts

    @property
    def _padding_style(self) -> dict[str, Any]:
        tokenizer = self.processing_class
        config = getattr(self.model, "config", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        pad = getattr(config, "pad_token_id", None) if pad is None else pad
        left = getattr(tokenizer, "padding_side", "right") == "left"
        return {"pad_token_id": pad or 0, "left": left}

    # ---- the loss ------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Add label smoothing to the model's own loss instead of replacing that loss."""
        smoother = None if self._has_own_loss() else self.label_smoother
        if smoother is None or self.compute_loss_func is not None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
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
        self._eval_loss = EvalLoss()
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
        if labelled and self._facts is None and has_target(inputs):
            self._facts = self._ask(model, inputs)
        copies = self._eval_copies
        micro_batch = make_micro_batch(inputs, copies=copies)
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss, real = result[0], self._count_real_rows(micro_batch.num_sequences)
        if loss is None:
            return result
        if real < micro_batch.num_sequences or (self._engine.lockstep and self._is_filled):
            # Accelerate filled this rank's last batch with rows of the first: leave them out.
            own_rows = slice_rows(inputs, range(real), copies=copies)
            micro_batch = make_micro_batch(own_rows, copies=copies)
            if real or self._engine.lockstep:  # in step, no rank may sit out a forward
                again = slice_rows(inputs, range(max(real, 1)), copies=copies)
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
