"""What we rely on inside the stock Trainer. If an upgrade moves it, it fails here and says why."""

import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.utils import is_deepspeed_available
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from hf_gradacc import GradAccMixin

ROWS = ragged_rows(4, seed=1)
OURS = [cls for cls in GradAccMixin.__mro__ if cls.__module__.startswith("hf_gradacc")]


def stock(tmp_path, **options):
    return make_trainer(
        tmp_path, ROWS, trainer_class=Trainer, arguments_class=TrainingArguments, **options
    )


def prepared(tmp_path, **options):
    trainer = stock(tmp_path, **options)
    trainer.create_optimizer_and_scheduler(1)
    return trainer


@pytest.mark.parametrize("divisor", [1.0, 7.3])
def test_training_step_divides_a_mean_loss_by_current_gradient_accumulation_steps(
    tmp_path, divisor
):
    """`ExactLoss._run_micro_batch` sets it to N / n_i, which makes the weight n_i / N."""
    trainer = prepared(tmp_path)
    loss = trainer.model(**pad(ROWS)).loss.item()
    trainer.current_gradient_accumulation_steps = divisor
    trainer.loss_is_scaled_for_ga = False
    step_loss = trainer.training_step(trainer.model, pad(ROWS), None)
    assert step_loss.item() == pytest.approx(loss / divisor, rel=1e-6)


def test_compute_loss_without_a_count_is_the_models_own_mean(tmp_path):
    trainer = prepared(tmp_path)
    expected = trainer.model(**pad(ROWS)).loss
    assert torch.equal(trainer.compute_loss(trainer.model, pad(ROWS)), expected)


def test_the_stock_loop_with_one_batch_per_step_steps_once_per_item_of_the_loader(tmp_path):
    trainer = stock(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    trainer.train()
    assert trainer.state.global_step == len(ROWS)


def test_get_batch_samples_may_hand_out_anything_and_decides_what_training_step_gets(tmp_path):
    """`UpdateLoading.get_batch_samples` hands out one update and no count."""
    seen = []

    class Probe(Trainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            assert num_batches == 1
            return [next(epoch_iterator)], None

        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append(num_items_in_batch)
            return super().training_step(model, inputs, num_items_in_batch)

    make_trainer(tmp_path, ROWS, trainer_class=Probe, arguments_class=TrainingArguments).train()
    assert seen == [None]


def test_an_optimizer_does_not_step_while_gradients_are_not_synced(tmp_path):
    """`ExactLoss._skip_optimizer` relies on accelerate's AcceleratedOptimizer for that."""
    model = torch.nn.Linear(2, 1)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    accelerator.gradient_state._set_sync_gradients(False)
    optimizer.step()
    assert torch.equal(model.weight, before)
    accelerator.gradient_state._set_sync_gradients(True)
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_the_stock_loop_syncs_gradients_again_before_every_step(tmp_path):
    """So that one skipped update does not skip the next."""
    states = []

    class Watch(Trainer):
        def training_step(self, *args, **kwargs):
            states.append(self.accelerator.gradient_state.sync_gradients)
            loss = super().training_step(*args, **kwargs)
            self.accelerator.gradient_state._set_sync_gradients(False)
            return loss

    make_trainer(
        tmp_path,
        ROWS,
        trainer_class=Watch,
        arguments_class=TrainingArguments,
        per_device_train_batch_size=1,
    ).train()
    assert states == [True] * 4


def test_callbacks_are_called_through_call_event_of_the_handler(tmp_path):
    """`UpdateLoading._inner_training_loop` wraps it, to show callbacks the user's settings."""
    trainer = stock(tmp_path)
    events = []
    stock_call_event = trainer.callback_handler.call_event

    def call_event(event, *args, **kwargs):
        events.append(event)
        return stock_call_event(event, *args, **kwargs)

    trainer.callback_handler.call_event = call_event
    trainer.train()
    assert {"on_step_begin", "on_optimizer_step", "on_log", "on_train_end"} <= set(events)


def test_skipping_batches_leaves_our_sampler_within_reach_of_set_epoch(tmp_path):
    """On resume the stock loop wraps our sampler and calls `set_epoch` two levels down."""
    from hf_gradacc import UpdateSampler

    loader = DataLoader(range(6), batch_sampler=UpdateSampler(6, effective_batch_size=2))
    skipped = skip_first_batches(loader, 1)
    assert isinstance(skipped.batch_sampler.batch_sampler, UpdateSampler)
    assert len(list(skipped)) == 2


def test_callback_state_is_written_into_the_trainer_state_under_the_class_name(tmp_path):
    """The ledger is restored from there."""
    from transformers.trainer_callback import ExportableState, TrainerState

    class Kept(TrainerCallback, ExportableState):
        def state(self):
            return {"args": {}, "attributes": {"answer": 42}}

    trainer = stock(tmp_path, callbacks=[Kept()], save_strategy="steps", save_steps=1)
    trainer.train()
    saved = TrainerState.load_from_json(tmp_path / "checkpoint-1" / "trainer_state.json")
    assert saved.stateful_callbacks["Kept"]["attributes"] == {"answer": 42}


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            name
            for cls in OURS
            for name, value in vars(cls).items()
            if inspect.isfunction(value) and hasattr(Trainer, name) and not name.startswith("__")
        }
    ),
)
def test_every_method_we_override_is_still_called_by_that_name(name):
    """A method that stock renames would be overridden in vain, and silently."""
    source = inspect.getsource(Trainer)
    assert f"def {name}(" in source
    assert source.count(name) > 1


def test_overrides_accept_what_the_stock_loop_passes():
    for cls in OURS:
        for name, value in vars(cls).items():
            if not inspect.isfunction(value) or not hasattr(Trainer, name):
                continue
            if name.startswith("__"):
                continue
            ours, theirs = inspect.signature(value), inspect.signature(getattr(Trainer, name))
            if any(p.kind is p.VAR_KEYWORD for p in ours.parameters.values()):
                continue
            assert list(ours.parameters) == list(theirs.parameters), name


def test_the_default_loss_filter_would_hide_a_loss_that_is_not_a_number(tmp_path):
    """Why `_STOCK_LOOP_SEES` turns it off."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    trainer = stock(tmp_path, model=model)
    trainer.train()
    assert next(row["loss"] for row in trainer.state.log_history if "loss" in row) == 0.0


# ---- DeepSpeed: what `zero` and `trainer_zero` rely on -------------------------------------------


def test_accelerate_sends_a_backward_to_the_wrapped_engine_and_to_nothing_else():
    """`ZeroUpdates` puts its own engine there."""
    source = inspect.getsource(Accelerator.backward)
    assert (
        "self.deepspeed_engine_wrapped.backward(loss, sync_gradients=self.sync_gradients, **kwargs)"
        in source
    )
    assert "self.deepspeed_engine_wrapped = None" in inspect.getsource(Accelerator.__init__)


def test_accelerates_wrapper_steps_in_each_backward_that_syncs():
    """Why ours exists; and `engine` is where it keeps DeepSpeed's."""
    source = inspect.getsource(DeepSpeedEngineWrapper.backward)
    assert "if sync_gradients:" in source
    assert "self.engine.step()" in source
    assert callable(DeepSpeedEngineWrapper.get_global_grad_norm)


def test_stock_lets_deepspeed_divide_by_nothing():
    """The weight rule has done it; ``gradient_accumulation_steps`` in its configuration is idle."""
    assert 'kwargs["scale_wrt_gas"] = False' in inspect.getsource(Trainer.training_step)


def test_steps_of_wrapped_deepspeed_optimizers_do_nothing():
    """The stock loop calls them after `_get_grad_norm`, where our engine has stepped already."""
    wrapped = DeepSpeedOptimizerWrapper(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    assert wrapped.step() is None
    assert "return self.optimizer.overflow" in inspect.getsource(DeepSpeedOptimizerWrapper)


def test_stock_makes_the_engine_of_the_configuration_that_the_plugin_holds(tmp_path):
    """`complete_config` writes into it; `trainer.deepspeed` tells whether there was an engine."""
    source = inspect.getsource(Accelerator._prepare_deepspeed)
    assert "self.deepspeed_config = deepspeed_plugin.deepspeed_config" in source
    assert "config_params=self.deepspeed_config" in source
    assert stock(tmp_path).deepspeed is None


def test_stock_passes_clipping_on_only_where_deepspeeds_configuration_says_auto():
    """So where it says nothing, nothing would be clipped, and `complete_config` writes it in."""
    source = inspect.getsource(HfTrainerDeepSpeedConfig.fill_match)
    assert 'if config.get(ds_key) == "auto":' in source


@pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
def test_deepspeeds_engine_has_the_members_we_call():
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(DeepSpeedEngine)
    assert "def backward(self, loss, retain_graph=False, scale_wrt_gas=True):" in source
    assert "def set_gradient_accumulation_boundary(self, is_boundary):" in source
    for name in ("step", "get_global_grad_norm", "fp16_enabled", "dynamic_loss_scale"):
        assert callable(getattr(DeepSpeedEngine, name))
    # A gradient that is not finite is left out by these; `test_zero` watches them do it.
    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert "self.overflow = True" in inspect.getsource(optimizer)
