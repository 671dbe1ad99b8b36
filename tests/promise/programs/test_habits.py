"""Programs with what scripts do out of habit: flags, frozen parts, rows of every kind, metrics."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch
import transformers as T
from support.programs import NUM_ROWS, Program, cases, hold
from support.tiny import pad, ragged_rows, tiny_llama
from support.zoo_rows import tiny_tokenizer
from torch import nn
from torch.nn import functional as F

BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}


def language_rows():
    return ragged_rows(NUM_ROWS, seed=6)


def classifier():
    return T.BertForSequenceClassification(T.BertConfig(**BERT))


def ids(i):
    return [5 + (7 * i + place) % 50 for place in range(3 + i % 9)]


# ---- rows --------------------------------------------------------------------------------------


def glue():
    """Tokenized by ``map``, the text still there, the column called ``label``."""
    rows = [{"sentence": "a" * i, "idx": i, "label": i % 3} for i in range(NUM_ROWS)]
    return datasets.Dataset.from_list(rows).map(
        lambda row: {"input_ids": ids(row["idx"]), "attention_mask": [1] * len(ids(row["idx"]))}
    )


@dataclass
class Example:
    input_ids: list[int]
    attention_mask: list[int]
    label: int


def examples():
    """Objects with attributes, as the first example scripts made them."""
    return [Example(ids(i)[:3], [1, 1, 1], i % 3) for i in range(NUM_ROWS)]


def encodings():
    return [
        T.BatchEncoding({"input_ids": ids(i), "attention_mask": [1] * len(ids(i)), "label": i % 3})
        for i in range(NUM_ROWS)
    ]


def arrays():
    return [
        {
            "input_ids": np.array(ids(i)),
            "attention_mask": np.ones(len(ids(i)), int),
            "labels": i % 3,
        }
        for i in range(NUM_ROWS)
    ]


class ByIndex(torch.utils.data.Dataset):
    """The tutorial's: encodings of all rows, and their labels."""

    def __init__(self):
        self.encodings = tiny_tokenizer().pad({"input_ids": [ids(i) for i in range(NUM_ROWS)]})
        self.labels = [i % 3 for i in range(NUM_ROWS)]

    def __getitem__(self, i):
        item = {key: torch.tensor(value[i]) for key, value in self.encodings.items()}
        return item | {"labels": torch.tensor(self.labels[i])}

    def __len__(self):
        return NUM_ROWS


def flat():
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in language_rows()]


# ---- models and flags --------------------------------------------------------------------------


def frozen_trunk():
    model = classifier()
    model.bert.requires_grad_(False)
    return model


def tied_and_frozen():
    model = tiny_llama(tie_word_embeddings=True)
    model.get_input_embeddings().requires_grad_(False)
    return model


class FlagOff(T.Trainer):
    """Tells stock that its loss is a mean of the batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        targets = inputs["labels"][:, 1:] != -100
        loss = outputs.loss + 0.01 * outputs.logits[:, :-1].square().mean(-1)[targets].mean()
        return (loss, outputs) if return_outputs else loss


class Scaled(T.Trainer):
    """Says itself that the loss is scaled: it divides by the count of the whole batch."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        loss = loss / (
            labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        )
        return (loss, outputs) if return_outputs else loss


class Swapped(T.Trainer):
    """The same arguments in another order."""

    def compute_loss(self, model, inputs, num_items_in_batch=None, return_outputs=False):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Positional(T.Trainer):
    """Hands everything on by position."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


class Adversaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.maker, self.judge = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, features):
        return self.judge(self.maker(features[:, :2]))


class TwoOptimizers(T.Trainer):
    """A GAN: the judge learns by its own optimizer in each step, the maker by the trainer's."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.maker.parameters(), lr=0.1)
        self.of_judge = torch.optim.SGD(self.model.judge.parameters(), lr=0.1)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        features = inputs["features"]
        made = model.maker(features[:, :2])
        right, wrong = model.judge(features), model.judge(made.detach())
        self.of_judge.zero_grad()
        (F.softplus(-right) + F.softplus(wrong)).mean().backward()
        self.of_judge.step()
        loss = F.softplus(-model.judge(made)).mean() / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        self.of_judge.zero_grad()
        return loss.detach()


class StepsByItself(T.Trainer):
    """Does all of it in its step; the trainer's optimizer finds no gradient."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs)["loss"]
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for weight, grad in zip(model.parameters(), grads, strict=True):
                weight -= 0.1 * grad
        return loss.detach()


class Tabular(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, features, labels=None):
        score = self.layer(features).squeeze(-1)
        return {"loss": F.mse_loss(score, labels), "logits": score}


def table():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_ROWS, 4, generator=draw, dtype=torch.float64)
    return [{"features": x, "labels": float(x[0])} for x in features]


def evaluates(model):
    return {
        "eval_dataset": {"one": language_rows()[:5], "two": language_rows()[5:9]},
        "compute_metrics": lambda p: {"wide": float(p.predictions.shape[-1])},
    }


def evaluated_both(trainer):
    keys = {key for row in trainer.state.log_history for key in row}
    assert {"eval_one_loss", "eval_two_loss", "eval_one_wide"} <= keys


padded = T.DataCollatorWithPadding(tiny_tokenizer())
SAME = {"stock": "exact"}
NOT_UNUSED = {"remove_unused_columns": True}

PROGRAMS = {
    "GLUE": Program(classifier, glue, padded, options=NOT_UNUSED),
    "objects": Program(classifier, examples),
    "encodings": Program(classifier, encodings, padded),
    "arrays": Program(classifier, arrays, padded),
    "tutorial": Program(classifier, ByIndex),
    "flattened": Program(tiny_llama, flat, T.DataCollatorWithFlattening(), **SAME),
    "frozen trunk": Program(frozen_trunk, glue, padded, options=NOT_UNUSED),
    "frozen embeddings": Program(tied_and_frozen, language_rows, pad, **SAME),
    "flag off": Program(tiny_llama, language_rows, pad, FlagOff),
    "scaled by itself": Program(tiny_llama, language_rows, pad, Scaled, **SAME),
    "arguments swapped": Program(tiny_llama, language_rows, pad, Swapped),
    "all by position": Program(tiny_llama, language_rows, pad, Positional, **SAME),
    "two optimizers": Program(
        Adversaries,
        table,
        trainer=TwoOptimizers,
        ours="named",
        says="several backwards",
    ),
    "steps by itself": Program(
        Tabular, table, trainer=StepsByItself, ours="as stock", says="before it neither"
    ),
    "two evaluations": Program(
        tiny_llama,
        language_rows,
        pad,
        more=evaluates,
        options={"eval_strategy": "steps", "eval_steps": 1},
        check=evaluated_both,
        **SAME,
    ),
    "one loader worker": Program(
        tiny_llama, language_rows, pad, options={"dataloader_num_workers": 1}, **SAME
    ),
    "NEFTune of nothing": Program(
        tiny_llama, language_rows, pad, options={"neftune_noise_alpha": 0.0}, **SAME
    ),
    "best model at end": Program(
        tiny_llama,
        language_rows,
        pad,
        more=lambda model: {
            "eval_dataset": language_rows()[:5],
            "callbacks": [T.EarlyStoppingCallback(3)],
        },
        options={
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "save_total_limit": 2,
        },
        **SAME,
    ),
}


@pytest.mark.parametrize("program", cases(PROGRAMS))
def test_a_program_of_habit_trains(program, tmp_path):
    hold(program, tmp_path)
