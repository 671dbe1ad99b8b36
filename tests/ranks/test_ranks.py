"""Many ranks: the gradients, membership and logs of one process, over real gloo groups."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.rank_jobs import (
    SCENARIOS,
    ask_for_what_needs_ddp_to_reduce,
    count_collectives,
    pad,
    scenario_rows,
    train_dealt_by_length,
    train_scenarios,
    train_with_batch_normalization,
)
from support.ranks import run_ranks
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import tiny_llama

pytestmark = pytest.mark.slow

WORLDS = ("1", "2", "3", "4", "2, FSDP2")


@functools.cache
def runs(world: str) -> list[dict[str, Any]]:
    """What every rank of a world reports, all scenarios in one process group."""
    return run_ranks(
        train_scenarios,
        int(world[0]),
        scenarios=SCENARIOS,
        sharded=world.endswith("FSDP2"),
    )


def updates_of(world: str, name: str) -> list[tuple[int, int, list[int]]]:
    """Epoch, index and rows of every update that was trained, over all ranks."""
    updates: dict[tuple[int, int], list[int]] = {}
    for rank in runs(world):
        for epoch, index, rows in rank[name]["seen"]:
            updates.setdefault((epoch, index), []).extend(rows)
    return [(*key, sorted(rows)) for key, rows in sorted(updates.items())]


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_any_number_of_ranks_takes_the_steps_of_the_whole_batch(world, name):
    scenario = SCENARIOS[name]
    smoothing = scenario["options"].get("label_smoothing_factor", 0.0)
    results = [rank[name] for rank in runs(world)]
    rows = list(scenario_rows(scenario))
    with float64_everywhere():
        model = tiny_llama()
        trained = 0
        for _, _, members in updates_of(world, name):
            batch = [rows[i] for i in members if _has_target(rows[i])]
            if not batch or trained == len(results[0]["gradients"]):
                continue
            expected = reference_gradient(model, batch, pad, loss_of=_loss(smoothing))
            for result in results:
                assert relative_error(result["gradients"][trained], expected) < 1e-10
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    parameter -= 0.1 * expected[parameter_name]
            trained += 1
    assert trained == len(results[0]["gradients"]) > 0
    for result in results:
        for parameter_name, parameter in model.named_parameters():
            torch.testing.assert_close(
                result["weights"][parameter_name], parameter.data, rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_membership_and_logs_do_not_depend_on_the_number_of_ranks(world, name):
    one, many = runs("1")[0][name], runs(world)[0][name]
    assert updates_of(world, name) == updates_of("1", name)
    assert many["steps"] == one["steps"]
    assert many["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-12)
    # Its divisor is this call's steps alone; the float32 sums of the stock loop round differently.
    assert many["train_loss"] == pytest.approx(one["train_loss"], rel=1e-6)
    assert len(many["logs"]) == len(one["logs"])
    for ours, theirs in zip(many["logs"], one["logs"], strict=True):
        # How an update is cut depends on how many ranks share it; nothing else may.
        free = {"micro_batches_per_update", "padding_fraction"}
        free |= {"computed_tokens_per_update", "shared_fraction"}
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - free:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, nan_ok=True), key


@pytest.mark.parametrize("world", WORLDS)
def test_no_row_is_trained_twice_in_an_epoch_and_none_is_forgotten(world):
    name = "an epoch that ends mid-update"
    for epoch in (0, 1):
        rows = [i for e, _, members in updates_of(world, name) if e == epoch for i in members]
        assert sorted(rows) == list(range(11))


@pytest.mark.parametrize("name", ["rows that begin alike", "a stream of rows that begin alike"])
def test_rows_that_begin_alike_are_dealt_so_that_ranks_compute_less(name):
    """With the same gradient in float64, see above, and the same rows in every update."""
    by_length = run_ranks(train_dealt_by_length, 2, scenario=SCENARIOS[name])
    dealt = [rank[name] for rank in runs("2")]
    before, after = (
        [row["computed_tokens_per_update"] for row in of[0]["logs"]] for of in (by_length, dealt)
    )
    assert sum(after) < 0.95 * sum(before)
    assert all(row["shared_fraction"] > 0 for row in dealt[0]["logs"])
    members = [
        sorted(i for rank in of for *_, rows in rank["seen"] for i in rows)
        for of in (by_length, dealt)
    ]
    assert members[0] == members[1]


def test_weights_are_sharded_where_the_test_says_so():
    name = next(iter(SCENARIOS))
    worlds = [world for world in WORLDS if world != "4"]  # which nothing else asks for in the gate
    assert [runs(world)[0][name]["sharded"] for world in worlds] == [False] * 3 + [True]


def test_epochs_are_shuffled_anew():
    updates = updates_of("2", "an epoch that ends mid-update")
    assert [m for e, _, m in updates if e == 0] != [m for e, _, m in updates if e == 1]


def test_an_update_makes_three_collectives_however_it_is_cut():
    """Counts, outcome and gradients: one each for 8 micro-batches. Stock's DDP makes four."""
    for rank in run_ranks(count_collectives, 2, num_rows=24):
        assert rank == {"gloo:all_reduce": 3}


def test_what_ddp_would_do_while_reducing_is_refused_and_not_left_out_in_silence():
    for rank in run_ranks(ask_for_what_needs_ddp_to_reduce, 2):
        assert rank["static graph"].startswith("ConfigError: ddp_static_graph = True prepares")
        assert "hook fp16_compress_hook would never be called" in rank["hook"]


def test_all_ranks_evaluate_with_the_running_statistics_of_the_first():
    first, second = run_ranks(train_with_batch_normalization, 2)
    assert not torch.equal(first["apart"], second["apart"])
    assert torch.equal(first["together"], first["apart"])
    assert torch.equal(second["together"], first["apart"])
    assert first["loss"] == pytest.approx(first["alone"], rel=1e-12)


def _has_target(row: dict[str, Any]) -> bool:
    return any(label != -100 for label in row["labels"][1:])


def _loss(smoothing: float) -> Any:
    """The model's loss or, smoothed, torch's own ``label_smoothing`` over the same targets."""

    def loss_of(model: Any, batch: Any) -> torch.Tensor:
        outputs = model(**batch)
        logits, labels = outputs.logits[:, :-1], batch["labels"][:, 1:]
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), label_smoothing=smoothing
        )

    return loss_of
