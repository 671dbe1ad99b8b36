"""Sequences that become two collated rows: cut again, they are what TRL's collator would make."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("trl")

from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_gradacc.loss.asking.rows import ProbeRows
from hf_gradacc.updates.collator import UpdateCollator, make_micro_batch
from hf_gradacc.updates.lengths import measure_length
from hf_gradacc.updates.planner import plan_micro_batches
from hf_gradacc.updates.recut import can_slice, cut_again, even_out
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.update import Update

COLLATE = DataCollatorForPreference(pad_token_id=0)


def make_rows(count, *, seed=0):
    draw = random.Random(seed)

    def ids(longest):
        return [draw.randrange(3, 48) for _ in range(draw.randint(1, longest))]

    return [
        {
            "prompt_ids": ids(4),
            "chosen_ids": ids(9),
            "rejected_ids": ids(9),
            "ref_chosen_logps": draw.random(),
            "ref_rejected_logps": draw.random(),
        }
        for _ in range(count)
    ]


def assert_collated(micro_batch, rows):
    expected = COLLATE(rows)
    assert micro_batch.inputs.keys() == expected.keys()
    for key, value in expected.items():
        assert micro_batch.inputs[key].equal(value), key


def make_update(rows, *, max_sequences):
    collator = UpdateCollator(COLLATE, max_sequences=max_sequences)
    collator.rows_per_sequence = ProbeRows.of(
        rows[:3], COLLATE(rows[:3]), COLLATE
    ).rows_per_sequence
    return collator(rows)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_tokens", [20, 45, 100])
def test_pairs_cut_again_are_what_the_collator_makes_of_them(seed, max_tokens):
    rows = make_rows(9, seed=seed)
    update = make_update(rows, max_sequences=4)
    assert all(can_slice(mb) and mb.rows_per_sequence == 2 for mb in update)
    plans = []

    def cut(lengths):
        plans.append(plan_micro_batches(lengths, max_tokens=max_tokens))
        return plans[-1]

    again = cut_again(update, cut, count=make_micro_batch)
    assert len(again) == len(plans[0]) > 1
    for micro_batch, piece in zip(again, plans[0], strict=True):
        assert micro_batch.num_sequences == len(piece)
        assert_collated(micro_batch, [rows[i] for i in piece])


def test_the_cost_of_a_pair_is_what_its_two_rows_take_in_a_batch():
    rows = make_rows(6)
    for row in rows:
        assert measure_length(row) == COLLATE([row])["input_ids"].numel()


def test_a_rank_with_nothing_left_runs_one_whole_pair_of_weight_zero():
    rows = make_rows(3)
    update = even_out(
        Update([]),
        2,
        halve=lambda micro_batch: [micro_batch],
        rule=TargetRule.SEQUENCE,
        spare=COLLATE(rows),
        rows_per_sequence=2,
    )
    assert [mb.weightless for mb in update] == [True, True]
    for micro_batch in update:
        assert_collated(micro_batch, rows[:1])


def test_a_rank_with_nothing_left_runs_all_rows_if_they_cannot_be_told_apart():
    rows = make_rows(3)
    update = even_out(
        Update([]),
        1,
        halve=lambda micro_batch: [micro_batch],
        rule=TargetRule.SEQUENCE,
        spare=COLLATE(rows),
        rows_per_sequence=None,
    )
    (micro_batch,) = update
    assert micro_batch.weightless
    assert_collated(micro_batch, rows)


def test_rows_that_alternate_are_not_taken_for_blocks():
    """[chosen, rejected, chosen, rejected] is another order: such rows are collated, not sliced."""

    def alternate(rows):
        n = len(rows)
        order = torch.arange(2 * n).view(2, n).T.reshape(-1)
        return {
            key: value[order] if len(value) == 2 * n else value
            for key, value in COLLATE(rows).items()
        }

    rows = make_rows(3)
    assert ProbeRows.of(rows, COLLATE(rows), COLLATE).rows_per_sequence == 2
    known = ProbeRows.of(rows, alternate(rows), alternate)
    assert known.rows_per_sequence is None
    assert known.take([2])["input_ids"].equal(alternate(rows[2:])["input_ids"])
