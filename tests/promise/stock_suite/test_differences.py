"""The table of differences is whole, in code and documentation, and no longer than agreed."""

import ast
from pathlib import Path

import pytest
from support.line import fit_line
from support.stock_differences import DIFFERENCES

from hf_gradacc import GradAccTrainer

HERE = Path(__file__).parent
NOTE = HERE.parents[2] / "docs" / "design-notes" / "2026-11-29-the-stock-suite.md"


def claims():
    """The tests that run against both classes."""
    for file in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            if is_test and "kind" in [argument.arg for argument in node.args.args]:
                yield node.name


def test_every_difference_is_a_claim_and_stands_in_the_note():
    found = list(claims())
    assert len(found) == len(set(found))
    assert set(DIFFERENCES) <= set(found)
    note = NOTE.read_text()
    assert [name for name in DIFFERENCES if f"`{name}`" not in note] == []
    assert f"{len(found)} claims" in note


def test_the_table_is_no_longer_than_agreed():
    assert len(DIFFERENCES) == 9
    assert len(set(DIFFERENCES.values())) == 6


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_the_callbacks_of_ours_are_these(tmp_path, disable_tqdm):
    trainer = fit_line(GradAccTrainer, tmp_path, disable_tqdm=disable_tqdm)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    printer = "RowPrinter" if disable_tqdm else "UpdateProgress"
    ours = ["Ledger", "ShowPlan", "ShowSummary", "StopSignals", "TokenBudget", "TrackingCallback"]
    assert sorted(names) == sorted(["DefaultFlowCallback", printer, *ours])


def test_the_files_of_ours_are_these(tmp_path):
    fit_line(GradAccTrainer, tmp_path, max_steps=1).train()
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {name for name in names if "gradacc" in name} == {
        "gradacc_log.jsonl",
        "gradacc_run.json",
        "checkpoint-1/gradacc_manifest.json",
    }
