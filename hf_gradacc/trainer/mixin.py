"""The stock Trainer with updates in place of batches: each hook it overrides, once.

One item of the loop's DataLoader is one `Update`, so ``gradient_accumulation_steps`` is 1 for the
stock loop, and its steps, schedule, callbacks and epoch ends need no change. Inside
``training_update`` each micro-batch goes through ``training_step``, and so through the stock one,
with the weight ``n_i / N``: its own targets over those of the whole update on all ranks.

A hook calls the parts in their order. The parts are attributes, not base classes: a part overrides
nothing, calls no ``super()``, and receives what it needs of the stock Trainer as arguments.
`contract` and ``tests/promise/test_stock_contract.py`` hold what the hooks assume of stock.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import nested_gather

from hf_gradacc.arguments import (
    GradAccArguments,
    add_options,
    options_apart,
    settle_drawn_size,
)
from hf_gradacc.compat import (
    divided_by_stock,
    is_sharded_by_loading,
    stock_divides_every_loss,
    stock_splits_rows_in_evaluation,
)
from hf_gradacc.loss.added_mean import find_added_mean
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.refusals import (
    refuse_by_name,
    refuse_generating,
    refuse_steps_in_backward,
    refuse_unknown_engines,
    warn_by_name,
)
from hf_gradacc.loss.shortcuts.choose import Shortcuts
from hf_gradacc.ranks.collectives import agree_on_inputs
from hf_gradacc.ranks.engine import Engine, end_group_at_exit, make_engine
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.ranks.sequence_parallel import rows_for_ring
from hf_gradacc.safety.precision import Float32Gradients
from hf_gradacc.safety.rollback import Rollback
from hf_gradacc.safety.signals import StopSignals
from hf_gradacc.safety.withheld import pickled_without_secrets
from hf_gradacc.tracking.install import install_tracking
from hf_gradacc.tracking.mfu import begin_peak_memory
from hf_gradacc.tracking.phases import PhaseClock
from hf_gradacc.tracking.run_files import is_training_row
from hf_gradacc.tracking.wandb_ranks import find_rank_runs
from hf_gradacc.trainer.as_requested import changed, stock_loop_sees_one_batch
from hf_gradacc.trainer.budget import timed_for_budget
from hf_gradacc.trainer.card import write_trainer_card
from hf_gradacc.trainer.checkpoints.choosing import Start, choose_start, hold_run_folder
from hf_gradacc.trainer.checkpoints.position import (
    Ledger,
    begin_epoch,
    find_place,
    note_losses,
    restored,
)
from hf_gradacc.trainer.checkpoints.resume import Beginning
from hf_gradacc.trainer.checkpoints.saved_values import refuse_bad_values
from hf_gradacc.trainer.checkpoints.saving import CheckpointWriter, rotate, save_aside
from hf_gradacc.trainer.checkpoints.sharded import (
    holds_split_optimizer,
    is_split,
    load_optimizer,
    load_weights,
    save_optimizer,
    saves_checkpoints,
    writing_together,
)
from hf_gradacc.trainer.contract import tell_what_moved
from hf_gradacc.trainer.data import TrainingData
from hf_gradacc.trainer.evaluation import Evaluation, count_real_rows
from hf_gradacc.trainer.foreign_metrics import ForeignMetrics
from hf_gradacc.trainer.gradients import GradientGate
from hf_gradacc.trainer.grouping import tell_if_nothing_is_shared
from hf_gradacc.trainer.log_row import LogBook
from hf_gradacc.trainer.loss.asked import Asked
from hf_gradacc.trainer.loss.asking import (
    ask_trainer,
    quietly,
    refuse_data_without_targets,
    tell_collator,
)
from hf_gradacc.trainer.loss.row_parts import (
    loss_in_ring,
    loss_of_part,
    refuse_losses_of_whole_rows,
)
from hf_gradacc.trainer.loss.settle import LossSettler, settled
from hf_gradacc.trainer.noise import NoiseListener
from hf_gradacc.trainer.optimizer.groups import ParameterGroups
from hf_gradacc.trainer.optimizer.low_precision import OptimizerSteps
from hf_gradacc.trainer.optimizer.packages import use_averages
from hf_gradacc.trainer.optimizer.schedule import complete_schedule
from hf_gradacc.trainer.overrides import (
    OwnStep,
    find_own_step,
    has_own_loader_behind,
    plain_for_steps_behind,
    refuse_old_signature,
)
from hf_gradacc.trainer.runner import UpdateResult, UpdateRunner
from hf_gradacc.trainer.step import MicroBatchStep, loss_of_rows, smoothed_loss
from hf_gradacc.trainer.stopping import Stopping
from hf_gradacc.updates.batch import count_rows
from hf_gradacc.updates.budget import TokenBudget
from hf_gradacc.updates.collator import UpdateCollator, make_micro_batch
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.update import Update

__all__ = ["GradAccMixin", "GradAccTrainer"]

tell_what_moved()

_STOCK_DIVIDES = stock_divides_every_loss(Trainer)
_SPLITS_IN_EVALUATION = stock_splits_rows_in_evaluation(Trainer)


class GradAccMixin(Trainer):
    """Put before any ``Trainer`` subclass: ``class MyTrainer(GradAccMixin, SFTTrainer)``.

    Override ``training_step`` to see micro-batches, as in the stock Trainer, and
    ``training_update`` to see whole updates. What is overridden of the stock Trainer, and why, in
    the order in which it is called:

    =======================================  =====================================================
    ``train``                                resumes from whole checkpoints only; signals end it
                                             after a whole, saved update
    ``_hp_search_setup``                     lets a trial draw the size of an update
    ``_inner_training_loop``                 shows the stock loop one batch per step, and all
                                             others the user's arguments
    ``get_train_dataloader``                 loads updates
    ``get_total_train_batch_size``           returns the effective batch size
    ``set_initial_training_values``          counts the updates of each epoch
    ``_init_training_state``                 takes the position in the data from the ledger
    ``_prepare_for_training``                chooses the engine, asks the model how its loss counts
    ``create_optimizer``                     gives parameters learning rates of their own
    ``create_scheduler``                     counts the updates of a decay
    ``_load_from_checkpoint``                reads the weights of a model that was split in loading
    ``_load_optimizer_and_scheduler``        reads their state of such a model; lets changed
                                             settings take effect
    ``_run_epoch``                           begins at that position; makes up for an evaluation
                                             that a signal broke off
    ``get_batch_samples``                    returns one update
    ``training_step``                        runs one micro-batch, laid out the cheapest way
    ``current_gradient_accumulation_steps``  divides its loss: the weight rule
    ``compute_loss``                         smooths labels without replacing the model's loss
    ``_get_num_items_in_batch``              counts an evaluation batch by its own targets
    ``floating_point_ops``                   adds up an update's micro-batches
    ``_track_num_input_tokens``              takes the count from the update's only collective
    ``_clip_grad_norm``                      leaves out updates without targets
    ``_get_grad_norm``                       keeps NaN and infinity from the optimizer
    ``_maybe_log_save_evaluate``             adds the update to the log row; acts on signals
    ``log``                                  adds what the updates consumed to training rows
    ``_evaluate``                            breaks off on a signal
    ``_determine_best_metric``               ignores an evaluation that was broken off
    ``evaluation_loop``                      reports the loss per target, over all ranks
    ``prediction_step``                      counts targets; cuts a batch that does not fit
    ``_save_checkpoint``                     checks values, writes to a staging folder, renames
    ``_get_output_dir``                      returns that folder meanwhile
    ``_push_from_checkpoint``                uploads whole checkpoints only
    ``save_model``                           refuses NaN; saves a schedule-free optimizer's
                                             averages; says where weights are if the disk fails
    ``create_model_card``                    writes figures, data and a plot of the run
    ``_save_optimizer_and_scheduler``        holds back a disk error until all ranks know of it
    ``_save_scaler``                         likewise
    ``_save_rng_state``                      likewise
    ``_finalize_training``                   averages losses over ranks; keeps the newest checkpoint
    ``_load_best_model``                     reads the weights of a model that was split in loading
    =======================================  =====================================================

    Attributes:
        facts: What the loss is a mean over; None until the model has been asked.
        ledger: What the run has consumed, and its position in the data.
        token_budget: The tokens a micro-batch may compute.
        stop_signals: Which signal the run stops for.
        optimizer_steps: How the optimizer steps on weights of low precision.
        eval_metrics: Functions of the trainer whose figures join those of each evaluation.
        parameter_groups: Which parameters learn at rates of their own.
    """

    control: Any
    _tr_loss: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass's own hooks see micro-batches where the stock loop hands out an update."""
        super().__init_subclass__(**kwargs)
        for name, wrap in _SEE_BATCHES.items():
            method = getattr(cls, name)
            if method is not getattr(GradAccMixin, name) and not hasattr(method, "of_batches"):
                wrapped: Any = functools.wraps(method)(wrap(method))
                wrapped.of_batches = True
                setattr(cls, name, wrapped)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_generating(type(self))
        self.facts: LossFacts | None = None
        self._micro_batch_step = MicroBatchStep()
        self._foreign_metrics = ForeignMetrics()
        self._loss_settler = LossSettler()
        self._gradient_gate = GradientGate(self._foreign_metrics)
        self._exact_evaluation = Evaluation()
        self.eval_metrics: list[Callable[[Any], dict[str, float]]] = []
        self._checkpoint_writer = CheckpointWriter()
        self.optimizer_steps = OptimizerSteps()
        self.parameter_groups = ParameterGroups()
        self._training_data = TrainingData()
        self._beginning = Beginning(Start())
        self._is_asking = False
        self._asked = Asked()
        self._update_runner: UpdateRunner | None = None
        self._last_update: UpdateResult | None = None
        is_trl = any(cls.__module__.startswith("trl.") for cls in type(self).__mro__)
        given = [*args, *kwargs.values()]
        with options_apart(given if is_trl else []) as options, saves_checkpoints(given):
            super().__init__(*args, **kwargs)
        add_options(self.args, options)
        refuse_unknown_engines(self)
        refuse_by_name(self)
        self._loss_settler.added = find_added_mean(self)
        self._rank_engine = self._make_engine()
        end_group_at_exit()
        self._noise_listener = NoiseListener(self.args.noise_scale_every)
        self.stop_signals = StopSignals()
        self._stopping = Stopping(self.stop_signals)
        self.token_budget = TokenBudget()
        self.ledger = Ledger()
        kept = [self._noise_listener.record, self.stop_signals, self.token_budget, self.ledger]
        for callback in kept:
            if callback is not None:
                self.add_callback(callback)
        install_tracking(self)
        self._log_book = LogBook(PhaseClock(self.args.device), find_rank_runs(self))

    # ---- what others may look at ---------------------------------------------------------------

    @property
    def shortcuts(self) -> Shortcuts | None:
        """The cheaper ways to the same loss that are taken, and why the others are not."""
        return self._micro_batch_step.shortcuts

    @property
    def last_update(self) -> UpdateResult | None:
        """The result of the update that ran last; None before the first."""
        return self._last_update

    @property
    def update_collator(self) -> UpdateCollator | None:
        """The collator that makes updates of rows; None if a subclass built its own loader."""
        return self._training_data.collator

    @property
    def shards_weights(self) -> bool:
        """Whether each rank holds only a part of the weights."""
        return bool(self._rank_engine.shards_weights)

    def check_for_stop(self) -> None:
        """Check for a signal in an evaluation; all ranks have to call it equally often."""
        self._stopping.check_evaluation(self.args)

    @property
    def rank_layout(self) -> RankLayout:
        """Which ranks train the same rows, and which train others."""
        return self._rank_engine.layout

    @property
    def sample(self) -> Any:
        """The rows the model is asked with; None if they are not known."""
        return self._training_data.sample

    # ---- the run -------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, from a checkpoint if asked to; on a signal stop after a saved update.

        Args:
            resume_from_checkpoint: A folder; True for the newest whole one in ``output_dir``; or
                "auto" for that one of the folder's run, or the beginning if it has saved none.
            *args: As for the stock Trainer.
            **kwargs: Likewise.

        Raises:
            CheckpointError: If the folder is damaged or of another model, or if True was passed
                and none is whole.
            ConfigError: If another process trains into the folder, or ranks disagree.
        """
        self._gradient_gate.begin_run()
        self._checkpoint_writer.begin_run()
        with hold_run_folder(self.args) as holder:
            start = choose_start(self.args, resume_from_checkpoint, holder=holder)
            self._beginning = Beginning(start)
            self._beginning.check(self)
            with self._stopping.around_run(self, phase=lambda: self._log_book.clock.phase):
                result = super().train(start.checkpoint, *args, **kwargs)
                save = functools.partial(self._save_unless_saved, self.model_wrapped)
                self._stopping.stop_at_end(self, save)
        self.stop_signals.exit_if_asked()
        return result

    def _hp_search_setup(self, trial: Any) -> None:
        before = (self.args.effective_batch_size, self.args.tokens_per_update)
        super()._hp_search_setup(trial)
        settle_drawn_size(self.args, before=before)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with stock_loop_sees_one_batch(self.args), self.optimizer_steps.undoing_failed_step():
            return self._stopping.run_loop(self, super()._inner_training_loop, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Load updates; whoever iterates this loader by hand gets their micro-batches."""
        behind: Any = super().get_train_dataloader
        if has_own_loader_behind(type(self), mixin=GradAccMixin):
            return behind()  # its batches are grouped, as those of a subclass's loader are
        is_stock = behind.__func__ is Trainer.get_train_dataloader
        return self._training_data.load(self, is_stock_loader=is_stock, engine=self._rank_engine)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the effective batch size."""
        return self._training_data.total_batch_size(self, args)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Count the updates and sequences of the run, epoch by epoch."""
        stock_values = super().set_initial_training_values
        return self._training_data.initial_values(self, args, dataloader, stock_values)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self.ledger.restart()  # the new state copies what callbacks kept from the last train()
        self._noise_listener.restore(None)
        epochs, updates = super()._init_training_state(*args, **kwargs)
        self.state.train_batch_size = self._train_batch_size
        saved = self.state.stateful_callbacks or {}
        self._noise_listener.take_over(self, saved.get("NoiseRecord"))
        self.token_budget = restored(self, TokenBudget)
        self.token_budget.restore(saved.get("TokenBudget"))
        self.ledger = restored(self, Ledger)
        membership = self._training_data.membership(self)
        self._beginning.begin(self, membership)
        return find_place(self, self.ledger, membership, epochs=epochs, updates=updates)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        refuse_steps_in_backward(self.args, num_replicas=self.rank_layout.num_replicas)
        refuse_old_signature(type(self))
        self._rank_engine = self._make_engine()
        refuse_losses_of_whole_rows(self)
        # The last run may have ended in any phase.
        self._log_book.clock = PhaseClock(self.args.device)
        self._rank_engine.before_wrapping(
            resume_from_checkpoint, is_wrapped=getattr(self, "deepspeed", None) is not None
        )
        model, loader = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self.parameter_groups.check(self)
        self.optimizer_steps.begin(self)
        self._beginning.tell(self)
        has_own_step = find_own_step(type(self)) is not None
        self._rank_engine.after_wrapping(model, has_own_step=has_own_step)
        self.facts = None  # the model may differ from that of the last call of train()
        self._asked = Asked()
        facts = self._ask_with_sample(model)
        if facts is not None:
            refuse_data_without_targets(self.train_dataset, self.sample, facts.rule)
        self._noise_listener.check_engine(self._rank_engine)
        self._update_runner = self._make_runner(model)
        begin_peak_memory(self.args.device)
        return model, self._training_data.as_updates(self, loader)

    def _run_epoch(self, **kwargs: Any) -> None:
        begin_epoch(self, self.ledger, kwargs)
        if self._stopping.make_up_for_evaluation(self, kwargs):
            self._asked.look_again(self, kwargs["model"], together=True)
            super()._run_epoch(**kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the stock optimizer, with a group for each learning rate that was asked for."""
        behind: Any = super().create_optimizer
        stock = behind if model is None else functools.partial(behind, model)
        optimizer = self.parameter_groups.create(self, stock, model)
        self._beginning.check_optimizer(optimizer, self.parameter_groups.describe())
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the stock schedule, whose decay may be left to us to count."""
        options = complete_schedule(self.args, num_training_steps)
        with changed(self.args, lr_scheduler_kwargs=options):
            return super().create_scheduler(num_training_steps, optimizer)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load weights; into a split model each rank its part."""
        if is_split(self.model):
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load their state, of a split model each rank its part; then what was changed since."""
        load = functools.partial(super()._load_optimizer_and_scheduler, checkpoint)
        is_sharded = is_sharded_by_loading(self)
        if checkpoint is not None and (is_sharded or holds_split_optimizer(checkpoint)):
            load = functools.partial(load_optimizer, self, checkpoint)
        with self.optimizer_steps.loading(self, checkpoint):
            self._beginning.load_optimizer(self, load)

    def _load_best_model(self) -> None:
        use_averages(self.optimizer)
        if is_split(self.model) and self.state.best_model_checkpoint is not None:
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    # ---- an update -----------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        """Return the next update. `training_update` counts its items, once."""
        samples = super().get_batch_samples
        if self._training_data.hands_out:  # an override asks for the batches of an update
            return samples(epoch_iterator, num_batches, device)
        return self._next_update(samples, epoch_iterator, device)

    def _next_update(
        self, samples: Callable[..., Any], epoch_iterator: Any, device: Any
    ) -> tuple[list[Any], None]:
        """Take the next update, and let `samples` see its batches if it is not stock's."""
        started = self._log_book.open()
        updates = self._training_data.next_update(self, self.ledger, epoch_iterator)
        self._log_book.begin_update(started, has_data=bool(updates))
        if getattr(samples, "__func__", samples) is not Trainer.get_batch_samples:
            updates = [self._training_data.handed_out(u, samples, device) for u in updates]
        return updates, None

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of one micro-batch, as the stock step does.

        An override in a subclass is called for each micro-batch, see `_per_micro_batch`. The stock
        loop calls this with a whole update, which is passed to `training_update`.
        """
        if isinstance(inputs, Update):
            return self.training_update(model, inputs)
        if self.rank_layout.cp_size > 1:
            inputs = rows_for_ring(inputs, self.rank_layout, device=self.args.device)
        step, ours = super().training_step, self._micro_batch_step
        run = functools.partial(
            ours.run, step, model, inputs, num_items_in_batch, device=self.args.device
        )
        if _STOCK_DIVIDES:
            return run()
        with divided_by_stock(self, lambda: ours.num_reads > 0) as divided:
            return divided(run())

    def training_update(self, model: nn.Module, update: Update) -> Tensor:
        """Run an update up to its gradient; the optimizer steps after it.

        Override it to look at whole updates.

        Args:
            model: The wrapped model.
            update: This rank's share.

        Returns:
            The update's mean loss, scaled so that the stock average over ranks is that mean.
        """
        self._asked.look_again(self, model, together=False)
        # Not asked yet: the stream cannot be read ahead, or a subclass built the loader.
        facts = self.facts or self._ask(model, agree_on_inputs(update))
        runner = self._update_runner = self._update_runner or self._make_runner(model)
        self._gradient_gate.begin_update(self)
        if self.parameter_groups.are_split:
            self.parameter_groups.note(self.optimizer)
        if self.neftune_noise_alpha is not None:
            self._micro_batch_step.noise.take_over(self)
        is_tuning = self.token_budget.tuner is not None
        with (
            timed_for_budget(self, model, update, self.token_budget)
            if is_tuning
            else contextlib.nullcontext()
        ):
            result = runner.run(self, model, update)
        self._last_update = result
        ran = result.update.micro_batches if result.stats.num_targets else []
        self._foreign_metrics.end_update(self, ran, facts.rule)
        if self._log_book.is_open:
            self._log_book.clock.enter("optimizer")
        return result.loss

    @property
    def current_gradient_accumulation_steps(self) -> float:
        """What a loss must be divided by. Whoever reads it is trusted to divide by it."""
        return self._micro_batch_step.read_divisor()

    @current_gradient_accumulation_steps.setter
    def current_gradient_accumulation_steps(self, divisor: float) -> None:
        self._micro_batch_step.divisor = divisor

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Add label smoothing to the model's own loss instead of replacing that loss."""
        if args:  # the count, by position; it is not named to one behind that takes none
            kwargs["num_items_in_batch"] = args[0]
        if self.rank_layout.sp_size > 1 and model.training and not self._is_asking:
            return loss_of_part(
                model,
                inputs,
                count=kwargs["num_items_in_batch"],
                layout=self.rank_layout,
                return_outputs=return_outputs,
            )
        stock_loss = functools.partial(super().compute_loss, model, inputs, **kwargs)
        if hasattr(self, "compute_update_loss"):
            loss = functools.partial(loss_of_rows, self, model, inputs, return_outputs)
        elif self._replaces_smoothing(inputs):
            loss = functools.partial(smoothed_loss, self, stock_loss, inputs, return_outputs)
        else:
            loss = functools.partial(stock_loss, return_outputs=return_outputs)
        # Losses are averaged over ranks by the weight rule: no factor for that may come on top.
        # Whoever multiplies by it does so only if a count is given.
        has_count = kwargs.get("num_items_in_batch") is not None
        with (
            changed(self.args, average_tokens_across_devices=False)
            if has_count
            else contextlib.nullcontext()
        ):
            if self._foreign_metrics.taken is not None:
                loss = functools.partial(self._foreign_metrics.compute_loss, self, loss, inputs)
            is_plain = self.facts is not None and self.facts.is_plain
            return loss() if is_plain else self._loss_settler.call_behind(loss)

    def compute_row_outputs(self, model: nn.Module, inputs: Any) -> Any:
        """Return what ``compute_update_loss(outputs, inputs)`` of a subclass needs of each row.

        Defining that method makes its scalar the loss: of all rows of an update, on all ranks, in
        two passes; in evaluation of the rows of a batch. Each row's outputs may depend on that row
        alone.

        Args:
            model: The model, wrapped or bare.
            inputs: Collated inputs.
        """
        return model(**inputs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor | None:
        """Return the batch's own target count if the loss needs it, else None."""
        if self.facts is None or not batch_samples:
            return None
        if not self.facts.wants_own_count and self.rank_layout.cp_size == 1:
            return None
        rule = self.facts.rule
        local = sum(make_micro_batch(batch).targets.under(rule) for batch in batch_samples)
        return torch.tensor(local, device=device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Add up the stock estimate over an update's micro-batches.

        It is proportional to the tokens and counts the model's parameters each time, so it is made
        once.
        """
        stock_count = super().floating_point_ops
        if not isinstance(inputs, Update):
            return stock_count(inputs)
        if getattr(stock_count, "__func__", None) is Trainer.floating_point_ops:
            name = getattr(self.model, "main_input_name", "input_ids")
            sizes = [mb.inputs[name].numel() for mb in inputs if name in mb.inputs]
            return stock_count({name: torch.empty(sum(sizes), device="meta")}) if sizes else 0
        return sum(stock_count(micro_batch.inputs) for micro_batch in inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count input tokens over all ranks, without a collective per micro-batch."""
        kind = self.args.include_num_input_tokens_seen
        if not isinstance(inputs, Update) or self._last_update is None:
            super()._track_num_input_tokens(inputs)
        elif kind != "no":
            stats = self._last_update.stats
            padding = 0 if kind == "non_padding" else stats.num_encoder_padding
            self.state.num_input_tokens_seen += stats.num_encoder_tokens + padding

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        clip = super()._clip_grad_norm
        if self._update_runner is None or self._last_update is None:
            return clip(model)
        return self._gradient_gate.clip(self, self._update_runner, self._last_update, model, clip)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        stock_norm = super()._get_grad_norm
        if self._update_runner is None or self._last_update is None:
            return stock_norm(model, grad_norm)
        return self._gradient_gate.check(
            self, self._update_runner, self._last_update, model, grad_norm, stock_norm
        )

    # ---- the log -------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Add the update that has just ended to the log row, then log, evaluate, save."""
        if self._log_book.is_open and self._last_update is not None:
            norm = self._gradient_gate.take_norm()
            self._log_book.close(
                self.ledger.window, self._last_update, grad_norm=norm, facts=self.facts
            )
        if self.control.should_log or self.control.should_evaluate:
            self._foreign_metrics.hand_over(self)
        if self.control.should_log and self.facts is not None and not self.facts.is_plain:
            self._log_book.losses = self._loss_settler.hand_over(self)
        lasts = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if lasts:
            save = functools.partial(self._save_unless_saved, model, trial)
            self._stopping.stop_between_updates(self, save)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Put what the updates consumed beside the stock numbers of a training row."""
        if self._is_asking:
            return  # a loss that logs is only being asked how it counts
        self._log_book.complete(logs, self.ledger.window, trainer=self)
        if is_training_row(logs):
            logs.update(self._noise_listener.metrics())
            if self.parameter_groups.are_split:
                logs.update(self.parameter_groups.metrics())
        super().log(logs, *args, **kwargs)

    # ---- evaluation ----------------------------------------------------------------------------

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        stock_evaluate = functools.partial(super()._evaluate, *args, **kwargs)
        return self._stopping.evaluate(self, stock_evaluate)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Ignore an evaluation that was broken off."""
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Report the loss per target over all batches and ranks, and its perplexity."""
        stock_loop = functools.partial(super().evaluation_loop, *args, **kwargs)
        loader = args[0] if args else kwargs.get("dataloader")
        prefix = kwargs.get("metric_key_prefix", "eval")
        run = functools.partial(self._exact_evaluation.run, self, stock_loop, loader, prefix)
        return self._foreign_metrics.evaluate(self, run)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Run the stock step, in pieces if the batch does not fit, and count its targets."""
        stock_step = super().prediction_step
        if self.rank_layout.cp_size > 1 and _SPLITS_IN_EVALUATION:
            stock_step = functools.partial(loss_in_ring, stock_step, layout=self.rank_layout)
        self._stopping.check_evaluation(self.args)
        rows_per_sequence = self._exact_evaluation.rows_per_sequence
        with self._foreign_metrics.keeping_evaluation(
            self,
            inputs,
            num_rows=lambda: count_real_rows(self, count_rows(inputs) // rows_per_sequence),
            rows_per_sequence=rows_per_sequence,
            rule=lambda: self.facts.rule if self.facts else TargetRule.SEQUENCE,
        ):
            return self._exact_evaluation.predict(
                self,
                stock_step,
                model,
                inputs,
                prediction_loss_only,
                ignore_keys,
                engine=self._rank_engine,
                ask=self._ask,
            )

    # ---- saving --------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the stock code write into a staging folder, then rename the whole checkpoint."""
        run_dir = Path(super()._get_output_dir(trial))
        refuse_bad_values(self, run_dir, is_checkpoint=True)
        save = functools.partial(super()._save_checkpoint, model, trial)
        note_losses(self, self.ledger)
        self._checkpoint_writer.save(self, run_dir, save, push=self._push_from_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the staging folder while a checkpoint is written, else the stock folder."""
        staging = self._checkpoint_writer.staging
        return str(staging) if staging is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload nothing while a checkpoint is written; `_save_checkpoint` does it afterwards."""
        if self._checkpoint_writer.staging is None:
            with pickled_without_secrets(self.args):
                super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the stock Trainer does.

        Raises:
            CheckpointError: If the disk fails; it says where the weights can still be found.
            NonFiniteError: If a weight is NaN or infinite. Nothing is overwritten.
        """
        folder = output_dir or self.args.output_dir
        save = super().save_model
        if self._checkpoint_writer.staging is not None:
            with self._checkpoint_writer.inside_checkpoint(), self._saving_to(folder):
                save(output_dir, _internal_call=_internal_call)
            return
        use_averages(self.optimizer)
        refuse_bad_values(self, folder, is_checkpoint=False)
        with save_aside(self, folder) as staged, self._saving_to(staged):
            save(str(staged), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a card with figures, settings and a plot; that of a trainer behind us is its own.

        Takes what the stock method takes, see `tracking.card`.
        """
        behind: Any = super().create_model_card
        if behind.__func__ is not Trainer.create_model_card:
            behind(*args, **kwargs)
        elif self.is_world_process_zero():
            given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs)
            write_trainer_card(self, self.args.output_dir, **dict([*given.arguments.items()][1:]))

    def _saving_to(self, folder: str | Path) -> contextlib.ExitStack:
        """Save arguments without secrets, and the weights of a model split in loading together."""
        stack = contextlib.ExitStack()
        stack.enter_context(pickled_without_secrets(self.args))
        if is_sharded_by_loading(self):
            stack.enter_context(writing_together(self.model, str(folder)))
        return stack

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._checkpoint_writer.inside_checkpoint():
            if is_sharded_by_loading(self):
                save_optimizer(self, output_dir)
            else:
                super()._save_optimizer_and_scheduler(output_dir)
            self.optimizer_steps.save(self.args, output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self._checkpoint_writer.inside_checkpoint():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._checkpoint_writer.inside_checkpoint():
            super()._save_rng_state(output_dir)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Average the losses not yet logged over ranks; keep the newest checkpoint."""
        self._foreign_metrics.hand_over(self)
        self._noise_listener.tell_verdict(self)
        # The stock code would add only rank 0's losses.
        self._tr_loss = nested_gather(self._tr_loss, self.args.parallel_mode).mean()
        with self._checkpoint_writer.keeping_newest(self.args):
            output = super()._finalize_training(trial, *args, **kwargs)
        # The run may have been killed between saving and rotating.
        rotate(self.args, self.state, Path(self._get_output_dir(trial)))
        return output

    # ---- making and asking parts ---------------------------------------------------------------

    def _make_engine(self) -> Engine:
        return make_engine(
            self.accelerator,
            self.args,
            layout=RankLayout(
                self.args.process_index,
                self.args.world_size,
                tp_size=self.get_tp_size(),
                cp_size=self.get_cp_size(),
                sp_size=self.get_sp_size(),
            ),
            is_fsdp=bool(self.is_fsdp_enabled),
            is_deepspeed=bool(self.is_deepspeed_enabled),
            is_sharded_by_loading=is_sharded_by_loading(self),
        )

    def _make_runner(self, model: nn.Module) -> UpdateRunner:
        """Make the runner, once the model is wrapped and on its device."""
        sums_in_float32 = self.args.accumulate_grads_in_fp32 is not False
        asked = self.args.max_tokens_per_micro_batch if self.update_collator else None
        self.token_budget.begin(asked)
        # Where ranks run in lockstep, gradients of micro-batches are not in .grad.
        owner = None if self._rank_engine.lockstep else find_own_step(type(self))
        self._micro_batch_step.own = None if owner is None else OwnStep(owner, self.args)
        return UpdateRunner(
            step=self._micro_batch_step,
            engine=self._rank_engine,
            clock=self._log_book.clock,
            budget=self.token_budget,
            noise=self._noise_listener,
            metrics=self._foreign_metrics,
            rollback=Rollback(model, self.args.device),
            float32=Float32Gradients(
                model.parameters(), is_rounded=not self.optimizer_steps.takes_float32
            )
            if sums_in_float32 and self._rank_engine.can_roll_back
            else None,
            spare=self._training_data.sample_inputs,
        )

    def _ask(
        self, model: nn.Module, inputs: Any, sample: Any = None, *, insists: bool = True
    ) -> LossFacts:
        """Ask the model how its loss counts, without a trace in metrics, log rows or buffers."""
        with quietly(self):
            facts, shortcuts = ask_trainer(
                self, model, inputs, sample=sample, engine=self._rank_engine, insists=insists
            )
        refuse_losses_of_whole_rows(self, facts)
        if facts.is_plain:
            warn_by_name(self)
        shortcuts = plain_for_steps_behind(shortcuts, type(self), mixin=GradAccMixin)
        self._take_answer(facts, shortcuts)
        tell_if_nothing_is_shared(self.args, self._training_data.families, self.shortcuts)
        self._asked.note(self)
        return facts

    def _ask_with_sample(self, model: nn.Module, *, insists: bool = True) -> LossFacts | None:
        """Ask with rows that were read ahead; None if there are none."""
        inputs = self._training_data.sample_inputs
        if inputs is None:
            return None
        return self._ask(model, inputs, sample=self.sample, insists=insists)

    def _take_answer(self, facts: LossFacts, shortcuts: Shortcuts | None) -> None:
        """Train by what the model has answered."""
        self.facts = facts
        self._micro_batch_step.shortcuts = shortcuts or self._micro_batch_step.shortcuts
        if shortcuts is not None and self.update_collator is not None:
            tell_collator(self.update_collator, facts, shortcuts)

    def _replaces_smoothing(self, inputs: Any) -> bool:
        """Return whether we smooth labels: they are smoothed, and nobody else computes the loss."""
        mro = type(self).__mro__
        behind = mro[mro.index(GradAccMixin) + 1 : mro.index(Trainer)]
        return (
            self.label_smoother is not None
            and self.compute_loss_func is None
            and "labels" in inputs
            and not any("compute_loss" in vars(cls) for cls in behind)
        )

    def _save_unless_saved(self, model: nn.Module, trial: Any = None) -> None:
        if self._checkpoint_writer.saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)


def _per_micro_batch(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Call a ``training_step`` of a subclass with micro-batches; an update goes to ours."""

    def training_step(
        self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        if isinstance(inputs, Update):
            return GradAccMixin.training_step(self, model, inputs, *args, **kwargs)
        return step(self, model, inputs, *args, **kwargs)

    return training_step


def _added_up(count: Callable[..., int]) -> Callable[..., int]:
    """Add a subclass's ``floating_point_ops`` up over an update's micro-batches."""

    def floating_point_ops(self: Any, inputs: Any) -> int:
        if isinstance(inputs, Update):
            return sum(count(self, micro_batch.inputs) for micro_batch in inputs)
        return count(self, inputs)

    return floating_point_ops


def _of_one_update(samples: Callable[..., Any]) -> Callable[..., Any]:
    """Call a ``get_batch_samples`` of a subclass with the micro-batches of the next update."""

    def get_batch_samples(self: Any, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if self._training_data.hands_out:
            return samples(self, epoch_iterator, num_batches, device)
        return self._next_update(functools.partial(samples, self), epoch_iterator, device)

    return get_batch_samples


_SEE_BATCHES: dict[str, Callable[..., Any]] = {
    "compute_loss": settled,
    "floating_point_ops": _added_up,
    "get_batch_samples": _of_one_update,
    "training_step": _per_micro_batch,
}
"""Hooks of a subclass that see batches where the stock loop has updates, and what lets them."""


class GradAccTrainer(GradAccMixin, Trainer):
    """``transformers.Trainer`` whose accumulated gradient equals that of the whole batch.

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
