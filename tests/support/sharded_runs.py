"""Runs whose weights are split between ranks, by FSDP2 or ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hf_gradacc.errors import GradAccError
from hf_gradacc.tracking.run_files import LOG_NAME, RUN_NAME, read_log

from .rank_jobs import FSDP2, allow_sharding_on_cpu, whole
from .resume_jobs import train_and_report
from .tiny import make_trainer, ragged_rows
from .zero_jobs import config_of, set_up


def tell_runs_apart(out: str, *, engine: str) -> dict[str, Any]:
    """Train a run, begin another in its folder, and go on from what is there in three ways."""
    if engine == "fsdp2":
        allow_sharding_on_cpu()
    else:
        set_up()

    def train(**changes: Any) -> None:
        options: dict[str, Any] = {"num_train_epochs": 1, "logging_steps": 1}
        if engine == "fsdp2":
            options |= _fsdp2("SHARDED_STATE_DICT")
        else:  # which steps in float32, and keeps what it is given
            options |= {"dtype": torch.float32, "deepspeed": config_of(3)}
        train_and_report(out, **options | changes)

    train()
    runs = [_run_id(out)]
    train(stop=3, save_strategy="no")
    runs.append(_run_id(out))
    train(resume="auto")
    report: dict[str, Any] = {"runs": [*runs, _run_id(out)]}
    report["steps_of_auto"] = [row["step"] for row in _rows(out)]
    try:
        train(resume=True, optim="adafactor")
    except GradAccError as error:
        report["other optimizer"] = str(error)
    train(resume=True, learning_rate=0.02, num_train_epochs=2)
    report["rates"] = [row["learning_rate"] for row in _rows(out)]
    return report


def save_at_the_end(out: str, *, kind: str) -> dict[str, torch.Tensor]:
    """Train under FSDP2, save the model, and give the weights it has."""
    allow_sharding_on_cpu()
    trainer = make_trainer(out, ragged_rows(4), effective_batch_size=4, **_fsdp2(kind))
    trainer.train()
    weights = {n: whole(p.detach()).clone() for n, p in trainer.model.named_parameters()}
    trainer.save_model(out)
    return weights


def _fsdp2(kind: str) -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": {**FSDP2["fsdp_config"], "state_dict_type": kind}}


def _run_id(out: str) -> str:
    return str(json.loads(Path(out, RUN_NAME).read_text())["run"]["id"])


def _rows(out: str) -> list[dict[str, Any]]:
    return [row for row in read_log(Path(out, LOG_NAME)) if row["kind"] == "train"]
