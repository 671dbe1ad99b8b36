"""`warmup_stable_decay` by its name alone: when the rate falls, and that a resume falls with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import make_trainer, ragged_rows

from hf_gradacc import ConfigError, GradAccArguments
from hf_gradacc.trainer.optimizer.schedule import complete_schedule

ROWS = ragged_rows(20, seed=5)
JOB: dict[str, Any] = {
    "effective_batch_size": 2,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "warmup_stable_decay",
    "warmup_steps": 2,
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 8,
}


def rates(trainer: Any) -> list[float]:
    return [row["learning_rate"] / 0.01 for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = make_trainer(tmp_path_factory.mktemp("wsd"), ROWS, **JOB)
    trainer.train()
    return trainer


def test_the_rate_rises_stays_and_falls_over_the_last_fifth(trained):
    assert rates(trained) == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.5])
    assert trained.args.lr_scheduler_kwargs is None, "the user's arguments stay as they were"


def test_a_resume_inside_of_the_decay_goes_on_bit_by_bit(trained, tmp_path):
    trainer = make_trainer(tmp_path, ROWS, **JOB)
    trainer.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-8")
    assert rates(trainer) == rates(trained)
    weights = dict(trained.model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters())


def test_a_longer_decay_takes_effect_from_the_checkpoint(trained, tmp_path):
    """And a longer run goes on at the height it had: what the schedule is made for."""
    start = f"{trained.args.output_dir}/checkpoint-8"
    trainer = make_trainer(tmp_path / "a", ROWS, **JOB | {"lr_decay_steps": 4})
    trainer.train(resume_from_checkpoint=start)
    assert rates(trainer)[8:] == pytest.approx([0.5, 0.5 - 0.5**1.5])
    trainer = make_trainer(tmp_path / "b", ROWS, **JOB | {"max_steps": 12, "lr_decay_steps": 2})
    trainer.train(resume_from_checkpoint=start)
    assert rates(trainer)[8:] == pytest.approx([1, 1, 1, 0.5])


@pytest.mark.parametrize(
    ("options", "num_decay_steps"),
    [
        ({}, 20),
        ({"lr_decay_steps": 0.5}, 50),
        ({"lr_decay_steps": 7}, 7),
        ({"warmup_steps": 0.9}, 10),
        ({"lr_scheduler_kwargs": {"num_stable_steps": 30}}, 60),
        ({"lr_scheduler_kwargs": {"num_decay_steps": 3, "decay_type": "linear"}}, 3),
    ],
    ids=str,
)
def test_the_decay_is_as_long_as_was_said(tmp_path, options, num_decay_steps):
    given = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 10, **options}
    completed = complete_schedule(GradAccArguments(str(tmp_path), **given), 100)
    assert completed["num_decay_steps"] == num_decay_steps
    assert completed.items() >= (options.get("lr_scheduler_kwargs") or {}).items()


def test_other_schedules_are_left_alone(tmp_path):
    args = GradAccArguments(str(tmp_path), lr_scheduler_type="cosine")
    assert complete_schedule(args, 100) is None


def test_a_decay_that_does_not_fit_is_an_error(tmp_path):
    args = GradAccArguments(
        str(tmp_path), lr_scheduler_type="warmup_stable_decay", warmup_steps=50, lr_decay_steps=60
    )
    with pytest.raises(ConfigError, match=r"warmup of 50 updates and lr_decay_steps = 60 do not"):
        complete_schedule(args, 100)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr_scheduler_type": "linear"}, "no effect with lr_scheduler_type = 'linear'"),
        ({"lr_decay_steps": 1.5}, "lr_decay_steps = 1.5: use a whole number"),
        ({"lr_decay_steps": -1}, "lr_decay_steps = -1: use"),
        ({"warmup_steps": 0.8}, "are shares of one run, and more than all of it"),
        ({"lr_scheduler_kwargs": {"num_decay_steps": 3}}, "both say how long the decay is"),
    ],
    ids=str,
)
def test_a_decay_without_effect_is_an_error(tmp_path, options, told):
    given = {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_steps": 0.5, **options}
    with pytest.raises(ConfigError) as error:
        GradAccArguments(str(tmp_path), **given)
    assert told in str(error.value)
