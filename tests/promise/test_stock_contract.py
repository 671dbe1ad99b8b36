"""What we rely on inside the stock Trainer. If an upgrade moves it, it fails here and says why."""

import ast
import inspect
import re
import textwrap
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.utils import DistributedType, is_deepspeed_available
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper
from support.call_sites import call_sites, callers_of
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from hf_gradacc import GradAccMixin
from hf_gradacc.trainer import contract
from hf_gradacc.trainer.contract import HOOKS, USED, find_moved, tell_what_moved

ROWS = ragged_rows(4, seed=1)
OURS = [cls for cls in GradAccMixin.__mro__ if cls.__module__.startswith("hf_gradacc")]
OVERRIDES = {
    name: [vars(cls)[name] for cls in OURS if name in vars(cls)]
    for cls in OURS
    for name in vars(cls)
    if name in vars(Trainer) and not name.startswith("__")
}
STOCK_SOURCE = inspect.getsource(inspect.getmodule(Trainer))

# Each stock method that we override, and the stock methods whose calls of it we live by.
CALLED_FROM = {name: hook.callers for name, hook in HOOKS.items() if hook.callers}
# Nothing in stock calls these, a user does: their parameters must stay what the user knows.
CALLED_BY_USERS = {
    "train": [
        "self",
        "resume_from_checkpoint: str | bool | None = None",
        "trial: 'optuna.Trial | dict[str, Any] | None' = None",
        "ignore_keys_for_eval: list[str] | None = None",
    ],
}


def check_callers(name, source):
    missing = set(CALLED_FROM[name]) - callers_of(name, call_sites(source, "Trainer"))
    assert not missing, f"stock no longer calls {name} in {sorted(missing)}"


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
    """`GradAccMixin` sets it to N / n_i, which makes the weight n_i / N."""
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
    """`GradAccMixin.get_batch_samples` hands out one update and no count."""
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
    """A skipped update relies on accelerate's AcceleratedOptimizer for that."""
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


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CALLED_FROM))
def test_every_method_we_override_is_still_called_by_that_name(name):
    """A method that stock renames would be overridden in vain, and silently."""
    check_callers(name, STOCK_SOURCE)


def test_every_override_says_who_calls_it():
    assert set(CALLED_FROM) | set(CALLED_BY_USERS) == set(OVERRIDES)
    assert not set(CALLED_FROM) & set(CALLED_BY_USERS)


@pytest.mark.parametrize(
    ("name", "caller"),
    [(name, caller) for name in sorted(CALLED_FROM) for caller in CALLED_FROM[name]],
)
def test_a_call_that_stock_renames_is_missed(name, caller):
    """The check above can fail: for each hook, and for each of the places that call it."""
    lines, first = inspect.getsourcelines(getattr(Trainer, caller))
    before = STOCK_SOURCE.splitlines(keepends=True)
    renamed = [re.sub(rf"\bself\.{name}\b", f"self.{name}_of_tomorrow", line) for line in lines]
    assert renamed != lines
    mention = f"# self.{name}() was called here, and {caller} called {name}()\n"
    after = [*before[: first - 1], mention, *renamed, *before[first - 1 + len(lines) :]]
    with pytest.raises(AssertionError):
        check_callers(name, "".join(after))


@pytest.mark.parametrize("name", sorted(CALLED_FROM))
def test_overrides_accept_what_the_stock_loop_passes(name):
    """Each call in stock, bound to the parameters of each of our overrides."""
    calls = [
        site.arguments
        for site in call_sites(STOCK_SOURCE, "Trainer")
        if site.method == name and site.arguments is not None
    ]
    if name == "_inner_training_loop":  # handed to accelerate, which adds the batch size in front
        source = ast.parse(textwrap.dedent(inspect.getsource(Trainer.train)))
        calls = [node for node in ast.walk(source) if isinstance(node, ast.Call)]
        calls = [node for node in calls if ast.unparse(node.func) == "inner_training_loop"]
        calls[0].args.insert(0, ast.Constant(8))
    assert calls
    for override in OVERRIDES[name]:
        for site in calls:
            assert not any(isinstance(argument, ast.Starred) for argument in site.args)
            named = {keyword.arg: None for keyword in site.keywords if keyword.arg}
            inspect.signature(override).bind(None, *site.args, **named)


@pytest.mark.parametrize("name", sorted(set(CALLED_FROM) - {"_run_epoch"}))
def test_overrides_of_subclasses_may_hand_their_arguments_on_by_position(name):
    stock_parameters = inspect.signature(getattr(Trainer, name)).parameters.values()
    places = [p for p in stock_parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    for override in OVERRIDES[name]:
        inspect.signature(override).bind(*places)


@pytest.mark.parametrize("name", sorted(CALLED_BY_USERS))
def test_what_users_call_takes_the_parameters_of_stock(name):
    stock_parameters = list(inspect.signature(getattr(Trainer, name)).parameters.values())
    assert [str(parameter) for parameter in stock_parameters] == CALLED_BY_USERS[name]
    for override in OVERRIDES[name]:
        positional = [None for p in stock_parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        named = {p.name: None for p in stock_parameters if p.kind is not p.VAR_KEYWORD}
        inspect.signature(override).bind(*positional)
        inspect.signature(override).bind(None, **{k: v for k, v in named.items() if k != "self"})


def test_importing_the_trainer_finds_every_hook_where_it_was():
    assert find_moved(Trainer) == []


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_a_hook_that_a_release_renames_is_named_when_the_trainer_is_imported(name, monkeypatch):
    """The class of tomorrow: its loop calls another name, and takes another parameter."""
    renamed = {caller: lambda self: self.of_tomorrow() for caller in HOOKS[name].callers}
    tomorrow = type("Tomorrow", (Trainer,), renamed)
    moved = find_moved(tomorrow)
    for caller in HOOKS[name].callers:
        assert f"{caller} does not call {name}" in moved
    tomorrow = type("Tomorrow", (Trainer,), {name: lambda self, other: None})
    assert f"{name} takes other" in find_moved(tomorrow)
    monkeypatch.delattr(Trainer, name)
    assert f"{name} is gone" in find_moved(Trainer)


@pytest.mark.parametrize("name", USED)
def test_a_method_that_our_parts_call_is_missed_too(name, monkeypatch):
    monkeypatch.delattr(Trainer, name)
    assert find_moved(Trainer) == [f"{name} is gone"]


def test_what_has_moved_is_told_in_one_line_on_the_first_rank_only(monkeypatch):
    lines = []
    monkeypatch.setattr(contract.logger, "warning_once", lines.append)
    tell_what_moved()
    assert not lines
    tomorrow = type("Tomorrow", (Trainer,), {"_clip_grad_norm": lambda self, norm: None})
    monkeypatch.setenv("RANK", "1")
    tell_what_moved(tomorrow)
    assert not lines
    monkeypatch.setenv("RANK", "0")
    tell_what_moved(tomorrow)
    (line,) = lines
    assert "(_clip_grad_norm takes norm)" in line
    assert "\n" not in line


def test_the_default_loss_filter_would_hide_a_loss_that_is_not_a_number(tmp_path):
    """Why `_STOCK_LOOP_SEES` turns it off."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    trainer = stock(tmp_path, model=model)
    trainer.train()
    assert next(row["loss"] for row in trainer.state.log_history if "loss" in row) == 0.0


# ---- DeepSpeed: what `ranks.deepspeed` relies on ------------------------------------------------


def test_accelerate_sends_a_backward_to_the_wrapped_engine_and_to_nothing_else():
    """`ranks.deepspeed` puts its own engine there."""
    calls = []
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        sync_gradients=True,
        deepspeed_engine_wrapped=SimpleNamespace(backward=lambda *a, **k: calls.append((a, k))),
    )
    Accelerator.backward(accelerator, "loss", scale_wrt_gas=False)
    assert calls == [(("loss",), {"sync_gradients": True, "scale_wrt_gas": False})]
    assert "self.deepspeed_engine_wrapped = None" in inspect.getsource(Accelerator.__init__)


@pytest.mark.parametrize("syncs", [True, False])
def test_accelerates_wrapper_steps_in_each_backward_that_syncs(syncs):
    """Why ours exists; and `engine` is where it keeps DeepSpeed's."""
    engine = Mock()
    wrapped = DeepSpeedEngineWrapper(engine)
    wrapped.backward("loss", sync_gradients=syncs)
    assert wrapped.engine is engine
    assert engine.mock_calls == [
        call.set_gradient_accumulation_boundary(is_boundary=syncs),
        call.backward("loss"),
        *([call.step()] if syncs else []),
    ]
    engine.get_global_grad_norm.return_value = torch.tensor(2.5)
    assert wrapped.get_global_grad_norm() == 2.5


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


@pytest.mark.slow
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
