"""A trainer with `compute_update_loss`: its updates against one backward of all their rows."""

from __future__ import annotations

import pytest
import torch
from support.contrastive_jobs import AllRows, Embedder, collate, dataset, loss_of, reference, train
from support.ranks import run_ranks
from support.reference import relative_error
from support.tiny import make_trainer

pytestmark = pytest.mark.slow


def check(run, tolerance=1e-10):
    assert [len(rows) for rows in run["updates"]] == [14, 1]
    for gradient, rows, told in zip(run["gradients"], run["updates"], run["losses"], strict=True):
        expected, loss = reference(rows)
        assert relative_error(gradient, expected) <= tolerance
        assert told == pytest.approx(loss, rel=max(tolerance, 1e-6))


def test_an_update_in_pieces_has_the_gradient_and_loss_of_all_its_rows():
    run = train()
    check(run)
    assert "taken once over all rows of an update" in run["notes"][0]


@pytest.mark.parametrize("fails", ["first", "second"])
def test_out_of_memory_in_either_pass_cuts_the_update_finer(fails):
    run = train(fails=fails)
    assert run["failures"] == 1
    check(run)


def test_ranks_share_one_loss_even_if_one_has_no_row():
    for run in run_ranks(train, 2, per_device_train_batch_size=4):
        check(run)


def test_bf16_is_as_far_off_as_one_backward_in_bf16():
    check(train(bf16=True), tolerance=3e-2)


def test_a_resumed_run_drops_out_the_same(tmp_path):
    options = {
        "dropout": 0.2,
        "learning_rate": 0.5,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = train(out=str(tmp_path / "whole"), **options)
    part = str(tmp_path / "part")
    train(out=part, **options, max_steps=2)
    resumed = train(out=part, resume=True, **options)
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name


def test_an_evaluation_batch_has_its_own_loss(tmp_path):
    trainer = make_trainer(
        tmp_path,
        dataset(),
        model=Embedder(),
        trainer_class=AllRows,
        data_collator=collate,
        eval_dataset=dataset()[:5],
        per_device_eval_batch_size=5,
        label_names=["labels"],
    )
    batch = collate(dataset()[:5])
    model = trainer.model.eval()
    with torch.no_grad():
        expected = loss_of(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_in_one_pass_rows_of_a_micro_batch_are_compared_and_a_line_says_so(caplog):
    run = train(update_passes=1)
    expected, _ = reference(run["updates"][0])
    assert relative_error(run["gradients"][0], expected) > 1e-3
