"""What a run says on the terminal."""

from __future__ import annotations

import re

from support.tracked import make_trainer


def test_the_terminal_tells_the_plan_and_what_to_do_next(tmp_path, capsys):
    options = {"report_to": "none", "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path / "out", max_tokens_per_micro_batch=64, **options).train()
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


def test_a_quiet_log_level_silences_plan_and_summary(tmp_path, capsys):
    make_trainer(tmp_path / "out", report_to="none", log_level="error", max_steps=1).train()
    printed = capsys.readouterr().out
    assert "Plan of" not in printed
    assert "Trained" not in printed


def test_the_progress_bar_writes_rows_a_person_can_read(tmp_path, capsys):
    options = {"max_steps": 2, "disable_tqdm": False, "eval_strategy": "steps", "eval_steps": 2}
    make_trainer(tmp_path / "out", report_to="none", **options).train()
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if "loss" in line]
    number = r"[\d.]+"
    assert re.search(rf"update 1: loss {number} \| \d+ target tokens, 6 sequences, ", rows[0])
    assert re.search(rf"held out after update 2: loss {number}, perplexity {number}$", rows[2])
    assert rows[3].startswith("Trained 2 updates")
    assert "{'" not in printed.out, "no dictionary"
    assert re.search(rf"loss {number}, [\d,.]+k? tokens/s", printed.err), "in the bar itself"
