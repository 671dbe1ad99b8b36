"""The words of a turn: answer, thought and tool calls, and turns with one letter more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = [
    "Messages",
    "answer_of",
    "cut_in_pieces",
    "holds",
    "mark_for",
    "marked_turns",
    "marked_words",
    "thought_of",
    "without_thought",
]

Messages = Sequence[dict[str, Any]]
"""Turns `{"role": ..., "content": ...}` in order."""

_MARKS = "§¤¶¬¦"
_END_OF_THOUGHT = "</think>"
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""What rows call the thought of a turn; transformers reads all three alike."""


def thought_of(message: Mapping[str, Any]) -> str:
    """What a turn thought before it answered, from its own field or between think tags.

    >>> thought_of({"content": "<think>2 and 2</think>4"})
    '2 and 2'
    """
    for name in _THOUGHTS:
        if isinstance(message.get(name), str):
            return str(message[name]).strip()
    thought, end, _ = str(message.get("content") or "").rpartition(_END_OF_THOUGHT)
    return thought.rpartition("<think>")[2].strip() if end else ""


def answer_of(message: Mapping[str, Any]) -> str:
    """The content of a turn without its thought."""
    return str(message.get("content") or "").rpartition(_END_OF_THOUGHT)[2]


def without_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """The same turn as if it had not thought."""
    rest = {name: value for name, value in message.items() if name not in _THOUGHTS}
    return {**rest, "content": answer_of(message).lstrip("\n")}


def holds(text: str, words: str) -> bool:
    """Whether a text holds words, whatever blanks there are between and around them."""
    return "".join(words.split()) in "".join(text.split())


def cut_in_pieces(messages: Messages) -> Messages:
    """The same turns with their contents as lists of one piece of type text."""
    return [{**m, "content": [{"type": "text", "text": m.get("content") or ""}]} for m in messages]


def mark_for(messages: Messages) -> str:
    """A letter that is nowhere in a conversation."""
    words = str(messages)
    return next((mark for mark in _MARKS if mark not in words), _MARKS[0])


def marked_turns(
    message: Mapping[str, Any], mark: str, *, at_end: bool
) -> Iterator[dict[str, Any]]:
    """Yield a turn with one letter more, for each of its parts that has words; or its content.

    Args:
        message: The turn.
        mark: The letter.
        at_end: Behind the part's last letter, or before its first.
    """
    yield {**message, "content": marked_words(message, mark, at_end=at_end)}
    thought, end, answer = str(message.get("content") or "").rpartition(_END_OF_THOUGHT)
    if end:
        opening, begin, thought = thought.rpartition("<think>")
        marked = _with(thought, mark, at_end=at_end)
        yield {**message, "content": f"{opening}{begin}{marked}{end}{answer}"}
    for name in _THOUGHTS:
        if message.get(name):
            yield {**message, name: _with(str(message[name]), mark, at_end=at_end)}
    calls = list(message.get("tool_calls") or [])
    if calls:
        place = -1 if at_end else 0
        calls[place] = _marked_call(calls[place], mark, at_end=at_end)
        yield {**message, "tool_calls": calls}


def marked_words(message: Mapping[str, Any], mark: str, *, at_end: bool) -> str:
    """The content of a turn with one letter more in its answer."""
    content = str(message.get("content") or "")
    thought, end, answer = content.rpartition(_END_OF_THOUGHT)
    return f"{thought}{end}{_with(answer, mark, at_end=at_end)}"


def _with(words: str, mark: str, *, at_end: bool) -> str:
    return words + mark if at_end else mark + words


def _marked_call(call: Mapping[str, Any], mark: str, *, at_end: bool) -> dict[str, Any]:
    inner = dict(call.get("function", call))
    name = str(inner.get("name", ""))
    if not at_end:
        inner["name"] = mark + name
    elif isinstance(inner.get("arguments"), Mapping):
        inner["arguments"] = {**inner["arguments"], mark: mark}
    else:
        inner["arguments"] = f"{inner.get('arguments', '')}{mark}"
    return {**call, "function": inner} if "function" in call else inner
