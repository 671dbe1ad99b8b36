"""A model that changes after it was asked how its loss counts is asked again.

Callbacks see a model first in ``on_train_begin``, when all shortcuts have been tried on it already.
What they put on it then has the gradient of the whole update: that of the same model, changed the
same way, on all rows at once.
"""

from __future__ import annotations

import pytest
from peft import LNTuningConfig, LoraConfig, get_peft_model
from support.asked_jobs import (
    CHANGES,
    Changes,
    a_hook_by_place,
    a_wider_vocabulary,
    another_loss,
    network,
    train,
    train_as_rank,
    wanted,
)
from support.kept_rows import NUM_ROWS, rows_behind, watching_kept
from support.ranks import run_ranks
from support.reference import relative_error
from support.tiny import tiny_llama
from transformers import TrainerCallback

from hf_gradacc.trainer import mixin
from hf_gradacc.trainer.loss import asked


@pytest.fixture(scope="module")
def unchanged():
    return wanted(lambda model: None)


@pytest.mark.parametrize("layout", ["auto", "shared_prefix"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_callback_puts_on_a_model_enters_the_gradient(tmp_path, unchanged, change, layout):
    expected = wanted(change)
    assert change is a_wider_vocabulary or relative_error(expected, unchanged) > 1e-2
    _, (gradient,), _ = train(tmp_path, Changes(change), layout=layout)
    assert relative_error(gradient, expected) < 1e-12


@pytest.mark.parametrize("change", [another_loss, a_hook_by_place], ids=lambda c: c.__name__)
def test_a_model_that_is_not_looked_at_again_has_another_gradient(tmp_path, monkeypatch, change):
    monkeypatch.setattr(asked.Asked, "look_again", lambda *args, **kwargs: None)
    _, (gradient,), _ = train(tmp_path, Changes(change))
    assert relative_error(gradient, wanted(change)) > 1e-2


@pytest.mark.parametrize("change", [another_loss, a_hook_by_place], ids=lambda c: c.__name__)
def test_a_change_between_two_updates_enters_the_gradient_of_the_second(tmp_path, change):
    rows = rows_behind() + rows_behind(seed=1)
    options = {"rows": rows, "max_steps": 2, "learning_rate": 0.0}
    _, gradients, _ = train(tmp_path, Changes(change, at=1), **options)
    expected = [wanted(lambda model: None), wanted(change, rows_behind(seed=1))]
    for mine, theirs in zip(gradients, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-12


def test_what_was_asked_for_by_name_and_is_given_up_is_named(tmp_path):
    _, _, warnings = train(tmp_path, Changes(a_hook_by_place), chunked_loss=True)
    assert len(warnings) == 1
    assert "layout = 'shared_prefix' is not followed any more: its loss as a tree" in warnings[0]
    assert "hooks on it changed" in warnings[0]


def test_a_hook_that_only_looks_sees_all_logits_and_rows_as_they_are(tmp_path):
    """It may have been there from the beginning: no loss tells that it looks."""
    model, seen = network(), {"logits": [], "states": []}

    def look_at(name):
        return lambda module, args, output: seen[name].append(output.shape)

    model.lm_head.register_forward_hook(look_at("logits"))
    model.model.layers[0].mlp.register_forward_hook(look_at("states"))
    trainer, _, warnings = train(tmp_path, model=model, layout="auto")
    num_micro_batches = trainer.state.log_history[0]["micro_batches_per_update"]
    logits, states = (seen[name][-int(num_micro_batches) :] for name in ("logits", "states"))
    assert {shape[-1] for shape in logits} == {48}
    assert sum(shape[0] for shape in logits) == NUM_ROWS
    assert [shape[:2] for shape in states] == [shape[:2] for shape in logits]
    assert "look_at.<locals>.<lambda> on Linear" in trainer.shortcuts.reason("chunked_loss")
    assert "<lambda> on LlamaMLP" in trainer.shortcuts.reason("shared_prefix")
    assert not warnings


def test_hooks_of_libraries_are_no_hindrance(tmp_path):
    model = network()
    model.enable_input_require_grads()
    with watching_kept() as kept:
        trainer, _, _ = train(tmp_path, model=model)
    assert trainer.shortcuts.chunked_loss
    assert kept


def count_asking(monkeypatch):
    calls, stock = [], mixin.ask_trainer

    def ask_trainer(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    monkeypatch.setattr(mixin, "ask_trainer", ask_trainer)
    return calls


def test_a_model_that_does_not_change_is_asked_once(tmp_path, monkeypatch):
    """Evaluation, freezing, checkpoints and coefficients in between change nothing."""

    class Trains(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.config.use_cache = not model.config.use_cache
            model.model.embed_tokens.requires_grad_(state.global_step % 2 == 0)
            model.config.initializer_range *= 0.5

    calls = count_asking(monkeypatch)
    options = {"num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"save_strategy": "steps"}
    train(tmp_path, Trains(), rows=rows_behind() * 2, eval_dataset=rows_behind(), **options)
    assert len(calls) == 1


def test_a_hook_that_comes_and_goes_is_asked_about_once(tmp_path, monkeypatch):
    class Looks(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step % 2:
                head = model.lm_head
                self.handle = head.register_forward_hook(lambda module, args, logits: None)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 2 == 0:
                self.handle.remove()

    calls = count_asking(monkeypatch)
    _, gradients, _ = train(
        tmp_path, Looks(), rows=rows_behind() * 6, max_steps=6, learning_rate=0.0
    )
    assert len(calls) == 2
    assert all(relative_error(one, gradients[0]) < 1e-12 for one in gradients)


def test_a_model_that_changes_in_each_update_computes_rows_as_they_are_in_the_end(
    tmp_path, monkeypatch
):
    def another_scale(model):
        scale = 0.5 + 0.1 * len(model.lm_head._forward_hooks)
        model.lm_head.register_forward_hook(lambda module, args, logits: scale * logits)

    class Always(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            another_scale(model)

    calls = count_asking(monkeypatch)
    num_updates = asked._MOST_ANSWERS + 3
    trainer, gradients, warnings = train(
        tmp_path,
        Always(),
        rows=rows_behind() * num_updates,
        max_steps=num_updates,
        learning_rate=0.0,
    )
    assert len(calls) == asked._MOST_ANSWERS
    assert any("until it is asked again" in line.lower() for line in warnings)
    assert not trainer.shortcuts.bodies

    def all_of_them(model):
        for _ in range(num_updates):
            another_scale(model)

    assert relative_error(gradients[-1], wanted(all_of_them)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("at", [None, 0], ids=["when a run begins", "within an epoch"])
def test_two_ranks_ask_again_together_and_only_when_an_epoch_begins(tmp_path, at):
    expected = wanted(another_loss)
    for gradients, chunked, shares, warnings in run_ranks(
        train_as_rank, 2, out=str(tmp_path), at=at
    ):
        for gradient in gradients:
            assert relative_error(gradient, expected) < 1e-12
        assert not chunked
        assert shares  # asked again by the second epoch at the latest
        assert any("Until it is asked again" in line for line in warnings) == (at == 0)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("kind", [None, LoraConfig, LNTuningConfig])
def test_looking_twice_finds_the_same_and_names_what_has_changed(kind):
    model = tiny_llama()
    if kind is not None:
        layers = ["q_proj"] if kind is LoraConfig else ["input_layernorm"]
        get_peft_model(model, kind(target_modules=layers))
    before = asked.as_they_stand([model])
    assert before == asked.as_they_stand([model])
    a_hook_by_place(model)
    after = asked.as_they_stand([model])
    assert [name for name in after if after[name] != before[name]] == ["hooks on it"]
