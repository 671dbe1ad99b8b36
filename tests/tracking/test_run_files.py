"""The run's own files: what is in them after a kill, a resume, a NaN."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.tiny import CLOCK_KEYS
from support.tracked import tracked_trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_gradacc.errors import DataError
from hf_gradacc.tracking.run_files import LOG_NAME, RUN_NAME, RunFile, read_log, read_run

TIMED = {"time", "run", *CLOCK_KEYS}


class KillInUpdate(TrainerCallback):
    """Ends training in the midst of an update, as a kill does: no end, no save, no last row."""

    def __init__(self, update):
        self.update = update

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.update - 1:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("restore", [False, True], ids=["callbacks_kept", "callbacks_restored"])
def test_a_killed_and_resumed_run_leaves_the_file_of_an_undisturbed_one(tmp_path, restore):
    options = {"report_to": "none", "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    tracked_trainer(tmp_path / "whole", **options).train()
    killed = tracked_trainer(tmp_path / "killed", callbacks=[KillInUpdate(6)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    log = tmp_path / "killed" / LOG_NAME
    assert [row["step"] for row in read_log(log)] == [1, 2, 3, 4, 5], "one beyond the checkpoint"
    with log.open("a") as file:
        file.write('{"kind": "train", "ste')  # the line being written at the kill
    options["restore_callback_states_from_checkpoint"] = restore
    tracked_trainer(tmp_path / "killed", **options).train(resume_from_checkpoint=True)
    assert timeless(log) == timeless(tmp_path / "whole" / LOG_NAME)
    assert json.loads((tmp_path / "killed" / RUN_NAME).read_text())["resumed_at"] == [4]


def timeless(path):
    return [
        {key: value for key, value in row.items() if key not in TIMED}
        for row in read_log(path)
        if row["kind"] != "end"
    ]


def test_resuming_in_another_directory_brings_the_rows_along(tmp_path):
    options = {"report_to": "none", "save_strategy": "steps", "save_steps": 2}
    tracked_trainer(tmp_path / "one", **options).train()
    trainer = tracked_trainer(tmp_path / "two", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    one, two = timeless(tmp_path / "one" / LOG_NAME), timeless(tmp_path / "two" / LOG_NAME)
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one])


def test_a_checkpoint_of_the_stock_trainer_can_be_resumed_and_saved_again(tmp_path):
    options = {"report_to": "none", "save_strategy": "steps", "save_steps": 2}
    ours = tracked_trainer(tmp_path / "out", **options)
    arguments = TrainingArguments(
        tmp_path / "out",
        max_steps=2,
        optim=ours.args.optim,
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
        logging_steps=1,
    )
    rows, collator = ours.train_dataset, ours.data_collator
    stock = Trainer(ours.model, arguments, train_dataset=rows, data_collator=collator)
    stock.train()
    ours.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    assert [row["step"] for row in timeless(tmp_path / "out" / LOG_NAME)] == [1, 2, 3, 4]


def test_nan_is_written_as_json_that_any_tool_reads(tmp_path):
    run_file = RunFile(tmp_path)
    run_file.start(step=0)
    run_file.append({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": torch.tensor(2.0)})
    json.loads(run_file.log_path.read_text(), parse_constant=pytest.fail)
    (row,) = read_log(run_file.log_path)
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == 2.0


class LogsALossOfItsOwn(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.trainer.log({"loss": 7.0})


def test_a_loss_that_somebody_else_logs_makes_no_training_row(tmp_path):
    callback = LogsALossOfItsOwn()
    callback.trainer = tracked_trainer(
        tmp_path, callbacks=[callback], report_to="none", max_steps=2
    )
    callback.trainer.train()
    rows = read_log(tmp_path / LOG_NAME)
    found = [(row["kind"], "effective_batch_size" in row) for row in rows if "loss" in row]
    assert found == [("train", True), ("other", False), ("train", True)]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / LOG_NAME).write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_log(tmp_path / LOG_NAME)


def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path):
    run_file = RunFile(tmp_path)
    run_file.log_path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    rows = [{"loss": 2.0 / step, "learning_rate": 0.1, "step": step} for step in (1, 2)]
    run_file.start(step=1, history=rows)
    assert read_log(run_file.log_path) == [{"kind": "train", **rows[0]}]
    assert "rubbish" in (tmp_path / "gradacc_log.damaged.jsonl").read_text()


def test_a_directory_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="output_dir"):
        read_run(tmp_path)


def test_a_fresh_run_keeps_the_former_file_beside_its_own(tmp_path):
    for loss in (1.0, 2.0):
        run_file = RunFile(tmp_path)
        run_file.start(step=0)
        run_file.append({"kind": "train", "step": 1, "loss": loss})
    assert read_log(tmp_path / "gradacc_log.previous.jsonl")[0]["loss"] == 1.0
    assert read_log(run_file.log_path)[0]["loss"] == 2.0
