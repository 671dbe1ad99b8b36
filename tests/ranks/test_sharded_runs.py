"""Runs whose weights are split between ranks: whose folder it is, and what is saved at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.sharded_runs import save_at_the_end, tell_runs_apart

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_folder_of_split_weights_belongs_to_one_run_too(engine, tmp_path):
    ranks = run_ranks(tell_runs_apart, 2, out=str(tmp_path), engine=engine)
    assert ranks[0] == ranks[1]
    told: dict[str, Any] = ranks[0]
    assert len(set(told["runs"])) == len(told["runs"])
    assert told["steps_of_auto"] == [1, 2, 3, 4, 5, 6], "an older run's checkpoint was gone on from"
    assert "the optimizer: AdamW before, Adafactor now" in told["other optimizer"]
    assert told["rates"] == [0.01] * 6 + [0.02] * 6


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_the_final_model_of_split_weights_is_whole(kind, tmp_path):
    ranks = run_ranks(save_at_the_end, 2, out=str(tmp_path), kind=kind)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved
    for name, weight in saved.items():
        assert torch.equal(weight, ranks[0][name])
