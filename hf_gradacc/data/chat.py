"""Chat turns to tokens, with the assistant's turns as targets.

A model answers behind what the template prompts it with, so that is where an answer should be
learned, and as the template writes an answer, not as it writes history. Most templates make no
difference. Some do: Qwen3 puts an empty thought before an answer and leaves it out of earlier
turns, and it drops earlier thoughts once the next question is asked. `turns` says what becomes of
conversations that such a template renders:

| `turns` | rows | learned in each |
|---|---|---|
| `auto` | as few as can be | each turn once, behind its prompt and as it is generated |
| `each` | one for each turn of the assistant | that turn |
| `last` | one | the last turn of the assistant |
| `together` | one | all its turns, wherever the template has put them |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_gradacc.data.rendering import ChatError
from hf_gradacc.data.section import AssistantTurns
from hf_gradacc.data.turns import Conversation, Turn
from hf_gradacc.data.words import Messages
from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = ["ChatRow", "encode_chat", "split_chat"]


@dataclass(frozen=True)
class ChatRow:
    """A training row made of a conversation, or of its beginning.

    Attributes:
        input_ids: Tokens.
        labels: As many; -100 outside of what is learned.
        notes: How often something happened that the report tells, see `data.report`.
    """

    input_ids: list[int]
    labels: list[int]
    notes: Counter[str] = field(default_factory=Counter)


def encode_chat(tokenizer: Any, messages: Messages, **options: Any) -> tuple[list[int], list[int]]:
    """Render a conversation as one row, and label the assistant's turns.

    Args:
        tokenizer: One with a chat template.
        messages: Turns `{"role": ..., "content": ...}` in order.
        options: What the template reads beside them: `tools`, and values of its own such as
            Qwen3's `enable_thinking`.

    Returns:
        `input_ids` and `labels`, of equal length; labels are -100 outside assistant turns.

    Raises:
        ChatError: If there is no assistant turn, or the template refuses the conversation.
    """
    row = split_chat(tokenizer, messages, turns="together", options=options)[0]
    return row.input_ids, row.labels


def split_chat(
    tokenizer: Any,
    messages: Messages,
    *,
    turns: AssistantTurns = "auto",
    learned: Sequence[bool] | None = None,
    options: dict[str, Any] | None = None,
) -> list[ChatRow]:
    """Make the rows of a conversation.

    Args:
        tokenizer: One with a chat template.
        messages: Turns in order.
        turns: Which turns share a row, see above.
        learned: Which turns are learned; by default those of the assistant. If one of another role
            is, all turns share a row: nothing prompts for it.
        options: What the template reads beside the turns.

    Returns:
        The rows, in the order of their last turns; one without a target if no turn is learned.

    Raises:
        ChatError: If there is no turn to learn, or the template refuses the conversation.
    """
    if learned is None:
        learned = [turn.get("role") == "assistant" for turn in messages]
        if not any(learned):
            raise ChatError("no assistant turn, so there is nothing to learn")
    if not getattr(tokenizer, "is_fast", True):
        raise ChatError(
            "this tokenizer cannot say which letters a token stands for; use a fast one"
        )
    conversation = Conversation.of(tokenizer, messages, options or {})
    wanted = [index for index, is_learned in enumerate(learned) if is_learned]
    prompted = all(messages[index].get("role") == "assistant" for index in wanted)
    if turns == "together" or not prompted or not wanted:
        return [_together(tokenizer, conversation, wanted)]
    notes: Counter[str] = Counter()
    answers: dict[int, Turn] = {}
    for index in wanted:
        answer = conversation.answer(index)
        if _is_learned(conversation, index, answer, notes):
            answers[index] = answer
    if turns == "last":
        answers = dict(list(answers.items())[-1:])
    rows: list[ChatRow] = []
    while answers:
        index, answer = answers.popitem()
        row, covered = _row_of_turn(tokenizer, conversation, index, answer, answers, turns=turns)
        rows.append(row)
        for other in covered:
            del answers[other]
    if not rows:
        rows.append(_label(tokenizer, conversation.text(len(messages)), []))
    rows[-1].notes.update(notes)
    return rows[::-1]


def _row_of_turn(
    tokenizer: Any,
    conversation: Conversation,
    index: int,
    answer: Turn,
    others: dict[int, Turn],
    *,
    turns: AssistantTurns,
) -> tuple[ChatRow, list[int]]:
    """The row that ends with a turn, and the earlier turns that can be learned in it."""
    notes: Counter[str] = Counter()
    placed = conversation.behind_prompt(index)
    if placed is None:
        # A prompt that holds an empty thought leaves no place for another.
        lighter = conversation.without_thought(index)
        placed = None if lighter is None else lighter.behind_prompt(index)
        notes["other_prefix" if placed is None else "thought"] += 1
    text, answer = placed or (conversation.text(index + 1), answer)
    spans, covered = [*answer.spans], []
    if turns == "auto":
        for other, its_answer in others.items():
            turn = conversation.same(text, other, its_answer, count=index + 1)
            if turn is not None:
                covered.append(other)
                spans += turn.spans
    row = _label(tokenizer, text, spans)
    row.notes.update(notes, turns=1 + len(covered))
    return row, covered


def _together(tokenizer: Any, conversation: Conversation, wanted: Iterable[int]) -> ChatRow:
    count = len(conversation.messages)
    text = conversation.text(count)
    notes: Counter[str] = Counter()
    spans: list[tuple[int, int]] = []
    for index in wanted:
        turn = conversation.find(count, index)
        if not _is_learned(conversation, index, turn, notes):
            continue
        spans += turn.spans
        is_prompted = conversation.messages[index].get("role") == "assistant"
        if is_prompted and not conversation.is_behind_prompt(text, index, turn):
            notes["other_prefix"] += 1
        notes["turns"] += 1
    row = _label(tokenizer, text, spans)
    row.notes.update(notes)
    return row


def _is_learned(conversation: Conversation, index: int, turn: Turn, notes: Counter[str]) -> bool:
    """Whether a turn can be learned; note what of it the template leaves out.

    One whose tool call is left out is not: it would teach to end where a tool is to be called.
    """
    if not turn.spans:
        notes["untagged"] += 1
        return False
    left_out = conversation.left_out(index, turn)
    notes.update(left_out)
    return "tool call" not in left_out


def _label(tokenizer: Any, text: str, spans: Iterable[tuple[int, int]]) -> ChatRow:
    """Tokenize the whole text; a token is a target if it begins in what is learned.

    One that begins before belongs to the prompt: generation never has it to itself.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = bytearray(len(text) + 1)
    starts = set()
    for start, end in spans:
        learned[start:end] = b"\1" * (end - start)
        starts.add(start)
    ids: list[int] = list(encoded["input_ids"])
    labels, straddling = [], 0
    for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True):
        labels.append(token if learned[first] and first < last else IGNORE_INDEX)
        straddling += any(first < start < last for start in starts) if last - first > 1 else 0
    return ChatRow(ids, labels, Counter(straddling=straddling) if straddling else Counter())
