"""Evaluation: the loss per target token, whatever the evaluation batch size."""

import math

import pytest
import torch
from support.common_prompts import rows_of_prompts, watching_calls
from support.failing import Failure
from support.reference import float64_everywhere
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama

ROWS = ragged_rows(13, seed=12)


def evaluate(tmp_path, rows=ROWS, **options):
    trainer = make_trainer(tmp_path, None, eval_dataset=rows, **options)
    with float64_everywhere():
        return trainer.evaluate()


def true_loss(rows=ROWS, **options):
    model = tiny_llama().eval()
    with float64_everywhere(), torch.no_grad():
        return float(model(**pad(rows)).loss)


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_eval_loss_does_not_depend_on_the_eval_batch_size(tmp_path, size):
    metrics = evaluate(tmp_path, per_device_eval_batch_size=size)
    assert metrics["eval_loss"] == pytest.approx(true_loss(), rel=1e-12)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(true_loss()), rel=1e-12)


def test_the_stock_loss_does_depend_on_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    losses = {
        evaluate(
            tmp_path,
            per_device_eval_batch_size=size,
            trainer_class=Trainer,
            arguments_class=TrainingArguments,
        )["eval_loss"]
        for size in (1, 5)
    }
    assert len(losses) == 2
    assert max(abs(loss / true_loss() - 1) for loss in losses) > 1e-4


def test_rows_without_a_target_change_nothing(tmp_path):
    bare = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS[:3]]
    metrics = evaluate(tmp_path, [bare[0], *ROWS, *bare[1:]], per_device_eval_batch_size=1)
    assert metrics["eval_loss"] == pytest.approx(true_loss(), rel=1e-12)


def test_several_evaluation_sets_keep_their_own_loss(tmp_path):
    metrics = evaluate(tmp_path, {"a": ROWS[:5], "b": ROWS[5:]}, per_device_eval_batch_size=2)
    assert metrics["eval_a_loss"] == pytest.approx(true_loss(ROWS[:5]), rel=1e-12)
    assert metrics["eval_b_loss"] == pytest.approx(true_loss(ROWS[5:]), rel=1e-12)


def test_label_smoothing_enters_the_evaluation_loss_as_in_stock(tmp_path):
    model = tiny_llama().eval()
    with float64_everywhere(), torch.no_grad():
        batch = pad(ROWS)
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(
            logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.3
        )
    metrics = evaluate(tmp_path, per_device_eval_batch_size=3, label_smoothing_factor=0.3)
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-12)


def test_compute_metrics_still_gets_every_prediction(tmp_path):
    def count(prediction):
        return {"rows": len(prediction.predictions), "labels": prediction.label_ids.shape[0]}

    metrics = evaluate(
        tmp_path, per_device_eval_batch_size=4, trainer_options={"compute_metrics": count}
    )
    assert (metrics["eval_rows"], metrics["eval_labels"]) == (13, 13)
    assert metrics["eval_loss"] == pytest.approx(true_loss(), rel=1e-12)


def test_predict_reports_the_same_loss_under_its_own_name(tmp_path):
    trainer = make_trainer(tmp_path, None, per_device_eval_batch_size=4)
    with float64_everywhere():
        output = trainer.predict(ROWS)
    assert output.metrics["test_loss"] == pytest.approx(true_loss(), rel=1e-12)


def test_a_loss_that_is_not_a_number_is_shown_and_not_filtered(tmp_path):
    trainer = make_trainer(tmp_path, None, eval_dataset=ROWS, per_device_eval_batch_size=4)
    with torch.no_grad():
        trainer.model.lm_head.weight[ROWS[0]["labels"][-1]] = float("nan")
    assert math.isnan(trainer.evaluate()["eval_loss"])


# ---- rows that begin alike ---------------------------------------------------------------------

PROMPTED = rows_of_prompts(11, seed=4, prompts=2)


def trained_to_share(tmp_path, *, layout="auto", size=11, **options):
    """A trainer that has trained for one update, so that the model has been asked."""
    trainer = make_trainer(
        tmp_path,
        rows_of_prompts(8),
        eval_dataset=PROMPTED,
        layout=layout,
        effective_batch_size=8,
        per_device_eval_batch_size=size,
        **options,
    )
    trainer.train()
    assert bool(trainer.shortcuts.bodies) == (layout == "auto")
    return trainer


@pytest.mark.parametrize("size", [6, 11])
def test_rows_that_begin_alike_are_evaluated_as_trees_to_the_same_loss(tmp_path, in_float64, size):
    trainer = trained_to_share(tmp_path, size=size)
    with torch.no_grad():
        expected = float(trainer.model.eval()(**pad(PROMPTED)).loss)
    with watching_calls() as calls:
        metrics = trainer.evaluate()
    assert calls.num_trees == -(-11 // size)
    assert sum(calls.widths) < 0.7 * sum(len(row["input_ids"]) for row in PROMPTED)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-12)


def test_predictions_of_trees_are_those_of_rows(tmp_path, in_float64):
    trees = trained_to_share(tmp_path / "trees")
    rows = trained_to_share(tmp_path / "rows", layout="padded")
    rows.model.load_state_dict(trees.model.state_dict())
    with watching_calls() as calls:
        actual = trees.predict(PROMPTED)
    expected = rows.predict(PROMPTED)
    assert calls.num_trees == 1
    assert actual.predictions.shape == expected.predictions.shape
    real = pad(PROMPTED)["attention_mask"].bool().numpy()  # what stands for padding is anybody's
    assert abs(actual.predictions - expected.predictions)[real].max() < 1e-12
    assert (actual.label_ids == expected.label_ids).all()
    assert actual.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-12)


def test_pieces_of_a_batch_that_did_not_fit_are_trees_as_well(tmp_path, in_float64):
    trainer = trained_to_share(tmp_path)
    with torch.no_grad():
        expected = float(trainer.model.eval()(**pad(PROMPTED)).loss)
    failure = Failure(trainer.model, lambda trees, width, seen: seen == 0, evaluation=True)
    trainer._asked.note(trainer)  # what fails here by a hook has been there before
    with watching_calls() as calls:
        metrics = trainer.evaluate()
    assert failure.raised == 1
    assert calls.num_trees == 3  # the batch, and pieces of 5, 5 and 1 row
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-12)


def test_rows_are_evaluated_as_rows_where_those_have_proved_faster(tmp_path, in_float64):
    trainer = trained_to_share(tmp_path)
    expected = trainer.evaluate()["eval_loss"]
    trainer.update_collator.takes_trees = False
    with watching_calls() as calls:
        metrics = trainer.evaluate()
    assert calls.num_trees == 0
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-12)


def test_an_evaluation_before_training_computes_rows(tmp_path, in_float64):
    trainer = make_trainer(tmp_path, rows_of_prompts(8), eval_dataset=PROMPTED)
    with watching_calls() as calls:
        metrics = trainer.evaluate()
    assert not calls.of_trees
    with torch.no_grad():
        expected = float(tiny_llama()(**pad(PROMPTED)).loss)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-12)
