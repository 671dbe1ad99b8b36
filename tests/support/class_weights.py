"""Losses with class weights, as people write them, and trainers that take them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
)

from hf_gradacc import GradAccMixin

from .reference import float64_everywhere
from .tiny import make_trainer, pad, ragged_rows, tiny_llama

WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
TOKEN_WEIGHTS = torch.linspace(0.2, 3.0, 48, dtype=torch.float64)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_labels": 3, "vocab_size": 64}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def rows_of(classes):
    rows = ragged_rows(len(classes), seed=5)
    return [{**row, "labels": label} for row, label in zip(rows, classes, strict=True)]


def collate_classes(rows):
    ids = pad([{**row, "labels": row["input_ids"]} for row in rows])
    return {**ids, "labels": torch.tensor([row["labels"] for row in rows])}


def collate_tokens(rows):
    batch = pad(rows)
    return {**batch, "labels": torch.where(batch["labels"] < 0, -100, batch["labels"] % 3)}


def of_rows(logits, labels):
    return functional.cross_entropy(logits, labels, weight=WEIGHTS)


def of_two_classes(logits, labels):
    """The first class weighs nothing."""
    weights = torch.tensor([0.0, 5.0, 0.2], dtype=torch.float64)
    return functional.cross_entropy(logits, labels, weight=weights)


def of_tokens(logits, labels):
    return nn.CrossEntropyLoss(WEIGHTS)(logits.flatten(0, 1), labels.flatten())


def of_next_tokens(logits, labels):
    scores = functional.log_softmax(logits[:, :-1].flatten(0, 1), -1)
    return functional.nll_loss(scores, labels[:, 1:].flatten(), TOKEN_WEIGHTS)


def smoothed(logits, labels):
    return functional.cross_entropy(logits, labels, weight=WEIGHTS, label_smoothing=0.1)


def bert(kind):
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES)).double()


def llama():
    return tiny_llama().double()


MIXED = rows_of([0, 0, 1, 2, 0, 1, 1, 2, 0, 0, 0, 1, 2, 2, 1, 0])
CASES = {
    "rows": (lambda: bert(BertForSequenceClassification), MIXED, collate_classes, of_rows),
    "two classes": (
        lambda: bert(BertForSequenceClassification),
        rows_of([0, 0, 1, 2, 0, 0, 0, 2, 0, 0, 0, 1, 2, 2, 0, 0]),
        collate_classes,
        of_two_classes,
    ),
    "smoothed": (lambda: bert(BertForSequenceClassification), MIXED, collate_classes, smoothed),
    "tokens": (
        lambda: bert(BertForTokenClassification),
        ragged_rows(16, seed=5),
        collate_tokens,
        of_tokens,
    ),
    "next tokens": (llama, ragged_rows(16, seed=5), pad, of_next_tokens),
}


def trainer_class(loss):
    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            value = loss(outputs.logits, labels)
            return (value, outputs) if return_outputs else value

    return type("Ours", (GradAccMixin, Weighted), {})


def trained(tmp_path, case, *, size, rows=None, **options):
    make_model, known, collate, loss = CASES[case]
    trainer = make_trainer(
        tmp_path,
        known if rows is None else rows,
        model=make_model(),
        data_collator=collate,
        trainer_class=trainer_class(loss),
        per_device_train_batch_size=size,
        effective_batch_size=8,
        max_steps=2,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        **options,
    )
    trainer.train()
    return trainer


def weights_of_rank(folder):
    """Train on this rank; return the weights."""
    with float64_everywhere():
        trainer = trained(Path(folder), "rows", size=2)
    return [p.detach().tolist() for p in trainer.model.parameters()]
