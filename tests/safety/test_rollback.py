"""Buffers, plain attributes and random states go back to what they were."""

import random
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from hf_gradacc.safety import rollback
from hf_gradacc.safety.rollback import (
    AttributeState,
    BufferState,
    RandomState,
    Rollback,
    devices_of,
)


class Counting(nn.Module):
    """Counts its forwards in one buffer in place, in another by a new tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("still", torch.ones(3))
        self.register_buffer("nothing", None)

    def forward(self):
        self.in_place += 1
        self.replaced = self.replaced + 1


def counts(model):
    return int(model.part.in_place), int(model.part.replaced)


def nested():
    model = nn.Module()
    model.part = Counting()
    return model


def test_what_changed_is_known_by_name_and_put_back_whole():
    model = nested()
    state, replaced = BufferState(model), model.part.replaced
    model.part()
    assert state.changed() == {"part.in_place", "part.replaced"}
    state.restore()
    assert counts(model) == (0, 0)
    assert model.part.replaced is replaced
    assert state.changed() == set()


def test_every_update_is_rolled_back_not_the_first_alone():
    model = nested()
    guard = Rollback(model, torch.device("cpu"))
    for done in range(3):
        guard.mark()
        model.part()  # an attempt that fails
        guard.restore()
        assert counts(model) == (done, done)
        model.part()
        guard.settle()
        assert counts(model) == (done + 1, done + 1)


def test_large_buffers_are_not_copied_but_found_again(monkeypatch):
    monkeypatch.setattr(rollback, "_SMALL_BUFFER_BYTES", 4)
    model = nested()
    state, still = BufferState(model), model.part.still
    model.part.still = torch.zeros(3)
    state.restore()
    assert model.part.still is still


class Counts:
    def __init__(self):
        self.calls, self.seen, self.by_name = 0, [1.0], {"a": [1], "b": {2}}
        self.tensor = torch.zeros(2)
        self.many = list(range(5000))


def test_plain_attributes_are_put_back_with_what_is_in_them():
    counts = Counts()
    seen, tensor, inner = counts.seen, counts.tensor, counts.by_name["a"]
    state = AttributeState([counts])
    counts.calls += 3
    counts.seen.append(2.0)
    counts.by_name["a"].append(7)
    counts.by_name["b"].clear()
    counts.by_name["c"] = 1
    counts.added, counts.cache = 1, torch.ones(1)
    counts.tensor = torch.ones(2)
    state.restore()
    assert (counts.calls, counts.seen, counts.by_name) == (0, [1.0], {"a": [1], "b": {2}})
    assert counts.seen is seen  # the same object, for whoever holds it
    assert counts.by_name["a"] is inner
    assert not hasattr(counts, "added")
    assert hasattr(counts, "cache")  # what is not plain is left alone
    assert counts.tensor is not tensor
    assert len(counts.many) == 5000


def test_random_states_tell_whether_a_number_was_drawn():
    for draw in (lambda: torch.rand(1), np.random.rand, random.random):
        state = RandomState(torch.device("cpu"))
        assert not state.has_moved()
        draw()
        assert state.has_moved()
        state.restore()
        assert not state.has_moved()


class Generators:
    """Stands in for ``torch.cuda``: a generator on each of several devices."""

    def __init__(self):
        self.of = {index: torch.Generator() for index in range(3)}

    def get_rng_state(self, device):
        return self.of[device.index].get_state()

    def set_rng_state(self, state, device):
        self.of[device.index].set_state(state)

    def draw(self, index):
        return torch.rand(2, generator=self.of[index]).tolist()


class Spread(nn.Module):
    """Weights on two devices, and the inputs' device is a third."""

    def parameters(self, recurse=True):
        return iter([SimpleNamespace(device=torch.device("cuda", i)) for i in (1, 2, 1)])


def test_a_model_on_several_devices_is_rolled_back_on_all_of_them(monkeypatch):
    """No such device is here: generators of the CPU stand in for theirs."""
    generators = Generators()
    monkeypatch.setattr(
        rollback, "_backend_of", lambda device: generators if device.type == "cuda" else None
    )
    devices = devices_of(Spread(), torch.device("cuda", 0))
    assert [device.index for device in devices] == [0, 1, 2]
    state = RandomState(*devices)
    for index in range(3):
        before = generators.draw(index)
        assert state.has_moved()
        state.restore()
        assert not state.has_moved()
        assert generators.draw(index) == before
        state.restore()
    guard = Rollback(Spread(), torch.device("cuda", 0))
    guard.mark()
    first = [generators.draw(index) for index in range(3)]
    guard.restore()
    assert [generators.draw(index) for index in range(3)] == first
