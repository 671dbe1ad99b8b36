"""Logs for machines: no carriage return, a row a line, times, JSON alone, or results alone."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from support.patience import HUNG_AFTER_SECONDS

from hf_gradacc import cli
from hf_gradacc.data.progress import with_progress
from hf_gradacc.recipe.streams import opened_output
from hf_gradacc.safety.waiting import telling
from hf_gradacc.tracking.terminal import UpdateProgress

ROOT = Path(__file__).parents[2]
RECIPE = """\
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 1}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: question_answer, holdout: 4}
train: {max_steps: 3, effective_batch_size: 4, use_cpu: true, save_strategy: no, logging_steps: 1,
        eval_strategy: steps, eval_steps: 2}
wandb: {project: p}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}?", "answer": "7" * i} for i in range(1, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-gradacc", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out, printed.err

    return run_command


@pytest.mark.slow
def test_a_run_without_a_terminal_is_lines_with_a_time_each(folder):
    done = subprocess.run(
        [sys.executable, "-m", "hf_gradacc", "train", "mine.yaml", "--timestamps"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf")},
        capture_output=True,
        timeout=HUNG_AFTER_SECONDS,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert "\r" not in out + err
    assert "FutureWarning" not in out + err
    stamped = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
    assert all(stamped.match(line) for line in out.splitlines())
    rows = [line for line in out.splitlines() if " update " in line and ": loss " in line]
    assert len(rows) == 5, "three of training, each whole; two of evaluations"
    assert not re.search(r"\d+%\|", out + err), "no bar"


@pytest.mark.slow
def test_json_is_all_there_is_on_standard_output(run, folder):
    out, err = run("train", "mine.yaml", "--json", "train.report_to=none")
    rows = [json.loads(line) for line in out.splitlines()]
    written = list(
        map(json.loads, (folder / "runs/mine/gradacc_log.jsonl").read_text().splitlines())
    )
    assert rows[:-1] == written, "the rows of the run's own file"
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
    assert rows[-1]["kind"] == "result"
    assert rows[-1]["folder"] == "runs/mine"
    assert rows[-1]["metrics"]["eval_loss"] > 0
    assert "Plan of mine" in err


@pytest.mark.slow
def test_a_quiet_run_says_what_it_left_and_nothing_else(run):
    out, err = run("train", "mine.yaml", "--quiet", "train.report_to=none")
    assert [line.split(":")[0].split(" ")[0] for line in out.splitlines()] == [
        "held-out", "saved", "load",
    ]  # fmt: skip
    # tqdm was imported before the command began, and so draws the bars that it else would not.
    assert [line for line in err.splitlines() if line and "examples" not in line] == []


@pytest.mark.slow
def test_plan_and_verify_are_one_row_each(run):
    out, err = run("plan", "mine.yaml", "--json")
    plan = json.loads(out)
    assert (plan["num_sequences"], plan["num_updates"]) == (15, 3)
    assert plan["num_targets"] > 15
    assert "updates" in err
    found = json.loads(run("verify", "mine.yaml", "--json", "--rows", "4", "--no-preflight")[0])
    assert found["passed"] is True
    assert found["error"] < found["tolerance"]


def test_a_check_that_takes_long_says_what_it_does(capsys):
    with telling("adding up", after=0.02, every=0.02):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "adding up ..."
    assert lines[1].startswith("adding up ... ")
    assert len(lines) < 30
    with opened_output(quiet=True), telling("adding up", after=0.01):
        time.sleep(0.1)
    with telling("adding up", after=5):
        pass
    assert capsys.readouterr().err == ""


class Pieces(io.StringIO):
    """A stream that is not buffered: another may write between any two pieces."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return len(text)


@pytest.mark.parametrize("timestamps", [False, True], ids=["plain", "stamped"])
def test_no_line_of_progress_can_run_into_another(monkeypatch, timestamps):
    stream = Pieces()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("hf_gradacc.data.progress._FIRST_SECONDS", 0.0)
    with opened_output(timestamps=timestamps) as output:
        list(with_progress([1, 2], what="counting", total=2))
        with telling("adding up", after=0.02, every=0.02):
            time.sleep(0.2)
        output.say("the result\nin two lines")
        UpdateProgress()._write("update 1: loss 2")
    with opened_output(as_json=True) as output:
        output.row({"kind": "result"})
    assert len(stream.pieces) > 5
    assert [piece for piece in stream.pieces if not piece.endswith("\n")] == []
    assert {"counting", "adding up", "update 1"} <= {
        piece[20 * timestamps :].partition(":")[0].partition(" ...")[0] for piece in stream.pieces
    }


def test_each_line_has_the_time_at_which_it_was_begun(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with opened_output(timestamps=True) as output:
        print("one", end=" ")
        print("line\nanother")
        output.say("the result")
    print("as before")
    lines = stream.getvalue().splitlines()
    assert [line[20:] for line in lines[:3]] == ["one line", "another", "the result"]
    assert lines[3] == "as before"


def test_what_will_change_in_other_peoples_code_is_not_told_on_a_command(recwarn):
    with opened_output():
        warnings.warn("soon", FutureWarning, stacklevel=1)
    assert not recwarn.list
