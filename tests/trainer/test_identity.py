"""Which run a folder is of: what a resume takes, what a rotation deletes, who may write."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.resume_jobs import train_and_report
from support.tiny import make_trainer, ragged_rows

from hf_gradacc.errors import ConfigError
from hf_gradacc.safety.checkpoints import list_checkpoints, run_of
from hf_gradacc.safety.run_lock import LOCK_NAME, hold_folder
from hf_gradacc.tracking.run_files import LOG_NAME, RUN_NAME, read_log

SHORT: dict[str, Any] = {"num_train_epochs": 1, "logging_steps": 1}


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def run_id(folder: Path) -> str:
    return str(json.loads((folder / RUN_NAME).read_text())["run"]["id"])


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    """The checkpoints of a finished run, and a new one in its folder that saved nothing yet."""
    train_and_report(str(tmp_path), **SHORT)
    old = run_id(tmp_path)
    train_and_report(str(tmp_path), stop=3, save_strategy="no", **SHORT)
    assert run_id(tmp_path) != old
    assert {run_of(path) for path in list_checkpoints(tmp_path)} == {old}
    return tmp_path


def test_auto_takes_checkpoints_of_its_own_run_only(two_runs):
    result = train_and_report(str(two_runs), resume="auto", **SHORT)
    rows = read_log(two_runs / LOG_NAME)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert result["collated"] > 6, "all six updates were trained, not none"
    assert {row["run"] for row in rows} == {run_id(two_runs)}


def test_true_takes_the_newest_in_the_folder_as_stock_does_and(two_runs):
    longer = SHORT | {"num_train_epochs": 2}
    assert train_and_report(str(two_runs), resume=True, **longer)["step"] == 12
    assert run_id(two_runs) == run_of(two_runs / "checkpoint-6")
    assert json.loads((two_runs / RUN_NAME).read_text())["resumed_at"] == [6]


def test_a_rotation_leaves_checkpoints_of_another_run_alone(two_runs):
    (two_runs / "checkpoint-6").rename(two_runs / "checkpoint-60")
    train_and_report(str(two_runs), save_total_limit=1, save_steps=5, **SHORT)
    assert names(two_runs) == ["checkpoint-60", "checkpoint-6", "checkpoint-4", "checkpoint-2"]


def test_a_run_that_went_back_does_not_go_on_from_what_it_left(tmp_path):
    train_and_report(str(tmp_path), **SHORT)
    back = str(tmp_path / "checkpoint-2")
    train_and_report(str(tmp_path), resume=back, stop=3, save_strategy="no", **SHORT)
    result = train_and_report(str(tmp_path), resume="auto", **SHORT | {"num_train_epochs": 2})
    assert result["step"] == 12
    resumed = json.loads((tmp_path / RUN_NAME).read_text())["resumed_at"]
    assert resumed[-1] == 2, "and not 6"


# ---- the lock ----------------------------------------------------------------------------------


HOLD = """
import sys, time
from hf_gradacc.safety.run_lock import hold_folder
with hold_folder(sys.argv[1]) as holder:
    print(repr(holder), flush=True)
    time.sleep(600)
"""


def test_a_second_process_stops_with_one_line_until_the_first_is_gone(tmp_path):
    path = os.pathsep.join(sys.path)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline().strip() == "None"
        with pytest.raises(ConfigError, match=f"(?s)process {first.pid} on .*another output_dir"):
            train_and_report(str(tmp_path), **SHORT)
        assert not names(tmp_path)
        alone = train_and_report(str(tmp_path), save_strategy="no", **SHORT)
        assert alone["step"] == 6, "it saves nothing, so nothing can be lost"
        assert not (tmp_path / RUN_NAME).exists()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
    assert (tmp_path / LOCK_NAME).exists()
    assert train_and_report(str(tmp_path), **SHORT)["step"] == 6
    assert not (tmp_path / LOCK_NAME).exists()


def _nap(started: Any) -> None:
    import time

    started.set()
    time.sleep(600)


def test_children_do_not_inherit_the_lock(tmp_path):
    """Loader workers may outlive a killed run by seconds; a restart must not wait for them."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    child = context.Process(target=_nap, args=(started,))
    with hold_folder(tmp_path) as holder:
        assert holder is None
        child.start()
        started.wait()
    try:
        probe = HOLD.replace("time.sleep(600)", "pass")
        command = [sys.executable, "-c", probe, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert told.stdout.strip() == "None"
    finally:
        child.kill()
        child.join()


def test_a_run_within_a_run_of_the_same_process_goes_on(tmp_path):
    with hold_folder(tmp_path) as outer, hold_folder(tmp_path) as inner:
        assert (outer, inner) == (None, None)
        assert make_trainer(tmp_path, ragged_rows(4)).train().global_step == 1
    assert not (tmp_path / LOCK_NAME).exists()
