"""Steps, callbacks and hooks of one's own around beginnings that micro-batches keep."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from support.kept_rows import KEEPING, NUM_ROWS, keeping_always, rows_behind, watching_kept
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, make_trainer, pad, tiny_llama
from support.tree_jobs import RunsRowsTwice
from transformers import TrainerCallback

from hf_gradacc import GradAccTrainer
from hf_gradacc.errors import LossError
from hf_gradacc.loss.shortcuts.sharing import why_not_kept_by_options
from hf_gradacc.loss.trees import hooks as tree_hooks
from hf_gradacc.trainer.step import MicroBatchStep

ROWS = [{**row, "labels": list(row["input_ids"])} for row in rows_behind()]
EXACT = 1e-12


@pytest.fixture(autouse=True)
def keep_short_beginnings():
    with keeping_always():
        yield


def make_model():
    with float64_everywhere():
        return tiny_llama(attn_implementation="sdpa")


def train(tmp_path, trainer_class=GradAccTrainer, *, model=None, callbacks=(), as_rows=False):
    """Train one update; return the trainer, its gradient and the beginnings that were kept.

    `as_rows` keeps the cut and computes its rows as they are.
    """
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(float64_everywhere())
        kept = stack.enter_context(watching_kept())
        if as_rows:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(MicroBatchStep, "_trees_of", lambda self, inputs: None)
        trainer = make_trainer(
            tmp_path,
            ROWS,
            model=model or make_model(),
            trainer_class=trainer_class,
            callbacks=[recorder, *callbacks],
            effective_batch_size=NUM_ROWS,
            **KEEPING,
        )
        trainer.train()
    return trainer, recorder.gradients[0], kept


def compare(tmp_path, *args, **options):
    """How far kept beginnings are from the same rows as they are, and how many were kept."""
    _, gradient, kept = train(tmp_path / "kept", *args, **options)
    _, expected, _ = train(tmp_path / "rows", *args, as_rows=True, **options)
    return relative_error(gradient, expected), len(kept)


# ---- errors that a step catches ------------------------------------------------------------------


class GoesOn(GradAccTrainer):
    """A backward fails early in one micro-batch, and its rows are left out."""

    fails_in = 0
    count = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.count += 1
        if self.count != self.fails_in:
            return super().training_step(model, inputs, num_items_in_batch)
        handle = self.model.lm_head.weight.register_hook(self.fail)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except ArithmeticError:
            return torch.zeros(())
        finally:
            handle.remove()

    def fail(self, gradient):
        raise ArithmeticError


@pytest.mark.parametrize("number", [2, 4, 6])  # 2 and 6 are the last behind their beginnings
def test_an_error_that_a_step_catches_loses_no_gradient_of_other_micro_batches(tmp_path, number):
    trainer_class = type("GoesOn", (GoesOn,), {"fails_in": number})
    error, num_kept = compare(tmp_path, trainer_class)
    assert (num_kept, error < EXACT) == (2, True)


def test_a_beginning_that_nobody_sends_back_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(MicroBatchStep, "end_group", lambda self: None)
    error, _ = compare(tmp_path, type("GoesOn", (GoesOn,), {"fails_in": 6}))
    assert error > 0.1


# ---- steps that run their rows twice -------------------------------------------------------------


class Adversarial(GradAccTrainer):
    """Adds the gradient at embeddings that are moved (FGM), which torch does not count."""

    def training_step(self, *args, **kwargs):
        weight = self.model.get_input_embeddings().weight
        here = super().training_step(*args, **kwargs)
        backup = weight.data.clone()
        weight.data.add_(0.3)
        there = super().training_step(*args, **kwargs)
        weight.data = backup
        return here + there


@pytest.mark.parametrize("trainer_class", [RunsRowsTwice, Adversarial])
def test_rows_that_run_twice_are_computed_whole_from_then_on(tmp_path, trainer_class):
    error, num_kept = compare(tmp_path, trainer_class)
    assert (num_kept, error < EXACT) == (1, True)  # the first micro-batch knew of nothing


# ---- weights that change inside of an update -----------------------------------------------------


class Writes(TrainerCallback):
    def __init__(self, names):
        self.names = names

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self.names in name:
                    parameter.mul_(1.3)


def test_weights_that_are_written_to_compute_the_beginning_anew(tmp_path):
    error, num_kept = compare(tmp_path, callbacks=[Writes("embed_tokens")])
    assert (num_kept, error < EXACT) == (1, True)


def test_weights_that_a_backward_needs_as_they_were_are_an_error_that_says_so(tmp_path):
    with pytest.raises(LossError, match=r"written to.*\n.*layout = 'padded'"):
        train(tmp_path, callbacks=[Writes("")])


# ---- hooks on the body ---------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states):
        return states.view_as(states)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def hooked():
    """A model whose body is sent twice the gradient: no loss tells."""

    def double(module, args, output):
        output.last_hidden_state = Doubled.apply(output.last_hidden_state)

    model = make_model()
    model.model.register_forward_hook(double)
    return model


def test_a_hook_on_the_body_keeps_nothing_and_is_named(tmp_path):
    with float64_everywhere():
        expected = reference_gradient(hooked(), ROWS, pad)
    trainer, gradient, kept = train(tmp_path, model=hooked())
    assert kept == []
    assert "a hook on its layers" in trainer.shortcuts.reason("kept_beginnings")
    assert relative_error(gradient, expected) < EXACT


def test_a_hook_that_nobody_looks_for_does_not_have_that_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_hooks, "_is_foreign", lambda hook: False)
    with float64_everywhere():
        expected = reference_gradient(hooked(), ROWS, pad)
    assert relative_error(train(tmp_path, model=hooked())[1], expected) > 0.1


# ---- known before a run --------------------------------------------------------------------------


def test_activations_that_are_offloaded_by_the_backward_keep_nothing():
    options = {"gradient_checkpointing": False, "activation_offloading": True}
    assert "activation_offloading" in why_not_kept_by_options(SimpleNamespace(**options))
    options["activation_offloading"] = False
    assert why_not_kept_by_options(SimpleNamespace(**options)) == ""
