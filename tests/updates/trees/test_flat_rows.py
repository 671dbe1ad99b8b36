"""Rows lie end to end as they were: every token once, whatever held them and however many bits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_gradacc.updates.trees import flat_rows
from hf_gradacc.updates.trees.flat_rows import PADDING, FlatRows


def rows_in(flat):
    spans = zip(flat.starts.tolist(), flat.held.tolist(), strict=True)
    return [flat.tokens[start : start + held].tolist() for start, held in spans]


ROWS = [[5, 6, 7], [], [9] * 700, [-3, 0], *([k] * (k % 5) for k in range(600))]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, tuple], ids=lambda f: f.__name__)
def test_rows_come_back_as_they_were(make):
    rows = [make(row) for row in ROWS]
    for form in (rows, iter(rows)):
        flat = FlatRows.of_rows(form)
        assert rows_in(flat) == ROWS
        assert flat.lengths.tolist() == [len(row) for row in ROWS]
        assert flat.tokens[-PADDING:].tolist() == [0] * PADDING


@pytest.mark.parametrize("most", [1, 2, 300])
def test_of_each_row_its_first_tokens_are_held_and_its_length_is_known(most):
    for form in (ROWS, iter(ROWS)):
        flat = FlatRows.of_rows(form, most=most)
        assert rows_in(flat) == [row[:most] for row in ROWS]
        assert flat.lengths.tolist() == [len(row) for row in ROWS]


def test_ids_beyond_32_bits_stay_different_from_those_they_would_wrap_to():
    rows = [[5, 6]] * 300 + [[2**32 + 5, 6], [2**40, -1], [5, 6]]
    found = rows_in(FlatRows.of_rows(rows))
    numbers = {}
    for row, ids in zip(found, rows, strict=True):
        for number, token in zip(row, ids, strict=True):
            assert numbers.setdefault(token, number) == number
    assert len(set(numbers.values())) == len(numbers) == 5


def test_what_memory_held_before_changes_no_number(monkeypatch):
    """Ranks sort rows by these numbers, each for itself."""
    rows = np.random.default_rng(0).integers(0, 2**33, size=(40, 12))
    found = []
    for seed in range(3):
        draw = np.random.default_rng(seed)
        dirty = SimpleNamespace(
            **{name: getattr(np, name) for name in dir(np)}
            | {"empty": lambda n, dtype, draw=draw: draw.integers(-9999, 2**30, n).astype(dtype)}
        )
        monkeypatch.setattr(flat_rows, "np", dirty)
        batches = [(rows.reshape(-1), np.full(40, 12))]
        flat = FlatRows.of(batches, num_tokens=5_000)
        found.append(flat.tokens.tolist())
    assert found[0] == found[1] == found[2]


def test_no_rows_lie_nowhere():
    flat = FlatRows.of_rows([])
    assert (len(flat.starts), len(flat.tokens)) == (0, PADDING)
