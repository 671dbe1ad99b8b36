"""A small real run to track, and a machine on which nobody has logged in to W&B."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
import wandb
from support.tiny import make_trainer, spaced_rows, tiny_llama
from support.wandb_reader import WandbRun, find_wandb_files, read_wandb_file
from transformers import Trainer, TrainerCallback
from wandb.sdk.lib.module import unset_globals

from hf_gradacc.tracking import wandb_start as tracking_wandb_start
from hf_gradacc.tracking.install import record_event

WANDB_VARIABLES = ("MODE", "API_KEY", "IDENTITY_TOKEN_FILE", "RUN_ID", "RESUME", "PROJECT")


def end_wandb_run() -> None:
    """End a run that a test left open, even one that W&B's own end fails for, and forget the
    settings: both would be the next test's.
    """
    if wandb.run is not None:
        with contextlib.suppress(Exception):
            wandb.finish()
        unset_globals()
    wandb.teardown()


def no_wandb_login(tmp_path, monkeypatch):
    """Give the directory of W&B on a machine where nobody has logged in; body of a fixture."""
    for name in WANDB_VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    folder = tmp_path / "tracked"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setattr(tracking_wandb_start, "_DECIDED", set())
    wandb.teardown()
    yield folder
    end_wandb_run()


def tracked_trainer(out, **options):
    """Make a trainer of four updates in float32 that W&B is told about."""
    sizes = {"vocab_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    defaults = {"report_to": "wandb", "max_steps": 4, "effective_batch_size": 6}
    return make_trainer(
        out,
        spaced_rows(),
        model=tiny_llama(dtype=torch.float32, num_key_value_heads=2, **sizes),
        eval_dataset=spaced_rows(6),
        **defaults | options,
    )


class Trouble(TrainerCallback):
    """Reports two recoveries inside update 2 and 3."""

    trainer: Trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in (1, 2):
            text = "out of memory; cut again at half the budget"
            record_event(self.trainer, "out_of_memory", text=text, max_tokens=512)


def run_to_end(trainer, **kwargs) -> None:
    trainer.train(**kwargs)
    if wandb.run is not None:
        wandb.finish()
        wandb.teardown()  # as at the end of a process; only then is all of the file on disk


def variables_of_wandb() -> dict[str, str]:
    """What `no_wandb_login` has set, for a process that does not inherit it."""
    return {name: os.environ[name] for name in ("HOME", "NETRC", "WANDB_DIR")}


def only_run(folder: Path) -> WandbRun:
    (path,) = find_wandb_files(folder)
    return read_wandb_file(path)
