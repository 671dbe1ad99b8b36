"""What a chat template makes of turns: the text, what it prompts with, what its tags mark."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from hf_gradacc.data.sandbox import (
    TemplateLimitError,
    check_length,
    guard_templates,
    within_limits,
)
from hf_gradacc.data.words import Messages, answer_of, cut_in_pieces, holds
from hf_gradacc.errors import ConfigError
from hf_gradacc.text import common_length

__all__ = ["ChatError", "Rendering", "has_generation_tags"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatError(ValueError):
    """A conversation that the template cannot render, or whose targets cannot be found."""


def has_generation_tags(tokenizer: Any, *, tools: Any = None) -> bool:
    """Whether the chat template marks the assistant's turns itself."""
    return _GENERATION.search(_template_of(tokenizer, tools)) is not None


def _template_of(tokenizer: Any, tools: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # several by name; `tool_use` is for rows with tools
        template = tokenizer.get_chat_template(None, tools)
    return template if isinstance(template, str) else ""


class Rendering:
    """What a template makes of a conversation and of its beginnings, each rendered once.

    Args:
        tokenizer: One with a chat template.
        messages: Turns `{"role": ..., "content": ...}` in order.
        options: What the template reads beside them.

    Attributes:
        messages: The turns.
        is_tagged: The template marks itself what the assistant says.
        tokens: Finds the tokens that stand for more than their letters.

    Raises:
        ChatError: By `text` and `spans`, if the template refuses the turns.
    """

    def __init__(self, tokenizer: Any, messages: Messages, options: Mapping[str, Any]) -> None:
        self.messages = list(messages)
        self.is_tagged = has_generation_tags(tokenizer, tools=options.get("tools"))
        self.tokens = _added_tokens(tokenizer)
        self._tokenizer, self._options = tokenizer, dict(options)
        self._rendered: dict[tuple[int, bool], tuple[str, list[tuple[int, int]]]] = {}
        self._in_pieces = False
        self._in_pieces = not self._renders_words() and self._renders_words(in_pieces=True)
        if self._in_pieces:
            self._rendered.clear()

    def of(self, messages: Messages) -> Rendering:
        """What the same template makes of other turns."""
        return Rendering(self._tokenizer, messages, self._options)

    def text(self, count: int, *, prompt: bool = False) -> str:
        """The text of the first turns.

        Args:
            count: How many.
            prompt: With what the template prompts an answer with.
        """
        return self._first(count, prompt=prompt)[0]

    def spans(self, count: int) -> list[tuple[int, int]]:
        """What the template's tags mark in the text of the first turns, as places of letters."""
        return self._first(count, prompt=False)[1]

    def prompt(self, index: int) -> str | None:
        """The text that a turn is prompted with; None if the template does not prompt for it."""
        try:
            return self.text(index, prompt=True) if index else None
        except ChatError:
            return None

    def attempt(self, messages: Messages) -> str | None:
        """The text of other turns, None if the template refuses them."""
        try:
            return self._render(messages, prompt=False)[0]
        except ChatError:
            return None

    def always_prompts(self, index: int) -> bool:
        """Whether the template prompts for the next answer unasked, behind a last answer too."""
        try:
            return self.text(index + 1, prompt=True) == self.text(index + 1)
        except ChatError:
            return False

    def opening(self, index: int) -> str:
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

    def own_spans(self, index: int) -> list[tuple[int, int]]:
        """The tagged pieces of a turn while it is the last."""
        text, spans = self._first(index + 1, prompt=False)
        before = 0
        if index > 0:
            with contextlib.suppress(ChatError):
                before = common_length(text, self.text(index))
        return [span for span in spans if span[0] >= before]

    def alike(self, said: str, other: str) -> bool:
        """Whether two turns say the same, and differ in how they end at most."""
        words, others = (text[: len(text) - len(self.closing(text))] for text in (said, other))
        return said == other or (words == others and bool(words.strip()))

    def closing(self, said: str) -> str:
        """The blanks and tokens that end a turn."""
        ends = len(said)
        spans = {match.end(): match.start() for match in self.tokens.finditer(said)}
        while ends > 0:
            if said[ends - 1].isspace():
                ends -= 1
            elif ends in spans:
                ends = spans[ends]
            else:
                break
        return said[ends:]

    def end_of(self, text: str, at: int, closing: str) -> int | None:
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
        tokens = [match.end() for match in self.tokens.finditer(closing)]
        if not tokens:
            return at + common if common == len(closing) or not closing.strip() else None
        whole = [end for end in tokens if end <= common]
        if whole:
            return at + whole[-1]
        other = self.tokens.match(text, at)
        return None if other is None else other.end()

    def trailing_blank(self, said: str) -> int:
        """Number of blank characters after the token that closes a turn."""
        stripped = said.rstrip()
        closes = any(match.end() == len(stripped) for match in self.tokens.finditer(stripped))
        return len(said) - len(stripped) if closes else 0

    def _renders_words(self, *, in_pieces: bool = False) -> bool:
        """Whether the template renders all turns, with contents as texts or in pieces of type text.

        Templates of models that see images ask for pieces, and render nothing of a plain text.
        """
        text: str | None = None
        if in_pieces:
            text = self.attempt(cut_in_pieces(self.messages))
        else:
            with contextlib.suppress(ChatError):
                text = self.text(len(self.messages))
        if text is None or (in_pieces and "'type'" in text):  # printed, not read
            return False
        spoken = [m for m in self.messages if m.get("role") in ("user", "assistant")]
        return all(holds(text, answer_of(message)) for message in spoken)

    def _first(self, count: int, *, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        key = (count, prompt)
        if key not in self._rendered:
            self._rendered[key] = self._render(self.messages[:count], prompt=prompt)
        return self._rendered[key]

    def _render(self, messages: Messages, *, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        guard_templates()
        options = self._options
        messages = cut_in_pieces(messages) if self._in_pieces else messages
        try:
            with within_limits():
                if not self.is_tagged:
                    text = self._tokenizer.apply_chat_template(
                        list(messages), tokenize=False, add_generation_prompt=prompt, **options
                    )
                    check_length(text, messages)
                    return str(text), []
                # As `apply_chat_template` does, which gives the places of tokens, not of letters.
                turns = [{k: v for k, v in m.items() if v is not None} for m in messages]
                texts, places = render_jinja_template(
                    conversations=[turns],
                    chat_template=_template_of(self._tokenizer, options.get("tools")),
                    return_assistant_tokens_mask=True,
                    add_generation_prompt=prompt,
                    **{**self._tokenizer.special_tokens_map, **options},
                )
                check_length(texts[0], messages)
                return texts[0], [(start, end) for start, end in places[0] if end > start]
        except TemplateLimitError as error:  # of no row: any would be as slow
            raise ConfigError(
                f"the chat template cannot be meant for conversations ({error}): use another, see "
                "tokenizer.chat_template."
            ) from None
        except Exception as error:  # Jinja templates raise whatever they like
            raise ChatError(f"the chat template refuses it: {error}") from error


def _added_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds the tokens that stand for more than their letters, longest first."""
    texts = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
