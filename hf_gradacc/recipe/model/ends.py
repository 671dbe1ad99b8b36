"""Where a trained model stops: the tokens that end an answer become stop tokens of generation.

A base model such as Qwen3-Base stops at `<|endoftext|>`. Trained on chats whose turns end with
`<|im_end|>` it writes that token, goes on, and answers itself. The stock Trainer adds the
tokenizer's EOS to the generation config; the end of a template's turns may be another token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_gradacc.data.chat import encode_chat
from hf_gradacc.data.encode import source_format
from hf_gradacc.data.rendering import ChatError
from hf_gradacc.recipe.keys.sections import Recipe

__all__ = ["add_stop_tokens", "find_turn_end", "save_stop_tokens", "stop_or_end", "stop_tokens"]

_ANSWER = "Certainly"
_BY_TEMPLATE = ("chat", "prompt_completion", "instruction", "question_answer", "preference")
_BY_EOS = ("prompt_completion", "text", "seq2seq", "preference")  # rows of tokens end as they end


def find_turn_end(tokenizer: Any, **options: Any) -> int | None:
    """Find the token that ends an answer under a tokenizer's chat template.

    A short chat is rendered and labelled; the end is the first added token behind the answer's
    words. A template that ends a turn with ordinary text, such as a line break, has none: stopping
    at that would cut answers.

    Args:
        tokenizer: One with a chat template.
        options: Values that the template reads.

    Returns:
        The token's id, or None.
    """
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _ANSWER}]
    try:
        _, labels = encode_chat(tokenizer, turns, **options)
    except ChatError:
        return None  # told with the first row
    targets = [label for label in labels if label >= 0]
    added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    said = next((n for n in range(1 + len(targets)) if _ANSWER in tokenizer.decode(targets[:n])), 0)
    return next((token for token in targets[said:] if said and token in added), None)


def stop_tokens(model: Any) -> list[int]:
    """List the ids at which a model's `generate` stops: of its generation config, or its config."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return list(ids) if isinstance(ids, list | tuple) else [ids]
    return []


def stop_or_end(model: Any, tokenizer: Any) -> list[int] | None:
    """List the ids at which an answer ends: the model's, and the tokenizer's EOS; None if none."""
    return sorted({*stop_tokens(model), tokenizer.eos_token_id} - {None}) or None


def add_stop_tokens(model: Any, recipe: Recipe, *, tokenizer: Any, folder: str) -> str | None:
    """Let a model stop at every token that ends the answers of a recipe's rows.

    Changes `model.generation_config` in place; nothing is taken out of it.

    Args:
        model: The model, wrapped by peft or not.
        recipe: Its recipe.
        tokenizer: Its tokenizer.
        folder: Where the run saves the model.

    Returns:
        What was changed and why, in one line; None if nothing was.
    """
    config = getattr(model, "generation_config", None)
    if config is None or recipe.model.task in ("classification", "reward"):
        return None
    before = stop_tokens(model)
    missing = [token for token in _ends(recipe, tokenizer) if token not in before]
    if not missing:
        return None
    config.eos_token_id = [*missing, *before]

    def named(ids: list[int]) -> str:
        return " and ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in ids)

    alone = f"the model alone stops at {named(before)}" if before else "the model alone never stops"
    line = f"generation stops at {named(missing)}, which ends the answers here; {alone}"
    if recipe.peft.saves_whole_model:
        return f"{line}. generation_config.json is saved so."
    return (
        f"{line}. An adapter is loaded with its base's settings, so the right ones lie beside it: "
        f'generate(..., generation_config=GenerationConfig.from_pretrained("{folder}")).'
    )


def save_stop_tokens(model: Any, folder: Path) -> None:
    """Write `generation_config.json` beside an adapter; peft saves none."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.save_pretrained(folder)
    except ValueError as error:  # values that do not go together came with the base model
        print(f"generation_config.json was not saved beside the adapter: {error}".splitlines()[0])


def _ends(recipe: Recipe, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, by the formats of a recipe's sources."""
    formats = {source_format(recipe.data, source) for source in recipe.data.train}
    templated = tokenizer.chat_template is not None
    ends: list[int | None] = []
    if templated and formats.intersection(_BY_TEMPLATE):
        ends.append(find_turn_end(tokenizer, **recipe.data.template_options))
    without_template = () if templated else _BY_TEMPLATE
    if formats.intersection([*_BY_EOS, *without_template]):
        ends.append(tokenizer.eos_token_id)
    return [token for token in dict.fromkeys(ends) if token is not None]
