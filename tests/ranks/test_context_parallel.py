"""Rows that FSDP2's ranks compute together: all but the ring attention, which needs a GPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.context_jobs import place_in_row, train_in_ring
from support.rank_jobs import pad
from support.ranks import run_ranks
from support.reference import relative_error
from support.sequence_jobs import NUM_ROWS, answers, expected, train_rows_in_parts

from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.ranks.sequence_parallel import rows_for_ring

CPU = torch.device("cpu")


def test_rows_for_the_ring_are_whole_copies_shifted_and_padded():
    rows = pad(answers(5))
    before = {key: value.clone() for key, value in rows.items()}
    ready = rows_for_ring(rows, RankLayout(0, 2, cp_size=2), device=CPU)
    width = rows["input_ids"].shape[1]
    assert ready["input_ids"].shape[1] % 4 == 0
    assert ready["shift_labels"][:, : width - 1].equal(rows["labels"][:, 1:])
    assert ready["labels"].equal(ready["shift_labels"])
    assert ready["labels"].data_ptr() != ready["shift_labels"].data_ptr()  # each is cut by itself
    for value in ready.values():
        value.zero_()  # as torch cuts its buffers
    assert all(rows[key].equal(value) for key, value in before.items())


def test_the_stand_in_knows_where_tokens_are():
    places = torch.cat([place_in_row(4, rank, 2) for rank in range(2)])
    assert places.tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


SCENARIOS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ring": {},
        "counted by every rank": {"mistake": "counted by every rank", "max_steps": 1},
        "shifted after splitting": {"mistake": "shifted after splitting", "max_steps": 1},
    },
    4: {"ring": {"dp_shard_size": 2}},
}


@functools.cache
def runs(world: int) -> list[dict[str, Any]]:
    return run_ranks(train_in_ring, world, scenarios=SCENARIOS[world])


@pytest.mark.slow
@pytest.mark.parametrize("world", SCENARIOS)
def test_rows_in_a_ring_give_the_gradients_of_the_whole_batch(world):
    for rank in runs(world):
        assert len(rank["ring"]["gradients"]) == len(expected()) == 3
        for mine, theirs in zip(rank["ring"]["gradients"], expected(), strict=True):
            assert mine.keys() == theirs.keys()
            assert relative_error(mine, theirs) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("world", SCENARIOS)
def test_rows_in_a_ring_are_counted_and_logged_once(world):
    one = run_ranks(train_rows_in_parts, 1, scenarios={"one": {"stage": None}})[0]["one"]
    for rank in runs(world):
        many = rank["ring"]
        assert many["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-9)
        free = {"micro_batches_per_update", "computed_tokens_per_update", "padding_fraction"}
        free |= {"train_runtime", "train_tokens_per_second"}
        for ours, theirs in zip(many["logs"], one["logs"], strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - free:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-9), key
    shares = {rank["ring"]["layout"].replica: rank["ring"]["seen"] for rank in runs(world)}
    rows = [row for seen in shares.values() for *_, members in seen for row in members]
    assert sorted(rows) == list(range(NUM_ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [name for name in SCENARIOS[2] if name != "ring"])
def test_mistakes_made_with_rings_would_be_seen(mistake):
    assert relative_error(runs(2)[0][mistake]["gradients"][0], expected()[0]) > 0.05
