"""No random state and no count is left outside a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from support.resume_jobs import train_and_report
from support.tiny import make_trainer, ragged_rows, tiny_llama
from transformers import EarlyStoppingCallback, TrainerCallback

EVALUATED: dict[str, Any] = {
    "dropout": 0.2,
    "num_train_epochs": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_dataset": ragged_rows(7, seed=9),
}
PERSISTENT = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}


class EvaluatesToo(TrainerCallback):
    """Evaluates on its own, as callbacks that watch a second set do."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (1, 5):
            self.trainer.evaluate(metric_key_prefix="own")


def test_evaluation_with_workers_that_persist_leaves_no_trace_in_training(tmp_path):
    def run(folder: str, **options: Any) -> dict[str, Any]:
        also = EvaluatesToo()
        return train_and_report(
            str(tmp_path / folder),
            callbacks=[also],
            prepare=lambda trainer: setattr(also, "trainer", trainer),
            **EVALUATED | PERSISTENT,
            **options,
        )

    whole = run("whole")
    run("cut", stop=4)
    rest = run("cut", resume="auto")
    assert all(torch.equal(w, rest["weights"][name]) for name, w in whole["weights"].items())
    assert rest["logs"] == whole["logs"]


def test_a_run_trains_the_same_whether_or_not_it_evaluates(tmp_path):
    evaluated = train_and_report(str(tmp_path / "evaluated"), **EVALUATED)
    plain = train_and_report(str(tmp_path / "plain"), **EVALUATED | {"eval_strategy": "no"})
    weights = evaluated["weights"].items()
    assert all(torch.equal(weight, plain["weights"][name]) for name, weight in weights)


def test_outside_of_training_an_evaluation_draws_as_it_does_in_stock(tmp_path):
    trainer = make_trainer(tmp_path, None, model=tiny_llama(), eval_dataset=ragged_rows(3))
    before = torch.get_rng_state()
    trainer.evaluate()
    assert not torch.equal(torch.get_rng_state(), before)


def test_early_stopping_counts_on_after_a_resume(tmp_path):
    best = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    options = EVALUATED | best | {"num_train_epochs": 4}

    def run(folder: str, **more: Any) -> dict[str, Any]:
        stopping = EarlyStoppingCallback(3)
        return train_and_report(str(tmp_path / folder), callbacks=[stopping], **options, **more)

    whole = run("whole")
    run("cut", stop=6)
    rest = run("cut", resume="auto")
    assert rest["step"] == whole["step"] < 24
