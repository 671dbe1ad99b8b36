"""W&B goes away in the middle of an online run: training does not wait, and nothing is lost."""

from __future__ import annotations

import time

import pytest
import wandb
from support.patience import crowding
from support.tracked import no_wandb_login, tracked_trainer
from support.wandb_reader import find_wandb_files, read_wandb_file
from support.wandb_server import WandbServer
from transformers import TrainerCallback

from hf_gradacc.tracking.run_files import LOG_NAME, read_log


@pytest.fixture
def wandb_dir(tmp_path, monkeypatch):
    yield from no_wandb_login(tmp_path, monkeypatch)


@pytest.fixture
def server(wandb_dir, monkeypatch):
    server = WandbServer()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")  # ours is 60, and this test does not wait
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield server
    if server.trouble != "refuse":
        server.close()


class GoBad(TrainerCallback):
    def __init__(self, server, trouble):
        self.server, self.trouble, self.began = server, trouble, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.server.go_bad(self.trouble)
            self.began = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.monotonic() - self.began


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["hang", "error", "refuse"])
def test_a_server_that_goes_bad_midway_neither_stops_nor_slows_training(
    server, wandb_dir, tmp_path, monkeypatch, capsys, trouble
):
    monkeypatch.setattr("hf_gradacc.tracking.wandb_start.CONNECT_TIMEOUT_SECONDS", 1.0)
    going_bad = GoBad(server, trouble)
    trainer = tracked_trainer(tmp_path / "out", callbacks=[going_bad], max_steps=20)
    trainer.train()
    assert trainer.state.global_step == 20
    assert wandb.run.settings.mode == "online"
    # Fifteen updates of milliseconds, and one look at the server.
    assert going_bad.seconds < 10 * crowding()
    (path,) = find_wandb_files(wandb_dir)
    printed = capsys.readouterr().out
    assert "the server does not answer" in printed
    assert printed.rstrip().endswith(f"wandb sync {path.parent}")
    wandb.finish()
    wandb.teardown()
    sent = [row["train/global_step"] for row in read_wandb_file(path).rows_with("train/loss")]
    assert sent == list(range(1, 21))
    rows = [row for row in read_log(tmp_path / "out" / LOG_NAME) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 21))


@pytest.mark.slow
def test_a_server_that_stays_gets_every_row_and_nothing_is_said(server, tmp_path, capsys):
    trainer = tracked_trainer(tmp_path / "out", max_steps=6)
    trainer.train()
    wandb.finish()
    assert "wandb sync" not in capsys.readouterr().out
    sent = [row["train/global_step"] for row in server.rows if "train/loss" in row]
    assert sent == list(range(1, 7))
