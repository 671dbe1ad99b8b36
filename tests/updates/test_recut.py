"""Cutting collated micro-batches again gives what the collator would have given."""

import random

import pytest
import torch
from support.tiny import ragged_rows

from hf_gradacc import Update, UpdateCollator
from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.recut import can_slice, cut_again, cut_to_limit, join_rows, planned_lengths
from hf_gradacc.updates.stream import Rows


class Pad:
    """Pads rows as Hugging Face's collators do, with the options they have."""

    def __init__(self, *, left=False, multiple_of=1, width=None, masks=False):
        self.left, self.pad_to_multiple_of, self.width = left, multiple_of, width
        self.masks = masks

    def __call__(self, rows):
        fills = {"input_ids": 3, "attention_mask": 0, "labels": -100, "kind": 9}
        batch = {}
        for key in rows[0]:
            if not isinstance(rows[0][key], list):
                batch[key] = torch.tensor([row[key] for row in rows])
                continue
            width = self.width or max(len(row[key]) for row in rows)
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
            padding = [[fills[key]] * (width - len(row[key])) for row in rows]
            pairs = zip(rows, padding, strict=True)
            batch[key] = torch.tensor(
                [more + row[key] if self.left else row[key] + more for row, more in pairs]
            )
        if self.masks:
            batch["labels"][torch.rand(batch["labels"].shape) < 0.5] = -100
        return batch


def rows_of(count, *, encoder_decoder=False, seed=0):
    draw = random.Random(seed)
    rows = ragged_rows(count, seed=seed)
    for row in rows:
        row["kind"] = [draw.randrange(9) for _ in row["input_ids"]]
        row["score"] = draw.random()
        if encoder_decoder:
            row["labels"] = row["labels"][: draw.randint(1, len(row["labels"]))]
            row["labels"][-1] = 5
    return rows


def share_of(rows):
    order = random.Random(3).sample(range(100), len(rows))
    return Rows(rows, indices=order, epoch=0, update=4)


VARIANTS = {
    "padding on the right": ({}, {}),
    "padding on the left": ({"left": True}, {}),
    "widths in steps of 8": ({"multiple_of": 8}, {}),
    "one fixed width": ({"width": 20}, {}),
    "an encoder-decoder": ({}, {"encoder_decoder": True}),
    "padded alike": ({}, {"pad_to_one_width": True}),
    "cut in drawn order": ({}, {"noise_scale_every": 2}),
    "planned for packing": ({}, {"packed": True}),
}


def make_collator(pad, options, **limits):
    options = dict(options)
    collator = UpdateCollator(
        pad, encoder_decoder=options.pop("encoder_decoder", False), **{"max_tokens": 90} | limits
    )
    for name, value in options.items():
        setattr(collator, name, value)
    return collator


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_a_collator_with_the_smaller_limit(variant, seed):
    padding, options = VARIANTS[variant]
    pad = Pad(**padding)
    rows = rows_of(17, encoder_decoder=options.get("encoder_decoder", False), seed=seed)
    collator = make_collator(pad, options)
    update = collator(share_of(rows))
    for cap in (60, 31, 9, 1):
        update = cut_to_limit(
            update,
            collator,
            max_tokens=cap,
            pad_token_id=3,
            left=pad.left,
            encoder_decoder=collator.encoder_decoder,
        )
        expected = make_collator(pad, options, max_tokens=cap)(share_of(rows))
        assert [mb.rows for mb in update] == [mb.rows for mb in expected]
        for mine, theirs in zip(update, expected, strict=True):
            assert mine.inputs.keys() == theirs.inputs.keys()
            for key, value in theirs.inputs.items():
                assert torch.equal(mine.inputs[key], value), (cap, key)
                assert mine.inputs[key].is_contiguous()  # losses call labels.view(-1)
            assert mine.targets == theirs.targets
            assert mine.num_input_tokens == theirs.num_input_tokens
            assert mine.num_padding_tokens == theirs.num_padding_tokens
            assert (mine.lengths, mine.places) == (theirs.lengths, theirs.places)


def test_labels_drawn_at_random_stay_with_their_rows():
    collator = make_collator(Pad(masks=True), {})
    update = collator(share_of(rows_of(17)))
    before = {row: labels for mb in update for row, labels in _labels_by_row(mb).items()}
    finer = cut_again(update, lambda n: collator.cut(n, max_tokens=9), count=make_micro_batch)
    assert len(finer) > len(update)
    assert {row: labels for mb in finer for row, labels in _labels_by_row(mb).items()} == before


def _labels_by_row(micro_batch):
    labels = micro_batch.inputs["labels"]
    return {
        row: tuple(labels[i][micro_batch.inputs["attention_mask"][i] == 1].tolist())
        for i, row in enumerate(micro_batch.rows)
    }


def test_a_micro_batch_that_stays_whole_is_not_copied():
    collator = make_collator(Pad(), {})
    update = collator(share_of(rows_of(9)))
    again = cut_again(update, collator.cut, count=make_micro_batch)
    assert all(mine is theirs for mine, theirs in zip(again, update, strict=True))


def test_inputs_that_do_not_belong_to_rows_are_left_in_one_piece():
    patches = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "pixel_values": torch.ones(9, 4)}
    micro_batch = make_micro_batch(patches)
    assert not can_slice(micro_batch)
    update = cut_again(
        Update([micro_batch]),
        lambda lengths: [[i] for i in range(len(lengths))],
        count=make_micro_batch,
    )
    assert list(update) == [micro_batch]


def test_lengths_are_taken_from_the_mask_where_nobody_planned():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    bare = make_micro_batch({"input_ids": torch.ones(2, 3, dtype=torch.int64)})
    masked = make_micro_batch({"input_ids": torch.ones_like(mask), "attention_mask": mask})
    assert planned_lengths(masked) == [3, 1]
    assert planned_lengths(bare) == [1, 1]


def test_masks_of_four_dimensions_are_widened_in_both():
    a, b = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)
    joined = join_rows([{"mask": a}, {"mask": b}], fills={})["mask"]
    assert joined.shape == (2, 1, 3, 3)
    assert joined[0].sum() == 4
