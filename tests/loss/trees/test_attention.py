"""Attention row by row: each token attends to its row up to itself, and leaves nothing behind."""

import itertools

import pytest
import torch
from support.reference import float64_everywhere
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_gradacc.loss.trees.attention import Marker, attending_by_rows, group_rows
from hf_gradacc.loss.trees.held import repeat
from hf_gradacc.loss.trees.layout import lay_out_trees

ROWS = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 8], [1, 2, 9], [7, 8], [7, 8, 3, 3, 3, 3, 3]]


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


class Module(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


def attend_by_rows(trees, states, *, hand_on=lambda mask: mask, **limits):
    """What the marked call of sdpa gives for the tokens of trees."""
    width = trees.ids.shape[1]
    mask = torch.ones((), dtype=torch.bool).expand(1, 1, width, width)
    masks = [group.mask(**limits) for group in trees.groups]
    query, key, value = (part[None].transpose(1, 2) for part in states)
    with attending_by_rows() as attention:
        attention.mark(Marker(mask, trees.groups, masks, trees.places))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), query, key, value, hand_on(mask))[0][0]


def attend_by_definition(trees, states, *, window=None, chunk=None):
    """Each token's softmax over the tokens of its row up to itself, one by one."""
    query, key, value = states
    key, value = (part.repeat_interleave(2, 1) for part in (key, value))
    found = torch.empty_like(query)
    for row, of_row in zip(trees.nodes, padded(ROWS)[1], strict=True):
        path = row[of_row.bool()]
        for place, node in enumerate(path):
            first = 0 if window is None else max(0, place + 1 - window)
            first = first if chunk is None else place // chunk * chunk
            before = path[first : place + 1]
            scores = torch.einsum("hd,khd->hk", query[node], key[before]) / query.shape[-1] ** 0.5
            found[node] = torch.einsum("hk,khd->hd", scores.softmax(-1), value[before])
    return found


@pytest.mark.parametrize("limits", [{}, {"window": 2}, {"chunk": 3}], ids=str)
def test_each_token_attends_to_its_row_up_to_itself(limits):
    ids, mask = padded(ROWS)
    trees = lay_out_trees(ids, mask, [[0, 1, 3], [2, 4, 5]], by_rows=True)
    torch.manual_seed(0)
    with float64_everywhere():
        states = [
            torch.randn(trees.num_tokens, heads, 6, requires_grad=True) for heads in (4, 2, 2)
        ]
        actual = attend_by_rows(trees, states, **limits)
        expected = attend_by_definition(trees, states, **limits)
        weights = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad((found * weights).sum(), states) for found in (actual, expected)
        ]
    assert torch.allclose(actual, expected, rtol=0, atol=1e-14)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("hand_on", [torch.Tensor.detach, lambda mask: mask[:, :, :, :]])
def test_a_marker_is_known_in_whatever_object_layers_hand_it_on(hand_on):
    trees = lay_out_trees(*padded(ROWS), [[0, 1, 3], [2, 4, 5]], by_rows=True)
    torch.manual_seed(0)
    states = [torch.randn(trees.ids.shape[1], heads, 4) for heads in (4, 2, 2)]
    expected = attend_by_rows(trees, states)
    assert attend_by_rows(trees, states, hand_on=hand_on).equal(expected)


def test_rows_of_like_size_share_a_call_and_every_token_is_one_query():
    ends = list(itertools.accumulate(range(90, 130), initial=0))
    paths = [list(range(*of_row)) for of_row in itertools.pairwise(ends)]
    groups, places = group_rows(paths, [len(path) for path in paths])
    assert len(groups) < 8
    queries = torch.cat([group.queries.reshape(-1) for group in groups])
    assert queries[places].tolist() == list(range(ends[-1]))


def test_nothing_stays_in_the_table_of_attentions():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attending_by_rows():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    with pytest.raises(KeyError), attending_by_rows():
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before

    def own(*args, **kwargs):
        return before(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with attending_by_rows():
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_a_call_without_a_marker_is_the_stock_one():
    states = [torch.randn(1, 4, 5, 8) for _ in range(3)]
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    module = torch.nn.Identity()
    expected = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, mask)[0]
    with attending_by_rows():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, mask)[0].equal(expected)


def test_what_a_thousand_rows_share_adds_up_in_float32():
    states = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    repeat(states, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert states.grad.tolist() == [[1000.0] * 3, [0.0] * 3]  # one by one, bfloat16 stops at 256
