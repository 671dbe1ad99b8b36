"""What the benchmarks train: rows of several kinds, and models of some shapes with random weights.

Nothing is downloaded. GSM8K is read from disk where it lies, else the recipes' word problems take
its place; the other kinds are random tokens. Their lengths are drawn from a seeded distribution, or
are those of 1,024 rows of GSM8K.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Row = dict[str, list[int]]

REPO = Path(__file__).resolve().parent.parent
GSM8K = (REPO.parent / "shared/data/gsm8k/train.jsonl", Path("data/gsm8k/train.jsonl"))
GSM8K_LENGTHS = REPO / "benchmarks/gsm8k_lengths.json"
"""``[prompt, whole row]`` in tokens of a byte-level BPE of 16,384 that was trained on GSM8K."""
WORD_PROBLEMS = REPO / "recipes/data/word_problems.jsonl"
PAD, END = 0, 1

# name: (hidden, intermediate, layers, heads, vocabulary, tied)
SHAPES = {
    "llama-9m": (256, 688, 6, 4, 16_384, True),  # 8.9M parameters
    "llama-25m": (512, 1376, 6, 8, 16_384, True),  # 27M, 19M of them in the layers
    "small-head": (512, 1376, 8, 8, 4_096, True),  # 27M, 2.1M of them in the head
    "qwen3-0.6b": (1024, 3072, 28, 16, 151_936, True),
    "rehearsal": (32, 64, 2, 2, 512, True),  # to try the code
}
QWEN3 = {"qwen3-0.6b": {"num_key_value_heads": 8, "head_dim": 128}}
"""Shapes of Qwen3, and what it has besides; the others are Llamas."""


def make_model(shape: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of the shape with random weights; `changes` go into its config."""
    hidden, intermediate, layers, heads, vocab, tied = SHAPES[shape]
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": END,
        "use_cache": False,
    }
    torch.manual_seed(seed)
    if shape in QWEN3:
        return Qwen3ForCausalLM(Qwen3Config(**(settings | QWEN3[shape] | changes)))
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def make_rows(kind: str, count: int, *, vocab_size: int = 16_384, seed: int = 0) -> list[Row]:
    """`count` rows of one kind; those of `SHARING` begin alike.

    Of a kind with ``-all`` behind its name every token is a target.
    """
    if kind.endswith("-all"):
        rows = make_rows(kind.removesuffix("-all"), count, vocab_size=vocab_size, seed=seed)
        return [{**row, "labels": list(row["input_ids"])} for row in rows]
    rng = np.random.default_rng([seed, len(kind)])
    if kind == "gsm8k-4shot":
        rows = make_rows("gsm8k", 4 + count, vocab_size=vocab_size, seed=seed)
        head = [token for shot in rows[:4] for token in shot["input_ids"]]
        return [_row(head + row["input_ids"], len(head) + _prompt_of(row)) for row in rows[4:]]
    if kind == "chat-turns":
        return _chat_turns(rng, count, vocab_size)
    if kind == "pairs":
        return _pairs(rng, count, vocab_size)
    if kind == "role-play":
        # Short prompts, short answers: median 60 tokens.
        lengths = np.clip(rng.lognormal(np.log(60), 0.5, count), 12, 400).astype(int)
        return [_random_row(rng, int(n), vocab_size) for n in lengths]
    if kind == "gsm8k":
        rows = _text_rows(vocab_size)
        return [rows[i] for i in rng.choice(len(rows), size=count, replace=False)]
    if kind == "gsm8k-lengths":
        known = json.loads(GSM8K_LENGTHS.read_text())
        drawn = [known[i] for i in rng.choice(len(known), size=count, replace=False)]
        return [
            _random_row(rng, length, vocab_size, num_targets=length - prompt)
            for prompt, length in drawn
        ]
    if kind == "heavy-tail":
        # Instruction data: most answers short, a few per cent very long (Pareto, index 1.3).
        lengths = np.clip(40 * (1 + rng.pareto(1.3, count)), 20, 2048).astype(int)
    elif kind == "lognormal":
        # As in transformers#47340: median 180 tokens, sigma 0.9.
        lengths = np.clip(rng.lognormal(np.log(180), 0.9, count), 16, 2048).astype(int)
    elif kind == "equal":
        lengths = np.full(count, 200)
    else:
        raise SystemExit(f"no such kind of rows: {kind}")
    return [_random_row(rng, int(n), vocab_size) for n in lengths]


SHARING = ("gsm8k-4shot", "chat-turns", "pairs", "gsm8k-4shot-all", "chat-turns-all")
"""Kinds of rows that begin alike: a head of four examples before every question; chats with one row
for each turn of the assistant, behind its true beginning; a prompt and two answers of half its
length."""


def _chat_turns(rng: np.random.Generator, count: int, vocab_size: int) -> list[Row]:
    """Chats of 2 to 8 turns behind one system prompt; only the last turn of a row is a target."""

    def draw(median: float) -> list[int]:
        length = int(np.clip(rng.lognormal(np.log(median), 0.6), 4, 400))
        drawn: list[int] = rng.integers(2, vocab_size, length).tolist()
        return drawn

    system, rows = draw(60), []
    while len(rows) < count:
        chat = list(system)
        for _ in range(int(rng.integers(2, 9))):
            chat += draw(40)
            prompt = len(chat)
            chat += draw(80)
            rows.append(_row(list(chat), prompt))
    return rows[:count]


def _pairs(rng: np.random.Generator, count: int, vocab_size: int) -> list[Row]:
    """Two answers to each prompt, one after the other; the prompt is twice as long as they are."""
    rows = []
    for length in np.clip(rng.lognormal(np.log(120), 0.5, count // 2), 16, 800).astype(int):
        prompt = rng.integers(2, vocab_size, 2 * length).tolist()
        for _ in range(2):
            answer = int(np.clip(rng.normal(length, length / 4), 4, None))
            rows.append(_row(prompt + rng.integers(2, vocab_size, answer).tolist(), len(prompt)))
    return rows


def _prompt_of(row: Row) -> int:
    """Tokens of a row before its first target."""
    return next(i for i, label in enumerate(row["labels"]) if label != -100)


def dense_rows(rows: list[Row], *, seed: int = 0) -> list[Row]:
    """As many rows of one length, with the same input tokens and the same share of targets."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    length = round(tokens / len(rows))
    rng = np.random.default_rng(seed)
    high = max(max(row["input_ids"]) for row in rows)
    wanted = round(targets / len(rows))
    return [_random_row(rng, length, high + 1, num_targets=wanted) for _ in rows]


def make_collator(tokenizer: Any) -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(tokenizer, padding=True)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that only pads; the rows are tokens already."""
    bare = Tokenizer(models.WordLevel({"<pad>": PAD, "<end>": END}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="<pad>",
        eos_token="<end>",
        model_input_names=["input_ids", "attention_mask"],
    )


def describe(rows: list[Row]) -> str:
    lengths = sorted(len(row["input_ids"]) for row in rows)
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    return (
        f"{len(rows)} rows, {min(lengths)} to {max(lengths)} tokens, median "
        f"{lengths[len(lengths) // 2]}, mean {np.mean(lengths):.0f}; "
        f"{targets / sum(lengths):.0%} of the tokens are targets"
    )


def _random_row(
    rng: np.random.Generator, length: int, vocab_size: int, *, num_targets: int | None = None
) -> Row:
    ids = rng.integers(2, vocab_size, length).tolist()
    prompt = length // 2 if num_targets is None else length - num_targets
    return _row(ids, prompt)


def _row(ids: list[int], prompt: int) -> Row:
    labels = [-100] * prompt + ids[prompt:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


_TEXT_ROWS: dict[int, list[Row]] = {}


def _text_rows(vocab_size: int) -> list[Row]:
    """Question as prompt, answer as target, under a byte-level BPE trained on the rows."""
    if vocab_size not in _TEXT_ROWS:
        found = [path for path in GSM8K if path.exists()]
        if found:
            lines = [json.loads(line) for line in found[0].read_text().splitlines()]
            pairs = [(line["question"] + "\n", line["answer"]) for line in lines]
        else:
            lines = [json.loads(line) for line in WORD_PROBLEMS.read_text().splitlines()]
            pairs = [_prompt_and_answer(line) for line in lines]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=min(vocab_size, 16_384), special_tokens=["<pad>", "<end>"]
        )
        bpe.train_from_iterator((text for pair in pairs for text in pair), trainer)
        rows = []
        for prompt, answer in pairs:
            head, tail = bpe.encode(prompt).ids, bpe.encode(answer).ids
            rows.append(_row([*head, *tail, END], len(head)))
        _TEXT_ROWS[vocab_size] = rows
    return _TEXT_ROWS[vocab_size]


def _prompt_and_answer(line: dict[str, Any]) -> tuple[str, str]:
    if "messages" in line:
        texts = [message["content"] for message in line["messages"]]
        return "\n".join(texts[:-1]), texts[-1]
    keys = list(line)
    return str(line[keys[0]]), str(line[keys[-1]])


def text_source() -> str:
    return "GSM8K (train)" if any(path.exists() for path in GSM8K) else "the shipped word problems"
