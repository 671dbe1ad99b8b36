"""A model's buffers go back to what they were, changed in place or replaced."""

import torch
from torch import nn

from hf_gradacc.safety import rollback
from hf_gradacc.safety.rollback import BufferState, Rollback


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
