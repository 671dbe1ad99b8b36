"""The Trainer's guarded side: an update happens as a whole, or leaves nothing behind."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from hf_gradacc.errors import DataError, GradAccError, MemoryBudgetError, RankFailedError
from hf_gradacc.ranks.collectives import trainable
from hf_gradacc.ranks.outcome import LastWords, Outcome
from hf_gradacc.safety.out_of_memory import (
    free_memory,
    is_out_of_memory,
    single_row_error,
    words_of,
)
from hf_gradacc.safety.rollback import Rollback
from hf_gradacc.tracking.install import record_event
from hf_gradacc.trainer.stopping import StoppableRuns, outside_error
from hf_gradacc.updates.budget import MemoryBudget
from hf_gradacc.updates.recut import can_slice, cut_to_cap, row_lengths
from hf_gradacc.updates.update import MicroBatch, Update

__all__ = ["GuardedUpdates"]

logger = logging.get_logger(__name__)


class GuardedUpdates(StoppableRuns):
    """Overrides that keep failures inside an update from touching the run."""

    _running: MicroBatch | None = None
    _error: Exception | None = None
    _said = ""
    _runs = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = MemoryBudget()
        self.add_callback(self.budget)

    # ---- around the run ------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; on SIGTERM or SIGINT stop after a whole, saved update."""
        # The stock answer to "out of memory" is to start over with smaller updates.
        finds_batch_size, self.args.auto_find_batch_size = self.args.auto_find_batch_size, False
        self._skipped_in_a_row = 0
        self.stop_signals.install()
        last_words = LastWords(GuardedUpdates._runs)
        GuardedUpdates._runs += 1
        try:
            result = super().train(*args, **kwargs)
            self._stop_at_end()
        except Exception as error:
            told = last_words.explain(self._explain_end(error))
            if told is error:
                raise
            raise told from error
        finally:
            self.stop_signals.uninstall()
            self.args.auto_find_batch_size = finds_batch_size
        self.stop_signals.exit_if_asked()
        return result

    def _explain_end(self, error: Exception) -> Exception:
        """Give what to raise for what ended the run, in plain words where it has none."""
        update = self.state.global_step + 1
        if isinstance(error, GradAccError):
            return error
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            self.stop_signals.exit_if_asked()  # it died of the signal that we got as well
            return DataError(
                f"a loader worker died at update {update}: {error}\n"
                f"  Most often the machine ran out of host memory or of /dev/shm. Set "
                f"dataloader_num_workers = 0 to see an error of the dataset itself, or a smaller "
                f"number; then train(resume_from_checkpoint=True) goes on from the last checkpoint."
            )
        if self.args.recover_from_out_of_memory and is_out_of_memory(error):
            asking = self._facts is None and self._clock.phase is None
            return outside_error(error, phase=self._clock.phase, update=0 if asking else update)
        return error

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Go on with the budget that fitted before the checkpoint."""
        position = super()._init_training_state(*args, **kwargs)
        callbacks = self.callback_handler.callbacks  # stock may have put a new one in its place
        self.budget = next(c for c in callbacks if isinstance(c, MemoryBudget))
        self.budget.restore(self.state.stateful_callbacks.get(MemoryBudget.__name__))
        return position

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Look at the model's buffers once it is wrapped and on its device."""
        model, loader = super()._prepare_for_training(*args, **kwargs)
        self._rollback = Rollback(model, self.args.device)
        return model, loader

    # ---- out of memory -------------------------------------------------------------------------

    def _weigh(self, update: Update) -> Update:
        """Cut the update to what fits before it is counted."""
        self._loaded = update
        cap = self.budget.cap
        if cap is None:
            return super()._weigh(update)
        config = getattr(self.model, "config", None)
        return super()._weigh(
            cut_to_cap(
                update,
                self._collator,
                cap=cap,
                encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
                **self._padding_style,
            )
        )

    def _run_update(self, model: nn.Module, update: Update, num_targets: int) -> Tensor:
        """Run the update until it goes through on all ranks, or say why it cannot."""
        if self._rollback is None:  # training_step called from outside of train()
            self._rollback = Rollback(model, self.args.device)
        self._rollback.mark()
        self._said = ""
        self._loss_before = self._tr_loss.clone() if hasattr(self, "_tr_loss") else None
        tried: list[str] = []
        while True:
            # Each time: of one micro-batch that did not fit there are several now, to be summed.
            self._choose_precision()
            outcome, loss = self._attempt(model, update, num_targets)
            if self.args.world_size > 1:
                has_grad = [p.grad is not None for p in trainable(model)]
                with self._meeting_ranks():
                    outcome, self._has_grad_anywhere = outcome.agree(
                        device=self.args.device, loss=loss, has_grad=has_grad
                    )
            if not outcome.failed:
                break
            self._rollback.restore()
            free_memory(model)
            self._react(outcome, tried)
            update = self._weigh(self._loaded)
        assert loss is not None
        self._rollback.settle()
        self.budget.note_success()
        self.stop_signals.agreed = outcome.stop
        self._update, self._loss, self._outcome = update, loss, outcome
        return loss

    def _attempt(
        self, model: nn.Module, update: Update, num_targets: int
    ) -> tuple[Outcome, Tensor | None]:
        """Run all micro-batches once, and turn a failure into something to tell the others."""
        self._running = None
        try:
            loss = super()._run_update(model, update, num_targets)
            return Outcome(stop=self.stop_signals.received), loss
        except Exception as error:
            if not self._can_roll_back and is_out_of_memory(error):
                raise MemoryBudgetError(
                    f"out of memory: {words_of(error)}\n  Under FSDP and DeepSpeed the other ranks "
                    f"are by now waiting inside a collective, so the update cannot be undone. Go "
                    f"on from the last checkpoint with a smaller max_tokens_per_micro_batch."
                ) from error
            recovers = self.args.recover_from_out_of_memory and is_out_of_memory(error)
            if not recovers and (self.args.world_size == 1 or not self._can_roll_back):
                raise
            if not recovers:
                self._error = error
                return Outcome(broken=1), None
            self._said = words_of(error)
        # Outside of the except block: there the traceback would keep all activations alive.
        return self._describe_failure(), None

    def _run_micro_batch(self, model: nn.Module, micro_batch: MicroBatch, targets: int) -> Tensor:
        """Note which micro-batch runs, should it fail."""
        self._running = micro_batch
        return super()._run_micro_batch(model, micro_batch, targets)

    def _describe_failure(self) -> Outcome:
        micro_batch = self._running
        if micro_batch is None:
            return Outcome(out_of_memory=1)
        lengths = row_lengths(micro_batch)
        packed = self._collator is not None and self._collator.packed
        cost = sum(lengths) if packed else len(lengths) * max(lengths)
        asked = self._collator.max_tokens if self._collator is not None else None
        num_rows = micro_batch.num_sequences if can_slice(micro_batch) else 1
        cap = self.budget.propose(cost, num_rows=num_rows, asked=asked)
        if cap is None:
            row = micro_batch.rows[0] if micro_batch.rows else -1
            return Outcome(out_of_memory=1, row_length=max(lengths), row=row)
        return Outcome(out_of_memory=1, cap=cap, cost=cost)

    def _react(self, outcome: Outcome, tried: list[str]) -> None:
        """Make the budget smaller, the same on all ranks; or give up on all of them."""
        if outcome.broken:
            error, self._error = self._error, None
            raise error or RankFailedError(
                "another rank failed in this update; its own log says how. This one stops with it."
            )
        if not outcome.cap:
            # Once more with empty caches: what is fragmented may fit after all.
            if tried and tried[-1].endswith("alone"):
                raise single_row_error(
                    length=outcome.row_length, row=outcome.row, tried=tried, said=self._said
                )
            tried.append("the row alone")
            return
        asked = self._collator.max_tokens if self._collator is not None else None
        self.budget.shrink_to(outcome.cap, asked=asked, cost=outcome.cost)
        tried.append(f"micro-batches of at most {outcome.cap:,} tokens")
        text = (
            f"out of memory on a micro-batch of {outcome.cost:,} tokens: the update was rolled "
            f"back and runs again with at most {outcome.cap:,} per micro-batch."
        )
        logger.warning(text)
        record_event(self, "out_of_memory", text=text, max_tokens=outcome.cap, cost=outcome.cost)
