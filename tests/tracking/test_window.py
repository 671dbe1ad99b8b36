"""What each log row says about the updates behind it."""

import pytest
from support.tiny import log_rows, make_trainer, ragged_rows

from hf_gradacc.tracking.window import StatsWindow
from hf_gradacc.updates.update import UpdateStats

ROWS = ragged_rows(10, seed=31)
TARGETS = [sum(label != -100 for label in row["labels"][1:]) for row in ROWS]
LENGTHS = [len(row["input_ids"]) for row in ROWS]


def train(tmp_path, **options):
    settings = {"effective_batch_size": 4, "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, ROWS, **settings | options)
    trainer.train()
    return trainer, trainer.get_train_dataloader().updates.batch_sampler.membership(0)


def test_each_row_counts_what_its_update_held(tmp_path):
    trainer, updates = train(tmp_path)
    seen = 0
    for row, members in zip(log_rows(trainer), updates, strict=True):
        widths = sorted((LENGTHS[i] for i in members), reverse=True)
        computed = sum(2 * w for w in widths[::2])
        seen += sum(TARGETS[i] for i in members)
        assert row["effective_batch_size"] == len(members)
        assert row["tokens_per_update"] == sum(TARGETS[i] for i in members)
        assert row["input_tokens_per_update"] == sum(widths)
        assert row["padding_fraction"] == pytest.approx(1 - sum(widths) / computed)
        assert row["micro_batches_per_update"] == -(-len(members) // 2)
        assert row["target_tokens_seen"] == seen
        assert row["step_seconds"] > 0
        assert row["target_tokens_per_second"] == pytest.approx(
            row["tokens_per_update"] / row["step_seconds"]
        )


def test_a_window_over_unequal_updates_divides_sums_by_sums(tmp_path):
    trainer, updates = train(tmp_path, logging_steps=3)
    (row,) = log_rows(trainer)
    assert row["effective_batch_size"] == pytest.approx(10 / 3)
    assert row["tokens_per_update"] == pytest.approx(sum(TARGETS) / 3)
    computed = 0
    for members in updates:
        widths = sorted((LENGTHS[i] for i in members), reverse=True)
        computed += sum(2 * w for w in widths[::2])
    assert row["padding_fraction"] == pytest.approx(1 - sum(LENGTHS) / computed)


def test_the_gradient_norm_is_that_of_all_updates_of_the_window(tmp_path):
    """The stock row shows the last update's alone, which may be a short one."""
    each, _ = train(tmp_path)
    norms = [row["grad_norm"] for row in log_rows(each)]
    assert [row["grad_norm_mean"] for row in log_rows(each)] == norms
    (row,) = log_rows(train(tmp_path, logging_steps=3)[0])
    assert row["grad_norm"] == norms[-1]
    assert row["grad_norm_mean"] == pytest.approx(sum(norms) / 3)


def test_evaluation_rows_and_the_final_report_are_not_mistaken_for_training_rows(tmp_path):
    trainer = make_trainer(
        tmp_path, ROWS, effective_batch_size=5, eval_dataset=ROWS, eval_strategy="epoch"
    )
    trainer.train()
    others = [row for row in trainer.state.log_history if "loss" not in row]
    assert len(others) == 2
    assert not any("tokens_per_update" in row for row in others)


def test_a_window_starts_anew_and_totals_stay():
    window = StatsWindow()
    window.add(UpdateStats(num_targets=6, num_sequences=2, num_input_tokens=9, step_seconds=2.0))
    assert window.metrics()["target_tokens_per_second"] == 3.0
    window.start_next()
    window.add(UpdateStats(num_targets=2, num_sequences=1))
    assert window.metrics()["tokens_per_update"] == 2
    assert window.metrics()["target_tokens_seen"] == 8
