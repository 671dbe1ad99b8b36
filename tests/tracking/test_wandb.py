"""Real runs in W&B, read back from disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
import transformers
import wandb
from support.ranks import run_ranks
from support.tiny import spaced_rows
from support.tracked import (
    Trouble,
    no_wandb_login,
    only_run,
    run_to_end,
    tracked_trainer,
    variables_of_wandb,
)
from support.tracked_jobs import train_with_wandb
from support.wandb_reader import find_wandb_files, read_wandb_file
from transformers import TrainerCallback

from hf_gradacc import DataError
from hf_gradacc.tracking import wandb as tracking_wandb
from hf_gradacc.tracking.install import attach_report, install_tracking
from hf_gradacc.tracking.run_files import LOG_NAME, read_log
from hf_gradacc.tracking.wandb import GradAccWandbCallback


@pytest.fixture
def wandb_dir(tmp_path, monkeypatch):
    yield from no_wandb_login(tmp_path, monkeypatch)


# --- a fresh run ---------------------------------------------------------------------------


def test_without_a_key_the_run_is_offline_and_one_line_says_how_to_sync(wandb_dir, tmp_path, capfd):
    run_to_end(tracked_trainer(tmp_path / "out"))
    printed = capfd.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if line.startswith("W&B:")]
    (line,) = lines
    (path,) = find_wandb_files(wandb_dir)
    assert line.endswith(f"to upload: wandb sync {path.parent}")
    assert "wandb:" not in printed.out + printed.err


def test_every_logged_number_reaches_wandb_under_train(wandb_dir, tmp_path):
    trainer = tracked_trainer(tmp_path / "out", eval_strategy="steps", eval_steps=2)
    run_to_end(trainer)
    run = only_run(wandb_dir)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 4
    seen = run.rows_with("train/loss")
    assert [row["train/global_step"] for row in seen] == [1, 2, 3, 4]
    for ours, theirs in zip(logged, seen, strict=True):
        for key, value in ours.items():
            if key != "step":
                assert theirs[f"train/{key}"] == pytest.approx(value, rel=1e-12), key
        for key in (
            "effective_batch_size",
            "tokens_per_update",
            "input_tokens_per_update",
            "padding_fraction",
            "micro_batches_per_update",
            "learning_rate",
            "target_tokens_seen",
            "target_tokens_per_second",
            "step_seconds",
        ):
            assert f"train/{key}" in theirs
    assert run.summary["train/loss"] == pytest.approx(logged[-1]["loss"])
    assert run.summary["train_loss"] > 0


def test_evaluations_can_be_drawn_over_target_tokens(wandb_dir, tmp_path):
    trainer = tracked_trainer(tmp_path / "out", eval_strategy="steps", eval_steps=2)
    run_to_end(trainer)
    run = only_run(wandb_dir)
    tokens_at = {
        row["step"]: row["target_tokens_seen"]
        for row in trainer.state.log_history
        if "target_tokens_seen" in row and "loss" in row
    }
    evaluated = run.rows_with("eval/loss")
    assert len(evaluated) == 2
    for row in evaluated:
        assert row["train/target_tokens_seen"] == tokens_at[row["train/global_step"]]
    assert run.metrics["train/target_tokens_seen"] == ""  # an axis, so it has none itself
    assert run.metrics["*"] == "train/global_step"


def test_config_tells_the_batch_as_requested_and_as_it_came_out(wandb_dir, tmp_path):
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    run_to_end(tracked_trainer(tmp_path / "out", effective_batch_size=None, **options))
    config = only_run(wandb_dir).config
    assert config["gradient_accumulation_steps"] == 4  # what was asked for, not an internal 1
    facts = config["hf_gradacc"]
    assert facts["batch"]["requested"]["per_device_train_batch_size"] == 3
    assert facts["batch"]["effective_batch_size"] == 12
    assert facts["batch"]["world_size"] == 1
    assert facts["batch"]["max_sequences_per_micro_batch"] == 3
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert facts["hardware"]["device"] == "cpu"
    assert facts["model"]["num_trainable_parameters"] > 0
    assert facts["updates"] == 4


def test_rows_are_previewed_with_their_targets_marked_if_that_is_wanted(
    wandb_dir, tmp_path, capsys
):
    run_to_end(tracked_trainer(tmp_path / "out", wandb_upload_text=True))
    told = "W&B: 8 rows of the training data go along as text (data/rows); wandb_upload_text"
    assert told in capsys.readouterr().out
    run = only_run(wandb_dir)
    (table,) = run.rows_with("data/rows/path")
    (path,) = find_wandb_files(wandb_dir)
    shown = json.loads((path.parent / "files" / table["data/rows/path"]).read_text())
    first = spaced_rows()[0]["input_ids"]
    prompt, answer = " ".join(map(str, first[:2])), " ".join(map(str, first[2:]))
    assert shown["data"][0] == [0, f"{prompt} ⟦{answer}⟧", len(first), len(first) - 2]
    (lengths,) = run.rows_with("data/input_tokens/values")
    assert sum(lengths["data/input_tokens/values"]) == 24


def test_unless_it_is_wanted_no_text_of_a_row_leaves_the_machine(wandb_dir, tmp_path, capsys):
    run_to_end(tracked_trainer(tmp_path / "out", max_steps=1))
    run = only_run(wandb_dir)
    assert not run.rows_with("data/rows/path")
    assert run.rows_with("data/input_tokens/values"), "lengths are no text"
    assert not list(wandb_dir.rglob("*.table.json"))
    assert "go along as text" not in capsys.readouterr().out


def test_a_preview_that_fails_costs_only_itself(wandb_dir, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("this row lies on a disk that is gone")

    monkeypatch.setattr(tracking_wandb, "preview_rows", fail)
    run_to_end(tracked_trainer(tmp_path / "out", max_steps=2, wandb_upload_text=True))
    run = only_run(wandb_dir)
    assert len(run.rows_with("train/loss")) == 2
    assert not run.rows_with("data/rows/path")


def test_the_report_is_an_artifact_on_request(wandb_dir, tmp_path):
    trainer = tracked_trainer(tmp_path / "out")
    trainer.train()
    page = attach_report(trainer)
    name = f"report-{wandb.run.id}"
    wandb.finish()
    wandb.teardown()
    assert only_run(wandb_dir).artifacts[name] == ["report.html", "report.png"]
    assert "<h3>Loss" in page.read_text("utf-8")


@pytest.mark.slow
def test_a_report_asked_for_beforehand_comes_when_training_ends(wandb_dir, tmp_path):
    trainer = tracked_trainer(tmp_path / "out", wandb_report=True, noise_scale_every=1, max_steps=6)
    run_to_end(trainer)
    run = only_run(wandb_dir)
    files = run.artifacts[f"report-{run.run_id}"]
    assert files == ["report.html", "report.png"]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "training time" in page, "the last row is in it"
    assert "not finished" not in page
    assert 'class="card verdict"' in page


def test_without_w_and_b_the_report_is_written_all_the_same(tmp_path):
    tracked_trainer(tmp_path / "out", report_to="none", wandb_report=True, max_steps=1).train()
    assert (tmp_path / "out" / "report.html").exists()


# --- resuming ------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_wandb_run(wandb_dir, tmp_path, capsys):
    saving = {"save_strategy": "steps", "save_steps": 2, "wandb_upload_text": True}
    run_to_end(tracked_trainer(tmp_path / "out", **saving))
    trainer = tracked_trainer(tmp_path / "out", **saving)
    run_to_end(trainer, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    paths = find_wandb_files(wandb_dir)
    first, second = map(read_wandb_file, paths)
    assert second.run_id == first.run_id
    assert [row["train/global_step"] for row in first.rows_with("train/loss")] == [1, 2, 3, 4]
    assert [row["train/global_step"] for row in second.rows_with("train/loss")] == [3, 4]
    assert not second.rows_with("data/rows/path"), "the preview is logged once"
    steps = [row["_step"] for row in first.history + second.history]
    assert steps == sorted(set(steps)), "or an upload would drop the rows of the second part"
    folders = f"{paths[0].parent} {paths[1].parent}"
    assert capsys.readouterr().out.rstrip().endswith(f"wandb sync {folders}")


def test_two_runs_that_have_nothing_to_do_with_each_other_have_two_ids(wandb_dir, tmp_path):
    run_to_end(tracked_trainer(tmp_path / "one", max_steps=1))
    run_to_end(tracked_trainer(tmp_path / "two", max_steps=1))
    first, second = (read_wandb_file(path) for path in find_wandb_files(wandb_dir))
    assert first.run_id != second.run_id


# --- what goes wrong -----------------------------------------------------------------------


def test_a_recovery_is_an_alert_and_a_line_of_the_file(wandb_dir, tmp_path):
    trouble = Trouble()
    trainer = tracked_trainer(tmp_path / "out", callbacks=[trouble])
    trouble.trainer = trainer
    run_to_end(trainer)
    run = only_run(wandb_dir)
    assert run.alerts[0] == {
        "title": "Out of memory",
        "text": "Update 2: out of memory; cut again at half the budget",
        "level": "WARN",
    }
    assert run.summary["events/out_of_memory"] == 2
    events = [row for row in read_log(tmp_path / "out" / LOG_NAME) if row["kind"] == "event"]
    assert [event["step"] for event in events] == [2, 3]
    assert events[0]["max_tokens"] == 512


def test_what_really_goes_wrong_in_an_update_is_an_alert(wandb_dir, tmp_path):
    """The second update runs out of memory and is cut again, the third is not finite: skipped."""
    trainer = tracked_trainer(
        tmp_path / "out", on_non_finite="skip", max_tokens_per_micro_batch=200
    )
    done = set()

    def fail(module, args, kwargs):
        rows, step = kwargs["input_ids"].shape[0], trainer.state.global_step
        if module.training and torch.is_grad_enabled() and step == 1 and rows > 3:
            done.add("memory")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def spoil(module, args, output):
        if module.training and torch.is_grad_enabled() and trainer.state.global_step == 2:
            done.add("numbers")
            output.loss = output.loss * torch.nan
        return output

    trainer.model.register_forward_pre_hook(fail, with_kwargs=True)
    trainer.model.register_forward_hook(spoil)
    run_to_end(trainer)
    assert done == {"memory", "numbers"}
    run = only_run(wandb_dir)
    assert [alert["title"] for alert in run.alerts] == ["Out of memory", "Skipped update"]
    assert run.alerts[0]["text"].startswith("Update 2: ")
    assert "not finite" in run.alerts[1]["text"]
    assert (run.summary["events/out_of_memory"], run.summary["events/skipped_update"]) == (1, 1)
    assert run.rows_with("train/loss")[-1]["train/skipped_updates"] == 1


def test_wandb_breaking_midway_costs_one_line_and_no_update(
    wandb_dir, tmp_path, monkeypatch, caplog
):
    trainer = tracked_trainer(tmp_path / "out", callbacks=[BreakWandb(monkeypatch)])
    tracking_wandb.logger.propagate = True
    with caplog.at_level("WARNING"):
        run_to_end(trainer)
    complaints = [r for r in caplog.messages if r.startswith("W&B:")]
    (line,) = complaints
    assert "CommError" in line
    assert "the server said no" in line
    assert trainer.state.global_step == 4
    rows = [row for row in read_log(tmp_path / "out" / LOG_NAME) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


class BreakWandb(TrainerCallback):
    """From update 3 on, W&B raises at every row."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def on_step_begin(self, args, state, control, **kwargs):
        def refuse(*args, **kwargs):
            raise wandb.errors.CommError("the server said no")

        if state.global_step == 2:
            self.monkeypatch.setattr(wandb, "log", refuse)


class LoseAWorker(TrainerCallback):
    """In update 2, the loader's worker dies while a row is handed to W&B."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def on_step_begin(self, args, state, control, **kwargs):
        def log(*args, **kwargs):
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(20)  # torch's handler raises from here

        if state.global_step == 1:
            self.monkeypatch.setattr(wandb, "log", log)


@pytest.mark.slow
def test_a_loader_workers_death_noticed_inside_wandb_ends_the_run(wandb_dir, tmp_path, monkeypatch):
    lose = LoseAWorker(monkeypatch)
    trainer = tracked_trainer(tmp_path / "out", callbacks=[lose], dataloader_num_workers=1)
    # torch tells of it from its handler, or from the next wait for a row if that came first.
    told = r"(?s)loader worker died at update 3: .*(killed by signal|exited unexpectedly)"
    with pytest.raises(DataError, match=told):
        trainer.train()
    callbacks = trainer.callback_handler.callbacks
    (tracker,) = (c for c in callbacks if isinstance(c, GradAccWandbCallback))
    assert not tracker.gave_up  # W&B is not to blame


# --- two ranks -----------------------------------------------------------------------------


@pytest.mark.slow
def test_of_two_ranks_only_the_first_writes_and_it_writes_what_both_did(wandb_dir, tmp_path):
    out, variables = str(tmp_path / "out"), variables_of_wandb()
    printed = "".join(run_ranks(train_with_wandb, 2, out=out, environment=variables, event="said"))
    run = only_run(wandb_dir)
    seen = run.rows_with("train/loss")
    assert [row["train/global_step"] for row in seen] == [1, 2, 3]
    assert [row["train/effective_batch_size"] for row in seen] == [6.0, 6.0, 6.0]
    assert run.config["hf_gradacc"]["batch"]["world_size"] == 2
    assert [alert["text"] for alert in run.alerts] == ["Update 4: said by rank 0"]
    rows = read_log(tmp_path / "out" / LOG_NAME)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
    assert printed.count("Plan of") == 1
    assert printed.count("W&B: recording offline") == 1


def test_installing_twice_changes_nothing(tmp_path):
    trainer = tracked_trainer(tmp_path / "out")
    install_tracking(trainer)
    before = list(trainer.callback_handler.callbacks)
    install_tracking(trainer)
    assert trainer.callback_handler.callbacks == before
    assert sum(isinstance(callback, GradAccWandbCallback) for callback in before) == 1
