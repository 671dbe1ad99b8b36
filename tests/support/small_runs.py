"""Recipes of tiny models that learn their rows by heart in a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
import yaml
from support.bytes_tokenizer import bytes_tokenizer

from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.run import train_recipe

ROWS = [
    {"question": "a", "answer": "It is red."},
    {"question": "bb", "answer": "Nobody knows, not even the owl."},
    {"question": "c", "answer": "Seven."},
]
TRAIN: dict[str, Any] = {
    "effective_batch_size": 3,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 50,
}


def make_base(folder: Path, *, template: str | None, tokens: list[str]) -> None:
    """Save a small Llama with random weights, and a tokenizer of bytes, into a folder."""
    transformers.set_seed(0)
    tokenizer = bytes_tokenizer(template, tokens)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_rows(
    folder: Path, name: str, rows: list[dict[str, Any]], *overrides: str, **sections: Any
) -> Any:
    """Train a recipe over rows in `folder`; the run lies in `folder/name`."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": {"name": str(folder / "base")}, "data": {}, "train": TRAIN, **sections}
    values["data"] = {"train": f"{name}.jsonl", "format": "question_answer", **values["data"]}
    values["train"] = {**TRAIN, **values["train"]}
    values["output"] = {"dir": str(folder / name)}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return train_recipe(load_recipe(folder / f"{name}.yaml", overrides=overrides))
