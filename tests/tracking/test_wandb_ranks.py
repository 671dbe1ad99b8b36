"""A W&B run per rank, on request: real ranks, real offline runs, read back from disk."""

from __future__ import annotations

import pytest
from support.ranks import run_ranks
from support.tracked import (
    no_wandb_login,
    only_run,
    run_to_end,
    tracked_trainer,
    variables_of_wandb,
)
from support.tracked_jobs import train_with_wandb
from support.wandb_reader import find_wandb_files, read_wandb_file

from hf_gradacc.errors import ConfigError
from hf_gradacc.tracking.phases import PHASE_KEYS


@pytest.fixture
def wandb_dir(tmp_path, monkeypatch):
    yield from no_wandb_login(tmp_path, monkeypatch)


@pytest.mark.slow
def test_each_rank_has_a_run_of_its_own_figures_in_one_group(wandb_dir, tmp_path):
    printed = run_ranks(
        train_with_wandb,
        2,
        out=str(tmp_path / "out"),
        environment=variables_of_wandb(),
        resumes=(None, str(tmp_path / "out" / "checkpoint-2")),
        run_name="both",
        wandb_per_rank=True,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=2,
    )
    runs = [read_wandb_file(path) for path in find_wandb_files(wandb_dir)]
    first, resumed_first = (run for run in runs if run.rows_with("train/loss"))
    second, resumed_second = (run for run in runs if "rank" in run.config)
    assert second.run_id == f"{first.run_id}-rank1"
    assert first.group == second.group == f"both-{first.run_id}"
    assert second.config["rank"] == 1
    assert not second.rows_with("train/loss"), "what both did is told once, by rank 0"
    whole = first.rows_with("train/loss")
    ranks = [run.rows_with("rank/step_seconds") for run in (first, second)]
    for one, other, both in zip(*ranks, whole, strict=True):
        assert one["train/global_step"] == other["train/global_step"] == both["train/global_step"]
        for key in ("effective_batch_size", "tokens_per_update", "input_tokens_per_update"):
            assert one[f"rank/{key}"] + other[f"rank/{key}"] == both[f"train/{key}"]
        cut = "micro_batches_per_update"
        assert one[f"rank/{cut}"] == other[f"rank/{cut}"] == both[f"train/{cut}"] / 2 == 3
        for row in (one, other):
            phases = [row[f"rank/{key}"] for key in PHASE_KEYS.values()]
            assert min(phases) > 0, "two ranks do reduce"
            assert sum(phases) <= row["rank/step_seconds"]
    assert "".join(printed).count("to upload: wandb sync") == 4
    for before, after in ((first, resumed_first), (second, resumed_second)):
        assert (after.run_id, after.group) == (before.run_id, before.group), "one run over resumes"
        steps = [[row["_step"] for row in run.history] for run in (before, after)]
        at = [row["train/global_step"] for row in after.rows_with("rank/step_seconds")]
        assert at == [3]
        assert steps[1][-1] >= steps[0][-1], "or an upload would drop the resumed rows"


def test_on_one_process_the_run_gets_its_group_and_its_own_figures(wandb_dir, tmp_path):
    run_to_end(
        tracked_trainer(tmp_path / "out", run_name="alone", wandb_per_rank=True, max_steps=2)
    )
    run = only_run(wandb_dir)
    assert run.group == f"alone-{run.run_id}"
    assert [row["rank/effective_batch_size"] for row in run.rows_with("rank/step_seconds")] == [
        6,
        6,
    ]


def test_unless_asked_for_there_is_no_group_and_no_figure_of_a_rank(wandb_dir, tmp_path):
    run_to_end(tracked_trainer(tmp_path / "out", max_steps=1))
    run = only_run(wandb_dir)
    assert run.group == ""
    assert not run.rows_with("rank/step_seconds")


def test_without_wandb_the_wish_is_not_dropped_in_silence(tmp_path, caplog):
    from hf_gradacc.tracking import install as tracking

    tracking.logger.propagate = True
    with caplog.at_level("WARNING"):
        tracked_trainer(tmp_path / "out", report_to="none", wandb_per_rank=True)
    assert "wandb_per_rank = True does nothing: report_to leaves wandb out." in caplog.messages


def test_a_wish_that_is_no_boolean_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="wandb_per_rank = 2: use True or False"):
        tracked_trainer(tmp_path / "out", report_to="none", wandb_per_rank=2)
