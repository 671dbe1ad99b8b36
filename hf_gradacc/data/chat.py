"""Chat turns to tokens, with the assistant's turns as targets.

Two ways, the first where the template allows it:

1. Templates with `{% generation %}` tags say themselves what the assistant wrote.
2. Otherwise each assistant turn is found in the rendered text: it starts where the template,
   given only the turns before and asked to prompt for an answer, ends; and it ends where the
   template, given the turns up to this one, ends. Templates that render a turn differently once
   others follow (Qwen3 drops the thinking of earlier turns) are searched for the turn's own text.
   What follows the end-of-turn token, usually a line break, is never generated and no target.

Where neither way is certain the row is refused: a wrong mask trains on the wrong words silently.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hf_gradacc.targets import IGNORE_INDEX

__all__ = ["ChatError", "Messages", "encode_chat", "has_generation_tags"]

Messages = Sequence[dict[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatError(ValueError):
    """A conversation that the template cannot render, or whose targets cannot be told."""


def has_generation_tags(tokenizer: Any) -> bool:
    """Whether the chat template marks the assistant's turns itself."""
    template = tokenizer.chat_template
    return isinstance(template, str) and _GENERATION.search(template) is not None


def encode_chat(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """Render a conversation, and label the assistant's turns.

    Args:
        tokenizer: One with a chat template.
        messages: Turns `{"role": ..., "content": ...}` in order.

    Returns:
        `input_ids` and `labels`, of equal length; labels are -100 outside assistant turns.

    Raises:
        ChatError: If there is no assistant turn, or the template refuses or rewrites a turn.
    """
    if not any(turn.get("role") == "assistant" for turn in messages):
        raise ChatError("no assistant turn, so there is nothing to learn")
    if has_generation_tags(tokenizer):
        return _by_tags(tokenizer, messages)
    text = _render(tokenizer, messages)
    spans = [
        _span(tokenizer, messages, index, text)
        for index, turn in enumerate(messages)
        if turn["role"] == "assistant"
    ]
    return _label(tokenizer, text, spans)


def _by_tags(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:  # Jinja templates raise whatever they like
        raise ChatError(f"the chat template refuses it: {error}") from error
    ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
    return ids, [token if keep else IGNORE_INDEX for token, keep in zip(ids, mask, strict=True)]


def _render(tokenizer: Any, messages: Messages, *, prompt: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:
        raise ChatError(f"the chat template refuses it: {error}") from error
    return str(text)


def _span(tokenizer: Any, messages: Messages, index: int, text: str) -> tuple[int, int]:
    """First character of an assistant turn in the rendered text, and the one after its last."""
    before = _render(tokenizer, messages[:index], prompt=True)
    through = _render(tokenizer, messages[: index + 1])
    content = _content(messages[index])
    if text.startswith(before) and text.startswith(through) and len(through) > len(before):
        start, end = len(before), len(through)
    elif text.startswith(before):
        # A later turn changed how this one is rendered; its own words are still there.
        found = text.find(content, len(before))
        if not content or found < 0:
            raise ChatError(_rewrites(index))
        closing = through[through.rindex(content) + len(content) :] if content in through else ""
        start, end = len(before), found + len(content)
        if text.startswith(closing, end):
            end += len(closing)
    else:
        raise ChatError(_rewrites(index))
    if content and content not in text[start:end]:
        raise ChatError(_rewrites(index))
    return start, end - _trailing_blank(tokenizer, text[start:end])


def _rewrites(index: int) -> str:
    return (
        f"the chat template rewrites turn {index + 1}, so its words cannot be found again; "
        "add {% generation %} tags to the template (tokenizer.chat_template)"
    )


def _content(turn: dict[str, Any]) -> str:
    content = turn.get("content")
    return content.strip() if isinstance(content, str) else ""


def _trailing_blank(tokenizer: Any, turn: str) -> int:
    """Number of blank characters after the special token that closes a turn."""
    stripped = turn.rstrip()
    closes = any(stripped.endswith(token) for token in tokenizer.all_special_tokens)
    closes = closes or any(stripped.endswith(token) for token in tokenizer.get_added_vocab())
    return len(turn) - len(stripped) if closes else 0


def _label(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Tokenize the whole text; a token is a target where any character of it is."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = encoded["input_ids"], []
    for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True):
        inside = any(first < end and last > start for start, end in spans)
        labels.append(token if inside and last > first else IGNORE_INDEX)
    return ids, labels
