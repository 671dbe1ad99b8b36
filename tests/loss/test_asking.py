"""How the trainer asks the model: in the precision it computes in, and about its own loss."""

import random

import numpy as np
import pytest
import torch
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_gradacc import ConfigError, DataError, GradAccTrainer
from hf_gradacc.loss.asking import dtype_computed_in
from hf_gradacc.loss.probe_rows import choose_probe_rows
from hf_gradacc.updates.loader import build_loader
from hf_gradacc.updates.targets import TargetRule

ROWS = ragged_rows(12, seed=61)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        (torch.float32, {}, torch.float32),
        (torch.float32, {"bf16": True}, torch.bfloat16),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.float64, {}, torch.float64),
    ],
    ids=str,
)
def test_rounding_is_expected_of_the_dtype_a_forward_runs_in(tmp_path, weights, options, expected):
    model = tiny_llama(dtype=weights)
    trainer = make_trainer(tmp_path, ROWS, model=model, effective_batch_size=6, **options)
    kinds = {"bf16": trainer.args.bf16, "fp16": trainer.args.fp16}
    assert dtype_computed_in(model, **kinds) == expected
    trainer.train()
    facts = trainer.facts
    assert facts.rule is TargetRule.NEXT_TOKEN
    assert not facts.pad_to_one_width
    assert not facts.warnings


def test_one_coarse_weight_is_enough_to_expect_coarse_rounding():
    model = tiny_llama(dtype=torch.float32)
    model.lm_head.to(torch.bfloat16)
    assert dtype_computed_in(model, bf16=False, fp16=False) == torch.bfloat16


def test_label_smoothing_does_not_disturb_the_answer(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, effective_batch_size=6, label_smoothing_factor=0.3)
    trainer.train()
    assert trainer.facts.rule is TargetRule.NEXT_TOKEN
    assert not trainer.facts.warnings


# ---- what a few rows may hide ------------------------------------------------------------------


def mean_of_row_means(outputs, labels, num_items_in_batch=None):
    """Rows without a target left out, as careful people write it."""
    rows = zip(outputs["logits"].float(), labels, strict=True)
    return torch.stack([cross_entropy(x[:-1], y[1:]) for x, y in rows if y[1:].max() >= 0]).mean()


def alike(count):
    """Rows of one length that all have four targets, but for one that is not among those asked."""
    row = {"input_ids": list(range(3, 11)), "attention_mask": [1] * 8}
    rows = [{**row, "labels": [-100] * 4 + [7 + i % 5, 8, 9, 10]} for i in range(count)]
    rows[10] = {**row, "labels": [-100] * 7 + [10]}
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [alike(30), ROWS], ids=["alike", "ragged"])
def test_a_mean_over_rows_is_told_from_one_over_tokens(tmp_path, rows, dtype):
    """Where all rows asked have as many targets, the two are one figure."""
    for function, rule in ((mean_of_row_means, "sequence"), (None, "next_token")):
        trainer = make_trainer(
            tmp_path,
            rows,
            model=tiny_llama(dtype=dtype),
            trainer_options={"compute_loss_func": function},
            max_steps=1,
        )
        trainer.train()
        assert trainer.facts.rule == rule
        assert not trainer.facts.warnings


def classes(count, *, sort):
    rows = [{**row, "labels": i % 3} for i, row in enumerate(ragged_rows(count, seed=3))]
    return sorted(rows, key=lambda row: row["labels"]) if sort else rows


def collate_classes(rows):
    ids = pad([{**row, "labels": row["input_ids"]} for row in rows])
    return {**ids, "labels": torch.tensor([row["labels"] for row in rows])}


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, (1.0, 5.0, 0.2)], ids=["plain", "weighted"])
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_weights_are_read_off_the_call(tmp_path, weights, sort, dtype):
    """The head is zero, as some begin: all losses are log 3, and only gradients tell."""

    def loss(outputs, labels, num_items_in_batch=None):
        weight = None if weights is None else torch.tensor(weights)
        return cross_entropy(outputs["logits"].float(), labels, weight=weight)

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=64, num_attention_heads=2, num_labels=3, **sizes)
    model = BertForSequenceClassification(config).to(dtype)
    torch.nn.init.zeros_(model.classifier.weight)
    trainer = make_trainer(
        tmp_path,
        classes(60, sort=sort),
        model=model,
        data_collator=collate_classes,
        trainer_options={"compute_loss_func": loss},
        max_steps=1,
    )
    trainer.train()
    assert trainer.facts.rule is TargetRule.SEQUENCE
    assert not trainer.facts.warnings
    found = trainer.facts.class_weights
    assert (None if found is None else found.weights) == (weights and pytest.approx(weights))


def test_rows_to_ask_are_unlike_each_other_and_from_all_over(tmp_path):
    from hf_gradacc.updates.collator import UpdateCollator

    rows = [{"input_ids": [1] * 4, "label": 0} for _ in range(50)]
    rows += [{"input_ids": [1] * 9, "label": 1}, *[{"input_ids": [1] * 4, "label": 1}] * 49]
    rows += [{"input_ids": [1] * 6, "label": 2}]
    collator = UpdateCollator(list, max_sequences=2)
    loader = build_loader(
        rows,
        collator,
        effective_batch_size=4,
        tokens_per_update=None,
        incomplete_update="keep",
        seed=0,
    )
    chosen = choose_probe_rows(loader, collator)
    assert {len(row["input_ids"]) for row in chosen} > {4}
    classes = sorted(row["label"] for row in chosen)
    assert len(set(classes)) == 2  # two of one class, whose rows may influence each other
    assert len(classes) == 3


@pytest.mark.slow
def test_rows_whose_only_label_is_the_first_are_refused_before_training(tmp_path):
    """They have a label, and a causal LM predicts none of it."""
    rows = [{**row, "labels": [5] + [-100] * (len(row["input_ids"]) - 1)} for row in ROWS]
    trainer = make_trainer(tmp_path, rows)
    with pytest.raises(DataError, match="none of the 12 training rows has a target: all labels"):
        trainer.train()
    make_trainer(tmp_path, [*rows, ROWS[0]]).train()


def test_smoothing_what_are_no_classes_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_labels=1,
    )  # fmt: skip

    def collate(rows):
        batch = collate_classes(rows)
        return {**batch, "labels": batch["labels"].double()}

    trainer = make_trainer(
        tmp_path,
        classes(6, sort=False),
        model=BertForSequenceClassification(config).double(),
        data_collator=collate,
        label_smoothing_factor=0.1,
    )
    with pytest.raises(ConfigError, match=r"label_smoothing_factor = 0.1: there is nothing"):
        trainer.train()


class Counting(torch.nn.Module):
    """Counts its forwards: in place, by a new tensor, and draws a number in each."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 3)
        self.calls = 0
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x, labels=None):
        self.in_place += 1
        self.replaced = self.replaced + 1
        self.calls += 1
        self.drawn = (torch.rand(()), np.random.rand(), random.random())
        logits = self.fc(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_asking_leaves_no_trace_in_buffers_counters_log_rows_or_random_states(tmp_path):
    class Logs(GradAccTrainer):
        def compute_loss(self, *args, **kwargs):
            self.log({"aux": 1.0})
            self.losses = [*getattr(self, "losses", []), 1.0]
            return super().compute_loss(*args, **kwargs)

    rows = [{"x": torch.randn(4), "labels": i % 3} for i in range(8)]
    trainer = make_trainer(
        tmp_path,
        rows,
        model=Counting(),
        trainer_class=Logs,
        data_collator=default_data_collator,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert (int(trainer.model.in_place), int(trainer.model.replaced)) == (4, 4)
    assert (trainer.model.calls, len(trainer.losses)) == (4, 4)
    assert sum("aux" in row for row in trainer.state.log_history) == 4
    set_seed(1)
    trainer._ask(trainer.model, trainer._training_data.sample_inputs)
    after = (torch.rand(()), np.random.rand(), random.random())
    set_seed(1)
    assert after == (torch.rand(()), np.random.rand(), random.random())


@pytest.mark.parametrize("name", ["plain", "shortcuts"])
def test_asking_takes_few_forwards(tmp_path, monkeypatch, name):
    """Five for what the loss is a mean over; a causal LM's shortcuts are tried with seven more."""
    forwards = []
    model = tiny_llama()
    if name == "plain":
        options = {"target_only_logits": False, "drop_attention_mask": False, "layout": "padded"}
    else:
        options = {}
    trainer = make_trainer(tmp_path, ROWS, model=model, effective_batch_size=6, **options)
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            hook.remove()

    trainer.add_callback(Stop())
    trainer.train()
    assert len(forwards) == (5 if name == "plain" else 12)
    # Few rows, and short ones: in tokens it is less than two micro-batches of the run.
    assert sum(forwards[:5]) < 2 * 3 * max(len(row["input_ids"]) for row in ROWS) + 40
