"""Evaluation and prediction: values, shapes, metrics, and when they run."""

import numpy as np
import pytest
import torch
from support.line import (
    LineConfig,
    LineModel,
    LineRows,
    LineStream,
    NearInBatches,
    WideRows,
    fit_line,
    logged,
    near,
)
from torch import nn

LINE = {"a": 1.5, "b": 2.5}


def expected_loss(rows):
    return float(np.mean((1.5 * rows.x + 2.5 - rows.y) ** 2))


@pytest.mark.parametrize("count", [64, 66])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_evaluate_gives_loss_and_metrics_of_all_rows(kind, tmp_path, count, batched, shift):
    options = {"compute_metrics": NearInBatches() if batched else near}
    if shift:
        options["preprocess_logits_for_metrics"] = lambda logits, labels: logits + 1
    trainer = fit_line(
        kind, tmp_path, evaluate=count, batch_eval_metrics=batched, **LINE, **options
    )
    metrics = trainer.evaluate()
    rows = trainer.eval_dataset
    assert metrics["eval_loss"] == pytest.approx(expected_loss(rows), rel=1e-5)
    predictions = (1.5 * rows.x + 2.5 + shift, rows.y)
    assert metrics["eval_accuracy"] == pytest.approx(near(predictions)["accuracy"])


def test_evaluate_takes_a_stream(kind, tmp_path):
    stream = LineStream(66, labels=("labels", "extra"))
    trainer = fit_line(kind, tmp_path, train=None, evaluate=stream, compute_metrics=near, **LINE)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected_loss(stream.rows), rel=1e-5)
    predictions = (1.5 * stream.rows.x + 2.5, stream.rows.y)
    assert metrics["eval_accuracy"] == pytest.approx(near(predictions)["accuracy"])


@pytest.mark.parametrize("count", [64, 66])
@pytest.mark.parametrize("batched", [False, True])
def test_predict_gives_a_value_for_each_row(kind, tmp_path, count, batched):
    options = {"compute_metrics": NearInBatches()} if batched else {}
    trainer = fit_line(
        kind, tmp_path, evaluate=count, batch_eval_metrics=batched, **LINE, **options
    )
    output = trainer.predict(trainer.eval_dataset)
    assert np.allclose(output.predictions, 1.5 * trainer.eval_dataset.x + 2.5)
    assert np.array_equal(output.label_ids, trainer.eval_dataset.y)
    assert ("test_accuracy" in output.metrics) == batched


def test_predict_takes_a_stream(kind, tmp_path):
    stream = LineStream(66, labels=("labels", "extra"))
    trainer = fit_line(kind, tmp_path, train=None, evaluate=None, **LINE)
    assert np.allclose(trainer.predict(stream).predictions, 1.5 * stream.rows.x + 2.5)


def test_several_predictions_and_labels_are_kept_apart(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, twice=True, label_names=["labels", "labels_2"], **LINE)
    output = trainer.predict(trainer.eval_dataset)
    expected = 1.5 * trainer.eval_dataset.x + 2.5
    assert len(output.predictions) == len(output.label_ids) == 2
    assert all(np.allclose(part, expected) for part in output.predictions)
    assert np.array_equal(output.label_ids[0], trainer.eval_dataset.labels["labels"])
    assert np.array_equal(output.label_ids[1], trainer.eval_dataset.labels["labels_2"])


def test_predict_needs_no_labels(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, **LINE)
    rows = [{"input_x": x} for x in trainer.eval_dataset.x]
    output = trainer.predict(rows)
    assert np.allclose(output.predictions, 1.5 * trainer.eval_dataset.x + 2.5)
    assert output.label_ids is None
    assert "test_loss" not in output.metrics


@pytest.mark.parametrize("accumulation", [None, 2])
def test_batches_of_unequal_width_are_padded_together(kind, tmp_path, accumulation):
    rows = WideRows(batch_size=8)
    trainer = fit_line(
        kind, tmp_path, train=None, evaluate=rows, model="plain", a=2.0, b=1.0,
        eval_accumulation_steps=accumulation,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] > 0
    output = trainer.predict(rows)
    for x, y, prediction, label in zip(
        rows.xs, rows.ys, output.predictions, output.label_ids, strict=True
    ):
        assert np.allclose(prediction[: len(x)], 2 * x + 1)
        assert np.array_equal(label[: len(y)], y)
        assert np.all(prediction[len(x) :] == -100)


def test_loss_alone_keeps_no_predictions(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, prediction_loss_only=True, compute_metrics=near)
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics
    assert "eval_accuracy" not in metrics


@pytest.mark.parametrize("included", [["inputs"], ["inputs", "loss"], []])
def test_metrics_are_given_what_was_asked_for(kind, tmp_path, included):
    seen = {}

    def compute_metrics(prediction):
        seen["inputs"] = getattr(prediction, "inputs", None)
        seen["losses"] = getattr(prediction, "losses", None)
        return {"one": 1.0}

    class Named(LineModel):
        main_input_name = "input_x"

    trainer = fit_line(
        kind, tmp_path, model=Named(LineConfig(**LINE)), evaluate=16,
        compute_metrics=compute_metrics, include_for_metrics=included,
    )  # fmt: skip
    assert trainer.evaluate()["eval_one"] == 1.0
    assert (seen["inputs"] is not None) == ("inputs" in included)
    assert (seen["losses"] is not None) == ("loss" in included)


def test_objects_may_be_gathered(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, eval_use_gather_object=True, max_steps=1)
    trainer.train()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)


def test_several_evaluation_sets_are_logged_by_name(kind, tmp_path):
    sets = {"one": LineRows(16), "two": LineRows(24)}
    trainer = fit_line(kind, tmp_path, evaluate=sets, **LINE)
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected_loss(rows), rel=1e-5)


def test_one_of_several_evaluation_sets_may_choose_the_best_model(kind, tmp_path):
    trainer = fit_line(
        kind,
        tmp_path,
        evaluate={"one": LineRows(16), "two": LineRows(24)},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_two_loss",
        learning_rate=0.1,
    )
    trainer.train()
    assert trainer.state.best_metric == min(logged(trainer, "eval_two_loss"))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "epoch"}, [8, 16, 24]),
        ({"eval_strategy": "steps", "eval_steps": 10}, [10, 20, 24]),
        ({"eval_strategy": "steps", "eval_steps": 0.5}, [12, 24]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [16, 24]),
        ({"eval_strategy": "steps", "eval_steps": 8, "eval_delay": 9}, [16, 24]),
        ({"eval_strategy": "epoch", "eval_on_start": True}, [0, 8, 16, 24]),
    ],
    ids=str,
)
def test_evaluations_come_when_asked(kind, tmp_path, options, steps):
    trainer = fit_line(kind, tmp_path, save_strategy="no", **options)
    trainer.train()
    rows = trainer.state.log_history
    assert [row["step"] for row in rows if "eval_loss" in row] == steps


def test_a_prefix_names_the_metrics(kind, tmp_path):
    trainer = fit_line(kind, tmp_path)
    assert "valid_loss" in trainer.evaluate(metric_key_prefix="valid")
    assert "held_loss" in trainer.predict(LineRows(8), metric_key_prefix="held").metrics


def test_keys_can_be_left_out_of_the_predictions(kind, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(()))

        def forward(self, input_x, labels=None):
            y = self.a * input_x
            loss = {} if labels is None else {"loss": nn.functional.mse_loss(y, labels)}
            return {**loss, "logits": y, "hidden": y * 2}

    trainer = fit_line(kind, tmp_path, model=Two())
    both = trainer.predict(LineRows(8)).predictions
    only = trainer.predict(LineRows(8), ignore_keys=["hidden"]).predictions
    assert len(both) == 2
    assert only.shape == (8,)


def test_evaluation_needs_rows(kind, tmp_path):
    with pytest.raises(ValueError, match="requires an eval_dataset"):
        fit_line(kind, tmp_path, evaluate=None).evaluate()


def test_an_evaluation_strategy_needs_rows(kind, tmp_path):
    with pytest.raises(ValueError, match="eval_dataset"):
        fit_line(kind, tmp_path, evaluate=None, eval_strategy="epoch")


def test_a_training_step_and_a_prediction_step_give_the_same_loss(kind, tmp_path):
    def mean_error(outputs, labels, num_items_in_batch=None):
        loss = (outputs[0] - labels).square().sum()
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    trainer = fit_line(kind, tmp_path, compute_loss_func=mean_error, **LINE)
    rows = LineRows(8)
    batch = {"input_x": torch.from_numpy(rows.x), "labels": torch.from_numpy(rows.y)}
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trained = trainer.training_step(trainer.model, dict(batch), torch.tensor(8))
    predicted = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=True)[0]
    assert trained.item() == pytest.approx(predicted.item(), rel=1e-6)
    assert trained.item() == pytest.approx(expected_loss(rows), rel=1e-5)


def test_half_precision_evaluates_after_a_run_in_full(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, bf16_full_eval=True, **LINE)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected_loss(trainer.eval_dataset), rel=0.05)
    assert trainer.model.a.dtype == torch.bfloat16


def test_an_override_of_prediction_step_is_called_for_each_batch(kind, tmp_path):
    class Own(kind):
        calls = 0

        def prediction_step(self, *args, **kwargs):
            self.calls += 1
            return super().prediction_step(*args, **kwargs)

    trainer = fit_line(Own, tmp_path, evaluate=20, per_device_eval_batch_size=8, **LINE)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        expected_loss(trainer.eval_dataset), rel=1e-5
    )
    assert trainer.calls == 3


def test_evaluate_during_training_leaves_the_run_as_it_was(kind, tmp_path):
    ends = []
    for strategy in ("no", "epoch"):
        trainer = fit_line(kind, tmp_path, eval_strategy=strategy, learning_rate=0.1)
        trainer.train()
        ends.append((trainer.model.a.item(), trainer.model.b.item()))
    assert ends[1] == pytest.approx(ends[0], abs=1e-6)
