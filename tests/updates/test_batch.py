"""Taking collated inputs apart and padding them again loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import pad, ragged_rows

from hf_gradacc.updates.batch import (
    can_slice_rows,
    count_rows,
    count_rows_per_sequence,
    pad_columns,
    slice_rows,
    trim_padding,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 5), st.booleans())
def test_trimming_undoes_padding_at_either_side(seed, extra, left):
    batch = pad(ragged_rows(4, seed=seed))
    width = batch["input_ids"].shape[1]
    wide = pad_columns(batch, width + extra, pad_token_id=9, left=left)
    assert {value.shape[1] for value in wide.values()} == {width + extra}
    back = trim_padding(wide)
    assert all(torch.equal(back[key], batch[key]) for key in batch)


def test_padding_is_no_target_and_is_masked():
    batch = pad(ragged_rows(2))
    width = batch["input_ids"].shape[1]
    wide = pad_columns(batch, width + 2, pad_token_id=9)
    assert wide["input_ids"][:, width:].eq(9).all()
    assert wide["labels"][:, width:].eq(-100).all()
    assert wide["attention_mask"][:, width:].eq(0).all()


def test_rows_are_cut_in_the_order_asked_for_and_the_rest_is_passed_on():
    inputs = {
        "input_ids": torch.arange(8).view(4, 2),
        "names": ["a", "b", "c", "d"],
        "scale": torch.tensor(3.0),
        "flag": True,
    }
    cut = slice_rows(inputs, [3, 1])
    assert cut["input_ids"].tolist() == [[6, 7], [2, 3]]
    assert cut["names"] == ["d", "b"]
    assert cut["scale"] is inputs["scale"]
    assert cut["flag"] is True
    assert count_rows(cut) == 2


def test_a_decoder_is_trimmed_by_its_own_labels():
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "labels": torch.tensor([[4, 5, -100, -100, -100]]),
        "decoder_input_ids": torch.tensor([[0, 4, 5, 0, 0]]),
    }
    bare = trim_padding(inputs)
    assert bare["input_ids"].tolist() == [[1, 2, 3]]
    assert bare["labels"].tolist() == [[4, 5]]
    assert bare["decoder_input_ids"].tolist() == [[0, 4]]


def test_a_decoder_as_wide_as_its_encoder_by_chance_keeps_its_targets():
    inputs = {
        "input_ids": torch.tensor([[1, 2, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0]]),
        "labels": torch.tensor([[4, 5, 6, 7]]),
        "decoder_input_ids": torch.tensor([[0, 4, 5, 6]]),
    }
    bare = trim_padding(inputs)
    assert bare["input_ids"].tolist() == [[1, 2]]
    assert bare["labels"].tolist() == [[4, 5, 6, 7]]
    assert bare["decoder_input_ids"].tolist() == [[0, 4, 5, 6]]


def test_choices_are_trimmed_by_the_longest_of_all():
    mask = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]]])
    bare = trim_padding({"input_ids": mask * 7, "attention_mask": mask})
    assert bare["input_ids"].tolist() == [[[7, 7], [7, 0]]]


@pytest.mark.parametrize(
    ("num_rows", "num_sequences", "expected"), [(3, 3, 1), (6, 3, 2), (1, 3, None), (4, 3, None)]
)
def test_rows_that_sequences_share_belong_to_none_of_them(num_rows, num_sequences, expected):
    inputs = {"input_ids": torch.zeros(num_rows, 2)}
    found = count_rows_per_sequence(inputs, num_sequences)
    assert found == expected
    assert can_slice_rows(inputs, num_sequences, rows_per_sequence=found) is (found is not None)
    assert count_rows_per_sequence({}, num_sequences) is None
