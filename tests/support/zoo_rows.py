"""Rows of very unequal size for every head, and the collator a user would pick for them.

Eleven rows make one update: four micro-batches of 3, 3, 3 and 2. No two rows have the same number
of tokens or, where a head counts tokens, of targets; row 0 keeps its first label, which a causal
LM must not count and a masked LM must.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from .zoo_configs import VOCAB_SIZE

HeadRow = dict[str, Any]
Collator = Callable[[list[HeadRow]], dict[str, torch.Tensor]]

IGNORE_INDEX = -100
NUM_LABELS = 3
NUM_CHOICES = 2
FIRST_PLAIN_TOKEN = 5  # below it stand the special tokens: pad, bos, eos, sep, mask
LENGTHS = (7, 4, 12, 5, 9, 3, 14, 6, 8, 10, 11)
# Other rows to run the same cases with: very short beside long; and short ones only where nobody
# looks who reads the first rows and some from all over (8, 10, 11, 13, 14, 16, 17, 19, 20 of 24).
MORE_LENGTHS = (
    LENGTHS,
    (20, 3, 29, 5, 24, 4, 17, 31, 12, 9, 26),
    (22, 19, 27, 21, 30, 18, 24, 20, 3, 23, 4, 7, 28, 5, 6, 25, 3, 9, 26, 4, 8, 29, 31, 17),
)
TARGETS = (
    7,
    1,
    11,
    3,
    8,
    2,
    5,
    4,
    6,
    9,
    10,
)  # labels kept per row; row 0 keeps all, its first included

HEADS = ("causal", "seq2seq", "mlm", "tok", "single", "regression", "multilabel", "qa", "mc")


def tiny_tokenizer(*, pad_token_id: int = 0) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over ``VOCAB_SIZE`` words whose padding is ``pad_token_id``."""
    vocab = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=f"w{pad_token_id}",
        unk_token="w3",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def rows_for(head: str, *, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> list[HeadRow]:
    """One row per entry of ``lengths``, with the labels ``head`` trains on."""
    rng = random.Random(seed)
    return [
        _LABELLERS[head](rng, length, i, _tokens(rng, length)) for i, length in enumerate(lengths)
    ]


def collator_for(
    head: str, *, model: Any = None, pad_token_id: int = 0, width: int | None = None
) -> Collator:
    """The collator a user of this head takes from Transformers, or a small one of their own."""
    tokenizer = tiny_tokenizer(pad_token_id=pad_token_id)
    if head == "seq2seq":
        return DataCollatorForSeq2Seq(tokenizer, model=model)
    if head == "causal":
        return DataCollatorForSeq2Seq(tokenizer)
    if head in ("mlm", "tok"):
        padding = True if width is None else "max_length"
        return DataCollatorForTokenClassification(tokenizer, padding=padding, max_length=width)
    if head == "mc":
        return MultipleChoiceCollator(tokenizer)
    return DataCollatorWithPadding(tokenizer)


class MultipleChoiceCollator:
    """Rows of ``[choices][tokens]`` -> tensors ``[batch, choices, seq]`` and ``labels [batch]``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[HeadRow]) -> dict[str, torch.Tensor]:
        flat = [
            {"input_ids": ids, "attention_mask": [1] * len(ids)}
            for row in rows
            for ids in row["input_ids"]
        ]
        padded = self.tokenizer.pad(flat, return_tensors="pt")
        batch = {key: value.view(len(rows), NUM_CHOICES, -1) for key, value in padded.items()}
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def count_targets(head: str, row: HeadRow, *, shifts: bool) -> int:
    """How many terms of ``row`` enter the loss: the definition, written a second time here."""
    if head in ("causal", "seq2seq", "mlm", "tok"):
        labels = row["labels"][1:] if head == "causal" and shifts else row["labels"]
        return sum(label != IGNORE_INDEX for label in labels)
    return 1


def _tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_PLAIN_TOKEN, VOCAB_SIZE) for _ in range(length)]


def _keep(rng: random.Random, index: int, length: int) -> list[int]:
    """Positions whose label row ``index`` keeps: the last ones, as in prompt-masked data."""
    kept = min(TARGETS[index % len(TARGETS)], length)
    return list(range(length - kept, length))


def _inputs(tokens: list[int]) -> HeadRow:
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens)}


def _causal(rng: random.Random, length: int, index: int, tokens: list[int]) -> HeadRow:
    keep = _keep(rng, index, length)
    labels = [tokens[i] if i in keep else IGNORE_INDEX for i in range(length)]
    return {**_inputs(tokens), "labels": labels}


def _seq2seq(rng: random.Random, length: int, index: int, tokens: list[int]) -> HeadRow:
    return {**_inputs(tokens), "labels": _tokens(rng, TARGETS[index % len(TARGETS)])}


def _masked(rng: random.Random, length: int, index: int, tokens: list[int]) -> HeadRow:
    """The tokens asked for stand elsewhere in the row, so that the model cannot copy them."""
    keep = _keep(rng, index, length)
    answers = _tokens(rng, length)
    labels = [answers[i] if i in keep else IGNORE_INDEX for i in range(length)]
    return {**_inputs(tokens), "labels": labels}


def _token_class(rng: random.Random, length: int, index: int, tokens: list[int]) -> HeadRow:
    keep = _keep(rng, index, length)
    labels = [rng.randrange(NUM_LABELS) if i in keep else IGNORE_INDEX for i in range(length)]
    return {**_inputs(tokens), "labels": labels}


def _single(rng: random.Random, length: int, index: int, tokens: list[int]) -> HeadRow:
    return {**_inputs(tokens), "labels": rng.randrange(NUM_LABELS)}


def _regression(rng: random.Random, length: int, index: int, tokens: list[int]) -> HeadRow:
    return {**_inputs(tokens), "labels": rng.gauss(0.0, 1.0)}


def _multilabel(rng: random.Random, length: int, index: int, tokens: list[int]) -> HeadRow:
    return {**_inputs(tokens), "labels": [float(rng.random() < 0.5) for _ in range(NUM_LABELS)]}


def _qa(rng: random.Random, length: int, index: int, tokens: list[int]) -> HeadRow:
    start = rng.randrange(length)
    return {
        **_inputs(tokens),
        "start_positions": start,
        "end_positions": rng.randrange(start, length),
    }


def _mc(rng: random.Random, length: int, index: int, tokens: list[int]) -> HeadRow:
    choices = [tokens, _tokens(rng, max(3, length - 2))]
    return {"input_ids": choices, "labels": rng.randrange(NUM_CHOICES)}


_LABELLERS: dict[str, Callable[[random.Random, int, int, list[int]], HeadRow]] = {
    "causal": _causal,
    "seq2seq": _seq2seq,
    "mlm": _masked,
    "tok": _token_class,
    "single": _single,
    "regression": _regression,
    "multilabel": _multilabel,
    "qa": _qa,
    "mc": _mc,
}
