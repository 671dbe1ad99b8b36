"""The result of the parity check goes with the run: its file, W&B, the terminal, the report."""

from __future__ import annotations

import json

import pytest
from support.tiny import pad, spaced_rows
from support.tracked import no_wandb_login, only_run, run_to_end, tracked_trainer

from hf_gradacc.tracking.parity_file import PARITY_NAME, describe_parity, read_parity, record_parity
from hf_gradacc.tracking.report import build_report
from hf_gradacc.tracking.run_files import read_run
from hf_gradacc.verify.parity import verify_parity
from hf_gradacc.verify.result import ParityReport


@pytest.fixture
def wandb_dir(tmp_path, monkeypatch):
    yield from no_wandb_login(tmp_path, monkeypatch)


def test_a_check_before_training_is_filed_with_the_run(wandb_dir, tmp_path, capsys):
    trainer = tracked_trainer(tmp_path / "out", max_steps=1)
    found = verify_parity(
        trainer.model, spaced_rows(6), data_collator=pad, compare_with_stock=False
    )
    record_parity(found, output_dir=tmp_path / "out", model=trainer.model)
    run_to_end(trainer)
    settings, _ = read_run(tmp_path / "out")
    for parity in (settings["parity"], only_run(wandb_dir).config["hf_gradacc"]["parity"]):
        assert parity["passed"] is True
        assert parity["error"] == found.error < 1e-4
        assert parity["date"].endswith("UTC")
        assert parity["matches_run"] is True
    assert "parity check" in capsys.readouterr().out
    build_report([tmp_path / "out"], html=tmp_path / "page.html")
    assert f"whole batch passed on {settings['parity']['date']}, relative error" in (
        tmp_path / "page.html"
    ).read_text("utf-8")


def test_a_run_that_was_not_checked_claims_nothing(tmp_path):
    trainer = tracked_trainer(tmp_path / "out", report_to="none", max_steps=1)
    record_parity(ParityReport(()), output_dir=tmp_path / "out", model=trainer.model)
    trainer.train()
    assert read_run(tmp_path / "out")[0]["parity"]["passed"]
    (tmp_path / "out" / PARITY_NAME).unlink()
    tracked_trainer(tmp_path / "out", report_to="none", max_steps=1).train()
    assert read_run(tmp_path / "out")[0]["parity"] is None, "that of the run before is not ours"


def test_a_check_of_another_model_says_so(tmp_path):
    model = tracked_trainer(tmp_path / "out", report_to="none").model
    record_parity(ParityReport(("bad",), error=0.5), output_dir=tmp_path, model=model)
    next(model.parameters()).requires_grad_(False)
    parity = read_parity(tmp_path, model=model)
    assert parity["matches_run"] is False
    said = describe_parity(parity)
    assert said.startswith("failed on ")
    assert said.endswith("the model or a version has changed")


@pytest.mark.parametrize("text", ["", "[]", '{"passed": true}'])
def test_a_file_that_somebody_else_wrote_is_no_result(tmp_path, text):
    (tmp_path / PARITY_NAME).write_text(text)
    assert read_parity(tmp_path) is None


def test_a_check_that_was_refused_has_no_figure_and_is_still_json(tmp_path):
    model = tracked_trainer(tmp_path / "out", report_to="none").model
    path = record_parity(ParityReport(("no",)), output_dir=tmp_path, model=model)
    assert json.loads(path.read_text())["error"] == "nan"
    assert "relative error" not in describe_parity(read_parity(tmp_path, model=model))
