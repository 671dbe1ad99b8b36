"""How long a run takes: told from updates that were timed, now or in an earlier run."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_gradacc import GradAccArguments
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.plan.measure import (
    Measurement,
    describe_time,
    expected_seconds,
    measure_updates,
    read_earlier_run,
)
from hf_gradacc.recipe.plan.screen import show_plan
from hf_gradacc.recipe.plan.updates import plan_recipe
from hf_gradacc.recipe.run import build_trainer

RECIPE = """\
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 1}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: question_answer}
train: {max_steps: 40, effective_batch_size: 2, use_cpu: true, disable_tqdm: true, optim: muon,
        report_to: wandb, save_steps: 1, save_strategy: steps}
output: {dir: OUT}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("OUT", str(tmp_path / "out")))
    return load_recipe(tmp_path / "mine.yaml")


def plan(**options: Any) -> Any:
    rows = [{"input_ids": [n + 1] * 10, "labels": [1] * 10} for n in range(8)]
    settings = {"use_cpu": True, "report_to": "none", "max_steps": 100, "effective_batch_size": 4}
    arguments = GradAccArguments("out", **settings)
    return plan_recipe(rows, arguments=arguments, task="causal_lm", **options)


def write_run(folder: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    folder.mkdir()
    log = "".join(json.dumps({"kind": "train", **row}) + "\n" for row in rows)
    (folder / "gradacc_log.jsonl").write_text(log)
    settings = {
        "model": {"num_parameters": 1000},
        "batch": {"world_size": 2},
        "hardware": {"device": "cuda:0", "device_name": "H200"},
    }
    (folder / "gradacc_run.json").write_text(json.dumps(settings | facts))


def row(step: int, seconds: float, tokens: float = 100.0) -> dict[str, Any]:
    return {"step": step, "step_seconds": seconds, "input_tokens_per_update": tokens}


def test_time_and_cost_follow_from_tokens_and_seconds():
    """100 updates of 40 tokens at half a second each: 2,000 s; 60 of them are left."""
    measured = Measurement(0.5, "there", updates_done=40)
    assert expected_seconds(measured, plan()) == 2000
    told = dict(describe_time(measured, plan(), price_per_hour=9))
    assert told == {
        "an update": "20 s",
        "tokens/s": "2; 1.8 targets/s",
        "the run": "33 min 20 s, 5.00 at 9 an hour, without evaluations and saves",
        "left": "20 min 0 s, 3.00 at 9 an hour for 60 updates, with --resume",
    }


def test_ranks_share_what_one_process_measured():
    measured = Measurement(0.5, "there")
    assert expected_seconds(measured, plan(world_size=2)) == 1000
    assert dict(describe_time(measured, plan(world_size=2)))["an update"].endswith(
        "10 s, if 2 ranks share it evenly"
    )


def test_an_earlier_run_is_read_without_its_first_row_and_rows_weigh_by_their_updates(tmp_path):
    write_run(tmp_path / "run", [row(1, 60.0), row(11, 1.0), row(31, 2.0, tokens=200.0)])
    found = read_earlier_run(tmp_path / "run", num_parameters=1000, world_size=2)
    assert found.seconds_per_token == (10 * 1 + 20 * 2) / (10 * 100 + 20 * 200)
    assert found.source == f"30 updates of the run in {tmp_path / 'run'}, 2 × H200"
    assert (found.updates_done, found.world_size) == (31, 2)


def test_time_goes_by_the_tokens_that_are_computed_and_not_by_those_that_rows_share(tmp_path):
    """A run that shared three quarters says what rows take that share nothing, and the reverse."""
    apart = plan()
    rows = [{"input_ids": [n % 2] * 90 + [2 + n] * 10, "labels": [1] * 100} for n in range(8)]
    options = {"use_cpu": True, "report_to": "none", "max_steps": 100, "effective_batch_size": 8}
    alike = plan_recipe(rows, arguments=GradAccArguments("out", **options), task="causal_lm")
    assert alike.chosen.computed_per_update == 2 * 90 + 8 * 10
    shared = row(2, 1.0, 800.0) | {"computed_tokens_per_update": 200.0, "shared_fraction": 0.75}
    write_run(tmp_path / "shared", [row(1, 9.0), shared])
    plain = row(2, 1.0, 150.0) | {"computed_tokens_per_update": 200.0, "padding_fraction": 0.25}
    write_run(tmp_path / "plain", [row(1, 9.0), plain])
    old = row(2, 1.0, 150.0) | {"padding_fraction": 0.25}
    write_run(tmp_path / "old", [row(1, 9.0), old])
    for name, of_alike in (("shared", 260), ("plain", 800), ("old", 800)):
        found = read_earlier_run(tmp_path / name, num_parameters=1000, world_size=2)
        one_rank = dataclasses.replace(found, world_size=1)
        assert expected_seconds(one_rank, apart, num_updates=1) == pytest.approx(40 / 200)
        assert expected_seconds(one_rank, alike, num_updates=1) == pytest.approx(of_alike / 200)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([row(1, 1.0), row(2, 1.0)], {"num_parameters": 2000}),
        ([row(1, 1.0), row(2, 1.0)], {"world_size": 1}),
        ([row(1, 1.0)], {}),
        ([], {}),
    ],
    ids=["another model", "other ranks", "one row", "no row"],
)
def test_a_run_that_says_nothing_is_left_out(tmp_path, rows, wanted):
    write_run(tmp_path / "run", rows)
    asked = {"num_parameters": 1000, "world_size": 2} | wanted
    assert read_earlier_run(tmp_path / "run", **asked) is None
    assert read_earlier_run(tmp_path / "nowhere", **asked) is None


def test_measuring_trains_the_recipe_and_leaves_nothing_behind(recipe, tmp_path, capsys):
    """With its optimizer and rows; without its saving, evaluating and reporting."""
    screen = io.StringIO()
    show_plan(recipe, measures=True, price_per_hour=36, console=Console(file=screen, width=110))
    text = screen.getvalue()
    assert "Time (2 updates on cpu, random weights)" in text
    assert " at 36 an hour, without evaluations and saves" in text
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_a_price_without_a_measurement_is_answered(recipe):
    screen = io.StringIO()
    show_plan(recipe, price_per_hour=36, console=Console(file=screen, width=110))
    assert "Time and cost are not known: add --measure." in screen.getvalue()


def test_a_log_row_tells_the_hours_that_are_left(recipe, tmp_path):
    recipe.data.holdout = 2
    options = {"report_to": "none", "max_steps": 4, "save_strategy": "no", "logging_steps": 1}
    trainer, data = build_trainer(recipe, **options)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "step_seconds" in row]
    for step, logged in enumerate(rows, start=1):
        assert logged["hours_left"] == (4 - step) * logged["step_seconds"] / 3600
    measured = measure_updates(recipe, data, tokenizer=trainer.processing_class, num_updates=1)
    assert measured.seconds_per_token > 0
