"""Models that transformers splits in loading: gradients, logs and checkpoints of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_jobs import (
    ADAM,
    NUM_ROWS,
    load,
    train_split,
    train_with_mistakes,
    train_with_stock,
    write_models,
)
from support.rank_jobs import pad
from support.ranks import run_ranks
from support.reference import float64_everywhere, reference_gradient, relative_error, scale
from support.tiny import ragged_rows
from transformers import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(Trainer, "_sync_replicated_trainable_parameters"),
        reason="before transformers 5.19 the Trainer does not train split models",
    ),
]

TWO: dict[str, dict[str, Any]] = {
    "layers": {
        "model": "qwen3",
        "split": {"tp_size": 2},
        "predicts": True,
        "per_device_eval_batch_size": 2,
    },
    "layers, clipped, under a budget": {
        "model": "llama",
        "split": {"tp_size": 2},
        "max_tokens_per_micro_batch": 20,
        "max_grad_norm": 0.4,
    },
    "layers, an adapter": {"model": "llama + adapter", "split": {"tp_size": 2}},
    "weights, an adapter": {"model": "llama + adapter", "split": {"fsdp_size": 2}},
    "experts": {"model": "experts", "split": {"fsdp_size": 2, "ep_size": 2}},
}
FOUR: dict[str, dict[str, Any]] = {
    "both": {
        "model": "qwen3",
        "split": {"fsdp_size": 2, "tp_size": 2},
        "predicts": True,
        "per_device_eval_batch_size": 2,
    },
    "layers, copied, clipped": {
        "model": "qwen3",
        "split": {"dp_replicate_size": 2, "tp_size": 2},
        "max_grad_norm": 0.4,
    },
}
ALL = [*((2, name) for name in TWO), *((4, name) for name in FOUR)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return str(folder)


@functools.cache
def runs(models: str, world: int) -> list[dict[str, Any]]:
    whole = {name: {**scenario, "split": None} for name, scenario in (TWO | FOUR).items()}
    scenarios = {1: whole, 2: TWO, 4: FOUR}[world]
    return run_ranks(train_split, world, folder=models, scenarios=scenarios)


def expected_gradients(models: str, rank: dict[str, Any], scenario: dict[str, Any]) -> Any:
    """The gradient of each update at once, by the model loaded whole."""
    rows, clip = ragged_rows(NUM_ROWS, seed=3), scenario.get("max_grad_norm")
    model = load(models, scenario["model"])
    with torch.no_grad():
        for name, weight in rank["begun"].items():
            model.get_parameter(name).copy_(weight)
    for start in range(0, NUM_ROWS, 4):
        gradient = reference_gradient(model, rows[start : start + 4], pad)
        if clip is not None:
            norm = torch.stack([g.norm() for g in gradient.values()]).norm()
            gradient = {n: g * min(1.0, clip / (float(norm) + 1e-6)) for n, g in gradient.items()}
        yield gradient
        with torch.no_grad():
            for name, g in gradient.items():
                model.get_parameter(name).sub_(0.1 * g)


@pytest.mark.parametrize(("world", "name"), ALL)
def test_split_models_take_the_steps_of_the_whole_batch(models, world, name):
    scenario = (TWO | FOUR)[name]
    results = [rank[name] for rank in runs(models, world)]
    is_double = scenario["model"] != "experts"
    with float64_everywhere() if is_double else torch.enable_grad():
        expected = list(expected_gradients(models, results[0], scenario))
    for result in results:
        assert result["is_split"]
        assert len(result["gradients"]) == len(expected) == 3
        for actual, gradient in zip(result["gradients"], expected, strict=True):
            assert actual.keys() == gradient.keys()
            for key in gradient:
                error = relative_error({key: actual[key]}, {key: gradient[key]})
                assert error < (1e-10 if is_double else 2e-5), key


@pytest.mark.parametrize(("world", "name"), ALL)
def test_split_models_log_what_one_process_logs(models, world, name):
    one = runs(models, 1)[0][name]
    for rank in runs(models, world):
        many = rank[name]
        assert many["steps"] == one["steps"] == 3
        if "adapter" not in name:  # drawn anew, in other parts
            rel = 1e-9 if name != "experts" else 1e-5
            assert many["eval_loss"] == pytest.approx(one["eval_loss"], rel=rel)
            for ours, theirs in zip(many["logs"], one["logs"], strict=True):
                assert ours.keys() == theirs.keys()
                # How an update is cut goes by how many share it. The last two are of a clock.
                free = {
                    "micro_batches_per_update",
                    "computed_tokens_per_update",
                    "padding_fraction",
                }
                free |= {"train_runtime", "train_tokens_per_second"}
                for key in ours.keys() - free:
                    assert ours[key] == pytest.approx(theirs[key], rel=rel), key


@pytest.mark.parametrize(("world", "name"), ALL)
def test_ranks_of_a_replica_have_the_same_rows_and_replicas_have_others(models, world, name):
    results = [rank[name] for rank in runs(models, world)]
    by_replica: dict[int, list[Any]] = {}
    for result in results:
        by_replica.setdefault(result["layout"].replica, []).append(result["seen"])
    split = (TWO | FOUR)[name]["split"]
    assert len(by_replica) == world // split.get("tp_size", 1)
    assert all(seen == same[0] for same in by_replica.values() for seen in same)
    rows = [row for same in by_replica.values() for *_, members in same[0] for row in members]
    assert sorted(rows) == list(range(NUM_ROWS))


@pytest.mark.parametrize(("world", "name"), [(2, "layers"), (4, "both")])
def test_each_row_is_predicted_once(models, world, name):
    """In batches of two; the last one is filled up on one replica."""
    one = runs(models, 1)[0][name]["predicted"]
    rows = ragged_rows(7, seed=5)
    for rank in runs(models, world):
        many = rank[name]["predicted"]
        assert len(many) == len(one) == len(rows)
        for mine, theirs, row in zip(many, one, rows, strict=True):
            length = len(row["input_ids"])  # what stands behind depends on the rows of its batch
            assert abs(mine[:length] - theirs[:length]).max() < 1e-9


@pytest.mark.parametrize(
    ("world", "mistakes"),
    [
        (2, ["counted by every rank", "gradients are summed again"]),
        (4, ["counted by every rank", "held back where it is summed again"]),
    ],
)
def test_mistakes_made_with_split_models_would_be_seen(models, world, mistakes):
    scenario = {2: TWO["layers"], 4: FOUR["both"]}[world]
    job = {"folder": models, "scenario": scenario, "mistakes": mistakes}
    broken = run_ranks(train_with_mistakes, world, **job)[0]
    with float64_everywhere():
        expected = reference_gradient(load(models, "qwen3"), ragged_rows(NUM_ROWS, seed=3)[:4], pad)
    for mistake in mistakes:
        wrong = broken[mistake]
        errors = [relative_error({k: wrong[k]}, {k: expected[k]}) for k in expected]
        assert max(errors) > 0.1, mistake


def test_stock_sums_norms_of_heads_again_with_each_micro_batch(models):
    """One micro-batch is right; of four, three are summed over the ranks once too often."""
    with float64_everywhere():
        expected = reference_gradient(load(models, "qwen3"), ragged_rows(NUM_ROWS, seed=3)[:4], pad)
    norm = "model.layers.0.self_attn.q_norm.weight"
    runs_of_stock = run_ranks(train_with_stock, 2, folder=models, split={"tp_size": 2})[0]
    for steps, right in ((1, True), (4, False)):
        stock = runs_of_stock[steps]
        rest = {key: g for key, g in stock.items() if "q_norm" not in key and "k_norm" not in key}
        assert relative_error(rest, {key: expected[key] for key in rest}) < 1e-10
        of_norm = {norm: stock[norm]}, {norm: expected[norm]}
        assert (relative_error(*of_norm) < 1e-10) is right
        assert (scale(*of_norm) > 2) is not right


def test_split_models_resume_to_the_same_bits(models, tmp_path):
    """Split by layers and by weights at once: what holds of both holds of each."""
    world, split = 4, {"fsdp_size": 2, "tp_size": 2}
    job = {"model": "qwen3", "split": split, "num_rows": 7, "save_strategy": "steps"}
    job |= {"save_steps": 1, "out": str(tmp_path / "out"), **ADAM}
    scenarios = {
        "straight": {**job, "out": str(tmp_path / "straight")},
        "stopped": {**job, "stop": 1},
        "resumed": {**job, "resume": True},
    }
    result = run_ranks(train_split, world, folder=models, scenarios=scenarios)[0]
    straight, resumed = result["straight"], result["resumed"]
    assert [result[name]["steps"] for name in scenarios] == [2, 1, 2]
    for name, weight in straight["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    clock = {"train_runtime", "train_tokens_per_second"}
    for ours, theirs in zip(resumed["logs"], straight["logs"], strict=True):
        assert {k: v for k, v in ours.items() if k not in clock} == {
            k: v for k, v in theirs.items() if k not in clock
        }
    assert Path(tmp_path, "out/checkpoint-2/optimizer").is_dir()


def test_a_disk_that_is_full_on_the_writing_rank_leaves_no_rank_waiting(models, tmp_path):
    """Before the ranks would meet, and after: training goes on without the checkpoint."""
    job = {"model": "llama", "split": {"tp_size": 2}, "save_strategy": "steps", "save_steps": 1}
    scenarios = {name: {**job, "unwritable": name} for name in ("safe_save_file", "save")}
    for rank in run_ranks(train_split, 2, folder=models, scenarios=scenarios):
        assert [(r["steps"], r["saved"]) for r in rank.values()] == [(3, []), (3, [])]
