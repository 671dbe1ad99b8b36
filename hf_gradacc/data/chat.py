"""Chat turns to tokens, with the assistant's turns as targets.

Two ways, the first where the template allows it:

1. Templates with `{% generation %}` tags say themselves what the assistant wrote.
2. Otherwise each assistant turn is found in the rendered text: it starts where the template,
   given only the turns before and asked to prompt for an answer, ends; and it ends where the
   template, given the turns up to this one, ends. Templates render a turn differently once others
   follow (Qwen3 drops its thinking, Phi-3 the token that closes the conversation): then the rest of
   the turn, with all its own words, has to be found there. What follows the end-of-turn token,
   usually a line break, is never generated and no target.

Where neither way is certain the row is refused: a wrong mask trains on the wrong words silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = ["ChatError", "Messages", "encode_chat", "has_generation_tags"]

Messages = Sequence[dict[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatError(ValueError):
    """A conversation that the template cannot render, or whose targets cannot be found."""


def has_generation_tags(tokenizer: Any) -> bool:
    """Whether the chat template marks the assistant's turns itself."""
    template = tokenizer.chat_template
    return isinstance(template, str) and _GENERATION.search(template) is not None


def encode_chat(tokenizer: Any, messages: Messages, **options: Any) -> tuple[list[int], list[int]]:
    """Render a conversation, and label the assistant's turns.

    Args:
        tokenizer: One with a chat template.
        messages: Turns `{"role": ..., "content": ...}` in order.
        options: What the template reads beside them: `tools`, and values of its own such as
            Qwen3's `enable_thinking`.

    Returns:
        `input_ids` and `labels`, of equal length; labels are -100 outside assistant turns.

    Raises:
        ChatError: If there is no assistant turn, or the template refuses or rewrites a turn.
    """
    if not any(turn.get("role") == "assistant" for turn in messages):
        raise ChatError("no assistant turn, so there is nothing to learn")
    if not getattr(tokenizer, "is_fast", True):
        raise ChatError(
            "this tokenizer cannot say which letters a token stands for; use a fast one"
        )
    if has_generation_tags(tokenizer):
        return _by_tags(tokenizer, messages, options)

    def render(turns: Messages, *, prompt: bool = False) -> str:
        return _render(tokenizer, turns, options, prompt=prompt)

    text = render(messages)
    spans = [
        _span(tokenizer, messages, index, text, render)
        for index, turn in enumerate(messages)
        if turn["role"] == "assistant"
    ]
    return _label(tokenizer, text, spans)


def _by_tags(
    tokenizer: Any, messages: Messages, options: dict[str, Any]
) -> tuple[list[int], list[int]]:
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **options,
        )
    except Exception as error:  # Jinja templates raise whatever they like
        raise ChatError(f"the chat template refuses it: {error}") from error
    ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
    return ids, [token if keep else IGNORE_INDEX for token, keep in zip(ids, mask, strict=True)]


def _render(tokenizer: Any, messages: Messages, options: dict[str, Any], *, prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **options
        )
    except Exception as error:
        raise ChatError(f"the chat template refuses it: {error}") from error
    return str(text)


def _span(
    tokenizer: Any, messages: Messages, index: int, text: str, render: Callable[..., str]
) -> tuple[int, int]:
    """First character of an assistant turn in the rendered text, and the one after its last."""
    start = (
        _opening(messages, text, render) if index == 0 else _start(messages, index, text, render)
    )
    through = render(messages[: index + 1])
    if start is None or not through.startswith(text[:start]):
        raise ChatError(_rewrites(index))
    turn, texts = through[start:], _texts_of(messages[index])
    if any(text not in turn for text in texts):
        raise ChatError(_rewrites(index))
    # As the last turn it may have begun with a thought that is dropped once others follow, and
    # ended with a token that only closes a conversation. Its own words have to be there.
    first_word = min((turn.rfind(word) for word in texts), default=0)
    last_word = max((turn.rfind(word) + len(word) for word in texts), default=len(turn))
    tokens = _added_tokens(tokenizer)
    token_ends = [m.end() for m in tokens.finditer(turn) if m.start() >= last_word]
    for dropped in range(first_word + 1):
        for end in (len(turn), *reversed(token_ends)):
            kept = turn[dropped:end]
            if kept and text.startswith(kept, start):
                return start, start + len(kept) - _trailing_blank(tokens, kept)
        # gpt-oss ends a turn with one token, and the last one with another.
        end_of_text = start + last_word - dropped
        closing = tokens.match(text, end_of_text) if tokens.match(turn, last_word) else None
        if closing is not None and text.startswith(turn[dropped:last_word], start):
            return start, closing.end()
    raise ChatError(_rewrites(index))


def _start(messages: Messages, index: int, text: str, render: Callable[..., str]) -> int | None:
    """Where an assistant turn starts: behind what the template prompts it with."""
    before = render(messages[:index], prompt=True)
    if text.startswith(before):
        return len(before)
    # The prompt may hold more than a turn's opening, such as the empty thought of Qwen3.
    bare = render(messages[:index])
    if not before.startswith(bare) or not text.startswith(bare):
        return None
    start = len(bare)
    while before[start : start + 1] and before[start] == text[start : start + 1]:
        start += 1
    return start if start > len(bare) else None


def _opening(messages: Messages, text: str, render: Callable[..., str]) -> int | None:
    """Where a greeting starts; templates refuse to prompt for it, so ask for what comes after."""
    first = render(messages[:1])
    prompt = render(messages[:1], prompt=True).removeprefix(first)
    found = text.find(prompt) if prompt else -1
    return None if found < 0 else found + len(prompt)


def _rewrites(index: int) -> str:
    return (
        f"the chat template rewrites turn {index + 1}, so its words cannot be found again; "
        "add {% generation %} tags to the template (tokenizer.chat_template)"
    )


def _texts_of(turn: dict[str, Any]) -> list[str]:
    """What must be found again of a turn: its content but for thoughts, and the tools it calls."""
    content = turn.get("content")
    answer = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    calls = [call.get("function", call) for call in turn.get("tool_calls") or []]
    return [word for word in (answer, *(str(call.get("name", "")) for call in calls)) if word]


def _added_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds the tokens that stand for more than their letters, longest first."""
    texts = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def _trailing_blank(tokens: re.Pattern[str], turn: str) -> int:
    """Number of blank characters after the token that closes a turn."""
    stripped = turn.rstrip()
    closes = any(match.end() == len(stripped) for match in tokens.finditer(stripped))
    return len(turn) - len(stripped) if closes else 0


def _label(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Tokenize the whole text; a token is a target where any character of it is."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = bytearray(len(text))
    for start, end in spans:
        learned[start:end] = b"\1" * (end - start)
    ids, labels = encoded["input_ids"], []
    for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True):
        labels.append(token if learned.find(1, first, last) >= 0 else IGNORE_INDEX)
    return ids, labels
