"""A run that was interrupted ends as the run that was not."""

from __future__ import annotations

import os
import pickle
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_and_kill, run_ranks
from support.resume_jobs import (
    die_while_saving,
    train_and_report,
    train_on_a_full_disk,
    train_until_killed,
)
from support.tiny import ragged_rows
from transformers import Trainer, TrainingArguments

from hf_gradacc.errors import CheckpointError, ConfigError, DataError
from hf_gradacc.safety.checkpoints import MANIFEST_NAME, find_damage, list_checkpoints

NUM_KILLS = 4
FORMS = ("list", "dataset", "stream", "shards", "mapped shards", "shuffle buffer")


def assert_same(left: dict[str, Any], right: dict[str, Any], *, tolerance: float = 0.0) -> None:
    for name, weight in left["weights"].items():
        torch.testing.assert_close(right["weights"][name], weight, rtol=0, atol=tolerance)


def names(out: Path) -> list[str]:
    return [path.name for path in list_checkpoints(out)]


# ---- killed ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(tmp_path):
    job: dict[str, Any] = {"num_train_epochs": 6, "save_total_limit": 2}
    job |= {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": ragged_rows(7, seed=9)}
    job |= {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    straight = train_and_report(str(tmp_path / "straight"), dropout=0.2, **job)
    draw, kills, result = random.Random(0), 0, tmp_path / "result"
    while not result.exists():
        # At most 7 updates and what 0.2 s hold: all four kills come before the end of 36.
        code = run_and_kill(
            train_until_killed,
            begun=tmp_path / "started",
            begins_after=draw.randrange(7),
            delay=draw.uniform(0, 0.2) if kills < NUM_KILLS else None,
            out=str(tmp_path / "killed"),
            result=str(result),
            started=str(tmp_path / "started"),
            pause=0.05,
            **job,
        )
        kills += code == -9
    assert kills == NUM_KILLS
    resumed = pickle.loads(result.read_bytes())
    assert_same(straight, resumed)
    assert resumed["logs"] == straight["logs"]
    assert [find_damage(path) for path in list_checkpoints(tmp_path / "killed")] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("in the middle of the optimizer's file", ["checkpoint-2"]),
        ("before the manifest", ["checkpoint-2"]),
        ("before the rename", ["checkpoint-2"]),
        ("while an old one is deleted", ["checkpoint-4"]),
    ],
)
def test_killed_while_saving_only_whole_checkpoints_are_left(tmp_path, moment, left):
    code = run_and_kill(
        die_while_saving, begun=tmp_path / "never", delay=60, out=str(tmp_path), moment=moment
    )
    assert code == -9
    assert names(tmp_path) == left
    assert find_damage(tmp_path / left[0]) is None


# ---- resumed -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stop", [4, 6, 10])
def test_resumed_in_any_pass_a_run_ends_with_the_same_bits(tmp_path, form, stop):
    """An epoch has 6 updates: in the first pass, at its end, in the second."""
    options = {"max_steps": 14, "form": form}
    straight = train_and_report(str(tmp_path / "straight"), save_strategy="no", **options)
    train_and_report(str(tmp_path / "out"), stop=stop, **options)
    resumed = train_and_report(str(tmp_path / "out"), resume=True, **options)
    assert_same(straight, resumed)
    assert resumed["logs"] == straight["logs"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["list", "shards", "shuffle buffer"])
def test_loader_workers_resume_to_the_bits_of_a_run_without_any(tmp_path, form):
    options = {"max_steps": 10, "form": form, "dropout": 0.2}
    straight = train_and_report(str(tmp_path / "straight"), save_strategy="no", **options)
    # torch warns where a machine has fewer cores.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        train_and_report(str(tmp_path / "out"), stop=8, dataloader_num_workers=3, **options)
    resumed = train_and_report(
        str(tmp_path / "out"), resume="auto", dataloader_num_workers=1, **options
    )
    assert_same(straight, resumed)
    assert resumed["logs"] == straight["logs"]


@pytest.mark.slow
@pytest.mark.parametrize("updates", [6, 3], ids=["at an epoch's end", "amid an epoch"])
def test_a_finished_run_that_is_started_again_does_nothing(tmp_path, updates):
    job = {"max_steps": updates, "save_steps": 3, "resume": "auto"}
    first = train_and_report(str(tmp_path), **job)
    kept = sorted(path.name for path in tmp_path.rglob("*"))
    log = (tmp_path / "gradacc_log.jsonl").read_bytes()
    again = train_and_report(str(tmp_path), **job)
    assert_same(first, again)
    assert again["logs"] == first["logs"]
    assert again["collated"] == 1  # what the model is asked with
    assert sorted(path.name for path in tmp_path.rglob("*")) == kept
    assert (tmp_path / "gradacc_log.jsonl").read_bytes() == log


@pytest.mark.slow
@pytest.mark.parametrize("stop", [8, None])
def test_the_newest_checkpoint_is_kept_beside_the_best_one(tmp_path, stop):
    """Stock deletes it when training ends, with a limit of 1: a resume would start far behind."""
    job = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 0.05,  # so large that the first checkpoint stays the best
        "eval_dataset": ragged_rows(7, seed=8),
        "num_train_epochs": 2,
    }
    straight = train_and_report(str(tmp_path / "straight"), **job)
    train_and_report(str(tmp_path / "out"), stop=stop, **job)
    assert names(tmp_path / "out") == [f"checkpoint-{stop or 12}", "checkpoint-2"]
    resumed = train_and_report(str(tmp_path / "out"), resume="auto", **job)
    assert_same(straight, resumed)  # the best ones, loaded at the end
    assert resumed["logs"] == straight["logs"]
    assert names(tmp_path / "out") == ["checkpoint-12", "checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["list", "stream", "shards"])
def test_skipped_updates_are_not_collated_again(tmp_path, form):
    options = {"max_steps": 12, "form": form, "per_device_train_batch_size": 4}
    train_and_report(str(tmp_path), stop=10, **options)
    again = train_and_report(str(tmp_path), resume=True, **options)
    # Two updates were left and are one micro-batch each; one more is what the model is asked with.
    assert again["collated"] <= 3


@pytest.mark.slow
def test_updates_drawn_by_tokens_are_found_again_in_a_stream(tmp_path):
    options = {
        "max_steps": 14,
        "form": "shards",
        "effective_batch_size": None,
        "tokens_per_update": 30,
    }
    straight = train_and_report(str(tmp_path / "straight"), save_strategy="no", **options)
    train_and_report(str(tmp_path / "out"), stop=8, **options)
    resumed = train_and_report(str(tmp_path / "out"), resume=True, **options)
    assert_same(straight, resumed)
    assert resumed["logs"] == straight["logs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "then"),
    [(2, {"per_device_train_batch_size": 1}), (1, {"max_tokens_per_micro_batch": 20})],
    ids=["on two ranks", "under another budget"],
)
def test_resumed_in_another_shape_a_run_ends_within_rounding(tmp_path, ranks, then):
    straight = train_and_report(str(tmp_path / "straight"), save_strategy="no")
    train_and_report(str(tmp_path / "out"), stop=8)
    job = {"out": str(tmp_path / "out"), "resume": True, **then}
    resumed = run_ranks(train_and_report, ranks, **job)[0]
    # AdamW divides by the root of a square: where a gradient is all but zero, rounding shows.
    assert_same(straight, resumed, tolerance=1e-7)
    cut = {"micro_batches_per_update", "computed_tokens_per_update", "padding_fraction"}
    for ours, theirs in zip(resumed["logs"], straight["logs"], strict=True):
        assert {k: v for k, v in ours.items() if k not in cut} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in cut}, rel=1e-6
        )


@pytest.mark.slow
def test_two_ranks_resume_to_the_same_bits(tmp_path):
    job = {"dropout": 0.2, "num_train_epochs": 2}
    straight = run_ranks(train_and_report, 2, out=str(tmp_path / "straight"), **job)
    run_ranks(train_and_report, 2, out=str(tmp_path / "out"), stop=8, **job)
    resumed = run_ranks(train_and_report, 2, out=str(tmp_path / "out"), resume=True, **job)
    for one, other in zip(straight, resumed, strict=True):
        assert_same(one, other)
    assert resumed[0]["logs"] == straight[0]["logs"]


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_changed_dataset_is_refused_unless_allowed(tmp_path):
    train_and_report(str(tmp_path), stop=4)
    rows = ragged_rows(22, seed=3)
    rows[7]["input_ids"][1] += 1
    with pytest.raises(DataError, match=r"fingerprint: .* before, .* now\n.*allow_changed_data"):
        train_and_report(str(tmp_path), resume=True, rows=rows)
    report = train_and_report(str(tmp_path), resume=True, rows=rows, allow_changed_data=True)
    assert report["step"] == 18


def test_another_effective_batch_size_is_refused(tmp_path):
    train_and_report(str(tmp_path), stop=4)
    with pytest.raises(ConfigError, match="effective_batch_size: 4 before, 8 now"):
        train_and_report(str(tmp_path), resume=True, effective_batch_size=8)


def test_another_order_of_the_rows_is_refused(tmp_path):
    train_and_report(str(tmp_path), stop=4)
    with pytest.raises(ConfigError, match="order: shuffled before, sequential now"):
        train_and_report(str(tmp_path), resume=True, train_sampling_strategy="sequential")


def test_a_checkpoint_of_the_stock_trainer_can_be_gone_on_from(tmp_path):
    from support.tiny import pad, tiny_llama

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=2, save_steps=2, disable_tqdm=True
    )
    Trainer(
        tiny_llama(), arguments, train_dataset=ragged_rows(22, seed=3), data_collator=pad
    ).train()
    report = train_and_report(str(tmp_path), resume=True, num_train_epochs=1)
    assert report["step"] == 6


# ---- damaged, full -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, monkeypatch):
    straight = train_and_report(str(tmp_path), stop=8)
    weights = tmp_path / "checkpoint-8" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-9] ^= 1
    written = weights.stat()
    weights.write_bytes(bytes(damaged))
    os.utime(weights, ns=(written.st_atime_ns, written.st_mtime_ns))  # nobody wrote it: it rotted
    said = []
    monkeypatch.setattr("hf_gradacc.trainer.checkpoints.choosing.logger.warning", said.append)
    again = train_and_report(str(tmp_path), stop=8, resume=True)
    assert said[0] == (
        "checkpoint-8 is damaged: model.safetensors holds other bytes than were written. "
        "It is skipped."
    )
    assert said[1] == "The run goes on from checkpoint-6, the newest whole checkpoint."
    assert_same(straight, again)
    assert find_damage(tmp_path / "checkpoint-8") is None


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))


def rewrite(text):
    return lambda path: path.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("manifest", [True, False], ids=["with manifest", "without"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut_off),
        ("optimizer.pt", cut_off),
        ("optimizer.pt", Path.unlink),
        ("trainer_state.json", cut_off),
        ("trainer_state.json", Path.unlink),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_any_damage_is_found(tmp_path, name, damage, manifest):
    train_and_report(str(tmp_path), stop=2)
    folder = tmp_path / "checkpoint-2"
    if not manifest:  # as the stock Trainer leaves it
        (folder / MANIFEST_NAME).unlink()
    assert find_damage(folder) is None
    damage(folder / name)
    found = find_damage(folder)
    if name == "optimizer.pt" and damage is Path.unlink and not manifest:
        assert found is None  # nobody wrote down that there was one: save_only_model leaves it out
    else:
        assert found.startswith(name)


@pytest.mark.parametrize(
    "damage",
    [cut_off, flip_a_bit, rewrite(""), rewrite("[]"), rewrite('{"files": {"a": {}}}')],
    ids=["cut off", "bit flipped", "empty", "a list", "half a manifest"],
)
def test_a_damaged_manifest_is_damage_and_no_crash(tmp_path, damage):
    train_and_report(str(tmp_path), stop=2)
    damage(tmp_path / "checkpoint-2" / MANIFEST_NAME)
    assert find_damage(tmp_path / "checkpoint-2") is not None
    (tmp_path / "checkpoint-4").mkdir()
    assert find_damage(tmp_path / "checkpoint-4") == "trainer_state.json is missing"


@pytest.mark.slow
def test_a_limit_on_checkpoints_holds_though_a_kill_came_before_the_oldest_went(tmp_path):
    job = {"num_train_epochs": 1, "resume": "auto"}
    train_and_report(str(tmp_path), **job)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    train_and_report(str(tmp_path), save_total_limit=1, **job)
    assert names(tmp_path) == ["checkpoint-6"]
    without = tmp_path / "without"
    train_and_report(str(without), save_total_limit=1, save_strategy="no", num_train_epochs=1)
    assert not names(without)


def test_what_a_killed_save_left_behind_is_cleared_away(tmp_path):
    left = tmp_path / ".saving" / "checkpoint-9"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    train_and_report(str(tmp_path), num_train_epochs=1, save_strategy="no")
    assert not left.parent.exists()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("optimizer.pt", cut_off, "bytes where .* were written|end of archive"),
        ("model.safetensors", cut_off, "bytes where .* were written|header"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
        ("trainer_state.json", cut_off, "bytes where .* were written|no valid JSON"),
    ],
)
def test_a_damaged_checkpoint_asked_for_by_name_is_refused(tmp_path, name, damage, words):
    train_and_report(str(tmp_path), stop=2)
    damage(tmp_path / "checkpoint-2" / name)
    with pytest.raises(CheckpointError, match=words):
        train_and_report(str(tmp_path), resume=str(tmp_path / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        train_and_report(str(tmp_path), resume=True)


def test_auto_starts_from_the_beginning_where_there_is_no_checkpoint(tmp_path):
    assert train_and_report(str(tmp_path), resume="auto", num_train_epochs=1)["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "full"), [(1, (0,)), (2, (0,)), (2, (1,))], ids=str)
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(tmp_path, world_size, full):
    """RLIMIT_FSIZE: the system itself refuses to write, on rank 0 or on a rank that waits."""
    options = {"logging_steps": 1}
    if full == (1,):
        options["most_bytes"] = 2_000  # a rank that is not the first writes its RNG state only
    results = run_ranks(train_on_a_full_disk, world_size, out=str(tmp_path), ranks=full, **options)
    for result in results:
        assert result["step"] == 6
    assert results[0]["found"] == ["checkpoint-2", "checkpoint-6"]
    assert find_damage(tmp_path / "checkpoint-2") is None
    (said,) = re.findall("could not be saved.*", (tmp_path / "gradacc_log.jsonl").read_text())
    assert "bytes free on that disk" in said
