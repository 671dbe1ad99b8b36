"""Rows that several ranks compute together: each is counted once, and the parts add up."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.rank_jobs import pad
from support.ranks import run_ranks
from support.reference import float64_everywhere, reference_gradient, relative_error, scale
from support.sequence_jobs import (
    NUM_ROWS,
    answers,
    ask_for_what_needs_whole_rows,
    expected,
    model_of,
    train_rows_in_parts,
    train_with_stock,
)
from support.tiny import ragged_rows

from hf_gradacc.errors import DataError
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.ranks.sequence_parallel import part_of_rows, with_shifted_labels

STAGES: dict[str, dict[str, Any]] = {f"stage {stage}": {"stage": stage} for stage in (1, 2, 3)}
MISTAKES = ("counted by every rank", "shifted after splitting", "a mean of each part")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_parts_of_rows_are_the_rows(ranks):
    rows = pad(answers(6))
    layouts = [RankLayout(rank, ranks, sp_size=ranks) for rank in range(ranks)]
    parts = [part_of_rows(rows, layout) for layout in layouts]
    width = rows["input_ids"].shape[1]
    joined = {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}
    assert joined["input_ids"][:, :width].equal(rows["input_ids"])
    assert joined["shift_labels"][:, : width - 1].equal(rows["labels"][:, 1:])
    assert joined["shift_labels"][:, width - 1 :].eq(-100).all()
    assert joined["position_ids"][0, :width].tolist() == list(range(width))
    assert not {"attention_mask", "labels"} & joined.keys()
    assert len({part["input_ids"].shape for part in parts}) == 1
    # Some part holds no target at all: a mean of its own would be NaN.
    assert any(not (part["shift_labels"][0] != -100).any() for part in parts)


def test_targets_of_parts_add_up_to_those_of_the_rows():
    rows = pad(answers(7))
    total = int((rows["labels"][:, 1:] != -100).sum())
    for size in (2, 4):
        layouts = [RankLayout(rank, size, sp_size=size) for rank in range(size)]
        counts = [int((part_of_rows(rows, r)["shift_labels"] != -100).sum()) for r in layouts]
        assert sum(counts) == total
        assert len(set(counts)) > 1


def test_positions_of_packed_rows_are_kept():
    rows = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "labels": torch.tensor([[5, 6, 7, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    }
    assert with_shifted_labels(rows, multiple_of=4)["position_ids"].tolist() == [
        [0, 1, 0, 1, 2, 2, 2, 2]
    ]


def test_rows_that_cannot_be_split_token_by_token_are_refused():
    rows = pad(answers(2))
    left = {**rows, "attention_mask": rows["attention_mask"].flip(1)}
    with pytest.raises(DataError, match="padded on the right"):
        with_shifted_labels(left, multiple_of=2)
    with pytest.raises(DataError, match=r"`pixels` has the shape \(2, 3\)"):
        with_shifted_labels({**rows, "pixels": torch.zeros(2, 3)}, multiple_of=2)


# ---- real ranks --------------------------------------------------------------------------------


@functools.cache
def runs(world: int) -> list[dict[str, Any]]:
    if world == 1:
        return run_ranks(train_rows_in_parts, 1, scenarios={"one": {"stage": None}})
    if world == 4:
        return run_ranks(
            train_rows_in_parts, 4, scenarios={"stage 1": {"stage": 1}}, num_replicas=2
        )
    broken = {name: {"stage": 1, "mistake": name, "max_steps": 1} for name in MISTAKES}
    return run_ranks(train_rows_in_parts, 2, scenarios=STAGES | broken)


# DeepSpeed's stage 2 sends in float32 where rows are split (``average_tensor``).
TOLERANCE = {"stage 1": 1e-10, "stage 2": 1e-6, "stage 3": 1e-10}
RUNS = [*((2, name) for name in STAGES), (4, "stage 1")]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), RUNS)
def test_split_rows_give_the_gradients_of_the_whole_batch(world, name):
    for rank in runs(world):
        actual = rank[name]["gradients"]
        assert len(actual) == len(expected()) == 3
        for mine, theirs in zip(actual, expected(), strict=True):
            assert mine.keys() == theirs.keys()
            assert relative_error(mine, theirs) < TOLERANCE[name]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), RUNS)
def test_split_rows_are_counted_and_logged_once(world, name):
    one = runs(1)[0]["one"]
    for rank in runs(world):
        many = rank[name]
        assert many["eval_loss"] == pytest.approx(one["eval_loss"], rel=TOLERANCE[name] * 10)
        assert len(many["logs"]) == len(one["logs"]) == 3
        free = {"micro_batches_per_update", "computed_tokens_per_update", "padding_fraction"}
        free |= {"train_runtime", "train_tokens_per_second"}
        for ours, theirs in zip(many["logs"], one["logs"], strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - free:
                assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE[name] * 10), key
    layouts = {rank[name]["layout"].replica: rank[name]["seen"] for rank in runs(world)}
    assert all(rank[name]["seen"] == layouts[rank[name]["layout"].replica] for rank in runs(world))
    rows = [row for seen in layouts.values() for *_, members in seen for row in members]
    assert sorted(rows) == list(range(NUM_ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_made_with_split_rows_would_be_seen(mistake):
    gradient = runs(2)[0][mistake]["gradients"][0]
    assert relative_error(gradient, expected()[0]) > 0.05


@pytest.mark.slow
def test_stock_trains_twice_the_gradient_of_a_split_row():
    """Each of two ranks differentiates the loss of both, and DeepSpeed adds the two up."""
    with float64_everywhere():
        gradient = reference_gradient(model_of("eager"), ragged_rows(2, seed=3)[:1], pad)
    stock = run_ranks(train_with_stock, 2, stage=1)[0]
    assert scale(stock, gradient) == pytest.approx(2.0, rel=1e-9)


@pytest.mark.slow
def test_runs_with_split_rows_resume_to_the_same_bits(tmp_path):
    job = {"stage": 1, "save_strategy": "steps", "save_steps": 1}
    job |= {"optim": "adamw_torch", "learning_rate": 0.01, "out": str(tmp_path / "out")}
    scenarios = {
        "straight": {**job, "out": str(tmp_path / "straight")},
        "stopped": {**job, "stop": 2},
        "resumed": {**job, "resume": True},
    }
    result = run_ranks(train_rows_in_parts, 2, scenarios=scenarios)[0]
    for name, weight in result["straight"]["weights"].items():
        assert torch.equal(result["resumed"]["weights"][name], weight), name


@pytest.mark.slow
def test_what_needs_whole_rows_is_refused_by_name():
    for answered in run_ranks(ask_for_what_needs_whole_rows, 2):
        assert (
            "compute_loss_func does not know what the others hold"
            in answered["a loss of one's own"]
        )
        assert "label_smoothing_factor does not know" in answered["smoothed labels"]
        assert "several ranks compute each row together" in answered["packing"]
