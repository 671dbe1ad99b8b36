"""What a resume says of changed settings is what the run then does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.resume_jobs import train_and_report
from support.tiny import make_trainer, ragged_rows, tiny_llama

from hf_gradacc.errors import CheckpointError
from hf_gradacc.safety.resume_rules import changed_settings, describe_change

ROWS = ragged_rows(22, seed=3)
JOB: dict[str, Any] = {
    "effective_batch_size": 4,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
}


def train(folder: Any, *, resume: Any = None, **options: Any) -> Any:
    trainer = make_trainer(folder, ROWS, **JOB | options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of six updates; its checkpoint after the second is resumed from."""
    folder = tmp_path_factory.mktemp("begun")
    train(folder)
    return str(folder / "checkpoint-2")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield lambda: caplog.text
    transformers_logging.disable_propagation()


def rates(trainer: Any) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "loss" in row][2:]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.01 * (6 - step) / 6 for step in (2, 3, 4, 5)]),
        ({"learning_rate": 0.5}, [0.5 * (6 - step) / 6 for step in (2, 3, 4, 5)]),
        ({"max_steps": 12}, [0.01 * (12 - step) / 12 for step in range(2, 12)]),
        ({"lr_scheduler_type": "constant"}, [0.01] * 4),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, [0.01] * 4),
    ],
    ids=["nothing", "rate", "length", "kind", "kind with a state of its own"],
)
def test_a_changed_learning_rate_is_trained_with(tmp_path, begun, said, changes, expected):
    given = {"eval_dataset": ROWS[:3]} if "eval_strategy" in changes else {}
    trainer = train(tmp_path, resume=begun, **changes, **given)
    assert rates(trainer) == pytest.approx(expected, rel=1e-12)
    for name in changes:
        assert f"  {name}: " in said(), "each is listed"
    assert ("changed since checkpoint-2" in said()) == bool(changes)


def test_decay_and_betas_take_effect_and_the_optimizer_keeps_its_moments(tmp_path, begun):
    changes = {"weight_decay": 0.3, "adam_beta2": 0.9, "max_steps": 3}
    trainer = make_trainer(tmp_path, ROWS, **JOB | changes)
    trainer.train(resume_from_checkpoint=begun)
    decayed, plain = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == (0.9, 0.9)
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {3}


def test_changed_intervals_of_logging_and_saving_hold(tmp_path, begun, said):
    trainer = train(tmp_path, resume=begun, logging_steps=2, save_steps=3)
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 4, 6]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    assert "logging_steps: 1 before, 2 now: takes effect from here" in said()


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ({"hidden_size": 32}, {}, "config.hidden_size: 16 before, 32 now"),
        ({"num_hidden_layers": 1}, {}, "config.num_hidden_layers: 2 before, 1 now"),
        ({"dtype": torch.float32}, {}, "float64 before, float32 now"),
        ({}, {"optim": "sgd"}, "the optimizer: AdamW before, SGD now"),
        ({"adapter": True}, {}, "all weights before, LORA now"),
        ({"frozen": True}, {}, "tensors before"),
    ],
    ids=["width", "depth", "precision", "optimizer", "adapter", "frozen"],
)
def test_what_cannot_be_gone_on_from_is_refused_by_name(tmp_path, begun, model, changes, words):
    model = dict(model)
    adapter, frozen = model.pop("adapter", False), model.pop("frozen", False)
    made: Any = tiny_llama(**model)
    if adapter:
        import peft

        made = peft.get_peft_model(made, peft.LoraConfig(target_modules=["q_proj"]))
    if frozen:
        made.lm_head.requires_grad_(False)
    trainer = make_trainer(tmp_path, ROWS, model=made, **JOB | changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        trainer.train(resume_from_checkpoint=begun)
    assert "begin a new run from its weights" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # of peft 0.18
def test_an_adapter_is_not_put_onto_another_base(tmp_path):
    import peft

    def adapted(seed: int) -> Any:
        base = tiny_llama(seed=seed)
        torch.manual_seed(5)
        return peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))

    make_trainer(tmp_path, ROWS, model=adapted(0), **JOB).train()
    again = make_trainer(tmp_path, ROWS, model=adapted(0), **JOB | {"max_steps": 7})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7
    with pytest.raises(CheckpointError, match="the frozen weights"):
        make_trainer(tmp_path, ROWS, model=adapted(1), **JOB).train(resume_from_checkpoint=True)


def test_a_changed_configuration_of_the_model_is_listed(tmp_path, begun, said):
    model = tiny_llama(rms_norm_eps=0.001)
    trainer = make_trainer(tmp_path, ROWS, model=model, **JOB | {"max_steps": 3})
    trainer.train(resume_from_checkpoint=begun)
    assert "model.rms_norm_eps: 1e-06 before, 0.001 now: takes effect from here" in said()


def test_an_engine_that_restores_its_optimizer_is_not_said_to_change_it():
    told = describe_change("weight_decay", begins_data_anew=False, restores_optimizer=True)
    assert told is not None
    assert "no effect" in told


def test_weights_alone_are_refused_to_auto_and_said_otherwise(tmp_path, said):
    options = {"save_only_model": True, "num_train_epochs": 1}
    train_and_report(str(tmp_path), stop=2, **options)
    with pytest.raises(CheckpointError, match="weights and no optimizer"):
        train_and_report(str(tmp_path), resume="auto", **options)
    assert train_and_report(str(tmp_path), resume=True, **options)["step"] == 6
    assert "optimizer, learning rate schedule and random numbers start anew" in said()


def test_what_names_a_run_is_no_change():
    then = {"output_dir": "a", "run_name": "a", "learning_rate": 0.1, "gone": 1}
    assert changed_settings(then, {"output_dir": "b", "run_name": "b", "learning_rate": 0.1}) == {}
    assert describe_change("effective_batch_size", begins_data_anew=False) is None
    assert describe_change("effective_batch_size", begins_data_anew=True) is not None
