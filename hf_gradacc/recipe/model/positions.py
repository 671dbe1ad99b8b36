"""How many positions a model has, compared with the rows of a recipe.

Two kinds of limits. A table of position embeddings ends: one token more is an index error in the
middle of a run, on a GPU an assertion that names nothing. Rotary positions go on, but past the
length that the model's config names it was never trained; whoever means that says so in the config.
Models whose attention knows distances only (T5, ALiBi) have neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_gradacc.data.prepare import PreparedData
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.keys.sections import Recipe

__all__ = ["Positions", "check_longest_row", "check_max_length", "find_positions"]

_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe", "embeddings_pos")
_SIZES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


@dataclass(frozen=True)
class Positions:
    """The longest row that a model is made for.

    Attributes:
        count: Tokens in it.
        is_table: Whether it cannot compute a longer one at all.
        size_key: The key of its config that says so; None if it has another name.
    """

    count: int
    is_table: bool
    size_key: str | None


def find_positions(model: Any) -> Positions | None:
    """Look for the positions of a model; its weights may be on the meta device.

    Args:
        model: A transformers model, wrapped by peft or not.

    Returns:
        Its limit; the lower one of an encoder and a decoder. None if it has none.
    """
    config = model.config.get_text_config()
    key = next((name for name in _SIZES if isinstance(getattr(config, name, None), int)), None)
    tables = [
        module.num_embeddings - _offset(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES
    ]
    # GPT-J and CTRL look up sines in a buffer that ends as well.
    tables += [buffer.shape[0] for name, buffer in model.named_buffers() if _is_table(name, buffer)]
    if tables:
        # GPT-2 answers to the common name, and its recipe has the name of its own.
        return Positions(min(tables), True, config.attribute_map.get(key, key))
    rotary = getattr(config, "rope_parameters", None)
    if not rotary or key is None:
        return None
    # Some models have one set of parameters for each type of layer.
    kinds = [kind for kind in rotary.values() if isinstance(kind, dict)] or [rotary]
    if any(kind.get("rope_type") == "dynamic" for kind in kinds):
        return None  # it stretches with the row
    size = getattr(config, key)
    stretched = (
        int((kind.get("original_max_position_embeddings") or size) * (kind.get("factor") or 1))
        for kind in kinds
    )
    return Positions(max(size, *stretched), False, key)


def _is_table(name: str, buffer: Tensor) -> bool:
    return name.rpartition(".")[2] in (*_TABLES, "pos_encoding") and buffer.ndim == 2


def _offset(table: nn.Embedding) -> int:
    """Rows of a table that are no position: OPT and BART skip two, RoBERTa those up to padding."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def check_max_length(recipe: Recipe, model: Any) -> None:
    """Compare a recipe's lengths with its model's positions, before any data are read.

    Args:
        recipe: A checked recipe.
        model: Its model; weights are not needed.

    Raises:
        ConfigError: If `data.max_length` or `data.max_target_length` exceeds them.
    """
    positions = find_positions(model)
    if positions is None:
        return
    room = positions.count - _virtual_tokens(recipe)
    for name in ("max_length", "max_target_length"):
        asked = getattr(recipe.data, name)
        if asked is not None and asked > room:
            raise ConfigError(
                f"data.{name} = {asked} is more than {_of_the_model(recipe, positions, model)}: "
                f"lower it to {room}{_larger(recipe, positions, asked + positions.count - room)}."
            )


def check_longest_row(recipe: Recipe, model: Any, data: PreparedData) -> str | None:
    """Compare the rows that were prepared with the model's positions.

    Args:
        recipe: A checked recipe.
        model: Its model; weights are not needed.
        data: Its rows. Those of a stream are not known yet.

    Returns:
        A line about rows that the model can compute, but was not made for; None if there are none.

    Raises:
        ConfigError: If the model cannot compute the longest row.
    """
    positions = find_positions(model)
    if positions is None:
        return None
    room = positions.count - _virtual_tokens(recipe)
    model_has = _of_the_model(recipe, positions, model)
    if recipe.data.streaming:
        if recipe.data.max_length is not None or not positions.is_table:
            return None
        return (
            f"the rows of a stream are not measured beforehand, and a longer one than {model_has} "
            f"would end the run: set data.max_length to {room} or less."
        )
    longest = max(data.reports, key=lambda report: report.longest, default=None)
    if longest is None or longest.longest <= room:
        return None
    larger = _larger(recipe, positions, longest.longest + positions.count - room)
    text = (
        f"the longest row of {longest.name} has {longest.longest:,} tokens, more than {model_has}: "
        f"set data.max_length to {room}{larger}."
    )
    if positions.is_table:
        raise ConfigError(f"data.max_length is not set, and {text}")
    return text


def _virtual_tokens(recipe: Recipe) -> int:
    learned = recipe.peft.method in ("prompt_tuning", "prefix_tuning")
    return recipe.peft.num_virtual_tokens if learned else 0


def _of_the_model(recipe: Recipe, positions: Positions, model: Any) -> str:
    virtual = _virtual_tokens(recipe)
    besides = f", {virtual} of them taken by peft.num_virtual_tokens" if virtual else ""
    return f"the {positions.count:,} positions of this {model.config.model_type} model{besides}"


def _larger(recipe: Recipe, positions: Positions, needed: int) -> str:
    """The other way out: more positions, where the model can have them."""
    if positions.size_key is None or (positions.is_table and recipe.model.name is not None):
        return ""  # a trained table has the size it has
    section = "overrides" if recipe.model.name is not None else "config"
    return f", or set model.{section}.{positions.size_key} to {needed}"
