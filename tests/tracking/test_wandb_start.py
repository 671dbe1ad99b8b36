"""Whether W&B runs online, offline or not at all: decided without a question."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
from support.tracked import no_wandb_login, run_to_end, tracked_trainer
from support.wandb_reader import find_wandb_files, read_wandb_file

from hf_gradacc.tracking.run_files import LOG_NAME
from hf_gradacc.tracking.wandb_start import ensure_wandb_mode, has_wandb_credentials


@pytest.fixture
def wandb_dir(tmp_path, monkeypatch):
    yield from no_wandb_login(tmp_path, monkeypatch)


def test_a_server_that_cannot_be_reached_makes_the_run_offline(
    wandb_dir, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    trainer = tracked_trainer(tmp_path / "out", max_steps=1)
    run_to_end(trainer)
    assert trainer.state.global_step == 1
    assert "recording offline, since it could not be reached" in capfd.readouterr().out
    path = next(path for path in find_wandb_files(wandb_dir) if "offline-run" in str(path))
    assert len(read_wandb_file(path).rows_with("train/loss")) == 1


def test_credentials_are_found_where_wandb_finds_them(wandb_dir, monkeypatch):
    settings = wandb.setup().settings
    assert not has_wandb_credentials(settings)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert has_wandb_credentials(settings)
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = Path(wandb_dir.parent / "netrc")
    netrc.write_text("machine api.wandb.ai login user password " + "b" * 40 + "\n")
    netrc.chmod(0o600)
    assert has_wandb_credentials(settings)


def test_a_mode_the_user_set_is_left_alone(wandb_dir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert ensure_wandb_mode() == "disabled"


def test_a_run_that_does_not_report_to_wandb_never_touches_it(wandb_dir, tmp_path):
    trainer = tracked_trainer(tmp_path / "out", report_to="none", max_steps=1)
    trainer.train()
    assert ensure_wandb_mode(trainer.args) is None
    assert find_wandb_files(wandb_dir) == []
    assert (tmp_path / "out" / LOG_NAME).exists()
