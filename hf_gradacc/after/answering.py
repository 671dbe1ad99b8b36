"""One answer of a model: written while it is generated, stopped by Ctrl-C, or scored by class."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, TextStreamer

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.model.ends import stop_tokens
from hf_gradacc.recipe.model.positions import find_positions

__all__ = ["Answer", "classify", "generate", "generation_settings"]


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: The answer.
        interrupted: Ctrl-C ended it.
        cut_at: Tokens after which it was cut off; None if it ended by itself.
    """

    text: str
    interrupted: bool = False
    cut_at: int | None = None


class _Pieces(TextStreamer):
    """Hands on the text of an answer as soon as its words are whole."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self.num_tokens = "", 0
        self._show = show

    def put(self, value: Any) -> None:
        self.num_tokens += 0 if self.next_tokens_are_prompt else value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if text:
            self._show(text)


def generation_settings(model: Any, *, temperature: float | None) -> GenerationConfig:
    """The settings that a model generates with: its own, and a temperature in place of its own.

    Args:
        model: The model; its stop tokens stay as they are.
        temperature: 0 takes the likeliest token each time; None leaves sampling as it is set.
    """
    settings = copy.deepcopy(model.generation_config)
    if settings.eos_token_id is None:
        settings.eos_token_id = stop_tokens(model) or None
    if temperature == 0:
        settings.do_sample = False
        plain = GenerationConfig()  # values for sampling alone would be warned of
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(settings, name, getattr(plain, name, None))
    elif temperature is not None:
        settings.do_sample, settings.temperature = True, temperature
    settings.num_beams = 1  # beams have no words to show before they end
    settings.max_length = None
    return settings


def generate(
    model: Any,
    prompt: Sequence[int],
    *,
    tokenizer: Any,
    settings: GenerationConfig,
    max_new_tokens: int,
    show: Callable[[str], None],
) -> Answer:
    """Let a model go on behind a prompt.

    Args:
        model: A causal language model, or an encoder-decoder.
        prompt: Token ids.
        tokenizer: Turns tokens into text.
        settings: From `generation_settings`.
        max_new_tokens: Longest answer.
        show: Is given each piece of the answer as it is made.

    Raises:
        ConfigError: If the model has no positions left for an answer.
    """
    import torch

    decodes = not model.config.is_encoder_decoder
    positions = find_positions(model)
    room = max_new_tokens
    if positions is not None and (decodes or positions.is_table):
        room = positions.count - (len(prompt) if decodes else 0)
        if room < 1 or len(prompt) > positions.count:
            raise ConfigError(
                f"the prompt has {len(prompt):,} tokens, and the model {positions.count:,} "
                "positions: ask for less, or begin anew with /new."
            )
    limit = min(max_new_tokens, room)
    ids = torch.tensor([list(prompt)], device=model.device)
    pieces = _Pieces(tokenizer, show)
    settings = copy.deepcopy(settings)
    settings.max_new_tokens, settings.pad_token_id = limit, tokenizer.pad_token_id
    interrupted = False
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=pieces,
            )
    except KeyboardInterrupt:
        interrupted = True
        pieces.end()
    was_cut = not interrupted and pieces.num_tokens >= limit
    return Answer(pieces.text, interrupted, limit if was_cut else None)


def classify(model: Any, text: str, *, tokenizer: Any) -> list[tuple[str, float]]:
    """Score a text.

    Args:
        model: A model with a head for sequences.
        text: The text.
        tokenizer: Its tokenizer.

    Returns:
        The classes with their probabilities, the likeliest first; for a regression one pair of
        "value" and the number.

    Raises:
        ConfigError: If the text is longer than the model can read.
    """
    import torch

    ids = tokenizer(text)["input_ids"]
    positions = find_positions(model)
    if positions is not None and len(ids) > positions.count:
        raise ConfigError(
            f"the text has {len(ids):,} tokens, and the model {positions.count:,} positions: "
            "shorten it."
        )
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0].float()
    if len(logits) == 1:
        return [("value", logits.item())]
    shares = logits.softmax(-1).tolist()
    names = model.config.id2label
    ranked = sorted(enumerate(shares), key=lambda pair: -pair[1])
    return [(str(names[index]), share) for index, share in ranked]
