"""Rows as the loss sees them, shown without using them up."""

from __future__ import annotations

import pytest
from support.tiny import spaced_rows
from torch.utils.data import IterableDataset

from hf_gradacc.tracking.wandb import mark_targets, preview_rows, sampled_lengths


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


def test_rows_that_are_not_those_of_a_causal_lm_are_shown_without_marks():
    table = preview_rows([{"input_ids": [5, 6, 7], "labels": 1}, {"pixels": [1.0]}])
    assert table == [[0, "5 6 7", 3, None]]
