"""What a model is asked with: a conversation as the tokens that its rows were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_gradacc.after.saved import SavedModel
from hf_gradacc.data.encode import source_columns, source_format
from hf_gradacc.data.joined import with_eos, without_eos
from hf_gradacc.data.plain import plain_instruction, plain_prompt, plain_question
from hf_gradacc.data.rendering import ChatError, Rendering
from hf_gradacc.data.section import DataSection
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.keys.sections import HEADS

__all__ = ["Asking", "choose_asking"]

Exchange = tuple[str, str]
"""What was asked, and what was answered."""

_WORDS = {
    "turns": "a conversation through the run's chat template",
    "question": "questions as plain text, as they were trained",
    "instruction": "instructions as plain text, as they were trained",
    "text": "text that is gone on with; each prompt stands alone",
    "source": "a text in, a text out; each stands alone",
}


@dataclass(frozen=True)
class Asking:
    """How prompts are written.

    Attributes:
        kind: Turns of the chat template, plain questions or instructions, text, or the source of
            an encoder-decoder.
        tokenizer: The run's.
        system: Said before everything; None without.
        options: What the chat template reads beside the turns.
        prefix: Put before each source.
    """

    kind: Literal["turns", "question", "instruction", "text", "source"]
    tokenizer: Any
    system: str | None = None
    options: dict[str, Any] | None = None
    prefix: str = ""

    def __str__(self) -> str:
        return _WORDS[self.kind]

    @property
    def remembers(self) -> bool:
        """Whether earlier exchanges stand before the next prompt."""
        return self.kind in ("turns", "question", "instruction")

    def encode(self, prompt: str, *, past: Sequence[Exchange] = ()) -> list[int]:
        """Write a prompt behind what was said before it, as token ids.

        Raises:
            ConfigError: If the chat template refuses the conversation.
        """
        if self.kind == "turns":
            return self._encode_turns(prompt, past)
        tokenizer = self.tokenizer
        if self.kind == "source":
            return with_eos(tokenizer, tokenizer(self.prefix + prompt)["input_ids"])
        if self.kind != "text":
            plain = plain_question if self.kind == "question" else plain_instruction
            earlier = [(plain(asked), said) for asked, said in past]
            prompt = plain_prompt(plain(prompt), past=earlier, system=self.system)
        return without_eos(tokenizer, tokenizer(prompt)["input_ids"])

    def _encode_turns(self, prompt: str, past: Sequence[Exchange]) -> list[int]:
        turns = [] if self.system is None else [("system", self.system)]
        for asked, said in past:
            turns += [("user", asked), ("assistant", said)]
        messages = [{"role": role, "content": text} for role, text in [*turns, ("user", prompt)]]
        try:
            text = Rendering(self.tokenizer, messages, self.options or {}).text(
                len(messages), prompt=True
            )
        except ChatError as error:
            raise ConfigError(f"{error}: leave out --system, or ask in another way.") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def choose_asking(saved: SavedModel, *, tokenizer: Any, system: str | None = None) -> Asking:
    """Choose how prompts are written, by the format of the run's rows.

    A model of no recipe is asked through its chat template, if its tokenizer has one.

    Args:
        saved: The model.
        tokenizer: Its tokenizer.
        system: In place of the recipe's `data.system`.

    Raises:
        ConfigError: If there is no place for a system turn.
    """
    data = None if saved.recipe is None else saved.recipe.data
    kind: Any
    if HEADS[saved.task] == "ForSeq2SeqLM":
        kind = "source"
    elif data is None:
        kind = "turns" if tokenizer.chat_template is not None else "text"
    else:
        format = source_format(data, data.train[0])
        templated = tokenizer.chat_template is not None
        is_turns = format == "prompt_completion" and templated and _are_turns(data)
        if format in ("question_answer", "instruction") and not templated:
            kind = format.removesuffix("_answer")
        elif not templated or (format in ("text", "tokens", "prompt_completion") and not is_turns):
            kind = "text"
        else:
            kind = "turns"
    if system is not None and kind in ("source", "text"):
        raise ConfigError(
            f"--system = {system!r} has no place: this model was trained on {_WORDS[kind]}. Leave "
            "it out."
        )
    return Asking(
        kind,
        tokenizer,
        system=(data.system if system is None and data is not None else system) or None,
        options={} if data is None else dict(data.template_options),
        prefix="" if data is None else data.source_prefix,
    )


def _are_turns(data: DataSection) -> bool:
    """Whether prompts of `prompt_completion` are turns, not texts: the first row says so."""
    from hf_gradacc.data.sources import load_source

    source = data.train[0]
    column = source_columns(data, source).get("prompt", "prompt")
    whole = source.model_copy(update={"split": source.split.partition("[")[0]})
    try:
        return isinstance(next(iter(load_source(whole, streaming=True)))[column], list)
    except Exception:  # the rows lie elsewhere by now; texts are what most of them are
        return False
