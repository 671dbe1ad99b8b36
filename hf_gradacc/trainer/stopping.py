"""Stop after a whole, saved update when a signal came; explain why a run ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from hf_gradacc.errors import DataError, GradAccError, MemoryBudgetError
from hf_gradacc.ranks.outcome import RankFailure
from hf_gradacc.safety.out_of_memory import advice_on_pieces, is_out_of_memory, message_of
from hf_gradacc.safety.run_state import keep, kept
from hf_gradacc.safety.signals import EvaluationStopped, StopSignals
from hf_gradacc.tracking.phases import Phase

__all__ = ["Stopping", "outside_error"]

logger = logging.get_logger(__name__)


class _Final(Exception):  # noqa: N818  (no error of its own)
    """Carries an error of ours past the stock search for a batch size."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Stopping:
    """Acts on a signal between updates. Within an update, `runner` passes the signal on.

    Args:
        signals: The callback that handles signals.
    """

    _num_runs = 0

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self._begins_again = False
        self._is_evaluating = False

    def is_asked(self, args: Any) -> bool:
        """Return whether any rank got a signal. Every rank must call it, at the same place."""
        return bool(self.signals.agree(args.device, alone=args.world_size == 1))

    # ---- the run -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def around_run(self, trainer: Any, *, phase: Callable[[], Phase | None]) -> Iterator[None]:
        """Handle signals while a run lasts; if an error ends it, raise one that explains it.

        Args:
            trainer: The trainer.
            phase: Returns the phase that the update is in; None between updates.
        """
        args = trainer.args
        finds_batch_size = args.auto_find_batch_size
        # Where no other rank would wait, and rows are what limits a micro-batch.
        can_find = args.world_size == 1 and args.max_tokens_per_micro_batch is None
        args.auto_find_batch_size = finds_batch_size and can_find
        self._begins_again = False
        self.signals.install()
        failure = RankFailure(Stopping._num_runs)
        Stopping._num_runs += 1
        try:
            yield
        except Exception as raised:
            error = raised.error if isinstance(raised, _Final) else raised
            explained = failure.explain(self._explain(trainer, error, phase()))
            if explained is raised:
                raise
            raise explained from (None if explained is error else error)
        finally:
            self.signals.uninstall()
            args.auto_find_batch_size = finds_batch_size

    def run_loop(
        self, trainer: Any, stock_loop: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run the stock loop, which ``auto_find_batch_size`` calls again with smaller batches.

        It does so when memory ran out where no cut of an update helps. Updates stay as large as
        they were, so the run goes on from its newest checkpoint, if it has saved one.
        """
        if self._begins_again:
            size = kwargs.get("batch_size", args[0] if args else None)
            place = "the beginning, with the weights as they are"
            checkpoint = trainer._checkpoint_writer.newest or kwargs.get("resume_from_checkpoint")
            if checkpoint is not None:
                trainer._load_from_checkpoint(checkpoint)
                kwargs["resume_from_checkpoint"] = place = checkpoint
            logger.warning(
                f"memory ran out: the run goes on from {place}, with at most {size} sequences in a "
                f"micro-batch. Updates stay as large as they were."
            )
        try:
            return stock_loop(*args, **kwargs)
        except GradAccError as error:
            raise _Final(error) from error  # its message may repeat the allocator's
        finally:
            self._begins_again = True

    def _explain(self, trainer: Any, error: Exception, phase: Phase | None) -> Exception:
        """Return what to raise for an error that ended the run: itself, or an explanation."""
        update = trainer.state.global_step + 1
        if isinstance(error, GradAccError):
            return error
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            self.signals.exit_if_asked()  # it died of the same signal that we got
            return DataError(
                f"a loader worker died at update {update}: {error}\n"
                f"  Most often the machine ran out of host memory or of /dev/shm. Set "
                f"dataloader_num_workers = 0 to see an error of the dataset itself, or a smaller "
                f"number; then train(resume_from_checkpoint=True) goes on from the last checkpoint."
            )
        if trainer.args.recover_from_out_of_memory and is_out_of_memory(error):
            is_asking = trainer.facts is None and phase is None
            return outside_error(error, phase=phase, update=0 if is_asking else update)
        return error

    # ---- saving --------------------------------------------------------------------------------

    def stop_between_updates(self, trainer: Any, save: Callable[[], None]) -> None:
        """Stop right after an evaluation or a save in which a signal came, not an update later."""
        if self.is_asked(trainer.args):
            trainer.control.should_training_stop = True
            keep(trainer.state, saves_model=False)  # the process exits before anybody can
            save()

    def stop_at_end(self, trainer: Any, save: Callable[[], None]) -> None:
        """Save if a signal came after the last update, because the process exits next."""
        if self.is_asked(trainer.args) and not trainer.args.load_best_model_at_end:
            save()

    # ---- evaluation ----------------------------------------------------------------------------

    def evaluate(self, trainer: Any, stock_evaluate: Callable[[], dict[str, float]]) -> Any:
        """Evaluate during training; a signal breaks it off, because only seconds may be left."""
        self._is_evaluating = True
        try:
            return stock_evaluate()
        except EvaluationStopped:
            keep(trainer.state, evaluation_due="broken off")
            return {}
        finally:
            self._is_evaluating = False

    def check_evaluation(self, args: Any) -> None:
        """Check for a signal before each batch of an evaluation; all ranks have equally many.

        Raises:
            EvaluationStopped: If a signal came.
        """
        if self._is_evaluating and self.is_asked(args):
            raise EvaluationStopped

    def make_up_for_evaluation(self, trainer: Any, arguments: dict[str, Any]) -> bool:
        """Make up for an evaluation that was broken off or left out.

        Args:
            trainer: The trainer.
            arguments: Those of the stock ``_run_epoch``.

        Returns:
            Whether there is anything left to train.
        """
        if kept(trainer.state).get("evaluation_due"):
            keep(trainer.state, evaluation_due=None)
            trainer._load_rng_state(arguments["resume_from_checkpoint"])
            metrics = trainer._evaluate(arguments["trial"], arguments["ignore_keys_for_eval"])
            if not metrics:  # broken off again: the checkpoint still says that it is due
                trainer.control.should_training_stop = True
                return False
            best = trainer._determine_best_metric(metrics, arguments["trial"])
            if best and trainer.args.save_strategy == SaveStrategy.BEST:
                trainer._save_checkpoint(arguments["model"], arguments["trial"])
        if trainer.state.global_step >= trainer.state.max_steps:
            # Stock checks whether a run has reached its end after an update, never before one.
            trainer.control.should_training_stop = True
            return False
        return True


_PLACES: dict[Phase | None, tuple[str, str]] = {
    "data": (
        "while rows were loaded",
        "a dataset and a collator that do not use the device",
    ),
    "forward_backward": (
        "outside the micro-batches, in a callback or in the sum over ranks",
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
    """Explain where memory ran out outside of forward and backward, where no finer cut helps.

    Args:
        error: What the allocator raised.
        phase: The phase that the update was in; None between updates.
        update: Its number, from 1; 0 before the first one has begun.
    """
    place, options = _PLACES[phase]
    if update == 0:
        place = "before the first update, while the model was asked how its loss counts"
        options = "a smaller model, or LoRA: not even a few short rows fit, without gradients"
    step = f" (update {update})" if update else ""
    halves = "\n  Weights may have been stepped in part." if phase == "optimizer" and update else ""
    after = f"{halves}\n  Go on from the last checkpoint with:" if update else "\n  Set:"
    message = message_of(error)
    advice = f"\n  {pieces}" if (pieces := advice_on_pieces(message)) else ""
    return MemoryBudgetError(f"out of memory {place}{step}: {message}{after} {options}.{advice}")
