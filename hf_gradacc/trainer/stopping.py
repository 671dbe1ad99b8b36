"""The Trainer's way out on a signal: soon, on all ranks, after whole updates that are saved."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_utils import SaveStrategy

from hf_gradacc.errors import MemoryBudgetError
from hf_gradacc.safety.out_of_memory import words_of
from hf_gradacc.safety.rollback import RandomState
from hf_gradacc.safety.run_state import recall, remember
from hf_gradacc.safety.signals import EvaluationStopped, StopSignals
from hf_gradacc.tracking.phases import Phase
from hf_gradacc.trainer.gradients import CheckedNumbers

__all__ = ["StoppableRuns", "outside_error"]


class StoppableRuns(CheckedNumbers):
    """Overrides around what lies between updates. Within one, `trainer_guard` passes signals on."""

    _saved_step = -1
    _is_evaluating = False
    _after_evaluation: RandomState | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_signals = StopSignals()
        self.add_callback(self.stop_signals)

    def _asked_to_stop(self) -> bool:
        """Say whether any rank got a signal. Every rank calls it, at the same place."""
        alone = self.args.world_size == 1
        return bool(self.stop_signals.agree(self.args.device, alone=alone))

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *rest: Any, **kwargs: Any
    ) -> None:
        """Stop right after an evaluation or a save that a signal came in, not an update later."""
        lasts = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **kwargs)
        if lasts and self._asked_to_stop():
            self.control.should_training_stop = True
            self._save_where_none_is(model, trial)

    def _save_where_none_is(self, model: nn.Module, trial: Any = None) -> None:
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _stop_at_end(self) -> None:
        """Save what a signal after the last update would leave unsaved, since the exit follows."""
        if self._asked_to_stop() and not self.args.load_best_model_at_end:
            self._save_where_none_is(self.model_wrapped)

    # ---- evaluation ----------------------------------------------------------------------------

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate while training; a signal breaks it off, since there may be seconds left."""
        self._is_evaluating = True
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            remember(self.state, evaluation_due="broken off")
            return {}
        finally:
            self._is_evaluating = False
        return metrics

    def _run_epoch(self, **kwargs: Any) -> None:
        """Make up for an evaluation broken off or left out; then train, unless all is done."""
        if due := recall(self.state).get("evaluation_due"):
            remember(self.state, evaluation_due=None)
            if due == "left out":  # what its loader draws is not yet in the checkpoint's state
                self._load_rng_state(kwargs["resume_from_checkpoint"])
            before = RandomState(self.args.device)
            metrics = self._evaluate(kwargs["trial"], kwargs["ignore_keys_for_eval"])
            if due == "left out":
                self._after_evaluation = RandomState(self.args.device)
            before.restore()
            if not metrics:  # broken off again: the checkpoint at hand says it is due
                self.control.should_training_stop = True
                return
            best = self._determine_best_metric(metrics, kwargs["trial"])
            if best and self.args.save_strategy == SaveStrategy.BEST:
                self._save_checkpoint(kwargs["model"], kwargs["trial"])
        if self.state.global_step >= self.state.max_steps:
            # Stock asks whether a run has reached its end after an update, never before one.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on from where the evaluation made up for left the random state."""
        super()._load_rng_state(checkpoint)
        if self._after_evaluation is not None:
            self._after_evaluation.restore()
            self._after_evaluation = None

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Look for a signal before each batch; ranks have equally many."""
        if self._is_evaluating and self._asked_to_stop():
            raise EvaluationStopped
        return super().prediction_step(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Call no checkpoint the best for an evaluation that was broken off."""
        return bool(metrics) and super()._determine_best_metric(metrics, trial)


_PLACES: dict[Phase | None, tuple[str, str]] = {
    "data": (
        "while rows were loaded",
        "a dataset and a collator that keep off the device",
    ),
    "forward_backward": (
        "beside the micro-batches, in a callback or in the sum over ranks",
        "a smaller max_tokens_per_micro_batch, which leaves room for what runs there",
    ),
    "optimizer": (
        "in clipping or in the optimizer's step",
        "a smaller optimizer (optim = 'adamw_8bit' or 'adafactor'), LoRA, FSDP2, or "
        "accumulate_grads_in_fp32 = False",
    ),
    None: (
        "between updates, in evaluation, a callback or a save",
        "eval_accumulation_steps = 1 (predictions then wait on the host) or "
        "prediction_loss_only = True",
    ),
}


def outside_error(error: BaseException, *, phase: Phase | None, update: int) -> MemoryBudgetError:
    """Say where memory ran out, if not in a forward or backward: a finer cut is no help there.

    Args:
        error: What the allocator raised.
        phase: What the update was at, None between updates.
        update: Its number, from 1; 0 before the first one has begun.
    """
    place, options = _PLACES[phase]
    if update == 0:
        place = "before the first update, while the model was asked how its loss counts"
        options = "a smaller model, or LoRA: not even a few short rows fit, without gradients"
    step = f" (update {update})" if update else ""
    halves = "\n  Weights may have been stepped in part." if phase == "optimizer" and update else ""
    after = f"{halves}\n  Go on from the last checkpoint with:" if update else "\n  Set:"
    return MemoryBudgetError(f"out of memory {place}{step}: {words_of(error)}{after} {options}.")
