"""The stock Trainer, with updates for batches.

One item of the DataLoader is one `Update`, so for the stock loop ``gradient_accumulation_steps``
is 1, and its steps, schedule, callbacks and epoch ends are right as they are. Inside
``training_step`` each micro-batch goes through the stock ``training_step`` with the weight
``n_i / N``: its own targets over those of the whole update on all ranks. Then

    Σ_i (n_i / N) · mean_i  =  (1 / N) · Σ over all targets

which is the mean of the whole batch at once, and so is its gradient.

``tests/promise/test_stock_contract.py`` asserts what this folder relies on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hf_gradacc.arguments import GradAccArguments, GradAccOptions
from hf_gradacc.errors import ConfigError
from hf_gradacc.tracking.install import install_tracking
from hf_gradacc.tracking.mfu import CostMeter
from hf_gradacc.tracking.wandb_ranks import find_rank_runs
from hf_gradacc.tracking.window import StatsWindow
from hf_gradacc.trainer.budget import TunedBudget
from hf_gradacc.trainer.data import UpdateLoading
from hf_gradacc.trainer.foreign_metrics import AveragedMetrics
from hf_gradacc.trainer.position import Ledger
from hf_gradacc.updates.update import Update, UpdateStats

__all__ = ["GradAccMixin", "GradAccTrainer"]


class GradAccMixin(AveragedMetrics, UpdateLoading, TunedBudget):
    """Put before any ``Trainer`` subclass: ``class MyTrainer(GradAccMixin, SFTTrainer)``.

    What is overridden of the stock Trainer, and why:

    ========================================  ====================================================
    ``__init__``                              refuses engines that cannot be exact; adds the ledger
    ``get_train_dataloader``                  loads updates
    ``get_total_train_batch_size``            is the effective batch size
    ``set_initial_training_values``           counts updates as they will be
    ``_init_training_state``, ``_run_epoch``  the position in the data, from the ledger
    ``_inner_training_loop``                  the stock loop sees one batch per step, all others
                                              what the user asked for
    ``_prepare_for_training``                 asks the model how its loss counts
    ``get_batch_samples``                     hands out one update
    ``train``                                 SIGTERM and SIGINT end it after a whole update,
    ``_evaluate``, ``_determine_best_metric`` or break an evaluation off
    ``training_step``                         the weight rule; the time after is the optimizer's
    ``current_gradient_accumulation_steps``   notes that the stock step read the weight
    ``_clip_grad_norm``, ``_get_grad_norm``   nothing non-finite goes on to the optimizer
    ``compute_loss``                          label smoothing that keeps the model's own loss
    ``_get_num_items_in_batch``               an evaluation batch's loss is a mean over its own
    ``prediction_step``, ``evaluation_loop``  evaluation loss per target, in pieces if it must
    ``floating_point_ops``                    adds up an update's micro-batches
    ``_track_num_input_tokens``               takes the count from the update's one collective
    ``_maybe_log_save_evaluate``, ``log``     what the updates consumed, in every log row
    ========================================  ====================================================
    """

    _costs: CostMeter | None = None
    _step_started = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Call a subclass's own ``training_step`` once per micro-batch, as stock does."""
        super().__init_subclass__(**kwargs)
        step = cls.training_step
        if step is not GradAccMixin.training_step and not hasattr(step, "of_micro_batch"):
            cls.training_step = _per_micro_batch(step)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, GradAccOptions):
            name = type(self.args).__name__
            raise ConfigError(
                f"args is a {name}, which has none of our options: use GradAccArguments, or "
                f"class MyArguments(GradAccOptions, {name})."
            )
        self._refuse_inexact_engines()
        self.ledger = Ledger()
        self.add_callback(self.ledger)
        install_tracking(self)
        self._rank_runs = find_rank_runs(self)
        self._own_window = StatsWindow()

    def _refuse_inexact_engines(self) -> None:
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel) cannot be exact: start one "
                f"process per GPU with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES."
            )
        for kind in ("tp", "cp", "sp"):
            size = getattr(self, f"get_{kind}_size")()
            if size > 1:
                raise ConfigError(
                    f"{kind}_size = {size}: tensor, context and sequence parallelism share rows or "
                    f"targets between ranks, which the weight rule does not know yet. Use DDP."
                )

    # ---- counting what goes through ------------------------------------------------------------

    def floating_point_ops(self, inputs: Any) -> int:
        """Add up the stock estimate over an update's micro-batches."""
        if isinstance(inputs, Update):
            return sum(super(GradAccMixin, self).floating_point_ops(mb.inputs) for mb in inputs)
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count what went in, over all ranks, without a collective per micro-batch."""
        if not isinstance(inputs, Update):
            return super()._track_num_input_tokens(inputs)
        kind = self.args.include_num_input_tokens_seen
        if kind != "no":
            stats = self._global_stats
            padding = 0 if kind == "non_padding" else stats.num_padding_tokens
            self.state.num_input_tokens_seen += stats.num_input_tokens + padding
        return None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], None]:
        """Open the books of an update: they begin with the wait for its data."""
        started = time.perf_counter()
        self._clock.enter("data")
        updates, count = super().get_batch_samples(*args, **kwargs)
        if updates:
            self._step_started = started
            self._clock.enter("forward_backward")
        else:  # an iterator that is asked past its end starts no update
            self._clock.drop()
        return updates, count

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run what the loader gave: a whole update, or one micro-batch of it.

        An override in a subclass is called for each micro-batch, see `_per_micro_batch`, and comes
        here from its ``super().training_step``.
        """
        if isinstance(inputs, Update):
            return self.training_update(model, inputs)
        return self._step_micro_batch(model, inputs, *args, **kwargs)

    def training_update(self, model: nn.Module, update: Update) -> Tensor:
        """Run an update up to its gradient; the time that follows is the optimizer's.

        Override it to look at whole updates.

        Args:
            model: The wrapped model.
            update: This rank's share.

        Returns:
            The update's mean loss.
        """
        loss = super().training_step(model, update)
        if self._step_started:
            self._clock.enter("optimizer")
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Close the books of the update that has just ended, then log, evaluate, save."""
        if self._step_started:
            self._clock.stop()
            seconds = time.perf_counter() - self._step_started
            stats = dataclasses.replace(self._global_stats, step_seconds=seconds)
            self.ledger.window.add(stats, grad_norm=self._grad_norm)
            self._grad_norm = None
            if self._rank_runs is not None:
                self._own_window.add(dataclasses.replace(self._own_stats, step_seconds=seconds))
            self._step_started = 0.0  # at the end of an epoch the stock loop calls this once more
        with self._as_requested():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    @property
    def _own_stats(self) -> UpdateStats:
        """What this rank ran of the update that has just ended."""
        if self._facts is None or self._global_stats.num_targets == 0:
            return UpdateStats()
        own = Update([mb for mb in self._update if not mb.weightless]).stats(self._facts.rule)
        return dataclasses.replace(own, num_micro_batches=len(self._update))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Put what the updates consumed beside the stock numbers of a training row."""
        window = self.ledger.window
        if "loss" in logs and "learning_rate" in logs and window.num_updates:
            trained = window.num_updates - window.num_skipped
            if window.num_skipped:
                # The stock mean took skipped updates for updates with a loss of 0.
                logs["loss"] *= window.num_updates / trained if trained else math.nan
            logs.update(window.metrics())
            own = self._clock.take()
            self._costs = self._costs or CostMeter(self.args, self.model)
            costs = self._costs.metrics(
                num_input_tokens=window.total.num_input_tokens,
                num_sequences=window.total.num_sequences,
                seconds=window.total.step_seconds,
            )
            logs.update(own)
            logs.update(costs)
            window.start_next()
            if self._rank_runs is not None:
                own |= {key: costs[key] for key in costs if key == "peak_memory_bytes"}
                own |= self._own_window.metrics()
                self._own_window = StatsWindow(target_tokens_seen=int(own["target_tokens_seen"]))
                self._rank_runs.send(own, step=self.state.global_step)
        super().log(logs, *args, **kwargs)


def _per_micro_batch(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a ``training_step`` that was written for batches see micro-batches, never updates."""

    @functools.wraps(step)
    def training_step(
        self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not isinstance(inputs, Update):
            return step(self, model, inputs, *args, **kwargs)
        self._own_step = functools.partial(type(self).training_step, self)
        return GradAccMixin.training_step(self, model, inputs, *args, **kwargs)

    training_step.of_micro_batch = True  # type: ignore[attr-defined]
    return training_step


class GradAccTrainer(GradAccMixin, Trainer):
    """``transformers.Trainer`` whose accumulated gradient is that of the whole batch.

    Takes the same arguments; ``args`` is a `GradAccArguments`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=1)
    >>> rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (2, 9, 5, 3)]
    >>> trainer = GradAccTrainer(
    ...     LlamaForCausalLM(config), GradAccArguments(output_dir="out", max_steps=1)
    ... )
    >>> type(trainer.args).__name__
    'GradAccArguments'
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is None:
            args = GradAccArguments(output_dir="tmp_trainer")
        super().__init__(model, args, *rest, **kwargs)
