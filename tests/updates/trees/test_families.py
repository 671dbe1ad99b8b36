"""Rows that begin alike meet, every row comes once, and no hardware decides which."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradacc import UpdateSampler
from hf_gradacc.updates.trees.families import Families, find_families, most_rows_of
from hf_gradacc.updates.trees.prefixes import count_distinct_tokens, sort_by_prefix


def found_in(rows, size):
    return find_families(sort_by_prefix(rows), rows_per_update=size)


def families_of(rows, size):
    found = found_in(rows, size)
    return [found.rows[a:b].tolist() for a, b in zip(found.starts, found.stops, strict=True)]


def draw_tokens(seed):
    draw = random.Random(seed)
    return lambda count: [draw.randrange(3, 10_000) for _ in range(count)]


def answers(questions, each, *, head=(), seed=0, question=50, answer=40):
    """Rows of so many answers to each question, question by question."""
    some = draw_tokens(seed)
    rows = []
    for _ in range(questions):
        begin = [*head, *some(question)]
        rows += [begin + some(answer) for _ in range(each)]
    return rows


def computed(rows, updates):
    """Part of the tokens fed in that is computed if every update computes what it shares once."""
    sorts = [sort_by_prefix([rows[i] for i in members]) for members in updates]
    total = sum(len(rows[i]) for members in updates for i in members)
    return sum(map(count_distinct_tokens, sorts)) / total


def updates_of(rows, size, *, epoch=0, seed=0, families=True):
    found = found_in(rows, size) if families else None
    sampler = UpdateSampler(len(rows), effective_batch_size=size, seed=seed, families=found)
    return sampler.membership(epoch)


# ---- which rows are a family -------------------------------------------------------------------


def test_answers_to_one_question_are_a_family_and_rows_alone_are_none():
    rows = answers(10, 4) + answers(300, 1, seed=1)
    assert sorted(map(sorted, families_of(rows, 8))) == [
        list(range(first, first + 4)) for first in range(0, 40, 4)
    ]


@pytest.mark.parametrize("size", [16, 32, 64, 256])
def test_a_system_prompt_of_all_rows_makes_no_family_and_hides_none(size):
    head = draw_tokens(5)(300)
    assert families_of(answers(500, 1, head=head), size) == []
    assert len(families_of(answers(500, 8, head=head), size)) == 500


def test_turns_of_a_chat_are_a_family_with_its_first_turn():
    some, rows = draw_tokens(0), []
    for _ in range(200):
        chat = []
        for _ in range(4):
            chat = chat + some(60)
            rows.append(chat)
    assert {len(family) for family in families_of(rows, 32)} == {4}
    assert len(families_of(rows, 32)) == 200


def test_a_beginning_too_short_to_pay_is_none():
    head = draw_tokens(5)
    rows = [row for _ in range(50) for row in answers(1, 2, question=5, answer=100, head=head(1))]
    assert families_of(rows, 8) == []


def test_families_are_the_same_in_every_process():
    """Written down: nothing of them comes from a hash that Python seeds anew for each process."""
    rows = answers(3, 3, question=6, answer=3) + answers(4, 1, seed=2)
    found = found_in(rows, 2)
    assert sorted(map(sorted, families_of(rows, 2))) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert found.rows.tolist() == sorted(range(13), key=lambda i: np.int32(rows[i]).tobytes())
    assert found.digest == found_in(rows, 2).digest != found_in(rows, 12).digest


# ---- the order of an epoch ---------------------------------------------------------------------

token_rows = st.lists(st.lists(st.integers(1, 3), max_size=12), min_size=1, max_size=60)


@settings(deadline=None)
@given(token_rows, st.integers(1, 16), st.integers(0, 3), st.integers(0, 5))
def test_every_row_comes_once_and_updates_are_full(rows, size, seed, epoch):
    updates = updates_of(rows, size, seed=seed, epoch=epoch)
    assert sorted(itertools.chain(*updates)) == list(range(len(rows)))
    assert [len(update) for update in updates[:-1]] == [size] * (len(updates) - 1)


@settings(deadline=None)
@given(token_rows, st.integers(1, 40), st.data())
def test_updates_drawn_by_tokens_hold_every_row_once_too(rows, goal, data):
    counts = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    families = found_in(rows, 8)
    sampler = UpdateSampler(
        len(rows), target_counts=counts, tokens_per_update=goal, families=families
    )
    updates = sampler.membership(1)
    assert sorted(itertools.chain(*updates)) == list(range(len(rows)))
    for update in updates[:-1]:
        assert sum(counts[i] for i in update) >= goal > sum(counts[i] for i in update[:-1])


def pieces_of(rows, family, updates):
    """In how many updates a family's rows are."""
    return sum(not set(family).isdisjoint(update) for update in updates)


@pytest.mark.parametrize("epoch", range(3))
def test_no_family_is_cut_by_the_end_of_an_update_while_rows_alone_can_fill_it(epoch):
    rows = answers(60, 7) + answers(200, 1, seed=1)
    updates = updates_of(rows, 32, epoch=epoch)
    for family in families_of(rows, 32):
        assert len(family) == 7
        assert pieces_of(rows, family, updates) == 1


def test_updates_by_tokens_cut_no_family_either():
    rows = answers(60, 7) + answers(200, 1, seed=1)
    counts = [1 + i % 3 for i in range(len(rows))]
    families = found_in(rows, 32)
    sampler = UpdateSampler(
        len(rows), target_counts=counts, tokens_per_update=64, families=families
    )
    updates = sampler.membership(0)
    assert all(pieces_of(rows, family, updates) == 1 for family in families_of(rows, 32))


def test_families_alone_are_cut_by_the_ends_of_few_updates():
    """Of 7 rows, none of which has another to fill an update of 32 with."""
    rows = answers(320, 7)
    updates = updates_of(rows, 32)
    cut = [family for family in families_of(rows, 32) if pieces_of(rows, family, updates) > 1]
    assert 0 < len(cut) <= len(updates)
    assert (
        computed(rows, updates) < 0.57 < 0.92 < computed(rows, updates_of(rows, 32, families=False))
    )


@pytest.mark.parametrize("size", [32, 64, 256])
def test_a_family_of_more_rows_than_may_be_drawn_together_is_cut_anew_in_every_epoch(size):
    rows = answers(10, 64) + answers(3000, 1, seed=1)
    most = most_rows_of(size)
    together = []
    for epoch in range(3):
        updates = updates_of(rows, size, epoch=epoch)
        groups = [
            frozenset(group)
            for update in updates
            for question in range(10)
            if (group := [i for i in update if i // 64 == question and i < 640])
        ]
        # Two pieces of one question may come into one update, as any two families may.
        assert sum(len(group) <= most for group in groups) > 0.8 * len(groups)
        assert sum(map(len, groups)) / len(groups) > most / 2
        together.append(set(groups))
    assert len(together[0] & together[1]) < len(together[0]) / 4


def test_epochs_and_seeds_shuffle_families_and_the_rows_of_each():
    rows = answers(40, 4)
    plain = updates_of(rows, 16)
    assert plain == updates_of(rows, 16)
    for other in (updates_of(rows, 16, epoch=1), updates_of(rows, 16, seed=1)):
        assert other != plain
        assert set(map(frozenset, other)).isdisjoint(map(frozenset, plain))
    places = {update.index(0) - min(map(update.index, range(4))) for update in plain if 0 in update}
    places |= {
        update.index(0) - min(map(update.index, range(4)))
        for epoch in range(1, 12)
        for update in updates_of(rows, 16, epoch=epoch)
        if 0 in update
    }
    assert len(places) > 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_same_updates_whatever_their_number(world_size):
    rows = answers(30, 6) + answers(50, 1, seed=1)
    families, lengths = found_in(rows, 24), [len(row) for row in rows]
    options = {"effective_batch_size": 24, "families": families, "lengths": lengths, "seed": 3}
    ranks = [
        list(UpdateSampler(len(rows), rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    for shares, members in zip(zip(*ranks, strict=True), one_rank(rows, options), strict=True):
        assert sorted(itertools.chain(*shares)) == sorted(members)


def one_rank(rows, options):
    return UpdateSampler(len(rows), **options).membership(0)


def test_without_families_the_shuffle_is_that_of_any_run():
    rows = answers(50, 1)
    assert updates_of(rows, 8) == updates_of(rows, 8, families=False)


# ---- broken variants ---------------------------------------------------------------------------


class LosesRow(Families):
    """Leaves out what does not fit into the last update."""

    def draw(self, *args, **kwargs):
        return super().draw(*args, **kwargs)[:-1]


class NamesRowTwice(Families):
    def draw(self, *args, **kwargs):
        order = super().draw(*args, **kwargs)
        return np.append(order[:-1], order[0])


class CutsByPlace(Families):
    """Lets families begin where they may: at the ends of updates they are cut."""

    def draw(self, seed, epoch, *, size, weights=None):
        return super().draw(seed, epoch, size=10**9)


class IgnoresEpoch(Families):
    def draw(self, seed, epoch, **kwargs):
        return super().draw(seed, 0, **kwargs)


def promises(families, rows, size):
    """What must hold of every way to draw families, by name."""
    sampler = UpdateSampler(len(rows), effective_batch_size=size, families=families)
    updates = [sampler.membership(epoch) for epoch in range(2)]
    all_rows = list(range(len(rows)))
    whole = families_of(rows, size)
    return {
        "each once": all(sorted(itertools.chain(*epoch)) == all_rows for epoch in updates),
        "whole": all(pieces_of(rows, family, updates[0]) == 1 for family in whole),
        "anew": updates[0] != updates[1],
    }


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (LosesRow, "each once"),
        (NamesRowTwice, "each once"),
        (CutsByPlace, "whole"),
        (IgnoresEpoch, "anew"),
    ],
)
def test_broken_ways_to_draw_families_are_rejected(broken, promise):
    rows = answers(60, 7) + answers(200, 1, seed=1)
    found = found_in(rows, 32)
    assert all(promises(found, rows, 32).values())
    assert not promises(broken(**vars(found)), rows, 32)[promise]
