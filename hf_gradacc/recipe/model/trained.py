"""Which parameters of a recipe's model are trained, and at which rates: by patterns of their names.

Asked of the model without weights, so that a pattern without effect is found before rows are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.text import nearest
from hf_gradacc.trainer.optimizer.groups import GroupRate, all_names, assign_rates_as_asked
from hf_gradacc.trainer.optimizer.muon import muon_options, refuse_muon

__all__ = ["check_trained", "describe_rates", "freeze_others"]

_ROWS = re.compile(r"\[\d*:\d*\]$")


def freeze_others(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train only the parameters whose name holds one of some patterns.

    Args:
        model: A whole model; its parameters are changed.
        patterns: Regular expressions, searched for in names. A tied weight has several names.

    Raises:
        ConfigError: If one of them is in no name.
    """
    found = all_names(model)
    problems = [_explain_unused(pattern, found.values()) for pattern in patterns]
    if any(problems):
        raise ConfigError("\n".join(filter(None, problems)))
    for parameter, names in found.values():
        parameter.requires_grad_(any(re.search(p, name) for p in patterns for name in names))


def _explain_unused(pattern: str, found: Any) -> str | None:
    names = [name for _, several in found for name in several]
    start = f"model.unfrozen_parameters: {pattern!r}"
    try:
        if any(re.search(pattern, name) for name in names):
            return None
    except re.error as error:
        return f"{start} is no regular expression ({error})."
    if _ROWS.search(pattern):
        return f"{start} asks for some rows of a parameter: it is trained whole, or not at all."
    words = {word for name in names for word in (name, *name.split("."))}
    guess = nearest(pattern, sorted(words))
    hint = f"did you mean {guess}?" if guess else f"there are such as {', '.join(names[:3])}."
    return f"{start} matches no parameter of the model; {hint}"


def check_trained(recipe: Recipe, model: Any, arguments: Any) -> None:
    """Refuse what the parameters of a recipe's model cannot be trained with.

    Args:
        recipe: A checked recipe.
        model: Its model and adapter; weights may be on the meta device.
        arguments: Its `GradAccArguments`.

    Raises:
        ConfigError: If a pattern has no effect, if Muon cannot step on the model, or if frozen
            embeddings would lose gradients or new tokens.
    """
    assign_rates_as_asked(model, arguments)
    if arguments.optim == "muon":
        muon_options(arguments.optim_args)
        splits = (name for name in ("fsdp", "deepspeed") if recipe.train.get(name))
        refuse_muon(model, sharded_by=next(splits, None))
    if not recipe.model.unfrozen_parameters:
        return
    embeddings = model.get_input_embeddings().weight
    if embeddings.requires_grad:
        return
    if recipe.tokenizer.add_tokens:
        raise ConfigError(
            "tokenizer.add_tokens grows the embeddings, which model.unfrozen_parameters leaves "
            "frozen, so the new tokens would mean nothing: add a pattern for them, such as "
            "embed_tokens."
        )
    if (arguments.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ConfigError(
            "activation_checkpointing_kwargs: use_reentrant = True loses the gradients behind "
            "frozen embeddings (model.unfrozen_parameters): set it to false."
        )


def describe_rates(model: nn.Module, arguments: Any) -> Iterator[tuple[str, float, int]]:
    """Yield label, learning rate and number of weights of each group; the default's label is "".

    Args:
        model: The model, with its adapter.
        arguments: The `GradAccArguments`.
    """
    assigned = assign_rates_as_asked(model, arguments)
    sizes: dict[GroupRate, int] = {}
    for i, (parameter, _) in all_names(model).items():
        if parameter.requires_grad:
            rate = assigned[i]
            sizes[rate] = sizes.get(rate, 0) + parameter.numel()
    for found, size in sorted(sizes.items(), key=lambda group: group[0].label != ""):
        yield found.label, found.rate, size
