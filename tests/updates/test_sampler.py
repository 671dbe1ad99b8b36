"""The sampler: membership is a function of seed, epoch and update size, never of the hardware."""

import itertools
import pickle
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gradacc import ConfigError, DataError, UpdateSampler
from hf_gradacc.updates.sampler import Share, bound_updates_by_tokens

sizes = st.integers(1, 60)


@given(sizes, st.integers(1, 20), st.integers(0, 9), st.integers(0, 4))
def test_every_sequence_is_in_exactly_one_update_of_an_epoch(n, size, seed, epoch):
    sampler = UpdateSampler(n, effective_batch_size=size, seed=seed)
    updates = sampler.membership(epoch)
    assert sorted(i for update in updates for i in update) == list(range(n))
    assert [len(u) for u in updates[:-1]] == [size] * (len(updates) - 1)
    assert len(updates) == sampler.num_updates(epoch)


@given(sizes, st.integers(1, 20), st.integers(1, 8), st.booleans())
def test_ranks_share_out_the_same_updates_whatever_their_number(n, size, world_size, costly):
    lengths = np.arange(n) % 7 + 1 if costly else None
    whole = UpdateSampler(n, effective_batch_size=size, seed=3).membership(0)
    ranks = [
        list(
            UpdateSampler(
                n,
                effective_batch_size=size,
                seed=3,
                rank=r,
                world_size=world_size,
                lengths=lengths,
            )
        )
        for r in range(world_size)
    ]
    for u, members in enumerate(whole):
        assert sorted(i for rank in ranks for i in rank[u]) == sorted(members)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 80))
def test_updates_drawn_by_tokens_stop_at_the_first_sequence_that_reaches_the_goal(counts, goal):
    bounds = bound_updates_by_tokens(np.array(counts), goal)
    pieces = [counts[a:b] for a, b in itertools.pairwise(bounds)]
    assert [c for piece in pieces for c in piece] == counts
    for piece in pieces[:-1]:
        assert sum(piece) >= goal > sum(piece[:-1])


def test_epochs_shuffle_anew_and_a_seed_repeats_them():
    first, again = (UpdateSampler(40, effective_batch_size=8, seed=1) for _ in range(2))
    assert first.membership(0) == again.membership(0)
    assert first.membership(0) != first.membership(1)
    other_seed = UpdateSampler(40, effective_batch_size=8, seed=2)
    assert first.membership(0) != other_seed.membership(0)


def test_set_epoch_decides_what_is_iterated():
    sampler = UpdateSampler(10, effective_batch_size=4)
    sampler.set_epoch(2)
    assert [list(share) for share in sampler] == sampler.membership(2)


def test_drop_leaves_out_only_the_incomplete_update():
    kept = UpdateSampler(10, effective_batch_size=4)
    dropped = UpdateSampler(10, effective_batch_size=4, incomplete_update="drop")
    assert dropped.membership(0) == kept.membership(0)[:2]
    assert len(dropped) == 2


def test_without_shuffling_the_dataset_keeps_its_order():
    sampler = UpdateSampler(5, effective_batch_size=3, shuffle=False)
    assert sampler.membership(4) == [[0, 1, 2], [3, 4]]


def test_a_measured_update_is_dealt_at_random_and_others_by_cost():
    """Membership stays; on every rank the same order, another one in every update and epoch."""
    costs = [1 + i % 9 for i in range(48)]

    def shares(world_size, every):
        ranks = [
            UpdateSampler(
                48,
                effective_batch_size=16,
                rank=rank,
                world_size=world_size,
                lengths=costs,
                noise_scale_every=every,
            )
            for rank in range(world_size)
        ]
        return [[list(share) for share in update] for update in zip(*ranks, strict=True)]

    plain, measured = shares(3, None), shares(3, 2)
    assert measured[1] == plain[1], "between the measured ones nothing changes"
    for before, after in ((plain[0], measured[0]), (plain[2], measured[2])):
        assert after != before
        assert sorted(chain(*after)) == sorted(chain(*before)), "the same members"
        assert [len(share) for share in after] == [6, 5, 5]
    orders = {
        tuple(members.index(i) for i in share)
        for (share,), (members,) in zip(shares(1, 1), shares(1, None), strict=True)
    }
    assert len(orders) == 3, "not one shuffle for all updates"


def test_rows_that_come_in_an_order_are_dealt_at_random_where_measured():
    """Without shuffling neighbours may resemble each other: cut in order they show less noise."""
    options = {"effective_batch_size": 8, "shuffle": False}
    assert [list(share) for share in UpdateSampler(8, **options)] == [list(range(8))]
    (share,) = UpdateSampler(8, **options, noise_scale_every=1)
    assert sorted(share) == list(range(8)) != list(share)


def test_a_share_keeps_its_place_on_the_way_to_a_worker():
    share = pickle.loads(pickle.dumps(Share([4, 2], epoch=3, update=7)))
    assert (list(share), share.epoch, share.update) == ([4, 2], 3, 7)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"effective_batch_size": 4, "tokens_per_update": 9}, ConfigError, "exactly one"),
        ({}, ConfigError, "exactly one"),
        ({"effective_batch_size": 0}, ConfigError, "use at least 1"),
        ({"effective_batch_size": 4, "rank": 2, "world_size": 2}, ConfigError, "rank = 2"),
        ({"effective_batch_size": 9, "incomplete_update": "drop"}, DataError, "'drop' leaves no"),
        ({"tokens_per_update": 9}, ConfigError, "target_counts"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_updates_are_refused_in_plain_words(options, error, words):
    with pytest.raises(error, match=words):
        UpdateSampler(5, **options)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="0 rows"):
        UpdateSampler(0, effective_batch_size=2)
