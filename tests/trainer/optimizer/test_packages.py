"""Optimizers of other packages train, have rates of their own and are resumed; or say why not.

Those that are not installed are skipped: only ``schedulefree`` comes with the tests' packages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import make_trainer, ragged_rows, tiny_llama
from transformers import TrainerCallback

from hf_gradacc import CheckpointError, ConfigError
from hf_gradacc.safety.saved_values import find_bad_value

ROWS = ragged_rows(16, seed=4)
LOW_RANK = {"optim_target_modules": ["q_proj"], "optim_args": "rank=4"}
PACKAGES = {
    "schedule_free_adamw": "schedulefree",
    "schedule_free_radam": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_4bit": "torchao",
    "adamw_8bit": "bitsandbytes",
    "lion_8bit": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "stable_adamw": "optimi",
    "galore_adamw": "galore_torch",
    "apollo_adamw": "apollo_torch",
}


def job(folder: Any, optim: str, **options: Any) -> Any:
    given = LOW_RANK if optim.startswith(("galore", "apollo")) else {}
    settings: dict[str, Any] = {
        "effective_batch_size": 4,
        "per_device_train_batch_size": 2,
        "optim": optim,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rates": {"lm_head": 0.001},
    }
    # Below 4,096 values torchao and bitsandbytes keep a state as it is.
    model = tiny_llama(dtype=torch.float32, hidden_size=64, intermediate_size=128)
    return make_trainer(folder, ROWS, model=model, **settings | given | options)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(("optim", "package"), PACKAGES.items(), ids=PACKAGES)
@pytest.mark.filterwarnings("ignore")  # of theirs
def test_they_train_at_two_rates_and_a_resume_is_exact(tmp_path, optim, package):
    pytest.importorskip(package, reason="one of the optional `optimizers`")
    whole = job(tmp_path / "whole", optim)
    whole.train()
    row = whole.state.log_history[0]
    assert row["learning_rate/lm_head"] == pytest.approx(row["learning_rate"] / 10)
    resumed = job(tmp_path / "resumed", optim)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours = weights(resumed)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, ours[name]), name


def averages(trainer: Any) -> dict[str, torch.Tensor]:
    """x = y + (1 - 1/beta) (z - y): what the paper evaluates with (Defazio et al. 2024)."""
    state = trainer.optimizer.state
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return {
        names[id(p)]: p.detach().lerp(state[p]["z"], 1 - 1 / group["betas"][0])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }


def test_the_model_that_is_saved_holds_the_averages(tmp_path):
    """Stock saves the weights that gradients are taken at, if no evaluation came last."""
    pytest.importorskip("schedulefree")
    trainer = job(tmp_path, "schedule_free_adamw", max_steps=3, save_strategy="no")
    trainer.train()
    expected, stepped = averages(trainer), weights(trainer)
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight)
    assert any(not torch.equal(saved[name], stepped[name]) for name in saved)


class StopAfterFive(TrainerCallback):
    """Between two evaluations, so that the weights of the last step are the ones that are there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 5


def test_an_evaluation_of_the_best_model_leaves_it_as_it_is(tmp_path):
    """Stock then takes it for the weights of the last step, and averages it once more."""
    pytest.importorskip("schedulefree")
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = job(
        tmp_path, "schedule_free_adamw", max_steps=8, callbacks=[StopAfterFive()],
        eval_dataset=ROWS[:4], metric_for_best_model="loss", greater_is_better=True, **options,
    )  # fmt: skip
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    trainer.evaluate()
    for name, weight in weights(trainer).items():
        assert torch.equal(weight, best[name]), name


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo"])
def test_those_that_step_inside_of_the_backward_are_refused(tmp_path, optim):
    """Before their packages are asked for."""
    with pytest.raises(ConfigError, match="would move weights in every micro-batch"):
        job(tmp_path, optim, learning_rates=None).train()


class GrokAdamW(torch.optim.SGD):
    """Its name is what is known of it."""


def test_one_whose_moments_are_lost_is_not_resumed(tmp_path):
    def trainer(folder: str) -> Any:
        model = tiny_llama()
        given = {"optimizers": (GrokAdamW(model.parameters(), lr=0.1), None)}
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        return make_trainer(tmp_path / folder, ROWS, model=model, trainer_options=given, **options)

    trainer("begun").train()
    with pytest.raises(CheckpointError, match="GrokAdamW keeps its moments by the parameters"):
        trainer("resumed").train(resume_from_checkpoint=str(tmp_path / "begun" / "checkpoint-1"))


class TwoParts(torch.Tensor):
    """A state that is kept in two tensors, as those of 8 bits are."""

    @staticmethod
    def __new__(cls, codes: Any, scale: Any) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], []

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


def test_a_state_of_several_tensors_is_looked_into():
    codes = torch.zeros(3, dtype=torch.uint8)
    whole, broken = (TwoParts(codes, torch.tensor([x])) for x in (1.0, torch.nan))
    assert find_bad_value([("w", whole, True)]) is None
    assert find_bad_value([("w", broken, True)]) == "w has 1 NaN of 1 values"
