"""Pairs as trees: together in one tree, under the budget, with as many tokens as they have."""

import functools
import itertools
import random

import numpy as np
import pytest
import torch
from support.common_prompts import rows_of_prompts
from support.tiny import pad

from hf_gradacc.loss.trees.layout import lay_out_trees
from hf_gradacc.trainer.runner import _halve
from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.lengths import measure_length, sequences_of_rows
from hf_gradacc.updates.limits import Limits
from hf_gradacc.updates.recut import cut_to_limit, even_out
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.trees.cost import TreeCost, padded_cost
from hf_gradacc.updates.trees.pairs import (
    halve_trees,
    plan_shared_sequences,
    sort_together,
    trees_of_sequences,
)
from hf_gradacc.updates.update import Update


def draw_pairs(seed, *, count=12, per_pair=2, system=5):
    """Pairs that all begin alike; of every third pair the prompt is there already."""
    draw = random.Random(seed)

    def some(least, most):
        return [draw.randrange(9) for _ in range(draw.randint(least, most))]

    begin, prompts, pairs = some(system, system), [], []
    for index in range(count):
        prompts.append(begin + some(3, 12) if index % 3 else draw.choice(prompts or [begin]))
        pairs.append([prompts[-1] + some(0, 5) for _ in range(per_pair)])
    return pairs


def count_prefixes(rows):
    """Tokens of a tree, by another way: the different beginnings of its rows."""
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


@pytest.mark.parametrize("per_pair", [2, 3])
@pytest.mark.parametrize("max_tokens", [None, 30, 70])
@pytest.mark.parametrize("attention_length", [None, 40])
@pytest.mark.parametrize("seed", range(5))
def test_pairs_stay_together_under_the_budget_and_sizes_are_true(
    seed, attention_length, max_tokens, per_pair
):
    pairs = draw_pairs(seed, per_pair=per_pair)
    plan = plan_shared_sequences(pairs, TreeCost(attention_length), Limits(max_tokens=max_tokens))
    assert sorted(itertools.chain.from_iterable(plan.pieces)) == list(range(len(pairs)))
    for piece, trees in zip(plan.pieces, plan.trees, strict=True):
        collated = [pairs[i][block] for block in range(per_pair) for i in piece]
        assert sorted(itertools.chain.from_iterable(trees.rows)) == list(range(len(collated)))
        for rows, size in zip(trees.rows, trees.sizes, strict=True):
            held = {row % len(piece) for row in rows}
            assert len(rows) == per_pair * len(held)
            assert size == count_prefixes([collated[row] for row in rows])
        if max_tokens is not None and len(piece) > 1:
            assert trees.num_computed <= max_tokens


@pytest.mark.parametrize("seed", range(20))
def test_what_pairs_are_said_to_share_they_do_share(seed):
    """A tree is never larger than it was planned to be, whatever run of neighbours it holds."""
    pairs = draw_pairs(seed)
    found = sort_together(pairs)
    own = found.lengths - found.shared
    for first, last in itertools.combinations(range(len(pairs) + 1), 2):
        rows = [row for i in found.order[first:last] for row in pairs[i]]
        assert count_prefixes(rows) <= int(own[first:last].sum() + found.shared[first])


def test_pairs_of_one_prompt_are_one_tree_and_cost_less():
    prompt = list(range(40))
    pairs = [[[*prompt, 50 + i], [*prompt, 60 + i]] for i in range(4)]
    plan = plan_shared_sequences(pairs, TreeCost(1000))
    assert [trees.sizes for trees in plan.trees] == [(48,)]
    plain = padded_cost([82] * 4, [[0, 1, 2, 3]], TreeCost(1000), rows_each=2)
    assert plan.cost < plain / 5


def test_a_pair_counts_as_two_rows_where_nothing_is_shared():
    assert padded_cost([8, 4], [[0, 1]], TreeCost(4), rows_each=2) == 4 * 4 * (1 + 4 / 4)


@pytest.mark.parametrize("seed", range(10))
def test_halves_of_trees_hold_every_sequence_once(seed):
    pairs = draw_pairs(seed)
    whole = trees_of_sequences(pairs, TreeCost(60))
    left, right = halve_trees(whole, len(pairs))
    assert sorted(left + right) == list(range(len(pairs)))
    assert left
    assert right
    for half in (left, right):
        again = trees_of_sequences([pairs[i] for i in half], TreeCost(60))
        assert again is None or again.num_tokens <= whole.num_tokens


# ---- rows of preferences -----------------------------------------------------------------------

DPO = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}


def test_the_sequences_of_a_row_are_its_answers_behind_its_prompt():
    assert sequences_of_rows([DPO], rows_per_sequence=2) == [[[1, 2, 3], [1, 2, 4, 5]]]
    reward = {"chosen_ids": np.array([1, 3]), "rejected_ids": np.array([1, 4])}
    assert sequences_of_rows([reward], rows_per_sequence=2) == [[[1, 3], [1, 4]]]
    kto = {"prompt_ids": [1], "completion_ids": [2], "KL_completion_ids": [3]}
    assert sequences_of_rows([kto]) == [[[1, 2]]]
    triple = {**DPO, "reference_ids": [6]}
    assert sequences_of_rows([triple], rows_per_sequence=3)[0][2] == [1, 2, 6]
    # TRL's collator may leave the reference out.
    assert sequences_of_rows([triple], rows_per_sequence=2)[0] == [[1, 2, 3], [1, 2, 4, 5]]


@pytest.mark.parametrize("per_sequence", [3, None])
def test_rows_that_become_something_else_are_not_known(per_sequence):
    assert sequences_of_rows([DPO], rows_per_sequence=per_sequence) is None
    assert sequences_of_rows([{"text": "a"}]) is None
    assert sequences_of_rows([DPO, {"prompt_ids": "ab"}], rows_per_sequence=2) is None


def collate(rows, *, most=None):
    answers = [
        row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids") for row in rows
    ]
    answers = [ids[:most] for ids in answers]
    width = max(map(len, answers))
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in answers]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in answers]),
    }


def preference_rows(seed=3, count=12):
    draw = random.Random(seed)

    def some(least, most):
        return [draw.randrange(1, 40) for _ in range(draw.randint(least, most))]

    prompts = [some(12, 20) for _ in range(count // 2)]
    return [
        {"prompt_ids": prompts[i // 2], "chosen_ids": some(1, 6), "rejected_ids": some(1, 6)}
        for i in range(count)
    ]


def make_collator(**options):
    collator = UpdateCollator(collate, **options)
    collator.rows_per_sequence, collator.shares_prefixes = 2, True
    return collator


def assert_counts_are_those_of_the_layout(update):
    for micro_batch in update:
        ids, mask = micro_batch.inputs["input_ids"], micro_batch.inputs["attention_mask"]
        laid_out = lay_out_trees(ids, mask, micro_batch.trees.rows)
        assert micro_batch.trees.num_tokens == laid_out.num_tokens
        assert micro_batch.num_input_tokens == int(mask.sum())
        assert micro_batch.num_shared_tokens == int(mask.sum()) - laid_out.num_tokens
        assert micro_batch.num_computed_tokens == laid_out.ids.numel()


@pytest.mark.parametrize("max_tokens", [None, 80])
def test_an_update_of_pairs_counts_what_its_layout_computes(max_tokens):
    rows = preference_rows()
    update = make_collator(max_tokens=max_tokens)(rows)
    assert sum(mb.num_sequences for mb in update) == len(rows)
    assert_counts_are_those_of_the_layout(update)
    plain = sum(measure_length(row) for row in rows)
    assert sum(mb.num_computed_tokens for mb in update) < 0.6 * plain
    if max_tokens is not None:
        assert len(update) > 1
        assert max(mb.num_computed_tokens for mb in update) <= max_tokens


def test_rows_that_the_collator_cuts_off_are_counted_as_they_are_then():
    """TRL's does, by max_length; the plan has seen whole rows."""
    collator = make_collator()
    collator.data_collator = lambda rows: collate(rows, most=9)
    update = collator(preference_rows())
    assert_counts_are_those_of_the_layout(update)
    assert all(mb.num_shared_tokens >= 0 for mb in update)


def test_pairs_cut_again_are_those_a_smaller_budget_gives():
    rows = preference_rows()
    again = cut_to_limit(make_collator()(rows), make_collator(), max_tokens=80)
    fresh = make_collator(max_tokens=80)(rows)
    assert len(again) == len(fresh) > 1
    for mine, theirs in zip(again, fresh, strict=True):
        assert (mine.trees, mine.places) == (theirs.trees, theirs.places)
        assert mine.num_computed_tokens == theirs.num_computed_tokens
        for key in theirs.inputs:
            assert torch.equal(mine.inputs[key], theirs.inputs[key])


def test_pairs_that_share_nothing_stay_rows():
    draw = random.Random(0)
    rows = [
        {name: [draw.randrange(1, 10**6) for _ in range(5)] for name in DPO if "prompt" not in name}
        | {"prompt_ids": []}
        for _ in range(6)
    ]
    assert all(mb.trees is None for mb in make_collator(max_tokens=100)(rows))


def test_a_hole_in_the_mask_keeps_rows_rows():
    def with_hole(rows):
        batch = collate(rows)
        batch["attention_mask"][0, 2] = 0
        return batch

    collator = make_collator()
    collator.data_collator = with_hole
    update = collator(preference_rows())
    assert all(mb.trees is None and mb.num_shared_tokens == 0 for mb in update)


# ---- as many micro-batches on every rank -------------------------------------------------------


@pytest.mark.parametrize("per_sequence", [1, 2])
def test_halves_for_ranks_in_lockstep_stay_trees_of_the_same_rows(per_sequence):
    collator, rows = make_collator(), preference_rows()
    if per_sequence == 1:
        collator = UpdateCollator(lambda rows: pad(rows))
        collator.shares_prefixes = True
        rows = rows_of_prompts(12, prompts=2)
    # One micro-batch of trees, whatever its padding.
    collator.overhead_tokens, collator.least_saving = 10**6, 0.0
    (whole,) = collator(rows)
    update = even_out(
        Update([whole]),
        4,
        halve=functools.partial(_halve, collator=collator),
        rule=TargetRule.SEQUENCE,
        spare=None,
        rows_per_sequence=per_sequence,
    )
    assert len(update) == 4
    assert sorted(place for mb in update for place in mb.places) == list(range(12))
    assert sum(mb.trees is not None for mb in update) >= 3
    for micro_batch in update:
        assert not micro_batch.weightless
        assert micro_batch.rows_per_sequence == per_sequence
        fresh = collator.data_collator([rows[place] for place in micro_batch.places])
        for key in fresh:
            assert torch.equal(micro_batch.inputs[key], fresh[key])
    assert_counts_are_those_of_the_layout([mb for mb in update if mb.trees is not None])
