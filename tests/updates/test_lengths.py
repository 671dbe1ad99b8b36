"""A row's tokens are found whatever holds them: other people's data sets are no lists of lists."""

from array import array

import numpy as np
import pyarrow as pa
import pytest
import torch

from hf_gradacc.updates.lengths import measure_length, sequences_of_rows, tokens_of_rows
from hf_gradacc.updates.trees.prefixes import sort_by_prefix

HOLDERS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "int32": lambda ids: np.array(ids, dtype=np.int32),
    "torch": torch.tensor,
    "arrow": pa.array,
    "array": lambda ids: array("q", ids),
    "list of numpy": lambda ids: list(np.array(ids)),
    "list of tensors": lambda ids: list(torch.tensor(ids)),
}
IDS = [[5, 6, 7], [9], [5, 6, 8, 8]]


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_tokens_are_tokens_whatever_holds_them(hold):
    rows = [{"input_ids": hold(ids)} for ids in IDS]
    assert [measure_length(row) for row in rows] == [3, 1, 4]
    found = tokens_of_rows(rows)
    assert found is not None
    assert sort_by_prefix(found).shared.tolist() == sort_by_prefix(IDS).shared.tolist() == [0, 2, 0]
    pair = {"prompt_ids": hold([1]), "chosen_ids": hold([2]), "rejected_ids": hold([3, 4])}
    assert sequences_of_rows([pair], rows_per_sequence=2) == [[[1, 2], [1, 3, 4]]]
    assert measure_length(pair) == 6


@pytest.mark.parametrize("empty", [[], (), np.array([]), torch.tensor([]), array("q")], ids=repr)
def test_an_answer_without_a_token_is_one(empty):
    assert tokens_of_rows([{"input_ids": empty}]) == [empty]


@pytest.mark.parametrize(
    "value",
    [[[1, 2]], "12", {"a": 1}, [0.5], [True], np.ones(3), np.ones((1, 3), dtype=int), None, 5],
)
def test_what_is_no_sequence_of_tokens_is_not_taken_for_one(value):
    assert tokens_of_rows([{"input_ids": value}]) is None
