"""Targets that rows share are one row of the head, weighted; what else is read stays as it was."""

import random
from collections import Counter

import pytest
import torch
from support.reference import relative_error
from torch.nn.functional import cross_entropy, linear

from hf_gradacc.loss.layouts import kept_rows
from hf_gradacc.loss.shortcuts import chunked as chunked_loss
from hf_gradacc.loss.shortcuts.chunked import ChunkedLoss
from hf_gradacc.loss.trees.attention import repeat
from hf_gradacc.loss.trees.layout import lay_out_trees
from hf_gradacc.loss.trees.targets import TreeTargets, merge_targets

ROWS = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 4, 4], [5, 6, 7, 8]]
IDS = torch.tensor(ROWS)


@pytest.mark.parametrize("seed", range(4))
def test_targets_are_alike_if_token_and_label_are(seed):
    draw = random.Random(seed)
    pairs = [(draw.randrange(6), draw.choice([3, 2**61, 2**61 + 1])) for _ in range(40)]
    merged = merge_targets(*(torch.tensor(values) for values in zip(*pairs, strict=True)))
    kinds = [pairs[first] for first in merged.first.tolist()]
    assert kinds == sorted(set(pairs))
    assert [pairs.index(kind) for kind in kinds] == merged.first.tolist()
    assert [kinds[kind] for kind in merged.kinds.tolist()] == pairs
    assert merged.weights.tolist() == [Counter(pairs)[kind] for kind in kinds]


@pytest.mark.parametrize(
    "pairs", [[], [(0, 3)], [(4, 3), (1, 3)], [(1, 3), (1, 4), (2, 3)]], ids=str
)
def test_targets_of_which_none_is_like_another_are_not_merged(pairs):
    nodes, labels = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    assert merge_targets(nodes, labels) is None


# ---- weights in the loss -------------------------------------------------------------------------


def make_weighted(*, dtype=torch.float64, most=6):
    torch.manual_seed(0)
    hidden = torch.randn(11, 12).to(dtype).requires_grad_()
    weight = torch.randn(31, 12).to(dtype).requires_grad_()
    bias = torch.randn(31).to(dtype).requires_grad_()
    counts = torch.randint(1, most, (11,))
    return (hidden, weight, bias), torch.randint(31, (11,)), counts


def gradients(loss, tensors):
    for x in tensors:
        x.grad = None
    loss.backward()
    return {str(i): x.grad for i, x in enumerate(tensors)}


@pytest.mark.parametrize("expected", [1.0, 3.0])
def test_a_row_counts_as_often_as_it_weighs(monkeypatch, expected):
    monkeypatch.setattr(chunked_loss, "_ROWS_ON_CPU", 4)
    used, labels, counts = make_weighted()
    hidden, weight, bias = used
    often = torch.arange(11).repeat_interleave(counts)
    logits = linear(hidden[often], weight, bias)
    truth = cross_entropy(logits, labels[often], reduction="sum")
    loss = ChunkedLoss.apply(*used, labels, True, False, expected, counts.float())
    torch.testing.assert_close(loss, truth, rtol=1e-13, atol=0)
    assert relative_error(gradients(3 * loss, used), gradients(3 * truth, used)) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_rounds_no_worse_than_rows_do(dtype):
    used, labels, counts = make_weighted(dtype=dtype, most=64)
    hidden, *head = used
    often = torch.arange(11).repeat_interleave(counts)
    wide = [x.detach().double().requires_grad_() for x in used]
    logits = linear(wide[0][often], *wide[1:])
    truth = gradients(cross_entropy(logits, labels[often]), wide)
    of_rows = ChunkedLoss.apply(repeat(hidden, often), *head, labels[often], True) / len(often)
    rows = relative_error(gradients(of_rows, used), truth)
    merged = ChunkedLoss.apply(*used, labels, True, False, 1.0, counts.float()) / len(often)
    assert merged.dtype is torch.float32
    assert relative_error(gradients(merged, used), truth) <= 1.1 * rows


# ---- what the head reads -------------------------------------------------------------------------


def make_targets(*, merge=True):
    trees = lay_out_trees(IDS, None, [range(4)])
    labels = IDS[:, 1:].reshape(1, -1)
    positions = torch.tensor([4 * row + place for row in range(4) for place in range(3)])
    return trees, TreeTargets(trees, positions, labels, given=labels, merge=merge), labels


def make_states(trees):
    torch.manual_seed(0)
    in_trees = torch.randn(*trees.ids.shape, 3, dtype=torch.float64, requires_grad=True)
    of_rows = repeat(in_trees.flatten(0, 1), trees.nodes.flatten()).view(4, 4, 3)
    return in_trees, of_rows


def test_the_head_reads_each_distinct_target_once():
    trees, targets, labels = make_targets()
    in_trees, of_rows = make_states(trees)
    targets.note(in_trees, of_rows)
    read = targets.read(of_rows[:, slice(0, None), :])
    hidden, right, weights = targets.weigh(read.unsqueeze(0), labels)
    expected = Counter()
    for row, states in zip(ROWS, of_rows, strict=True):
        expected.update((tuple(states[i].tolist()), row[i + 1]) for i in range(3))
    kinds = zip(map(tuple, hidden.tolist()), right.tolist(), weights.tolist(), strict=True)
    assert Counter({(states, label): weight for states, label, weight in kinds}) == expected
    assert sum(expected.values()) == 12
    assert len(expected) == 6


def test_it_reads_all_of_them_where_the_loss_takes_no_weights():
    trees, targets, labels = make_targets(merge=False)
    in_trees, of_rows = make_states(trees)
    targets.note(in_trees, of_rows)
    read = targets.read(of_rows)
    assert torch.equal(read, of_rows[:, :3].flatten(0, 1))
    assert targets.weigh(read, labels)[2] is None


class Reversed(torch.autograd.Function):
    """Looks like a view; its gradient is another."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def with_a_hook(x):
    x.register_hook(lambda grad: 2 * grad)
    return x


def with_its_gradient_kept(x):
    x.retain_grad()
    return x


TOUCHED = {
    "scaled": lambda x: 2 * x,
    "copied": lambda x: x.clone(),
    "in place": lambda x: x.mul_(2),
    "detached": lambda x: x.detach(),
    "some rows": lambda x: x[:2],
    "other order": lambda x: x.transpose(0, 1),
    "another gradient": Reversed.apply,
    "a hook": with_a_hook,
    "a hook on a view": lambda x: with_a_hook(x[:]),
    "gradient kept": with_its_gradient_kept,
}


@pytest.mark.parametrize("name", TOUCHED)
def test_states_that_somebody_touched_are_read_as_the_head_is_given_them(name):
    trees, targets, labels = make_targets()
    in_trees, of_rows = make_states(trees)
    targets.note(in_trees, of_rows)
    touched = TOUCHED[name](of_rows)
    assert targets.read(touched) is None
    flat, right, weights = targets.weigh(touched, labels)
    assert weights is None
    assert torch.equal(flat, touched.reshape(-1, 3))
    assert torch.equal(right, labels[0])


def test_a_body_that_computed_rows_is_read_by_the_row():
    trees, targets, _ = make_targets()
    in_trees, of_rows = make_states(trees)
    targets.note(in_trees, of_rows)
    targets.note(None, of_rows)
    assert targets.read(of_rows) is None


def test_states_are_read_once_and_not_kept_until_the_backward():
    trees, targets, _ = make_targets()
    in_trees, of_rows = make_states(trees)
    targets.note(in_trees, of_rows)
    assert targets.read(of_rows) is not None
    assert targets.read(of_rows) is None


@pytest.mark.parametrize("in_place", [False, True])
def test_labels_of_somebody_else_are_not_those_that_were_merged(in_place):
    trees, targets, labels = make_targets()
    in_trees, of_rows = make_states(trees)
    targets.note(in_trees, of_rows)
    read = targets.read(of_rows)
    others = labels if in_place else labels.clone()
    others[0, 0] = 3
    hidden, right, weights = targets.weigh(read, others)
    assert weights is None
    assert torch.equal(right, others[0])
    assert torch.equal(hidden, of_rows[:, :3].flatten(0, 1))


def test_the_head_is_given_what_is_read_and_else_its_positions():
    trees, targets, _ = make_targets()
    in_trees, of_rows = make_states(trees)
    head = torch.nn.Linear(3, 5).double()
    with kept_rows(head, torch.tensor([0, 3]), read=targets.read):
        targets.note(in_trees, of_rows)
        assert head(of_rows).shape == (1, 6, 5)
        assert head(of_rows).shape == (1, 2, 5)


def test_states_of_a_forward_without_any_graph_are_not_read():
    trees = lay_out_trees(IDS, None, [range(4)], by_rows=True)
    labels = torch.tensor([[7, 7, 4, 7]])
    targets = TreeTargets(trees, torch.tensor([1, 5, 9, 13]), labels, given=labels, merge=True)
    with torch.inference_mode():
        states = torch.rand(1, trees.num_tokens, 3)
        rows = repeat(states[0], trees.nodes.reshape(-1)).view(4, 4, 3)
        targets.note(states, rows)
        assert targets.read(rows) is None
