"""Layers that are given the same tokens run once while shortcuts are tried, and only then."""

import pytest
import torch
from support.tiny import pad, ragged_rows, tiny_llama
from transformers import LlamaModel

from hf_gradacc.loss.shortcuts.remembered import RememberedLayers, find_layers

BATCH = pad(ragged_rows(3, seed=4))


class Counted:
    """A model, and how often its first layer ran."""

    def __init__(self, **changes):
        self.model = tiny_llama(**changes).eval()
        self.runs = 0
        self.model.model.layers[0].register_forward_hook(self.count)

    def count(self, *_):
        self.runs += 1

    def loss(self, **changes):
        with torch.no_grad():
            return float(self.model(**BATCH | changes).loss)


def test_layers_run_once_for_the_same_tokens_and_again_for_others():
    counted = Counted()
    fewer = torch.where(torch.arange(BATCH["labels"].shape[1]) < 5, BATCH["labels"], -100)
    others = torch.where(BATCH["input_ids"] == BATCH["input_ids"].max(), 5, BATCH["input_ids"])
    expected = [counted.loss(), counted.loss(labels=fewer), counted.loss(input_ids=others)]
    memory, counted.runs = RememberedLayers(find_layers(counted.model)), 0
    with memory.keeping():
        counted.loss()
        counted.loss()
    assert counted.runs == 2
    with memory.returning():
        got = [counted.loss(), counted.loss(labels=fewer), counted.loss(input_ids=others)]
    assert got == expected
    assert counted.runs == 3
    assert "forward" not in vars(counted.model.model)


def test_nothing_is_returned_if_it_needs_a_gradient_or_was_changed():
    counted = Counted()
    memory = RememberedLayers(find_layers(counted.model))
    with memory.returning():
        with torch.no_grad():
            counted.model.model(BATCH["input_ids"]).last_hidden_state.zero_()
            assert counted.model.model(BATCH["input_ids"]).last_hidden_state.any()
        counted.loss()
        counted.model(**BATCH).loss.backward()
    assert counted.model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_whoever_changes_what_was_returned_changes_it_for_nobody_else():
    """Hooks behind a body put other hidden states into its output, as trees do."""
    counted = Counted()
    memory, body, ids = RememberedLayers(find_layers(counted.model)), counted.model.model, BATCH
    with memory.returning(), torch.no_grad():
        expected = body(ids["input_ids"]).last_hidden_state
        for _ in range(2):
            output = body(ids["input_ids"])
            assert output.last_hidden_state.equal(expected)
            output["last_hidden_state"] = torch.zeros(1)
    assert counted.runs == 1


def test_what_was_asked_is_not_taken_for_what_has_been_written_over_it():
    counted = Counted()
    memory, body, ids = RememberedLayers(find_layers(counted.model)), counted.model.model, BATCH
    given = ids["input_ids"].clone()
    with memory.returning(), torch.no_grad():
        body(given)
        given[:, 0] = 5
        body(given.clone())
    assert counted.runs == 2


def test_a_forward_that_drew_random_numbers_is_not_remembered():
    counted = Counted(attention_dropout=0.5)
    counted.model.train()
    state = torch.get_rng_state()
    memory = RememberedLayers(
        find_layers(counted.model), has_drawn=lambda: not torch.get_rng_state().equal(state)
    )
    with memory.returning():
        assert counted.loss() != counted.loss()


def last_gradients(model, **changes):
    loss = model(**BATCH | changes).loss
    return loss, *torch.autograd.grad(loss, [model.model.norm.weight], retain_graph=True)


def test_masked_labels_are_asked_with_gradients_through_the_graph_of_one_forward():
    counted = Counted(dtype=torch.float64)
    model, labels = counted.model, BATCH["labels"]
    row = torch.arange(len(labels)).unsqueeze(1)
    masked = [labels.where(row == i, -100) for i in range(len(labels))]
    expected = [last_gradients(model, labels=part) for part in masked]
    memory, counted.runs = RememberedLayers(find_layers(model), keeps_graph=True), 0
    with memory.keeping():
        last_gradients(model)
    with memory.repeating():
        got = [last_gradients(model, labels=part) for part in masked]
        assert counted.runs == 1
        last_gradients(model, input_ids=BATCH["input_ids"].flip(0))
        assert counted.runs == 2
        last_gradients(model)  # the last forward is kept, and no other
        assert counted.runs == 3
        model.train()
        last_gradients(model)
        last_gradients(model)
        assert counted.runs == 5
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    model.eval()
    last_gradients(model)
    assert counted.runs == 6


def test_without_being_told_no_graph_is_kept():
    counted = Counted()
    memory = RememberedLayers(find_layers(counted.model))
    with memory.keeping(), memory.repeating():
        last_gradients(counted.model)
        last_gradients(counted.model)
    assert counted.runs == 2


class OwnLayers(LlamaModel):
    """May do what no second look would repeat."""


@pytest.mark.parametrize("own", [False, True])
def test_layers_of_a_class_of_ones_own_are_not_remembered(own):
    model = tiny_llama()
    if own:
        model.model.__class__ = OwnLayers
    assert (find_layers(model) is None) == own
    assert find_layers(torch.nn.Linear(2, 2)) is None
    assert find_layers(model.model) is None
