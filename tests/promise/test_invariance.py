"""One recipe, many shapes, one trajectory.

A drift that each single update hides shows in the mean signed difference of the losses over a run:
rounding goes both ways, a wrong weight goes one.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.resume_jobs import train_and_report
from support.tiny import ragged_rows

pytestmark = pytest.mark.slow

RECIPE = {
    "effective_batch_size": 8,
    "max_steps": 24,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "dtype": torch.float32,
    "rows": ragged_rows(60, seed=11),
}

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 x 8": (1, {"per_device_train_batch_size": 1}),
    "2 ranks x 4": (2, {"per_device_train_batch_size": 4}),
    "3 ranks x 1": (3, {"per_device_train_batch_size": 1}),
    "packed": (1, {"layout": "packed"}),
    "a token budget": (1, {"max_tokens_per_micro_batch": 24}),
    "two loader workers": (1, {"dataloader_num_workers": 2}),
}


@functools.cache
def reference() -> dict[str, Any]:
    """All eight rows of an update at once, on one process."""
    with tempfile.TemporaryDirectory() as out:
        return run(1, {"per_device_train_batch_size": 8}, out=out)


def run(world_size: int, shape: dict[str, Any], **more: Any) -> dict[str, Any]:
    job = {**RECIPE, **shape, **more}
    return run_ranks(train_and_report, world_size, **job)[0]


def compare(actual: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float, float]:
    """The mean signed and the largest difference of losses; the largest one of weights."""
    pairs = zip(actual["logs"], expected["logs"], strict=True)
    differences = [ours["loss"] - theirs["loss"] for ours, theirs in pairs]
    weights = max(
        float((weight - expected["weights"][name]).abs().max())
        for name, weight in actual["weights"].items()
    )
    return sum(differences) / len(differences), max(map(abs, differences)), weights


def check(actual: dict[str, Any], record_property: Any) -> None:
    mean, largest, weights = compare(actual, reference())
    record_property("mean_signed_difference", mean)
    print(f"mean signed {mean:+.1e}, largest {largest:.1e}, weights {weights:.1e}")
    assert abs(mean) < 5e-7
    assert largest < 5e-6
    assert weights < 5e-6


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_follows_the_trajectory_of_the_whole_batch(name, record_property, tmp_path):
    check(run(*SHAPES[name], out=str(tmp_path)), record_property)


def test_resumed_half_way_in_another_shape_it_is_the_same_trajectory(tmp_path, record_property):
    saving = {"save_strategy": "steps", "save_steps": 11, "out": str(tmp_path)}
    run(2, {"per_device_train_batch_size": 1}, stop=12, **saving)
    resumed = run(1, {"max_tokens_per_micro_batch": 24}, resume=True, **saving)
    check(resumed, record_property)


def test_a_weight_that_is_a_little_wrong_would_show(tmp_path):
    """The bounds mean something: one row fewer in each update lies far outside of them."""
    mean, largest, _ = compare(run(1, {"effective_batch_size": 7}, out=str(tmp_path)), reference())
    assert abs(mean) > 2e-4
    assert largest > 2e-3
