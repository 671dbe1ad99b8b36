"""DeepSpeed ZeRO 1, 2 and 3 over real gloo groups: the updates of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from support.rank_jobs import train_scenarios
from support.ranks import run_ranks
from support.reference import relative_error
from test_ranks import SCENARIOS

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'hf_gradacc[deepspeed]'")

from support.zero_jobs import train_zero

STAGES = (1, 2, 3)
CHOSEN = {name: s for name, s in SCENARIOS.items() if "views" not in name}


@functools.cache
def alone() -> dict[str, Any]:
    """The same scenarios in one process without an engine."""
    return run_ranks(train_scenarios, 1, scenarios=CHOSEN)[0]


@functools.cache
def under_zero(stage: int) -> list[dict[str, Any]]:
    """What both ranks report under one stage, all scenarios in one process group."""
    return run_ranks(train_zero, 2, scenarios=CHOSEN, stage=stage)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("stage", STAGES)
def test_every_update_has_the_gradient_of_one_process_and_steps_once(stage, name):
    one = alone()[name]
    for rank in under_zero(stage):
        many = rank[name]
        assert len(many["gradients"]) == len(one["gradients"]) > 0
        for actual, expected in zip(many["gradients"], one["gradients"], strict=True):
            assert relative_error(actual, expected) < 1e-10
        assert relative_error(many["weights"], one["weights"]) < 1e-10
        assert many["engine_steps"] == len(one["gradients"])


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("stage", STAGES)
def test_logs_and_membership_are_those_of_one_process(stage, name):
    one, many = alone()[name], under_zero(stage)[0][name]
    assert many["steps"] == one["steps"]
    assert many["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-12)
    assert len(many["logs"]) == len(one["logs"])
    free = {"micro_batches_per_update", "padding_fraction"}
    for ours, theirs in zip(many["logs"], one["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - free:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, nan_ok=True), key
