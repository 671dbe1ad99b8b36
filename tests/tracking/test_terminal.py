"""What a run says on the terminal."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from support.patience import HUNG_AFTER_SECONDS
from support.tiny import log_rows, make_trainer, ragged_rows
from support.tracked import tracked_trainer

from hf_gradacc.tracking import progress
from hf_gradacc.tracking.report.data import load_runs

TESTS = Path(__file__).parents[1]
IN_A_TERMINAL = """
import sys
sys.path[:0] = sys.argv[2:]
from support.tracked import Trouble, tracked_trainer
options = dict(report_to="none", disable_tqdm=False, save_strategy="steps", save_steps=2)
trouble = Trouble()
trouble.trainer = tracked_trainer(sys.argv[1], callbacks=[trouble], **options)
trouble.trainer.train()
resumed = tracked_trainer(sys.argv[1], **options)
resumed.train(resume_from_checkpoint=sys.argv[1] + "/checkpoint-2")
"""


def run_in_a_terminal(code, *arguments, columns=80):
    """Give what a program writes to a terminal of so many columns, both its streams as one."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-c", code, *map(str, arguments), str(TESTS), str(TESTS.parent)]
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that nobody holds the other end any more
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.wait(HUNG_AFTER_SECONDS) == 0, seen.decode()
    return seen.decode().replace("\r\n", "\n")


def test_the_terminal_tells_the_plan_and_what_to_do_next(tmp_path, capsys):
    options = {"report_to": "none", "save_strategy": "steps", "save_steps": 4}
    tracked_trainer(tmp_path / "out", max_tokens_per_micro_batch=64, **options).train()
    lines = capsys.readouterr().out.splitlines()
    plan = lines[lines.index("Plan of out") :]
    told = {line[:15].strip(): line[15:].strip() for line in plan[1:9]}
    assert told["model"].startswith("LlamaForCausalLM, 4,656 parameters, all trained")
    assert told["data"] == "24 rows"
    assert told["update"] == "6 sequences"
    assert told["micro-batch"] == "at most 64 tokens with padding"
    assert told["training"].startswith("4 updates")
    summary = next(line for line in lines if line.startswith("Trained 4 updates"))
    assert "target tokens seen; loss" in summary
    assert any(line.endswith(str(tmp_path / "out" / "checkpoint-4")) for line in lines)
    assert any(line.endswith(f"hf-gradacc report {tmp_path / 'out'}") for line in lines)


ALIKE = [
    {
        "input_ids": [*range(4, 24), *row["input_ids"]],
        "attention_mask": [1] * 20 + row["attention_mask"],
        "labels": [-100] * 20 + row["labels"],
    }
    for row in ragged_rows(24)
]


def test_a_run_that_measures_noise_in_each_update_is_not_said_to_share(tmp_path, capsys):
    told = []
    for every in (1, 2):
        options = {"effective_batch_size": 8, "max_steps": 2, "noise_scale_every": every}
        trainer = make_trainer(tmp_path / str(every), ALIKE, **options)
        trainer.train()
        assert trainer.update_collator.shares_prefixes
        told.append("common prefixes" in capsys.readouterr().out)
    assert told == [False, True]


def test_the_terminal_tells_that_prefixes_are_shared_and_how_much(tmp_path, capsys):
    options = {"effective_batch_size": 8, "max_tokens_per_micro_batch": 128}
    trainer = make_trainer(tmp_path / "out", ALIKE, **options)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    told = next(line for line in lines if line.strip().startswith("micro-batch"))
    assert told.endswith("at most 128 tokens with padding, common prefixes computed once")
    logged = [row["shared_fraction"] for row in log_rows(trainer)]
    assert min(logged) > 0.3
    summary = next(line for line in lines if line.startswith("Trained 3 updates"))
    assert f", {sum(logged) / len(logged):.1%} of input tokens shared; loss" in summary
    (run,) = load_runs([tmp_path / "out"])
    shared = f"{sum(logged) / 3:.1%}"
    assert ("shared prefixes", shared, "of input tokens, not computed") in run.tiles()


@pytest.mark.parametrize("logging_steps", [1, 3, 500])
def test_the_last_line_counts_all_updates_whatever_was_logged(tmp_path, capsys, logging_steps):
    trainer = tracked_trainer(tmp_path, report_to="none", logging_steps=logging_steps)
    trainer.train()
    seen = sum(label != -100 for row in trainer.train_dataset for label in row["labels"][1:])
    last = rf"Trained 4 updates in \d+ [^,]+, {seen} target tokens seen"
    assert re.search(last, capsys.readouterr().out)
    if logging_steps == 500:
        return  # a report needs a training row
    (run,) = load_runs([tmp_path])
    assert ("targets seen", str(seen), "4 updates") in run.tiles()


def test_a_quiet_log_level_silences_plan_and_summary(tmp_path, capsys):
    tracked_trainer(tmp_path / "out", report_to="none", log_level="error", max_steps=1).train()
    printed = capsys.readouterr().out
    assert "Plan of" not in printed
    assert "Trained" not in printed


def test_rows_are_such_that_a_person_can_read_them(tmp_path, capsys):
    options = {"max_steps": 2, "disable_tqdm": False, "eval_strategy": "steps", "eval_steps": 2}
    tracked_trainer(tmp_path / "out", report_to="none", **options).train()
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if "loss" in line]
    number = r"[\d.]+"
    assert "\r" not in printed.err, "no bar where it would stay"
    assert re.search(rf"update 1: loss {number} \| \d+ target tokens, 6 sequences, ", rows[0])
    assert re.search(rf"held out after update 2: loss {number}, perplexity {number}$", rows[2])
    assert rows[3].startswith("Trained 2 updates")
    assert "{'" not in printed.out, "no dictionary"


@pytest.mark.slow
def test_on_a_terminal_the_plan_stands_before_the_bar_and_no_word_is_broken(tmp_path):
    """A real pseudo-terminal of 80 columns: what a bar leaves on the line shows, and what wraps."""
    screen = run_in_a_terminal(IN_A_TERMINAL, tmp_path / "out")
    first, second = screen.split("Plan of out\n")[1:]
    assert "%|" not in screen.split("Plan of out\n")[0], "the bar begins after the plan"
    for part in (first, second):
        plan = part.split("%|")[0].rsplit("\r", 1)[0]
        assert re.search(r"\n  training +\d updates \(1 epoch at most\)", plan)
    lines = re.split(r"[\r\n]|\x1b\[A", screen)
    # A path is not ours to break, nor what DeepSpeed says as it is imported.
    own = [x for x in lines if str(tmp_path) not in x and "real_accelerator" not in x]
    assert max(map(len, own)) <= 80
    folded = r"^update 4: loss [\d.]+ \| [^\n]*\n  [^\n]* tokens/s$"
    assert re.search(folded, first.replace("\r", "\n"), re.M), "the rest of a row is set in"
    assert re.search(r"^  out of memory +2 times; see the report$", first, re.M)
    assert "2/4" in second.split("update 3:")[0], "a resumed bar begins where the run goes on"
    assert "0/4" not in second
    assert re.search(r"loss [\d.]+, [\d,.]+k? tokens/s", first), "in the bar itself"
    assert re.search(r" update/s|\ds/ update", first), "on a busy machine its inverse"


def test_a_file_gets_each_row_in_one_line(tmp_path, capsys):
    tracked_trainer(tmp_path / "out", report_to="none", disable_tqdm=False, max_steps=1).train()
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("update 1:"))
    assert len(row) > 80
    assert row.endswith("tokens/s")


def test_without_a_terminal_progress_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    options = {"max_steps": 2, "disable_tqdm": False, "eval_strategy": "steps", "eval_steps": 2}
    tracked_trainer(tmp_path / "out", report_to="none", **options).train()
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert any(line.startswith("at update 1 of 2 (50%) after ") for line in lines)
    assert any(line.startswith("evaluating: batch 1 of 1") for line in lines)
