"""A tokenizer whose tokens can be written down by hand: one per byte, and the special ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_gradacc.data import train_tokenizer

Segment = tuple[str, bool]
"""A piece of text, and whether it is a target."""


def bytes_tokenizer(template: str | None = None, tokens: Sequence[str] = ()) -> Any:
    tokenizer = train_tokenizer(["a"], vocab_size=261)  # 256 bytes, 5 special: no merge
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    if "<|begin|>" in tokens:
        tokenizer.bos_token = "<|begin|>"
    tokenizer.chat_template = template
    return tokenizer


def read_segments(tokenizer: Any, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Ids and labels of a row written down piece by piece."""
    input_ids: list[int] = []
    labels: list[int] = []
    for text, is_target in segments:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids += ids
        labels += ids if is_target else [-100] * len(ids)
    return input_ids, labels
