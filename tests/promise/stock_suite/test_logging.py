"""What is logged, counted and written about a run."""

import json
import logging as python_logging

import datasets
import pytest
from support.line import KINDS, fit_line, logged
from transformers import default_data_collator
from transformers.utils import logging

from .test_training import tiny_gpt2


def test_a_training_row_has_the_stock_keys(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, logging_steps=4)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    for row in rows:
        assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} <= set(row)


def test_the_last_row_is_of_the_whole_run(kind, tmp_path):
    trainer = fit_line(kind, tmp_path)
    output = trainer.train()
    keys = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    assert keys <= set(trainer.state.log_history[-1])
    assert keys <= set(output.metrics)
    samples = output.metrics["train_samples_per_second"] * output.metrics["train_runtime"]
    assert samples == pytest.approx(3 * 64, rel=0.1)


def test_an_evaluation_row_has_its_speed(kind, tmp_path):
    trainer = fit_line(kind, tmp_path)
    metrics = trainer.evaluate()
    assert {
        "eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
    } <= set(metrics)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "epoch"}, [8, 16, 24]),
        ({"logging_strategy": "steps", "logging_steps": 0.25}, [6, 12, 18, 24]),
        ({"logging_steps": 10, "logging_first_step": True}, [1, 10, 20]),
    ],
    ids=str,
)
def test_rows_come_as_asked(kind, tmp_path, options, steps):
    trainer = fit_line(kind, tmp_path, **options)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == steps


def test_an_override_of_log_sees_and_adds_to_each_row(kind, tmp_path):
    class Own(kind):
        def log(self, logs, *args, **kwargs):
            logs["own"] = 7
            super().log(logs, *args, **kwargs)

    trainer = fit_line(Own, tmp_path, logging_steps=8)
    trainer.train()
    assert all(row["own"] == 7 for row in trainer.state.log_history)


class Capture(python_logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


@pytest.fixture
def said():
    logger, before = logging.get_logger("transformers"), logging.get_verbosity()
    capture = Capture()
    logger.addHandler(capture)
    yield capture
    logger.removeHandler(capture)
    logging.set_verbosity(before)


@pytest.mark.parametrize(("level", "is_said"), [("debug", True), ("error", False)])
def test_log_level_decides_what_is_told(kind, tmp_path, said, level, is_said):
    fit_line(kind, tmp_path, log_level=level, max_steps=1).train()
    assert ("Running training" in said.text) == is_said


def token_rows(*, with_mask):
    rows = {
        "input_ids": [[5, 6, 7, 0, 0], [8, 9, 3, 4, 2]],
        "labels": [[5, 6, 7, -100, -100], [8, 9, 3, 4, 2]],
    }
    if with_mask:
        rows["attention_mask"] = [[1, 1, 1, 0, 0], [1] * 5]
    return datasets.Dataset.from_dict(rows)


class Tokens:
    """Stands for a tokenizer, as far as counting goes."""

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def save_pretrained(self, folder):
        pass


@pytest.mark.parametrize(
    ("counts", "with_mask", "pad_token_id", "expected"),
    [
        ("non_padding", True, 0, 8),
        ("non_padding", False, 0, 8),
        ("non_padding", False, None, 10),
        ("all", True, 0, 10),
        (True, True, 0, 10),
        ("no", True, 0, 0),
    ],
)
def test_input_tokens_seen_are_counted(kind, tmp_path, counts, with_mask, pad_token_id, expected):
    trainer = fit_line(
        kind,
        tmp_path,
        model=tiny_gpt2(),
        train=token_rows(with_mask=with_mask),
        data_collator=default_data_collator,
        processing_class=Tokens(pad_token_id),
        include_num_input_tokens_seen=counts,
        per_device_train_batch_size=2,
        max_steps=1,
        logging_steps=1,
    )
    trainer.train()
    assert trainer.state.num_input_tokens_seen == expected
    assert logged(trainer, "num_input_tokens_seen") == ([expected] * 2 if expected else [])


def test_tokens_that_cannot_be_told_from_padding_are_warned_about(kind, tmp_path, said, caplog):
    logging.set_verbosity_warning()
    trainer = fit_line(
        kind,
        tmp_path,
        model=tiny_gpt2(),
        train=token_rows(with_mask=False),
        data_collator=default_data_collator,
        include_num_input_tokens_seen="non_padding",
        max_steps=1,
    )
    trainer.train()
    words = {"stock": "Could not determine method", "ours": "no processing_class says what padding"}
    is_ours = kind is KINDS["ours"]
    assert words["ours" if is_ours else "stock"] in said.text + caplog.text
    assert trainer.state.num_input_tokens_seen == 10


def test_metrics_are_written_by_split_and_together(kind, tmp_path, capsys):
    trainer = fit_line(kind, tmp_path, max_steps=1)
    metrics = trainer.train().metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_metrics("eval", {"eval_loss": 0.5})
    trainer.save_state()
    assert "train_loss" in capsys.readouterr().out
    written = json.loads((tmp_path / "train_results.json").read_text())
    assert written["train_loss"] == metrics["train_loss"]
    together = json.loads((tmp_path / "all_results.json").read_text())
    assert {"train_loss", "eval_loss"} <= set(together)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 1


def test_memory_is_measured_if_asked(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, max_steps=2, skip_memory_metrics=False)
    metrics = trainer.train().metrics
    assert any(key.startswith("init_mem_cpu") for key in metrics)
    assert any(key.startswith("train_mem_cpu") for key in metrics)
