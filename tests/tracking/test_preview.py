"""Rows as the loss sees them, shown without using them up."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.tiny import spaced_rows
from torch.utils.data import IterableDataset

from hf_gradacc.tracking.preview import (
    first_ids,
    mark_targets,
    preview_row,
    preview_rows,
    sampled_lengths,
)


class Stream(IterableDataset):
    """Has a length, and inherits a `__getitem__` that only raises."""

    def __init__(self):
        self.rows = iter(spaced_rows())

    def __iter__(self):
        return self.rows

    def __len__(self):
        return 24


@pytest.mark.parametrize("stream", [Stream(), iter(spaced_rows())], ids=["dataset", "iterator"])
def test_a_stream_is_not_used_up_by_the_preview(stream):
    assert preview_rows(stream) == []
    assert sampled_lengths(stream) == []
    assert len(list(iter(stream))) == 24


def test_the_first_label_is_never_marked_as_a_target():
    assert mark_targets([5, 6, 7], [5, 6, -100]) == "5 ⟦6⟧ 7"


def test_the_preview_is_spread_over_the_whole_dataset():
    rows = spaced_rows(100)
    table = preview_rows(rows, num_rows=8)
    assert [row[0] for row in table] == list(range(0, 100, 13))
    assert sampled_lengths(rows, num_rows=50) == [len(row["input_ids"]) for row in rows[::2]]


def test_rows_of_other_kinds_are_shown_without_marks():
    table = preview_rows([{"input_ids": [5, 6, 7], "labels": [[1]]}, {"pixels": [1.0]}])
    assert table == [[0, "5 6 7", 3, None]]


def test_a_class_is_a_target_by_its_name_and_a_number_by_itself():
    rows = [{"input_ids": [5, 6], "labels": label} for label in (1, 3, 0.25)]
    table = preview_rows(rows, label_names={0: "bad", 1: "good"})
    assert [row[1:] for row in table] == [
        ["5 6 → ⟦good⟧", 2, 1],
        ["5 6 → ⟦3⟧", 2, 1],
        ["5 6 → ⟦0.25⟧", 2, 1],
    ]


def test_the_target_of_an_encoder_decoder_stands_behind_its_source():
    row = {"input_ids": [5, 6], "labels": [7, 8]}  # of equal length, and still no causal LM's
    assert preview_rows([row], is_seq2seq=True) == [[0, "5 6 → ⟦7 8⟧", 2, 2]]


HOLDERS = [list, tuple, np.array, torch.tensor, pa.array, lambda ids: list(np.array(ids))]


@pytest.mark.parametrize(
    "hold", HOLDERS, ids=["list", "tuple", "numpy", "torch", "arrow", "list of numpy"]
)
def test_rows_are_shown_alike_whatever_holds_their_numbers(hold):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}
    pair = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
    bare = {"prompt_ids": [], "chosen_ids": [2, 3], "rejected_ids": [4]}
    for plain in (row, pair, bare):
        held = {name: hold(ids) for name, ids in plain.items()}
        assert preview_row(held) == preview_row(plain)
        assert first_ids(held) == first_ids(plain) != []
    source = {name: hold(ids) for name, ids in row.items()}
    assert str(preview_row(source, is_seq2seq=True)) == "5 6 7 → ⟦6⟧"
    label = hold([3])[0]
    assert str(preview_row({"input_ids": hold([5]), "labels": label})) == "5 → ⟦3⟧"
