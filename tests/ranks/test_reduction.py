"""Gradients are summed over ranks from inside of the last backward, and are those of one process.

Real gloo groups. The reference is one process that runs every micro-batch of all ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.reduction_jobs import (
    Tower,
    free_and_use_ddp,
    make_value,
    reduce_by_hand,
    train_and_write_late,
)
from torch.nn import Parameter

from hf_gradacc.ranks.reduction import fill_buckets

ALL = (0, 1, 2, 3, 4, 5)
CALM = {"micro_batches": [[ALL, ALL], [ALL]]}


def expected_gradient(update: dict[str, Any], place: int) -> dict[str, torch.Tensor | None]:
    """One process runs what all ranks ran; what nobody used keeps None."""
    model = Tower()
    for rank, micro_batches in enumerate(update["micro_batches"]):
        for i, used in enumerate(micro_batches):
            model(make_value(100 * place + 10 * rank + i), used).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check_gradients(ranks: list[Any], updates: list[dict[str, Any]], *, but: Any = ()) -> None:
    for place, update in enumerate(updates):
        if place in but:
            continue
        expected = expected_gradient(update, place)
        for results in ranks:
            actual = results[place]["gradient"]
            for name, grad in expected.items():
                assert (actual[name] is None) == (grad is None), (place, name)
                if grad is not None:
                    torch.testing.assert_close(actual[name], grad, rtol=1e-13, atol=1e-15)


def test_ranks_may_run_other_micro_batches_with_other_parameters_or_none_at_all():
    updates: list[dict[str, Any]] = [
        {"micro_batches": [[(0, 1, 2, 3)], [(0, 1, 3), (0, 1, 2)]]},  # layers 4 and 5 are not used
        {"micro_batches": [[(0, 1, 2, 3), (0, 1)], [(0, 1, 2, 3)]]},
        {"micro_batches": [[], [(0, 3)]]},  # a rank without rows; 1 and 2 keep None
        {"micro_batches": [[(3, 2, 1, 0)], [(0, 1, 2, 3)]]},  # in another order
        {"micro_batches": [[(0, 5)], [(0, 1, 2, 3)]]},  # the first gradient of layer 5
        {"micro_batches": [[ALL], [ALL, ALL]]},  # and of layer 4
        {"micro_batches": [[(0, 1, 2), (0, 1)], [(0, 1)]]},  # layer 2 is in nobody's last
        CALM,
    ]
    ranks = run_ranks(reduce_by_hand, 2, updates=updates)
    check_gradients(ranks, updates)
    for results in ranks:
        assert all(result["attempts"] == 1 and result["is_early"] for result in results)
        # Weight and bias of a layer are 336 bytes: no two weights share a bucket of 300.
        assert [result["buckets"] for result in results][:2] == [0, 8]
        assert results[-1]["buckets"] == 12
        assert results[-1]["early"] == 12
    # On the first rank the last micro-batch does not use the layer whose gradient was first.
    assert [results[1]["early"] for results in ranks] == [0, 8]


def test_a_rank_that_fails_in_its_last_backward_leaves_nobody_waiting_and_no_sum_behind():
    updates = [CALM, {**CALM, "fails": 0}, {**CALM, "fails": 1}, CALM]
    ranks = run_ranks(reduce_by_hand, 2, updates=updates)
    check_gradients(ranks, updates)
    for results in ranks:
        assert [result["attempts"] for result in results] == [1, 2, 2, 1]
        assert all(result["is_early"] for result in results)


@pytest.mark.parametrize("how", ["twice", "writes"])
def test_a_gradient_that_changes_after_it_was_sent_is_noticed_and_sent_again(how):
    updates = [CALM, {**CALM, how: 1}, CALM]
    ranks = run_ranks(reduce_by_hand, 2, updates=updates)
    check_gradients(ranks, updates, but=(1,))
    model = Tower()
    for rank, micro_batches in enumerate(CALM["micro_batches"]):
        for i, used in enumerate(micro_batches):
            twice = rank == 1  # it has one micro-batch, which counts double
            (model(make_value(100 + 10 * rank + i), used) * (2 if twice else 1)).backward()
    for results in ranks:
        for name, p in model.named_parameters():
            torch.testing.assert_close(results[1]["gradient"][name], p.grad, rtol=1e-13, atol=0)
        assert [result["attempts"] for result in results] == [1, 2, 1]
        assert [result["is_early"] for result in results] == [True, False, False]


@pytest.mark.slow
def test_a_step_that_writes_into_gradients_trains_as_if_they_were_sent_after_it():
    early, late = (run_ranks(train_and_write_late, 2, early=early) for early in (True, False))
    for ours, theirs in zip(early, late, strict=True):
        assert ours["sent"] > 0
        assert theirs["sent"] == 0
        for a, b in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)


def test_ddp_holds_no_copy_of_the_gradient_and_reduces_again_if_it_has_to():
    first, second = run_ranks(free_and_use_ddp, 2)
    for rank in (first, second):
        assert rank["freed"] > 0.9 * rank["size"]
        torch.testing.assert_close(rank["mean"], (first["local"] + second["local"]) / 2)
    assert not torch.allclose(first["local"], second["local"])


def test_buckets_hold_one_kind_each_and_are_in_the_order_they_are_complete():
    def make(size: int, dtype: torch.dtype) -> Parameter:
        return Parameter(torch.zeros(size, dtype=dtype))

    wide, narrow = torch.float32, torch.bfloat16
    parameters = [make(5, narrow), make(1, wide), make(5, narrow), make(1, wide), make(5, narrow)]
    assert fill_buckets(parameters, bucket_bytes=40) == [[0, 2], [1, 3], [4]]
    assert fill_buckets([], bucket_bytes=40) == []
