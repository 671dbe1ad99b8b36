"""Files of ours that are damaged never keep a run from starting, or a report from being made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.resume_jobs import train_and_report
from support.tracked import tracked_trainer

from hf_gradacc.recipe.folder import claim_folder, clear_folder
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.tracking.parity_file import PARITY_NAME, read_parity
from hf_gradacc.tracking.report import build_report
from hf_gradacc.tracking.run_files import LOG_NAME, RUN_NAME, RunFile, read_log, read_run
from hf_gradacc.updates.remembered_budgets import budget_file, load_budget, store_budget

DAMAGE = {
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "not UTF-8": '{"step": 1, "name": "Zürich"}\n'.encode("latin-1") * 2,
    "cut off": b'{"run": {"id": "a", "lin',
    "another shape": b"[1, 2]\n[3]\n",
}
SHORT: dict[str, Any] = {"num_train_epochs": 1, "logging_steps": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_and_report(str(folder), stop=4, **SHORT)
    return folder


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_run_goes_on_and_a_report_is_made(tmp_path, run, damage):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in (LOG_NAME, RUN_NAME, PARITY_NAME, "gradacc_files.json"):
        (folder / name).write_bytes(damage)
    settings, rows = read_run(folder)
    assert settings == {}
    assert {row["step"] for row in rows} >= {1, 2, 3, 4}, "from the newest checkpoint's state"
    build_report([folder], html=tmp_path / "page.html")
    assert read_parity(folder) is None
    recipe = {"model": {"name": "x"}, "data": {"train": "x"}, "output": {"dir": str(folder)}}
    claim_folder(Recipe.model_validate(recipe), resume=True)
    assert train_and_report(str(folder), resume="auto", **SHORT)["step"] == 6
    steps = [row["step"] for row in read_log(folder / LOG_NAME) if row["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    clear_folder(folder)
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_remembered_budgets_that_are_damaged_are_left_out(tmp_path, monkeypatch, damage):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    budget_file().parent.mkdir()
    budget_file().write_bytes(damage)
    assert load_budget("a setting") is None
    store_budget("a setting", 512)
    assert load_budget("a setting") == 512


def test_rows_that_a_power_cut_took_come_back_from_the_checkpoint(tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    lines = (folder / LOG_NAME).read_bytes().splitlines(keepends=True)
    (folder / LOG_NAME).write_bytes(b"".join(lines[:1]))
    rows = RunFile(folder)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    rows.start(step=4, history=state["log_history"])
    assert [row["step"] for row in read_log(folder / LOG_NAME)] == [1, 2, 3, 4]


def test_rows_are_flushed_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    order: list[str] = []
    flush = RunFile.flush
    monkeypatch.setattr(RunFile, "flush", lambda self: (order.append("rows"), flush(self))[1])
    import hf_gradacc.trainer.checkpoints.saving as saving

    publish = saving.publish
    monkeypatch.setattr(
        saving, "publish", lambda *args: (order.append("checkpoint"), publish(*args))[1]
    )
    tracked_trainer(tmp_path, save_strategy="steps", save_steps=2, report_to="none").train()
    assert order[:4] == ["rows", "checkpoint", "rows", "checkpoint"]
