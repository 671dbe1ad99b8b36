"""Code written for the stock Trainer, with our names put in: what is to be equal is equal."""

import pytest
import torch
from support.programs import warnings_of
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, log_rows, make_trainer, pad, ragged_rows, tiny_llama
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_gradacc import ConfigError, GradAccArguments, GradAccMixin, GradAccTrainer, LossError

ROWS = ragged_rows(23, seed=5)
STOCK = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
OURS = (GradAccTrainer, GradAccArguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 1.5, "lr_scheduler_type": "linear"},
        {"num_train_epochs": 0.3, "lr_scheduler_type": "cosine"},
        {"max_steps": 7, "lr_scheduler_type": "linear", "warmup_steps": 2},
        {"num_train_epochs": 3, "logging_steps": 0.2, "eval_steps": 0.25, "eval_strategy": "steps"},
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "eval_delay": 2},
        {"num_train_epochs": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "optim": "adamw_torch",
         "eval_strategy": "epoch"},
        {"optim": "adafactor", "logging_strategy": "epoch", "num_train_epochs": 2},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=str,
)  # fmt: skip
def test_steps_epochs_rates_and_events_are_those_of_stock(tmp_path, options):
    seen = []
    for trainer_class, arguments_class in ((Trainer, TrainingArguments), OURS):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path,
            ROWS,
            trainer_class=trainer_class,
            arguments_class=arguments_class,
            callbacks=[recorder],
            eval_dataset=ROWS[:5],
            **STOCK | options,
        )
        trainer.train()
        kept = ("step", "epoch", "learning_rate")
        rows = [[row.get(key) for key in kept] for row in trainer.state.log_history]
        state = trainer.state
        seen.append([state.max_steps, state.num_train_epochs, recorder.events, rows])
    assert seen[1] == seen[0]


@pytest.mark.slow
def test_training_twice_trains_twice(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, lr_scheduler_type="linear", **STOCK)
    trainer.train()
    first, weights = trainer.state.log_history[:-1], trainer.model.state_dict()
    before = {name: w.clone() for name, w in weights.items()}
    trainer.train()
    second = trainer.state.log_history[:-1]
    for key in ("step", "learning_rate", "epoch", "target_tokens_seen", "effective_batch_size"):
        assert [row[key] for row in second] == [row[key] for row in first]
    assert trainer.state.global_step == 4
    assert relative_error(trainer.model.state_dict(), before) > 1e-3


@pytest.mark.slow
def test_the_next_trial_of_a_search_may_have_another_batch(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, model=None, effective_batch_size=6, max_steps=2)
    trainer.train()
    trainer.args.effective_batch_size = 12
    trainer.train()
    assert [row["effective_batch_size"] for row in log_rows(trainer)] == [12, 11]


# ---- training_step -----------------------------------------------------------------------------


class CallsSuper(GradAccTrainer):
    """The usual: look at the batch, then go on."""

    seen = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen += len(inputs["input_ids"])
        return super().training_step(model, inputs, num_items_in_batch)


class CallsItTwiceOver(CallsSuper):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch)


class StepInAMixin:
    def training_step(self, model, inputs, num_items_in_batch=None):
        assert isinstance(inputs, dict)
        return super().training_step(model, inputs, num_items_in_batch)


class WithMixinInFront(StepInAMixin, GradAccTrainer):
    pass


class CopiesStock(GradAccTrainer):
    """What the stock step does, copied: it divides by the attribute that holds the weight."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class StockWithAStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        assert "input_ids" in inputs
        return super().training_step(model, inputs, num_items_in_batch)


class BehindTheMixin(GradAccMixin, StockWithAStep):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer_class", [CallsSuper, CallsItTwiceOver, WithMixinInFront, CopiesStock, BehindTheMixin]
)
def test_a_training_step_of_ones_own_is_called_for_each_micro_batch(tmp_path, trainer_class):
    recorder, rows = Recorder(), ROWS[:7]
    trainer = make_trainer(
        tmp_path,
        rows,
        trainer_class=trainer_class,
        callbacks=[recorder],
        effective_batch_size=7,
        per_device_train_batch_size=3,
        learning_rate=0.0,
    )
    whole = tiny_llama().train()
    with float64_everywhere():
        trainer.train()
        expected = reference_gradient(whole, rows, pad)
    assert relative_error(recorder.gradients[0], expected) <= 1e-10
    assert getattr(trainer, "seen", 7) == 7
    assert log_rows(trainer)[0]["micro_batches_per_update"] == 3


class DividesByTheArgument(GradAccTrainer):
    """As in tutorials; stock makes it a mean of means."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs) / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class DividesByNothing(GradAccTrainer):
    """As copied from before 4.46, when accelerate divided in its backward."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class DividesTheResult(GradAccTrainer):
    """The same with its last line: what is logged was divided by hand."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach() / self.args.gradient_accumulation_steps


class Forgets(GradAccTrainer):
    """PGD's: its own backward begins from a gradient of nothing, and what was there is put back."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        kept = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        model.zero_grad()
        steps = self.args.gradient_accumulation_steps
        (self.compute_loss(model, inputs) / steps).backward()
        for weight, gradient in kept.items():
            weight.grad += gradient
        return self.compute_loss(model, inputs).detach() / steps


@pytest.mark.parametrize(
    "trainer_class", [DividesByTheArgument, DividesByNothing, DividesTheResult, Forgets]
)
def test_a_backward_of_ones_own_is_weighed_whatever_it_divides_by(tmp_path, trainer_class):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        ROWS[:7],
        trainer_class=trainer_class,
        callbacks=[recorder],
        learning_rate=0.0,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    whole = tiny_llama().train()
    with float64_everywhere():
        trainer.train()
        expected = reference_gradient(whole, ROWS[:7], pad)
        loss = whole(**pad(ROWS[:7])).loss
    assert relative_error(recorder.gradients[0], expected) <= 1e-10
    assert log_rows(trainer)[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)


def test_where_gradients_are_kept_elsewhere_such_a_step_is_refused(tmp_path, monkeypatch):
    """In lockstep, FSDP2 and DeepSpeed hold the sums of an update, not ``.grad``."""
    monkeypatch.setattr("hf_gradacc.trainer.mixin.find_own_step", lambda trainer_class: None)
    trainer = make_trainer(tmp_path, ROWS, trainer_class=DividesByTheArgument, **STOCK)
    before = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    with pytest.raises(LossError, match=r"DividesByTheArgument.training_step did not weigh"):
        trainer.train()
    assert relative_error(trainer.model.state_dict(), before) == 0


class SeesRows(Trainer):
    """Behind the mixin: looks at what the collator made, not at how a shortcut lays it out."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        assert inputs["labels"].shape == inputs["input_ids"].shape
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_step_behind_the_mixin_sees_rows_as_they_are(tmp_path):
    kind = type("Mixed", (GradAccMixin, SeesRows), {})
    trainer = make_trainer(tmp_path, ROWS, trainer_class=kind, **STOCK)
    trainer.train()
    assert "SeesRows.training_step" in trainer.shortcuts.reason("target_only_logits")


class OldLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        return super().compute_loss(model, inputs, return_outputs)


class AsAdvised(OldLoss):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


def test_a_loss_of_before_4_46_is_named_as_such(tmp_path):
    """Stock fails on it in its first step; one that is called by a newer one trains in both."""
    with pytest.raises(TypeError, match="num_items_in_batch"):
        make_trainer(
            tmp_path, ROWS, trainer_class=OldLoss, arguments_class=TrainingArguments, **STOCK
        ).train()
    kind = type("Mixed", (GradAccMixin, OldLoss), {})
    with pytest.raises(LossError, match=r"OldLoss.compute_loss takes no num_items.*since 4.46"):
        make_trainer(tmp_path, ROWS, trainer_class=kind, **STOCK).train()
    for advised in (type("Behind", (GradAccMixin, AsAdvised), {}), AsAdvised):
        trainer = make_trainer(tmp_path, ROWS, trainer_class=advised, **STOCK)
        trainer.train()
        assert trainer.state.global_step == 4


# ---- rows and labels ---------------------------------------------------------------------------


class NamesItsTargets(nn.Module):
    """Labels under another name, and a loss of its own."""

    def __init__(self, *, shifts):
        super().__init__()
        self.llama = tiny_llama()
        self.shifts = shifts

    def forward(self, input_ids, attention_mask, targets=None):
        logits = self.llama(input_ids, attention_mask).logits
        if self.shifts:
            shifted, targets = logits[:, :-1], targets[:, 1:]
            return {"loss": nn.functional.cross_entropy(shifted.flatten(0, 1), targets.flatten())}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())}


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("drawn", ["effective_batch_size", "tokens_per_update"])
def test_labels_may_have_another_name(tmp_path, shifts, drawn):
    rows = [{"targets": row["labels"], **row} for row in ROWS[:7]]
    rows = [{key: row[key] for key in row if key != "labels"} for row in rows]

    def collate(part):
        batch = pad([{**row, "labels": row["targets"]} for row in part])
        return {"targets": batch.pop("labels"), **batch}

    recorder = Recorder()
    model, whole = NamesItsTargets(shifts=shifts), NamesItsTargets(shifts=shifts).train()
    with float64_everywhere():
        trainer = make_trainer(
            tmp_path,
            rows,
            model=model,
            data_collator=collate,
            callbacks=[recorder],
            label_names=["targets"],
            per_device_train_batch_size=3,
            learning_rate=0.0,
            **{drawn: 7 if drawn == "effective_batch_size" else 10_000},
        )
        trainer.train()
        expected = reference_gradient(whole, rows, collate)
    assert not trainer.facts.warnings
    assert not trainer.facts.pad_to_one_width  # padding is no target under that name either
    assert relative_error(recorder.gradients[0], expected) <= 1e-10
    first = 1 if shifts else 0
    targets = sum(label != -100 for row in rows for label in row["targets"][first:])
    assert log_rows(trainer)[0]["tokens_per_update"] == targets


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens_per_micro_batch": 40}, "max_tokens_per_micro_batch = 40: how many tokens"),
        ({"tokens_per_update": 60}, "tokens_per_update = 60: how many tokens a row has is unknown"),
    ],
)
def test_tokens_that_only_the_collator_knows_of_cannot_be_counted(tmp_path, options, words):
    """Taken for rows of length 0, all of an update would be one micro-batch, whatever its size."""
    rows = [{"text": " ".join(map(str, row["input_ids"]))} for row in ROWS]

    def collate(part):
        ids = [[int(word) for word in row["text"].split()] for row in part]
        return pad([{"input_ids": x, "attention_mask": [1] * len(x), "labels": x} for x in ids])

    settings = {"data_collator": collate, "remove_unused_columns": False}
    trainer = make_trainer(tmp_path, rows, **settings, **options)
    with pytest.raises(ConfigError, match=words):
        trainer.train()
    trainer = make_trainer(tmp_path, rows, **settings, **STOCK)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_sampler_without_a_seed_is_drawn_once_an_epoch(tmp_path):
    class Replacing(GradAccTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.WeightedRandomSampler([1.0] * len(ROWS), len(ROWS))

    trainer = make_trainer(
        tmp_path, ROWS, trainer_class=Replacing, tokens_per_update=30, max_steps=1
    )
    sampler = trainer.get_train_dataloader().updates.batch_sampler
    assert sampler.membership(0) == sampler.membership(0) == [list(share) for share in sampler]
    assert sampler.membership(1) != sampler.membership(0)


def test_options_are_read_from_a_command_line():
    line = (
        "--output_dir out --effective_batch_size 8 --max_tokens_per_micro_batch 2048 "
        "--incomplete_update drop --target_only_logits False --use_cpu True"
    )
    (parsed,) = HfArgumentParser(GradAccArguments).parse_args_into_dataclasses(line.split(" "))
    assert (parsed.effective_batch_size, parsed.max_tokens_per_micro_batch) == (8, 2048)
    assert (parsed.incomplete_update, parsed.target_only_logits) == ("drop", False)


class Doubles(TrainerCallback):
    """Lets the batch grow, as stock would from one update to the next."""

    def on_step_end(self, args, state, control, **kwargs):
        args.gradient_accumulation_steps *= 2


@pytest.mark.parametrize("grows", [True, False])
def test_a_batch_that_a_callback_lets_grow_is_named(tmp_path, grows):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    with warnings_of("hf_gradacc") as warnings:
        trainer = make_trainer(
            tmp_path, ragged_rows(12), callbacks=[Doubles()] if grows else [], **options
        )
        trainer.train()
    assert [row["effective_batch_size"] for row in log_rows(trainer)] == [4, 4, 4]
    named = ["gradient_accumulation_steps is no longer 2" in line for line in warnings]
    assert named == ([True] if grows else [])
