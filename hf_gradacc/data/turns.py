"""Where a turn stands in the text that a chat template makes of a conversation.

Nothing is guessed from the words alone. The template is asked again with something changed: what
it prompts the answer with, what it makes of the turns up to this one, and which letters of its text
change when a letter of the turn does.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_gradacc.text import common_length

__all__ = ["ChatError", "Conversation", "Messages", "Turn", "has_generation_tags"]

Messages = Sequence[dict[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = "§¤¶¬¦"
_END_OF_THOUGHT = "</think>"


class ChatError(ValueError):
    """A conversation that the template cannot render, or whose targets cannot be found."""


@dataclass(frozen=True)
class Turn:
    """A turn in the text of a conversation.

    Attributes:
        spans: First character, and the one after the last, of each piece that is learned. A
            template without tags has one.
        said: The pieces together.
    """

    spans: tuple[tuple[int, int], ...]
    said: str

    @property
    def start(self) -> int | None:
        """The first learned character; None if the template's tags mark nothing of the turn."""
        return self.spans[0][0] if self.spans else None


def has_generation_tags(tokenizer: Any, *, tools: Any = None) -> bool:
    """Whether the chat template marks the assistant's turns itself."""
    return _GENERATION.search(_template_of(tokenizer, tools)) is not None


def _template_of(tokenizer: Any, tools: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # several by name; `tool_use` is for rows with tools
        template = tokenizer.get_chat_template(None, tools)
    return template if isinstance(template, str) else ""


class Conversation:
    """A conversation, and what the template makes of it and of its beginnings.

    Args:
        tokenizer: One with a chat template.
        messages: Turns `{"role": ..., "content": ...}` in order.
        options: What the template reads beside them.

    Raises:
        ChatError: By any method, if the template refuses what it has to render.
    """

    def __init__(self, tokenizer: Any, messages: Messages, options: Mapping[str, Any]) -> None:
        self.messages = list(messages)
        self._tokenizer = tokenizer
        self._options = dict(options)
        self._is_tagged = has_generation_tags(tokenizer, tools=options.get("tools"))
        self._rendered: dict[tuple[int, bool], tuple[str, list[tuple[int, int]]]] = {}
        self._answers: dict[int, Turn] = {}
        self._tokens = _added_tokens(tokenizer)
        words = str(self.messages)
        self._mark = next((mark for mark in _MARKS if mark not in words), _MARKS[0])

    def text(self, count: int, *, prompt: bool = False) -> str:
        """The text of the first turns.

        Args:
            count: How many.
            prompt: With what the template prompts an answer with.
        """
        return self._first(count, prompt=prompt)[0]

    def prompt(self, index: int) -> str | None:
        """The text that a turn is generated behind; None if the template does not prompt for it.

        For a conversation that the assistant begins, that is its own text up to the first word.
        """
        if index == 0:
            start = self.answer(0).start
            return None if start is None else self.text(1)[:start]
        try:
            return self.text(index, prompt=True)
        except ChatError:
            return None

    def answer(self, index: int) -> Turn:
        """A turn as the template renders it while it is the last, which is how it is generated."""
        if index not in self._answers:
            self._answers[index] = self._answer(index)
        return self._answers[index]

    def _answer(self, index: int) -> Turn:
        if self._is_tagged:
            return self._tagged(index + 1, index)
        text = self.text(index + 1)
        prompt = self.prompt(index) if index > 0 else None
        if prompt is None or not text.startswith(prompt):
            return self.find(index + 1, index)
        end = len(text) - self._trailing_blank(text[len(prompt) :])
        return Turn(((len(prompt), end),), text[len(prompt) : end])

    def is_behind_prompt(self, count: int, index: int, turn: Turn) -> bool:
        """Whether a turn stands behind exactly what the template prompts it with."""
        prompt = self.prompt(index)
        return (
            prompt is not None and turn.start == len(prompt) and self.text(count).startswith(prompt)
        )

    def same(self, count: int, index: int, answer: Turn) -> Turn | None:
        """A turn in the text of more turns, if it stands there as it is generated.

        Args:
            count: The number of turns in the text.
            index: The turn.
            answer: What `answer` gives for it, behind its prompt.

        Returns:
            Its place; None if what comes before is not what the template prompts it with, or the
            template has changed the turn. Tokens that close a conversation may be missing, and
            the token that ends a last turn may be another.
        """
        text, said, start = self.text(count), answer.said, answer.start
        if start is None or not self.is_behind_prompt(count, index, answer):
            return None
        if self._is_tagged:
            tagged = self._tagged(count, index)
            return tagged if (tagged.said, tagged.start) == (said, start) else None
        body = len(said) - len(self._closing(said))
        if not text.startswith(said[:body], start):
            return None
        end = self._end(text, start + body, said[body:])
        return None if end is None or end <= start else Turn(((start, end),), text[start:end])

    def find(self, count: int, index: int) -> Turn:
        """A turn in the text of the first turns, wherever the template has put it.

        It begins behind the opening that the template prompts with, as much of it as is there, and
        ends with the first token behind its last word.

        Raises:
            ChatError: If no letter of the text changes when the turn does.
        """
        if self._is_tagged and self.messages[index].get("role") == "assistant":
            return self._tagged(count, index)
        text = self.text(count)
        extent = self._extent(count, index)
        if extent is None:
            raise ChatError(f"the chat template leaves out turn {index + 1}")
        first, last = extent
        before = 0 if index == 0 else (self._extent(count, index - 1) or (0, 0))[1]
        start = self._behind_opening(index, text, before, first)
        end = self._end(text, last, self._tail(index))
        end = last if end is None else end
        end -= self._trailing_blank(text[start:end])
        return Turn(((start, end),), text[start:end])

    def without_thought(self, index: int) -> Conversation | None:
        """The same conversation without what a turn thought; None if it thought nothing."""
        message = self.messages[index]
        if not _thought_of(message):
            return None
        rest = {k: v for k, v in message.items() if k not in _THOUGHTS}
        rest["content"] = _answer_of(message).lstrip("\n")
        messages = [*self.messages[:index], rest, *self.messages[index + 1 :]]
        return Conversation(self._tokenizer, messages, self._options)

    def left_out(self, index: int, turn: Turn) -> set[str]:
        """Which parts of a turn its text does not have.

        Returns:
            Of `tool call`, `thought` and `words` those that the template does not render.
        """
        message = self.messages[index]
        found = set()
        calls = [call.get("function", call) for call in message.get("tool_calls") or []]
        if any(str(call.get("name", "")) not in turn.said for call in calls):
            found.add("tool call")
        thought = _thought_of(message)
        if thought and not _holds(turn.said, thought):
            found.add("thought")
        answer = _answer_of(message)
        if answer.strip() and not _holds(turn.said, answer):
            # Written otherwise, such as in quotes, it is heard if one more letter at its end is.
            changed = {**message, "content": self._marked(message, "content", at_end=True)}
            text = self._try([*self.messages[:index], changed])
            if text is None or self._mark not in text:
                found.add("words")
        return found

    def _first(self, count: int, *, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        key = (count, prompt)
        if key not in self._rendered:
            self._rendered[key] = self._render(self.messages[:count], prompt=prompt)
        return self._rendered[key]

    def _render(self, messages: Messages, *, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        options = self._options
        try:
            if not self._is_tagged:
                text = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=prompt, **options
                )
                return str(text), []
            # As `apply_chat_template` does, which gives the places of tokens, not of letters.
            texts, places = render_jinja_template(
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
                chat_template=_template_of(self._tokenizer, options.get("tools")),
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **{**self._tokenizer.special_tokens_map, **options},
            )
            return texts[0], [(start, end) for start, end in places[0] if end > start]
        except Exception as error:  # Jinja templates raise whatever they like
            raise ChatError(f"the chat template refuses it: {error}") from error

    def _tagged(self, count: int, index: int) -> Turn:
        """What the template's tags mark of an assistant's turn, in the text of the first turns."""
        spans = self._first(count, prompt=False)[1]
        sizes = [len(self._own_spans(i)) for i in self._assistants(count)]
        before = sum(len(self._own_spans(i)) for i in self._assistants(index))
        mine = tuple(spans[before : before + len(self._own_spans(index))])
        if sum(sizes) != len(spans):  # tags that mark a turn only while it is the last, or first
            mine = self._own_spans(index) if count == index + 1 else ()
        text = self.text(count)
        return Turn(mine, "".join(text[start:end] for start, end in mine))

    def _assistants(self, count: int) -> list[int]:
        turns = enumerate(self.messages[:count])
        return [index for index, turn in turns if turn.get("role") == "assistant"]

    def _own_spans(self, index: int) -> tuple[tuple[int, int], ...]:
        """The tagged pieces of a turn while it is the last."""
        text, spans = self._first(index + 1, prompt=False)
        before = 0
        if index > 0:
            with contextlib.suppress(ChatError):
                before = common_length(text, self.text(index))
        return tuple(span for span in spans if span[0] >= before)

    def _extent(self, count: int, index: int) -> tuple[int, int] | None:
        """First character, and the one after the last, that depend on the words of a turn."""
        text = self.text(count)
        first, last = len(text), 0
        for field in ("content", "thought", "reasoning_content", "tool_calls"):
            for at_end in (False, True):
                changed = self._marked_turn(index, field, at_end=at_end)
                if changed is None:
                    continue
                other = self._try(
                    [*self.messages[:index], changed, *self.messages[index + 1 : count]]
                )
                if other is None or other == text:
                    continue
                if at_end:
                    same = common_length(text[::-1], other[::-1])
                    last = max(last, len(text) - same)
                else:
                    first = min(first, common_length(text, other))
        return None if first == len(text) and last == 0 else (first, max(first, last))

    def _try(self, messages: Messages) -> str | None:
        """The text of other turns, None if the template refuses them."""
        try:
            return self._render(messages, prompt=False)[0]
        except ChatError:
            return None

    def _tail(self, index: int) -> str:
        """What the template puts behind the words of a turn while it is the last."""
        try:
            extent = self._extent(index + 1, index)
            return "" if extent is None else self.text(index + 1)[extent[1] :]
        except ChatError:
            return ""

    def _marked_turn(self, index: int, field: str, *, at_end: bool) -> dict[str, Any] | None:
        message, mark = self.messages[index], self._mark
        if field == "tool_calls":
            calls = list(message.get("tool_calls") or [])
            if not calls:
                return None
            place = -1 if at_end else 0
            calls[place] = _marked_call(calls[place], mark, at_end=at_end)
            return {**message, "tool_calls": calls}
        name = "reasoning_content" if field == "reasoning_content" else "content"
        if field == "thought" and _END_OF_THOUGHT not in str(message.get("content")):
            return None
        if name == "reasoning_content" and not message.get(name):
            return None
        return {**message, name: self._marked(message, field, at_end=at_end)}

    def _marked(self, message: Mapping[str, Any], field: str, *, at_end: bool) -> str:
        """A text of a turn with one letter more, at the beginning or the end of a part of it."""
        mark = self._mark
        if field == "reasoning_content":
            words = str(message[field])
            return words + mark if at_end else mark + words
        content = message.get("content") or ""
        thought, end, answer = content.rpartition(_END_OF_THOUGHT)
        if field == "thought":
            opening, begin, thought = thought.rpartition("<think>")
            thought = thought + mark if at_end else mark + thought
            return f"{opening}{begin}{thought}{end}{answer}"
        return f"{thought}{end}{answer}{mark}" if at_end else f"{thought}{end}{mark}{answer}"

    def _behind_opening(self, index: int, text: str, before: int, first: int) -> int:
        """Where a turn starts: behind as much of the opening as stands between two places."""
        opening = self._opening(index)
        for size in range(len(opening), 0, -1):
            found = text.find(opening[:size], before, first)
            if found >= 0:
                return found + size
        return first

    def _opening(self, index: int) -> str:
        """What the template adds to prompt for an answer."""
        if self.messages[index].get("role") != "assistant":
            return ""
        for count in (index, 1, 2):
            if not 0 < count <= len(self.messages):
                continue
            try:
                bare, prompt = self.text(count), self.text(count, prompt=True)
            except ChatError:
                continue
            if prompt.startswith(bare) and prompt != bare:
                return prompt[len(bare) :]
            common = common_length(bare, prompt)
            if prompt[common:]:  # a token that closes the conversation is not prompted with
                return prompt[common:]
        return ""

    def _closing(self, said: str) -> str:
        """The blanks and tokens that end a turn."""
        ends = len(said)
        spans = {match.end(): match.start() for match in self._tokens.finditer(said)}
        while ends > 0:
            if said[ends - 1].isspace():
                ends -= 1
            elif ends in spans:
                ends = spans[ends]
            else:
                break
        return said[ends:]

    def _end(self, text: str, at: int, closing: str) -> int | None:
        """Where a turn ends whose words end at a place.

        Args:
            text: The text of the conversation.
            at: The place.
            closing: What ends the turn while it is the last.

        Returns:
            The place behind as much of `closing` as is there, in whole tokens; behind another
            token if none of them is; None if the turn goes on with something else.
        """
        common = common_length(text[at:], closing)
        tokens = [match.end() for match in self._tokens.finditer(closing)]
        if not tokens:
            return at + common if common == len(closing) or not closing.strip() else None
        whole = [end for end in tokens if end <= common]
        if whole:
            return at + whole[-1]
        other = self._tokens.match(text, at)
        return None if other is None else other.end()

    def _trailing_blank(self, said: str) -> int:
        """Number of blank characters after the token that closes a turn."""
        stripped = said.rstrip()
        closes = any(match.end() == len(stripped) for match in self._tokens.finditer(stripped))
        return len(said) - len(stripped) if closes else 0


_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""What rows call the thought of a turn; transformers reads all three alike."""


def _thought_of(message: Mapping[str, Any]) -> str:
    """What a turn thought before it answered, from its own field or between think tags."""
    for name in _THOUGHTS:
        if isinstance(message.get(name), str):
            return str(message[name]).strip()
    thought, end, _ = str(message.get("content") or "").rpartition(_END_OF_THOUGHT)
    return thought.rpartition("<think>")[2].strip() if end else ""


def _answer_of(message: Mapping[str, Any]) -> str:
    return str(message.get("content") or "").rpartition(_END_OF_THOUGHT)[2]


def _holds(text: str, words: str) -> bool:
    """Whether a text holds words, whatever blanks there are between and around them."""
    return "".join(words.split()) in "".join(text.split())


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


def _added_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds the tokens that stand for more than their letters, longest first."""
    texts = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
