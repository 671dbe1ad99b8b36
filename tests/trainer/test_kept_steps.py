"""Steps, callbacks and hooks of one's own around beginnings that micro-batches keep."""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.failing import Failure
from support.kept_rows import KEEPING, NUM_ROWS, keeping_always, rows_behind, watching_kept
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, make_trainer, pad, tiny_llama
from support.tree_jobs import RunsRowsTwice
from transformers import TrainerCallback

from hf_gradacc import GradAccTrainer
from hf_gradacc.errors import LossError
from hf_gradacc.loss.shortcuts import sharing
from hf_gradacc.loss.shortcuts.sharing import why_not_kept_by_options
from hf_gradacc.loss.trees import hooks as tree_hooks
from hf_gradacc.loss.trees.written import Weights
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


class CatchesAll(GradAccTrainer):
    """Leaves out the rows of a micro-batch that fails, whatever happens."""

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        except (ArithmeticError, torch.OutOfMemoryError):
            return torch.zeros(())


def failing_once_behind(model, error):
    """Let the backward of the beginning of 13 tokens fail, once."""
    failure = Failure(
        model,
        lambda rows, width, seen: width == 13 and not failure.raised,
        where="backward",
        error=error,
    )
    return failure


def test_the_backward_of_a_beginning_fails_for_all_rows_behind_it_whatever_a_step_catches(tmp_path):
    model = make_model()
    failure = failing_once_behind(model, ArithmeticError("broken"))
    with pytest.raises(ArithmeticError, match="broken"):
        train(tmp_path, CatchesAll, model=model)
    assert failure.raised == 1


def test_memory_that_runs_out_in_the_backward_of_a_beginning_rolls_the_update_back(tmp_path):
    with float64_everywhere():
        expected = reference_gradient(make_model(), ROWS, pad)
    for number, trainer_class in enumerate((GradAccTrainer, CatchesAll)):
        model = make_model()
        failure = failing_once_behind(model, None)
        _, gradient, _ = train(tmp_path / str(number), trainer_class, model=model)
        assert failure.raised == 1
        assert relative_error(gradient, expected) < EXACT


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
    def __init__(self, names, *, unseen=False):
        self.names, self.unseen = names, unseen

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self.names in name:
                    (parameter.data if self.unseen else parameter).mul_(1.3)


UNSEEN = pytest.mark.parametrize("unseen", [False, True], ids=["counted by torch", "by .data"])


@UNSEEN
def test_weights_that_are_written_to_compute_the_beginning_anew(tmp_path, unseen):
    error, num_kept = compare(tmp_path, callbacks=[Writes("embed_tokens", unseen=unseen)])
    assert (num_kept, error < EXACT) == (1, True)


@UNSEEN
def test_weights_that_a_backward_needs_as_they_were_are_an_error_that_says_so(tmp_path, unseen):
    with pytest.raises(LossError, match=r"written to.*\n.*layout = 'padded'"):
        train(tmp_path, callbacks=[Writes("", unseen=unseen)])


class MovesWeights(GradAccTrainer):
    """Adds noise to weights for the time of each step, by ``.data``, and takes it away again."""

    def training_step(self, *args, **kwargs):
        draw = torch.Generator().manual_seed(self.count)
        type(self).count += 1
        backup = {name: weight.data.clone() for name, weight in self.model.named_parameters()}
        for weight in self.model.parameters():
            noise = torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
            weight.data.add_(noise, alpha=0.02)
        loss = super().training_step(*args, **kwargs)
        for name, weight in self.model.named_parameters():
            weight.data.copy_(backup[name])
        return loss


def moves_weights():
    return type("MovesWeights", (MovesWeights,), {"count": 0})


def test_weights_that_a_step_moves_for_its_own_time_keep_nothing(tmp_path):
    _, gradient, kept = train(tmp_path / "kept", moves_weights())
    _, expected, _ = train(tmp_path / "rows", moves_weights(), as_rows=True)
    assert kept == []
    assert relative_error(gradient, expected) < EXACT


def test_weights_that_nobody_compares_give_another_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(Weights, "differ", lambda *args, **kwargs: False)
    _, gradient, _ = train(tmp_path / "kept", moves_weights())
    _, expected, _ = train(tmp_path / "rows", moves_weights(), as_rows=True)
    assert relative_error(gradient, expected) > 1e-3
    error, _ = compare(tmp_path, callbacks=[Writes("embed_tokens", unseen=True)])
    assert error > 1e-3


class Counts(torch.nn.Module):
    """Counts calls in a buffer, as layers do that keep statistics."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, states):
        self.calls += 1
        return self.norm(states)


def test_a_body_that_writes_to_its_own_buffers_keeps_nothing_and_trains(tmp_path):
    with float64_everywhere():
        expected = reference_gradient(make_model(), ROWS, pad)
    model = make_model()
    model.model.norm = Counts(model.model.norm)
    _, gradient, kept = train(tmp_path, model=model, callbacks=[Writes("nothing")])
    gradient = {name.replace("norm.norm", "norm"): value for name, value in gradient.items()}
    assert kept == []
    assert relative_error(gradient, expected) < EXACT


class Unfreezes(TrainerCallback):
    """Lets a layer train from the second micro-batch on."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.model.layers[0].requires_grad_(False)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        model.model.layers[0].requires_grad_(True)


def test_a_layer_that_begins_to_train_in_between_has_the_gradient_of_what_came_after(tmp_path):
    error, _ = compare(tmp_path, callbacks=[Unfreezes()])
    assert error < EXACT


class IsGivenALoss(GradAccTrainer):
    """Somebody has set a loss on this trainer alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compute_loss = partial(loss_of, self)


def loss_of(trainer, *args, **kwargs):
    return type(trainer).compute_loss(trainer, *args, **kwargs)


def test_weights_are_added_up_only_where_somebody_may_write_to_them(tmp_path, monkeypatch):
    made = []
    stock = Weights.__init__
    monkeypatch.setattr(Weights, "__init__", lambda self, of: made.append(1) or stock(self, of))

    def run(out, **options):
        with float64_everywhere():
            make_trainer(
                tmp_path / out,
                ROWS,
                model=make_model(),
                effective_batch_size=NUM_ROWS,
                **KEEPING,
                **options,
            ).train()
        return len(made)

    assert run("stock") == 0
    assert run("callback", callbacks=[Writes("nothing")]) == 1
    assert run("step", trainer_class=moves_weights()) == 2
    assert run("loss", trainer_class=IsGivenALoss) == 3


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
    assert "double on LlamaModel" in trainer.shortcuts.reason("kept_beginnings")
    assert relative_error(gradient, expected) < EXACT


def test_a_hook_that_nobody_looks_for_does_not_have_that_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_hooks, "_is_foreign", lambda hook: False)
    monkeypatch.setattr(sharing, "hook_inside", lambda bodies: "")
    with float64_everywhere():
        expected = reference_gradient(hooked(), ROWS, pad)
    assert relative_error(train(tmp_path, model=hooked())[1], expected) > 0.1


# ---- known before a run --------------------------------------------------------------------------


def test_activations_that_are_offloaded_by_the_backward_keep_nothing():
    options = {"gradient_checkpointing": False, "activation_offloading": True}
    assert "activation_offloading" in why_not_kept_by_options(SimpleNamespace(**options))
    options["activation_offloading"] = False
    assert why_not_kept_by_options(SimpleNamespace(**options)) == ""
