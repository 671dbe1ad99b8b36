"""Names of layers in a recipe's `peft` section, compared with the layers that a model has.

peft takes a list of names in which one is misspelt: it adapts the others, and says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.keys.sections import PeftSection
from hf_gradacc.text import nearest

__all__ = ["check_layer_names"]

_NAMES = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def check_layer_names(model: Any, section: PeftSection) -> None:
    """Refuse names of layers that a model does not have, all of them at once.

    Args:
        model: The model, not yet wrapped; weights are not needed.
        section: The recipe's `peft`.

    Raises:
        ConfigError: If a name matches nothing.
    """
    names = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    problems = []
    for key, asked in _asked(section):
        known = parameters if key == "peft.options.target_parameters" else names
        found = _as_pattern if key.endswith("_pattern") else _as_name
        if not any(found(asked, name) for name in known):
            guess = nearest(asked, dict.fromkeys(name.rpartition(".")[2] for name in known))
            hint = f"did you mean {guess}?" if guess else "name a layer it has, or leave it out."
            problems.append(f"{key}: no layer of this model is called {asked!r}: {hint}")
    if problems:
        raise ConfigError("\n".join(problems))


def _asked(section: PeftSection) -> Iterator[tuple[str, str]]:
    """Each key with each name in it. A text is a pattern, which peft refuses by itself."""
    values = {
        "peft.target_modules": section.target_modules,
        "peft.modules_to_save": section.modules_to_save,
        **{f"peft.options.{name}": section.options.get(name) for name in (*_NAMES, *_PATTERNS)},
    }
    for key, value in values.items():
        if isinstance(value, list | Mapping):
            yield from ((key, str(name)) for name in value)


def _as_name(asked: str, name: str) -> bool:
    return name == asked or name.endswith(f".{asked}")


def _as_pattern(asked: str, name: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({asked})", name) is not None
    except re.error:
        return False
