"""Where a turn stands in the text that a chat template makes of a conversation.

Nothing is guessed from the words alone. The template is asked again with something changed: what
it prompts the answer with, what it makes of the turns up to this one, and which letters of its text
change when a letter of the turn does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_gradacc.data.rendering import ChatError, Rendering
from hf_gradacc.data.words import (
    Messages,
    answer_of,
    holds,
    mark_for,
    marked_turns,
    marked_words,
    thought_of,
    without_thought,
)
from hf_gradacc.text import common_length

__all__ = ["Conversation", "Turn"]


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


class Conversation:
    """The turns of a conversation in the text that a template makes of it.

    Args:
        rendering: What the template makes of it.

    Raises:
        ChatError: By any method, if the template refuses what it has to render.
    """

    def __init__(self, rendering: Rendering) -> None:
        self.messages = rendering.messages
        self._rendering = rendering
        self._answers: dict[int, Turn] = {}
        self._extents: dict[tuple[int, int], tuple[int, int] | None] = {}
        self._mark = mark_for(self.messages)

    @classmethod
    def of(cls, tokenizer: Any, messages: Messages, options: Mapping[str, Any]) -> Conversation:
        """Make one of turns, of a tokenizer with a template, and of what the template reads."""
        return cls(Rendering(tokenizer, messages, options))

    def text(self, count: int) -> str:
        """The text of the first turns."""
        return self._rendering.text(count)

    def prompt(self, index: int) -> str | None:
        """The text that a turn is generated behind; None if the template does not prompt for it.

        For a conversation that the assistant begins, that is its own text up to the first word.
        """
        if index == 0:
            start = self.answer(0).start
            return None if start is None else self.text(1)[:start]
        return self._rendering.prompt(index)

    def answer(self, index: int) -> Turn:
        """A turn as the template renders it while it is the last, which is how it is generated."""
        if index not in self._answers:
            self._answers[index] = self._answer(index)
        return self._answers[index]

    def _answer(self, index: int) -> Turn:
        if self._rendering.is_tagged:
            return self._tagged(index + 1, index)
        text = self.text(index + 1)
        prompt = self.prompt(index) if index > 0 else None
        if prompt is None or not text.startswith(prompt):
            return self.find(index + 1, index)
        start, said = len(prompt), text[len(prompt) :]
        if len(self._rendering.tokens.findall(said)) > 1 and self._rendering.always_prompts(index):
            end = self.find(index + 1, index).spans[0][1]
        else:
            end = len(text) - self._rendering.trailing_blank(said)
        return Turn(((start, end),), text[start:end])

    def behind_prompt(self, index: int) -> tuple[str, Turn] | None:
        """A text that ends with a turn behind exactly what the template prompts it with.

        The template's own text where it is one. Some templates render the turns before otherwise
        once the answer is there, such as without the system turn (Mistral). Then the answer is put
        behind its prompt.

        Returns:
            The text, and the turn in it; None if the prompt holds more than the opening of the
            answer, such as a thought that has begun.
        """
        text, answer, prompt = self.text(index + 1), self.answer(index), self.prompt(index)
        if prompt is None or answer.start is None:
            return None
        if self._stands_behind(prompt, text, answer):
            return text, answer
        if not text[: answer.start].endswith(self._rendering.opening(index)):
            return None
        moved = Turn(((len(prompt), len(prompt) + len(answer.said)),), answer.said)
        return prompt + answer.said, moved

    def is_behind_prompt(self, text: str, index: int, turn: Turn) -> bool:
        """Whether a turn stands in a text behind exactly what the template prompts it with."""
        prompt = self.prompt(index)
        return prompt is not None and self._stands_behind(prompt, text, turn)

    @staticmethod
    def _stands_behind(prompt: str, text: str, turn: Turn) -> bool:
        return turn.start == len(prompt) and text.startswith(prompt)

    def same(self, text: str, index: int, answer: Turn, *, count: int) -> Turn | None:
        """A turn in a longer text, if it stands there as it is generated.

        Args:
            text: The text, of the first turns or of a turn behind its prompt.
            index: The turn.
            answer: What `answer` gives for it.
            count: The number of turns in the text.

        Returns:
            Its place; None if what comes before is not what the template prompts it with, or the
            template has changed the turn. Tokens that close a conversation may be missing, and
            the token that ends a last turn may be another.
        """
        prompt = self.prompt(index)
        if answer.start is None or prompt is None or not text.startswith(prompt):
            return None
        if self._rendering.is_tagged:
            tagged = self._tagged(count, index)
            is_same = text == self.text(count) and tagged.start == len(prompt)
            return tagged if is_same and self._rendering.alike(tagged.said, answer.said) else None
        said, start = answer.said, len(prompt)
        if text.startswith(said, start):
            return Turn(((start, start + len(said)),), said)
        body = len(said) - len(self._rendering.closing(said))
        is_said = text.startswith(said[:body], start) and said[:body].strip()
        end = self._rendering.end_of(text, start + body, said[body:]) if is_said else None
        return None if end is None else Turn(((start, end),), text[start:end])

    def find(self, count: int, index: int) -> Turn:
        """A turn in the text of the first turns, wherever the template has put it.

        It begins behind the opening that the template prompts with, as much of it as is there, and
        ends with the first token behind its last word.

        Raises:
            ChatError: If no letter of the text changes when the turn does.
        """
        if self._rendering.is_tagged and self.messages[index].get("role") == "assistant":
            return self._tagged(count, index)
        text = self.text(count)
        extent = self._extent(count, index)
        if extent is None:
            raise ChatError(f"the chat template leaves out turn {index + 1}")
        first, last = extent
        start = self._begin(index, text, first, count=count)
        end = self._rendering.end_of(text, last, self._tail(index))
        end = last if end is None else end
        end -= self._rendering.trailing_blank(text[start:end])
        return Turn(((start, end),), text[start:end])

    def without_thought(self, index: int) -> Conversation | None:
        """The same conversation without what a turn thought; None if it thought nothing."""
        if not thought_of(self.messages[index]):
            return None
        messages = [*self.messages]
        messages[index] = without_thought(messages[index])
        return Conversation(self._rendering.of(messages))

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
        thought = thought_of(message)
        if thought and not holds(turn.said, thought):
            found.add("thought")
        answer = answer_of(message)
        if answer.strip() and not holds(turn.said, answer):
            # Written otherwise, such as in quotes, it is heard if one more letter at its end is.
            changed = {**message, "content": marked_words(message, self._mark, at_end=True)}
            text = self._rendering.attempt([*self.messages[:index], changed])
            if text is None or self._mark not in text:
                found.add("words")
        return found

    def _tagged(self, count: int, index: int) -> Turn:
        """What the template's tags mark of an assistant's turn, in the text of the first turns.

        What the template prompts with is not generated, so it is left out where tags hold it too.
        """
        text, spans = self.text(count), self._rendering.spans(count)
        if count == index + 1:
            mine = self._rendering.own_spans(index)
        elif sum(len(self._rendering.own_spans(i)) for i in self._assistants(count)) == len(spans):
            before = sum(len(self._rendering.own_spans(i)) for i in self._assistants(index))
            mine = spans[before : before + len(self._rendering.own_spans(index))]
        else:  # tags that mark more of a turn, or nothing, while it is the last
            begins = [self._words_before(count, i) for i in self._assistants(count)]
            first = self._words_before(count, index)
            end = next((begin for begin in begins if begin > first), len(text))
            mine = [span for span in spans if first <= span[0] < end]
        prompt = self._rendering.prompt(index)
        if prompt is not None and text.startswith(prompt):
            mine = [(max(a, len(prompt)), b) for a, b in mine if b > len(prompt)]
        return Turn(tuple(mine), "".join(text[start:end] for start, end in mine))

    def _words_before(self, count: int, index: int) -> int:
        """Where the words of the turn before a turn end; 0 for the first."""
        return 0 if index == 0 else (self._extent(count, index - 1) or (0, 0))[1]

    def _assistants(self, count: int) -> list[int]:
        turns = enumerate(self.messages[:count])
        return [index for index, turn in turns if turn.get("role") == "assistant"]

    def _extent(self, count: int, index: int) -> tuple[int, int] | None:
        """First character, and the one after the last, that depend on the words of a turn."""
        if (count, index) not in self._extents:
            self._extents[count, index] = self._measure_extent(count, index)
        return self._extents[count, index]

    def _measure_extent(self, count: int, index: int) -> tuple[int, int] | None:
        text = self.text(count)
        first, last = len(text), 0
        for at_end in (False, True):
            for changed in marked_turns(self.messages[index], self._mark, at_end=at_end):
                messages = [*self.messages[:index], changed, *self.messages[index + 1 : count]]
                other = self._rendering.attempt(messages)
                if other is None or other == text:
                    continue
                if at_end:
                    last = max(last, len(text) - common_length(text[::-1], other[::-1]))
                else:
                    first = min(first, common_length(text, other))
        return None if first == len(text) and last == 0 else (first, max(first, last))

    def _rest(self, index: int) -> str:
        """All that the template puts behind the words of a turn while it is the last."""
        try:
            extent = self._extent(index + 1, index)
            return "" if extent is None else self.text(index + 1)[extent[1] :]
        except ChatError:
            return ""

    def _tail(self, index: int) -> str:
        """What ends a turn while it is the last, without a prompt for the next answer."""
        rest = self._rest(index)
        first = (
            self._rendering.tokens.search(rest) if self._rendering.always_prompts(index) else None
        )
        return rest if first is None else rest[: first.end()]

    def _begin(self, index: int, text: str, first: int, *, count: int) -> int:
        """Where a turn begins whose words begin at a place: behind what is there of its opening.

        A template without an opening for answers (Mistral) lets one follow what ends the question.
        """
        before = self._words_before(count, index)
        opening = self._rendering.opening(index)
        for size in range(len(opening), 0, -1):
            found = text.find(opening[:size], before, first)
            if found >= 0:
                return found + size
        if index == 0 or opening or self.messages[index].get("role") != "assistant":
            return first
        ends = self._rest(index - 1)
        return before + len(ends) if text.startswith(ends, before) else first
