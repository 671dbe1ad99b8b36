"""A prompt and what follows it as the tokens of one text.

Tokenized apart and put together they may be another text: tokenizers in the manner of SentencePiece
put a space before the first word, so `2+2=` and `4` would become `2+2= 4`.
"""

from __future__ import annotations

from typing import Any

from hf_gradacc.text import common_length
from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = ["join_and_encode", "with_eos", "without_eos"]


def join_and_encode(
    tokenizer: Any, prompt: str, completion: str
) -> tuple[list[int], list[int], bool]:
    """Tokenize a prompt and its completion together, and close them with EOS.

    Args:
        tokenizer: A transformers tokenizer with an EOS token.
        prompt: Not learned.
        completion: Learned, with EOS.

    Returns:
        `input_ids`; `labels`, -100 in the prompt; whether a token holds the end of the prompt and
        the beginning of the completion. Such a token belongs to the prompt.
    """
    alone = without_eos(tokenizer, tokenizer(prompt)["input_ids"])
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(prompt + completion, return_offsets_mapping=fast)
    ids = without_eos(tokenizer, list(encoded["input_ids"]))
    start = common_length(alone, ids)
    straddles = False
    if start < len(alone) and fast:
        # As many tokens as hold the prompt's last letter; a blank belongs to the token behind it.
        ends = [end for _, end in encoded["offset_mapping"]][: len(ids)]
        while start < len(ids) and max(ends[:start], default=0) < len(prompt):
            start += 1
        straddles = max(ends[:start], default=0) > len(prompt)
    elif start < len(alone):  # no letters to count by: as many tokens as the prompt has alone
        start, straddles = min(len(alone), len(ids)), True
    ids = [*ids, tokenizer.eos_token_id]
    return ids, [IGNORE_INDEX] * start + ids[start:], straddles


def without_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Remove the EOS that some tokenizers put after a text."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def with_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Put EOS behind a text where the tokenizer does not."""
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
