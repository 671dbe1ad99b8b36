"""Data collators and datasets that draw random numbers, of every kind that people write."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForPermutationLanguageModeling,
)

from .tiny import pad

WORDS = 60
_RNG = np.random.default_rng(5)


def make_tokenizer(**options: Any) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<mask>", "<unk>", "<c>", "<s>", *(f"w{i}" for i in range(WORDS - 5))]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "mask_token": "<mask>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<c>", sep_token="<s>", **names, **options
    )


def token_rows(count: int = 24, *, length: int | None = None) -> list[dict[str, Any]]:
    draw = random.Random(2)
    rows = []
    for i in range(count):
        ids = [3, *(draw.randrange(5, WORDS) for _ in range(length or 10 + 5 * i % 9)), 4]
        rows.append({"input_ids": ids})
    return rows


def with_offsets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Words of two tokens each, as whole-word masking wants them."""
    return [
        {
            **row,
            "offset_mapping": [(3 * (i // 2) + i % 2, 3 * (i // 2) + i % 2 + 1) for i in range(n)],
        }
        for row in rows
        if (n := len(row["input_ids"]))
    ]


def corrupt_spans(rows: Any) -> Any:
    """T5's span corruption by numpy: rows become shorter, by what is drawn."""
    made = []
    for row in rows:
        ids = list(row["input_ids"])
        start = np.random.randint(0, len(ids) - 3)
        size = np.random.randint(1, 4)
        kept = [*ids[:start], 1, *ids[start + size :]]
        made.append(
            {"input_ids": kept, "attention_mask": [1] * len(kept), "labels": [-100, *kept[1:]]}
        )
    return pad(made)


def fill_in_the_middle(rows: Any) -> Any:
    """Python's random numbers, and not for every row."""
    made = []
    for row in rows:
        ids = list(row["input_ids"])
        if random.random() < 0.5:
            a, b = sorted(random.sample(range(1, len(ids)), 2))
            ids = [*ids[:a], *ids[b:], *ids[a:b]]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    return pad(made)


def noise_from_a_module(rows: Any) -> Any:
    """A generator of the module, made by numpy."""
    batch = mask_of(rows)
    batch["noise"] = torch.tensor(_RNG.random(len(rows)))
    return batch


def mask_of(rows: Any) -> Any:
    return pad(
        [
            {**row, "attention_mask": [1] * len(row["input_ids"]), "labels": row["input_ids"]}
            for row in rows
        ]
    )


def drop_in_closure() -> Any:
    """A generator that a closure holds."""
    generator = torch.Generator().manual_seed(1)

    def collate(rows: Any) -> Any:
        batch = mask_of(rows)
        dropped = torch.rand(batch["input_ids"].shape, generator=generator) < 0.3
        return {**batch, "input_ids": batch["input_ids"].masked_fill(dropped, 1)}

    return collate


def mix_up(rows: Any) -> Any:
    """Mixes each row with another one of its batch, in one batch of two."""
    batch = mask_of(rows)
    weights = torch.nn.functional.one_hot(batch["input_ids"], WORDS).float()
    if random.random() < 0.5:
        other = torch.randperm(len(rows))
        weights = 0.7 * weights + 0.3 * weights[other]
    return {**batch, "weights": weights}


def mask_words(**options: Any) -> Any:
    return DataCollatorForLanguageModeling(make_tokenizer(), mlm_probability=0.3, **options)


def collators() -> dict[str, tuple[Any, list[dict[str, Any]]]]:
    """Each with rows that it takes."""
    rows = token_rows()
    left = make_tokenizer(padding_side="left")
    return {
        "masked words": (mask_words(), rows),
        "masked words, a generator of its own": (mask_words(seed=7), rows),
        "masked words, padded to a multiple": (mask_words(pad_to_multiple_of=8), rows),
        "masked words, padded in front": (DataCollatorForLanguageModeling(left), rows),
        "whole words": (
            mask_words(whole_word_mask=True, mask_replace_prob=1.0, random_replace_prob=0.0),
            [{**row, "offset_mapping": row["offset_mapping"]} for row in with_offsets(rows[:1] * 8)]
            + with_offsets(token_rows(16, length=len(rows[0]["input_ids"]) - 2)),
        ),
        "permutations": (
            DataCollatorForPermutationLanguageModeling(make_tokenizer()),
            token_rows(length=12),
        ),
        "spans": (corrupt_spans, rows),
        "fill in the middle": (fill_in_the_middle, rows),
        "a generator of the module": (noise_from_a_module, rows),
        "a generator in a closure": (drop_in_closure(), rows),
    }


def tiny_bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    options = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertForMaskedLM(BertConfig(**options | changes)).double()
