"""Which checkpoints are kept, which one is the best, and what is loaded at the end."""

from pathlib import Path

import pytest
import safetensors.torch
from support.line import LineModel, fit_line, logged, near

EVALUATES = {"learning_rate": 0.1, "a": 1.5, "b": 2.5}


def checkpoints(folder):
    found = (path.name.rpartition("checkpoint-")[2] for path in folder.iterdir())
    return sorted(int(step) for step in found if step.isdecimal())


def scripted(values):
    """A metric that has these values, one evaluation after the other."""
    left = iter(values)

    def compute_metrics(prediction):
        return {"accuracy": next(left, values[-1])}

    return compute_metrics


def weights(folder):
    return safetensors.torch.load_file(Path(folder, "model.safetensors"))


@pytest.mark.parametrize("model", ["transformers", "plain"])
@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5},
        {"eval_strategy": "epoch", "save_strategy": "epoch"},
    ],
    ids=["steps", "epochs"],
)
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_best_model_is_loaded_at_the_end(kind, tmp_path, model, options, metric):
    trainer = fit_line(
        kind,
        tmp_path,
        model=model,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        compute_metrics=near,
        **EVALUATES | options,
    )
    assert trainer.args.greater_is_better == (metric == "accuracy")
    trainer.train()
    values = logged(trainer, f"eval_{metric}")
    best = max(values) if metric == "accuracy" else min(values)
    assert trainer.state.best_metric == best
    saved = weights(trainer.state.best_model_checkpoint)
    assert trainer.model.a.item() == saved["a"].item()
    assert trainer.model.b.item() == saved["b"].item()
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(best)
    if model == "transformers":
        reloaded = LineModel.from_pretrained(trainer.state.best_model_checkpoint)
        assert reloaded.a.item() == trainer.model.a.item()


def test_only_better_models_are_saved(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, eval_strategy="epoch", save_strategy="best",
        metric_for_best_model="accuracy", compute_metrics=scripted([0.60, 0.65, 0.64]),
    )  # fmt: skip
    trainer.train()
    assert checkpoints(tmp_path) == [8, 16]


def test_saving_the_best_needs_a_metric(kind, tmp_path):
    with pytest.raises(ValueError, match="metric_for_best_model"):
        fit_line(kind, tmp_path, eval_strategy="epoch", save_strategy="best")


def test_loading_the_best_goes_by_the_loss_if_nothing_is_said(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True
    )
    assert trainer.args.metric_for_best_model == "loss"


def test_without_evaluation_no_model_is_best(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, save_steps=1, max_steps=4, metric_for_best_model="accuracy",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric is None
    assert trainer.state.best_model_checkpoint is None
    assert checkpoints(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(("limit", "kept"), [(1, [4]), (2, [3, 4])])
def test_only_so_many_checkpoints_are_kept(kind, tmp_path, limit, kept):
    fit_line(kind, tmp_path, save_steps=1, max_steps=4, save_total_limit=limit).train()
    assert checkpoints(tmp_path) == kept


@pytest.mark.parametrize("save", ["epoch", "steps"])
def test_the_best_checkpoint_is_that_of_the_best_evaluation(kind, tmp_path, save):
    trainer = fit_line(
        kind, tmp_path, eval_strategy="epoch", save_strategy=save, save_steps=1,
        metric_for_best_model="accuracy", greater_is_better=True,
        compute_metrics=scripted([0.59, 0.57, 0.55]),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == 0.59
    assert trainer.state.best_global_step == 8
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")


def trained_with_a_limit_of_one(kind, tmp_path):
    """Three checkpoints, of which the first is the best."""
    trainer = fit_line(
        kind, tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=3,
        metric_for_best_model="accuracy", greater_is_better=True, save_total_limit=1,
        compute_metrics=scripted([0.9, 0.8, 0.7]),
    )  # fmt: skip
    trainer.train()
    return trainer


def test_with_a_limit_of_one_the_best_checkpoint_remains(kind, tmp_path):
    trainer = trained_with_a_limit_of_one(kind, tmp_path)
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert 1 in checkpoints(tmp_path)


def test_with_a_limit_of_one_only_the_best_checkpoint_remains(kind, tmp_path):
    trained_with_a_limit_of_one(kind, tmp_path)
    assert checkpoints(tmp_path) == [1]


def test_an_evaluation_that_is_not_saved_has_no_checkpoint(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, eval_strategy="steps", eval_steps=3, save_steps=2, max_steps=8,
        metric_for_best_model="accuracy", greater_is_better=True,
        compute_metrics=scripted([0.9, 0.8, 0.7]),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert trainer.state.best_model_checkpoint is None
    assert checkpoints(tmp_path) == [2, 4, 6, 8]


def test_the_last_step_is_saved_whatever_the_interval(kind, tmp_path):
    fit_line(kind, tmp_path, save_steps=5, max_steps=9).train()
    assert checkpoints(tmp_path) == [5, 9]


def test_best_and_newest_are_kept_under_a_limit(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, eval_strategy="steps", eval_steps=5, save_steps=5, max_steps=11,
        load_best_model_at_end=True, save_total_limit=2, learning_rate=0.1,
    )  # fmt: skip
    trainer.train()
    assert checkpoints(tmp_path) == [10, 11]
    saved = weights(trainer.state.best_model_checkpoint)
    assert trainer.model.a.item() == saved["a"].item()


def test_a_metric_that_is_not_there_is_named(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, eval_strategy="epoch", save_strategy="epoch",
        metric_for_best_model="f1", greater_is_better=True,
    )  # fmt: skip
    with pytest.raises(KeyError, match="eval_f1"):
        trainer.train()
