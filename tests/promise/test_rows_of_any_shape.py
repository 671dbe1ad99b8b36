"""Rows of other people: leading dimensions, ready batches, inputs of any name. Each trains exactly.

What a row holds is the data collator's matter. Each case trains one update, in micro-batches, and
is held against one pass over the same rows at once.
"""

from __future__ import annotations

import pytest
import torch
from support.reference import float64_everywhere, relative_error
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, default_data_collator

from hf_gradacc import ConfigError, DataError

ROWS = ragged_rows(12, seed=9)


def gradient_of(model, batch):
    """Gradient of one pass over a batch, by plain torch."""
    with float64_everywhere():
        output = model(**batch)
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def trained(tmp_path, model, rows, collate, **options):
    """Train one update; give its gradient and what its log row counts."""
    recorder = Recorder()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6, "max_steps": 1}
    trainer = make_trainer(
        tmp_path,
        rows,
        model=model,
        data_collator=collate,
        callbacks=[recorder],
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        **settings | options,
    )
    with float64_everywhere():
        trainer.train()
    (gradient,) = recorder.gradients
    return gradient, trainer.state.log_history[0]


def test_rows_with_a_leading_dimension_are_concatenated_and_none_is_left_out(tmp_path):
    """As ``processor(..., return_tensors="pt")`` makes them."""
    leading = [{key: torch.tensor([value]) for key, value in row.items()} for row in ROWS]

    def concatenate(rows):
        width = max(row["input_ids"].shape[1] for row in rows)
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            key: torch.cat([F.pad(r[key], (0, width - r[key].shape[1]), value=fill) for r in rows])
            for key, fill in fills.items()
        }

    gradient, row = trained(tmp_path, tiny_llama(), leading, concatenate)
    assert relative_error(gradient, gradient_of(tiny_llama(), pad(ROWS))) <= 1e-12
    assert row["effective_batch_size"] == 12


def test_their_tokens_count_against_a_budget(tmp_path):
    leading = [{key: torch.tensor([value]) for key, value in row.items()} for row in ROWS]

    def concatenate(rows):
        return pad([{key: value[0].tolist() for key, value in row.items()} for row in rows])

    options = {"max_tokens_per_micro_batch": 32, "effective_batch_size": 12}
    _, row = trained(
        tmp_path, tiny_llama(), leading, concatenate, gradient_accumulation_steps=1, **options
    )
    plain = trained(
        tmp_path / "plain", tiny_llama(), ROWS, pad, gradient_accumulation_steps=1, **options
    )[1]
    assert row["micro_batches_per_update"] == plain["micro_batches_per_update"] > 3


def test_items_that_are_ready_batches_lose_no_row(tmp_path):
    """Dynamic batching: batches of two rows, of one, of three; the loader's items are theirs."""
    sizes, items, start = [2, 1, 3, 1, 4, 1], [], 0
    for size in sizes:
        items.append(pad(ROWS[start : start + size]))
        start += size
    gradient, row = trained(
        tmp_path, tiny_llama(), items, lambda batches: batches[0], per_device_train_batch_size=1
    )
    assert relative_error(gradient, gradient_of(tiny_llama(), pad(ROWS))) <= 1e-12
    assert row["effective_batch_size"] == 12
    assert row["micro_batches_per_update"] == len(sizes)


def test_a_collator_that_takes_one_row_is_given_one(tmp_path):
    def one(rows):
        assert len(rows) == 1
        return {key: torch.tensor([value]) for key, value in rows[0].items()}

    gradient, _ = trained(
        tmp_path,
        tiny_llama(),
        ROWS,
        one,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=12,
    )
    assert relative_error(gradient, gradient_of(tiny_llama(), pad(ROWS))) <= 1e-12


@pytest.mark.parametrize("size", [1, 2])
def test_rows_laid_end_to_end_are_asked_together_whatever_the_size_of_a_micro_batch(tmp_path, size):
    """Fewer collated rows than items, and none left out: not to be taken for ready batches."""

    def end_to_end(rows):
        ids = [token for row in rows for token in row["input_ids"]]
        starts = [place for row in rows for place in range(len(row["input_ids"]))]
        labels = [label for row in rows for label in [-100, *row["labels"][1:]]]
        values = {"input_ids": ids, "labels": labels, "position_ids": starts}
        return {key: torch.tensor([value]) for key, value in values.items()}

    trainer = make_trainer(
        tmp_path, ROWS, data_collator=end_to_end, per_device_train_batch_size=size
    )
    trainer.get_train_dataloader()
    assert len(trainer.sample.rows) == 3
    assert trainer.update_collator.rows_per_sequence is None
    assert not trainer.update_collator.items_are_batches


class TabularConfig(PreTrainedConfig):
    model_type = "tabular_of_a_test"


class Tabular(PreTrainedModel):
    """A model of one's own, whose inputs have names of their own."""

    config_class = TabularConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(4, 3)
        self.post_init()

    def forward(self, features, labels=None, **kwargs):
        logits = self.head(features)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class RewardOfPairs(nn.Module):
    """Scores two texts, as reward models before TRL's did: ``input_ids_j`` and ``input_ids_k``."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(48, 8), nn.Linear(8, 1)

    def forward(self, input_ids_j, input_ids_k):
        better, worse = (self.head(self.embed(x).mean(1)) for x in (input_ids_j, input_ids_k))
        return {"loss": -F.logsigmoid(better - worse).mean(), "logits": better}


class Detector(nn.Module):
    """Labels are a list of dicts, as in all detection models."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x, labels=None):
        boxes = self.layer(x)
        losses = [F.l1_loss(boxes[i].expand(2, 4), t["boxes"]) for i, t in enumerate(labels)]
        return {"loss": torch.stack(losses).mean(), "logits": boxes}


def made(model):
    torch.manual_seed(4)
    return (Tabular(TabularConfig()) if model is Tabular else model()).double()


def collate_detections(rows):
    return {"x": torch.stack([r["x"] for r in rows]), "labels": [r["labels"] for r in rows]}


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


OF_ONES_OWN = {
    "features": (
        Tabular,
        [{"features": draw(4, seed=i), "labels": i % 3} for i in range(12)],
        default_data_collator,
    ),
    "pairs": (
        RewardOfPairs,
        [
            {f"input_ids_{k}": torch.arange(5) * i % 7 + s for k, s in (("j", 1), ("k", 20))}
            for i in range(12)
        ],
        default_data_collator,
    ),
    "boxes": (
        Detector,
        [
            {"x": draw(8, seed=i), "labels": {"boxes": draw(2, 4, seed=i + 50), "class": [1, 2]}}
            for i in range(12)
        ],
        collate_detections,
    ),
}


@pytest.mark.parametrize("name", OF_ONES_OWN)
def test_inputs_and_labels_of_ones_own_train_as_they_are(tmp_path, name):
    model, rows, collate = OF_ONES_OWN[name]
    gradient, row = trained(tmp_path, made(model), rows, collate)
    assert relative_error(gradient, gradient_of(made(model), collate(rows))) <= 1e-12
    assert row["effective_batch_size"] == 12


class TakesOneBatch(nn.Module):
    """Takes the whole batch under one name; its loss is a mean over rows."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, batch):
        return {"loss": F.cross_entropy(self.head(batch["features"]), batch["labels"])}


def test_a_nested_batch_is_weighted_by_rows_and_that_is_said(tmp_path):
    _, rows, _ = OF_ONES_OWN["features"]

    def nest(rows):
        return {"batch": default_data_collator(rows)}

    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        rows,
        model=made(TakesOneBatch),
        data_collator=nest,
        callbacks=[recorder],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=6,
        remove_unused_columns=False,
    )
    with float64_everywhere():
        trainer.train()
    (gradient,) = recorder.gradients
    expected = gradient_of(made(TakesOneBatch), nest(rows))
    assert relative_error(gradient, expected) <= 1e-12
    assert "weighted by its rows" in trainer.facts.warnings[0]


@pytest.mark.parametrize("stated", ["sequences", "nothing", "micro_batch", "tokens"])
def test_what_is_stated_of_a_nested_batch_is_followed_or_refused(tmp_path, stated):
    _, rows, _ = OF_ONES_OWN["features"]
    trainer = make_trainer(
        tmp_path,
        rows,
        model=made(TakesOneBatch),
        data_collator=lambda rows: {"batch": default_data_collator(rows)},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=6,
        remove_unused_columns=False,
        loss_is_mean_over=stated,
    )
    if stated == "tokens":
        with pytest.raises(ConfigError, match="loss_is_mean_over = 'tokens': the data collator"):
            trainer.train()
        return
    trainer.train()
    weighing = {"sequences": "mean", "nothing": "sum", "micro_batch": "micro_batch"}[stated]
    assert (trainer.facts.rule, trainer.facts.weighing) == ("sequence", weighing)
    assert trainer.facts.warnings == ()


def test_rows_a_model_takes_nothing_of_are_still_one_clear_error(tmp_path):
    rows = [{"text_length": i, "labels": 1} for i in range(12)]
    with pytest.raises(DataError, match="give no `input_ids`, the input of LlamaForCausalLM"):
        trained(tmp_path, tiny_llama(), rows, default_data_collator)
