"""Which steps run a backward of their own, and what happens to gradients around them."""

import math

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from hf_gradacc import GradAccMixin, GradAccTrainer
from hf_gradacc.loss.shortcuts.choose import Shortcuts
from hf_gradacc.trainer.overrides import OwnStep, find_own_step, plain_for_steps_behind


class OnlyLooks(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        with torch.no_grad():
            self.seen = list(inputs)
        return super().training_step(model, inputs, num_items_in_batch)


class AddsAnother(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.accelerator.backward(self.compute_loss(model, inputs))
        return loss


class InsideAFunction(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        def closure():
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss

        return closure().detach()


class CallsAHelper(Trainer):
    """GradCache: forward and backward are somebody else's."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.cache(inputs)


def mixed(kind):
    return type("Mixed", (GradAccMixin, kind), {})


@pytest.mark.parametrize("kind", [AddsAnother, InsideAFunction, CallsAHelper])
def test_a_step_with_a_backward_of_its_own_is_found(kind):
    assert find_own_step(mixed(kind)) is kind
    below = type("Below", (GradAccTrainer,), {"training_step": kind.training_step})
    assert find_own_step(below) is below
    assert find_own_step(type("Looks", (OnlyLooks, mixed(kind)), {})) is kind


@pytest.mark.parametrize("kind", [OnlyLooks, Trainer, Seq2SeqTrainer])
def test_a_step_that_calls_the_one_behind_it_has_none(kind):
    assert find_own_step(mixed(kind)) is None


def weigh(tmp_path, *, divides, weights):
    """Add a gradient of 1 to a weight in each of some micro-batches; return what adds up."""
    args = TrainingArguments(output_dir=str(tmp_path), gradient_accumulation_steps=4, use_cpu=True)
    own, model = OwnStep(Trainer, args), nn.Linear(1, 1, bias=False).double()
    own.begin_update()
    for weight in weights:
        divisor = 1 / weight if weight else math.inf
        with own.weighing(model, divisor):
            (
                model(torch.ones(1, 1).double()).sum() / (own.read_divisor() if divides else 1)
            ).backward()
    return float(model.weight.grad)


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("weights", [[0.5, 0.2, 0.3], [0.0, 0.6, 0.0, 0.3], [0.25]])
def test_gradients_add_up_by_their_weights(tmp_path, divides, weights):
    """A micro-batch that weighs nothing comes first, or last, or not at all."""
    total = weigh(tmp_path, divides=divides, weights=weights)
    assert total == pytest.approx(sum(weights), rel=1e-14)


def test_a_step_behind_leaves_trees_and_why_there_are_none():
    kind = mixed(OnlyLooks)
    body = torch.nn.Linear(2, 2)
    for known in (
        Shortcuts(packed=True, bodies=(body,), trees_by_rows=True),
        Shortcuts(packed=True, refused=(("shared_prefix", "it has dropout"),)),
    ):
        plain = plain_for_steps_behind(known, kind, mixin=GradAccMixin)
        assert not plain.packed
        assert "OnlyLooks" in plain.reason("packed")
        assert plain.bodies == known.bodies
        assert plain.trees_by_rows == known.trees_by_rows
        assert plain.reason("shared_prefix") == known.reason("shared_prefix")
