"""Kept beginnings in runs of every kind: broken on purpose, failed, resumed, handed other rows."""

import contextlib
import gc
import tempfile
import weakref
from dataclasses import replace

import peft
import pytest
import torch
from support.failing import Failure
from support.kept_rows import KEEPING, NUM_ROWS, keeping_always, rows_behind, watching_kept
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.resume_jobs import train_and_report
from support.tiny import Recorder, log_rows, make_trainer, pad, tiny_llama

from hf_gradacc import GradAccTrainer
from hf_gradacc.loss.trees import kept as kept_module
from hf_gradacc.loss.trees.held import Held, hold, in_front
from hf_gradacc.loss.trees.kept import KeptBeginning
from hf_gradacc.trainer import step
from hf_gradacc.updates.trees.prefixes import count_distinct_tokens, sort_by_prefix

ROWS = rows_behind()


@pytest.fixture(autouse=True)
def keep_short_beginnings():
    with keeping_always():
        yield


def make_model(**options):
    with float64_everywhere():
        return tiny_llama(attn_implementation="sdpa", **options)


@contextlib.contextmanager
def training(rows=ROWS, *, model=None, in_float64=True, **options):
    """Train; give the trainer, the gradient of each update and what was kept."""
    recorder, network = Recorder(), model or make_model()
    options = {"effective_batch_size": NUM_ROWS} | KEEPING | options
    exactly = float64_everywhere() if in_float64 else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as out, exactly, watching_kept() as kept:
        callbacks = [recorder, *options.pop("callbacks", ())]
        trainer = make_trainer(out, rows, model=network, callbacks=callbacks, **options)
        trainer.train()
        trainer.gradients, trainer.kept = recorder.gradients, kept
        yield trainer


@pytest.fixture(scope="module")
def expected():
    with float64_everywhere():
        return reference_gradient(make_model(), ROWS, pad)


def error_of(trainer, expected):
    return relative_error(trainer.gradients[0], expected)


# ---- broken on purpose ---------------------------------------------------------------------------


def one_micro_batch_lost(monkeypatch):
    stock = KeptBeginning.begin_micro_batch

    def begin(self):
        for body in self._bodies.values():
            for held in kept_module._all_held(body):
                if held.leaf is not None:
                    held.leaf.grad = None
        stock(self)

    monkeypatch.setattr(KeptBeginning, "begin_micro_batch", begin)


def never_sent_back(monkeypatch):
    monkeypatch.setattr(KeptBeginning, "close", lambda self: None)


def sent_back_twice(monkeypatch):
    backward = torch.autograd.backward

    def twice(sources, sums):
        backward(sources, sums, retain_graph=True)
        backward(sources, sums)

    monkeypatch.setattr(
        kept_module.torch.autograd,
        "backward",
        lambda *a, **k: twice(*a) if isinstance(a[0], tuple) and len(a) == 2 else backward(*a, **k),
    )


def positions_that_start_again(monkeypatch):
    stock = step.lay_out_trees

    def lay_out(*args, behind=None, **options):
        trees = stock(*args, behind=behind, **options)
        moved = 0 if behind is None else len(behind.tokens)
        return replace(trees, positions=trees.positions - moved)

    monkeypatch.setattr(step, "lay_out_trees", lay_out)


def sums_in_bfloat16(monkeypatch):
    stock = kept_module.hold

    def broken(states):
        held = stock(states)
        if held.leaf is None:
            return held
        leaf = torch.zeros((), dtype=torch.bfloat16).expand(states.shape)
        return replace(held, leaf=leaf.requires_grad_())

    monkeypatch.setattr(kept_module, "hold", broken)


def keys_alone(monkeypatch):
    """What comes back to hidden states, router logits and the like is forgotten."""
    monkeypatch.setattr(kept_module, "held_outputs", forgetting(kept_module.held_outputs))


def forgetting(stock):
    def held_outputs(output, num_tokens):
        found = stock(output, num_tokens)
        return replace(found, source=None) if isinstance(found, Held) else found

    return held_outputs


BROKEN = [one_micro_batch_lost, never_sent_back, sent_back_twice, positions_that_start_again]
BROKEN += [sums_in_bfloat16, keys_alone]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_way_back_does_not_have_the_gradient(monkeypatch, expected, broken):
    with training() as trainer:
        assert len(trainer.kept) == 2
        assert error_of(trainer, expected) < 1e-12
    broken(monkeypatch)
    with training() as trainer:
        assert trainer.shortcuts.reason("kept_beginnings") == ""
        assert error_of(trainer, expected) > 1e-5


# ---- what is counted -----------------------------------------------------------------------------


def test_the_log_counts_a_kept_beginning_once():
    with training() as trainer:
        (row,) = log_rows(trainer)
        stats = trainer.last_update.stats
    distinct = count_distinct_tokens(sort_by_prefix([row["input_ids"] for row in ROWS]))
    again = 4  # a branch that two micro-batches have
    assert distinct <= row["computed_tokens_per_update"] <= distinct + again
    assert row["shared_fraction"] == stats.num_shared_tokens / stats.num_input_tokens


# ---- memory --------------------------------------------------------------------------------------


@contextlib.contextmanager
def watching_graphs():
    """Collect weak references to everything that was kept."""
    made = []
    stock = KeptBeginning.of

    def of(self, *args, **options):
        body = stock(self, *args, **options)
        if body is not None and not any(known() is body for known in made):
            made.append(weakref.ref(body))
        return body

    KeptBeginning.of = of
    try:
        yield made
    finally:
        KeptBeginning.of = stock


def test_nothing_is_kept_between_updates():
    with watching_graphs() as made:
        alive = []
        watch = Recorder()
        watch.on_pre_optimizer_step = lambda *_, **__: alive.append(
            sum(body() is not None for body in made)
        )
        gc.disable()
        try:
            with training(callbacks=[watch], num_train_epochs=2):
                pass
        finally:
            gc.enable()
    assert len(made) >= 4
    assert alive == [0, 0]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failed_attempt_keeps_nothing_and_the_next_one_is_exact(expected, where):
    model = make_model()
    failed = []
    with watching_graphs() as made:

        def third_micro_batch(trees, width, seen):
            if seen == 2 and not failed:
                failed.append(len(made))
                return True
            return False

        Failure(model, third_micro_batch, where=where)
        with training(model=model, max_tokens_per_micro_batch=40) as trainer:
            assert failed[0] >= 1
            assert error_of(trainer, expected) < 1e-12
            assert trainer.kept == []
    assert not any(body() for body in made)


# ---- resumed -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_keeps_beginnings_is_resumed_bit_for_bit(tmp_path):
    options = KEEPING | {
        "rows": [*rows_behind(), *rows_behind(seed=1)],
        "prepare": lambda trainer: trainer.model.set_attn_implementation("sdpa"),
        "effective_batch_size": NUM_ROWS,
        "max_steps": 6,
        "logging_steps": 1,
    }
    with watching_kept() as kept:
        whole = train_and_report(str(tmp_path / "whole"), **options)
    assert len(kept) >= 6
    train_and_report(str(tmp_path / "parts"), stop=2, **options)
    again = train_and_report(str(tmp_path / "parts"), resume=True, **options)
    assert again["logs"] == whole["logs"]
    for name, weight in whole["weights"].items():
        assert torch.equal(again["weights"][name], weight)


# ---- rows, steps and models that are not as they were planned ------------------------------------


class ReversesRows(GradAccTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = {key: value.flip(0) for key, value in inputs.items()}
        return super().training_step(model, inputs, num_items_in_batch)


def test_rows_in_another_order_stand_behind_the_same_beginning(expected):
    with training(trainer_class=ReversesRows) as trainer:
        assert len(trainer.kept) == 2
        assert error_of(trainer, expected) < 1e-12


class ChangesOneBeginning(GradAccTrainer):
    """Writes another first token into the first row of every micro-batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = {key: value.clone() for key, value in inputs.items()}
        inputs["input_ids"][0, 0] = 9
        return super().training_step(model, inputs, num_items_in_batch)


def as_rows(monkeypatch):
    """Keep the cut, but compute its rows."""
    monkeypatch.setattr(step.MicroBatchStep, "_trees_of", lambda self, inputs: None)


def test_rows_that_begin_otherwise_than_planned_are_computed_whole(monkeypatch):
    gradients = []
    for change in (None, as_rows):
        if change is not None:
            change(monkeypatch)
        with training(trainer_class=ChangesOneBeginning) as trainer:
            assert trainer.kept == []
            gradients.append(trainer.gradients[0])
    assert relative_error(*gradients) < 1e-12


class AsksTwice(GradAccTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return two_losses(model, inputs)


def two_losses(model, inputs):
    return sum(model(**inputs).loss * weight for weight in (1.0, 0.5))


def test_a_loss_that_calls_the_model_twice_keeps_nothing():
    with float64_everywhere():
        wanted = reference_gradient(make_model(), ROWS, pad, loss_of=two_losses)
    with training(trainer_class=AsksTwice) as trainer:
        assert trainer.kept == []
        assert "several times" in trainer.shortcuts.reason("kept_beginnings")
        assert error_of(trainer, wanted) < 1e-12


class AsksTwiceLater(GradAccTrainer):
    """Calls the model once as long as it is tried, twice in training."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return two_losses(model, inputs) if torch.is_grad_enabled() else model(**inputs).loss * 1.5


def test_a_loss_that_calls_the_model_twice_only_in_training_is_exact_and_says_so(monkeypatch):
    lines = []
    monkeypatch.setattr(step.logger, "warning_once", lines.append)
    with float64_everywhere():
        wanted = reference_gradient(make_model(), ROWS, pad, loss_of=two_losses)
    with training(trainer_class=AsksTwiceLater) as trainer:
        assert error_of(trainer, wanted) < 1e-12
    assert any("several times" in line for line in lines)


class TurnsAdaptersOff(GradAccTrainer):
    """Asks the model without its adapters in every other micro-batch."""

    count = 0

    def training_step(self, *args, **kwargs):
        self.count += 1
        off = self.model.disable_adapter() if self.count % 2 else contextlib.nullcontext()
        with off:
            return super().training_step(*args, **kwargs)


def test_adapters_that_are_off_at_times_see_no_beginning_computed_with_them(monkeypatch):
    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
        model = peft.get_peft_model(tiny_llama(attn_implementation="sdpa"), config).double()
        model.base_model.model.lm_head.weight.requires_grad_(True)  # trains without them, too
        return model

    gradients = []
    for change in (None, as_rows):
        if change is not None:
            change(monkeypatch)
        with training(model=adapted(), trainer_class=TurnsAdaptersOff) as trainer:
            gradients.append(trainer.gradients[0])
    assert relative_error(*gradients) < 1e-12


class Offloads(GradAccTrainer):
    def training_step(self, *args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            return super().training_step(*args, **kwargs)


def test_a_graph_whose_tensors_are_taken_elsewhere_is_not_kept(monkeypatch, expected):
    lines = []
    monkeypatch.setattr(step.logger, "warning_once", lines.append)
    with training(trainer_class=Offloads) as trainer:
        assert trainer.kept == []
        assert error_of(trainer, expected) < 1e-12
    assert any("moved elsewhere" in line for line in lines)


def test_layers_without_a_graph_are_noticed_when_they_run(monkeypatch, expected):
    lines = []
    monkeypatch.setattr(step.logger, "warning_once", lines.append)
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with training(model=model, in_float64=False, num_train_epochs=2) as trainer:
        assert trainer.kept == []
        assert error_of(trainer, expected) < 1e-6
        computed = [row["computed_tokens_per_update"] for row in log_rows(trainer)]
    assert sum("use_reentrant" in line for line in lines) >= 1
    assert computed[1] > computed[0]  # the log says so from the next update on


# ---- other precisions ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_is_as_near_as_whole_trees_are(monkeypatch, expected, way):
    errors = []
    for keeps in (True, False):
        monkeypatch.setattr("hf_gradacc.ranks.engine.OneProcess.keeps_beginnings", keeps)
        dtype = torch.bfloat16 if way == "weights" else torch.float32
        model = make_model().to(dtype)
        with training(model=model, in_float64=False, bf16=way == "autocast") as trainer:
            assert len(trainer.kept) == 2 * keeps
            errors.append(error_of(trainer, expected))
    assert errors[0] < max(1.5 * errors[1], 0.02)


def test_what_comes_back_to_kept_tokens_is_added_up_in_float32():
    kept = torch.ones(2, 1, 3, dtype=torch.bfloat16, requires_grad=True)
    held = hold(kept)
    own = torch.zeros(512, 1, 1, 3, dtype=torch.bfloat16)
    put = in_front(held, own)
    for _ in range(4):
        (put * 1.0).sum().backward(retain_graph=True)
    assert held.leaf.grad.dtype == torch.float32
    assert torch.equal(held.leaf.grad, torch.full((2, 1, 3), 2048.0))
    assert kept.grad is None
