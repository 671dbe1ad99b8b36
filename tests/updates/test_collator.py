"""From rows to an update: what is left out, how it is cut, what is counted."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import pad, ragged_rows

from hf_gradacc import UpdateCollator
from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.lengths import measure_length
from hf_gradacc.updates.stream import Rows
from hf_gradacc.updates.targets import TargetRule

ROWS = ragged_rows(9, seed=51)


def all_rows(update):
    """The rows of an update, unpadded, in a fixed order."""
    found = []
    for micro_batch in update:
        for ids, mask, labels in zip(*micro_batch.inputs.values(), strict=True):
            n = int(mask.sum())
            found.append((ids[:n].tolist(), labels[:n].tolist()))
    return sorted(found)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 99))
def test_every_row_arrives_whole_however_the_update_is_cut(max_sequences, max_tokens, seed):
    rows = ragged_rows(9, seed=seed)
    update = UpdateCollator(pad, max_sequences=max_sequences, max_tokens=max_tokens)(rows)
    assert all_rows(update) == sorted((row["input_ids"], row["labels"]) for row in rows)


def test_counts_are_those_of_the_rows():
    update = UpdateCollator(pad, max_sequences=4)(ROWS)
    stats = update.stats(TargetRule.NEXT_TOKEN)
    assert stats.num_targets == sum(sum(x != -100 for x in row["labels"][1:]) for row in ROWS)
    assert stats.num_sequences == 9
    assert stats.num_input_tokens == sum(len(row["input_ids"]) for row in ROWS)
    computed = sum(mb.inputs["input_ids"].numel() for mb in update)
    assert stats.num_padding_tokens == computed - stats.num_input_tokens


def test_rows_without_a_target_are_left_out_and_counted():
    bare = {**ROWS[0], "labels": [-100] * len(ROWS[0]["labels"])}
    update = UpdateCollator(pad)([bare, ROWS[1], bare])
    assert (update.num_left_out, len(update.micro_batches)) == (2, 1)
    assert all_rows(update) == [(ROWS[1]["input_ids"], ROWS[1]["labels"])]


def test_a_row_whose_only_target_is_its_first_label_is_left_out_once_the_loss_is_known_to_shift():
    row = {**ROWS[0], "labels": [7] + [-100] * (len(ROWS[0]["labels"]) - 1)}
    collator = UpdateCollator(pad)
    assert collator([row]).num_left_out == 0
    collator.rule = TargetRule.NEXT_TOKEN
    assert collator([row]).num_left_out == 1


def test_an_empty_share_is_an_empty_update():
    assert len(UpdateCollator(pad)([])) == 0


def test_padding_alike_gives_all_micro_batches_one_width_and_calls_the_collator_once():
    calls = []

    def counted(rows):
        calls.append(len(rows))
        return pad(rows)

    collator = UpdateCollator(counted, max_sequences=2)
    collator.pad_to_one_width = True
    update = collator(ROWS)
    assert len({mb.inputs["input_ids"].shape[1] for mb in update}) == 1
    assert calls == [9]
    assert all_rows(update) == sorted((row["input_ids"], row["labels"]) for row in ROWS)


def test_where_rows_came_from_goes_with_them():
    share = Rows(ROWS[:3], indices=[30, 10, 20], epoch=2, update=5)
    update = UpdateCollator(pad, max_sequences=1)(share)
    assert (update.epoch, update.index) == (2, 5)
    for micro_batch in update:
        place = [30, 10, 20].index(micro_batch.rows[0])
        assert int(micro_batch.inputs["attention_mask"].sum()) == len(ROWS[place]["input_ids"])


def test_a_collator_that_draws_does_so_by_seed_and_epoch_and_leaves_no_trace():
    def drawing(rows):
        return {**pad(rows), "noise": torch.rand(len(rows))}

    def draw(epoch, seed=0):
        share = Rows(ROWS, indices=range(9), epoch=epoch, update=1)
        collator = UpdateCollator(drawing, max_sequences=9, seed=seed)
        return collator(share).micro_batches[0].inputs["noise"]

    before = torch.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(draw(3), first)
    assert not torch.equal(draw(4), first)
    assert not torch.equal(draw(3, seed=1), first)


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"input_ids": [1, 2, 3]}, {}, 3),
        ({"input_ids": torch.ones(4)}, {}, 4),
        ({"input_ids": np.ones(5)}, {}, 5),
        ({"input_ids": [1, 2], "labels": [3, 4, 5]}, {"add_labels": True}, 5),
        ({"input_ids": [[1, 2], [1, 2, 3, 4]]}, {}, 8),
        ({"text": "hello"}, {"main_input": "text"}, 0),
        ({"labels": 1}, {}, 0),
        ("a string", {}, 0),
    ],
    ids=str,
)
def test_the_length_of_a_row_is_what_it_will_cost(row, options, expected):
    assert measure_length(row, **options) == expected


def test_a_batch_without_a_mask_counts_the_tokens_of_its_rows():
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1]}]
    inputs = {"input_ids": torch.tensor([[1, 2, 3], [1, 0, 0]])}
    micro_batch = make_micro_batch(inputs, rows)
    assert (micro_batch.num_input_tokens, micro_batch.num_padding_tokens) == (4, 2)
    assert make_micro_batch(inputs).num_padding_tokens == 0


def test_an_encoder_decoder_pads_its_labels_too():
    inputs = {
        "input_ids": torch.ones(2, 4, dtype=torch.int64),
        "attention_mask": torch.ones(2, 4, dtype=torch.int64),
        "labels": torch.tensor([[5, 6, 7], [5, -100, -100]]),
    }
    micro_batch = make_micro_batch(inputs, encoder_decoder=True)
    assert (micro_batch.num_input_tokens, micro_batch.num_padding_tokens) == (12, 2)


def test_a_collator_travels_to_workers():
    update = pickle.loads(pickle.dumps(UpdateCollator(pad, max_sequences=3)))(ROWS)
    assert len(update) == 3
