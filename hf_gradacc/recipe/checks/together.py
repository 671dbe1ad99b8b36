"""What the keys of a recipe mean together: keys without effect, and what would end a run later.

A key without effect is an error, but for one that a stronger place has turned off:
`train.save_strategy=no` on a command line leaves `save_steps` of the file behind, and a child's
`data.format` the columns that its base names for another. Those are taken out of the recipe, so
that the one that is saved holds none of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

from hf_gradacc.recipe.checks.foreseen import find_foreseen
from hf_gradacc.recipe.checks.idle_arguments import find_idle_arguments
from hf_gradacc.recipe.checks.idle_keys import find_idle_keys
from hf_gradacc.recipe.checks.readable import ReadableSections
from hf_gradacc.recipe.file.problems import Key, Problem, dotted
from hf_gradacc.recipe.file.source import RecipeSource
from hf_gradacc.recipe.keys.sections import Recipe

__all__ = ["check_together", "drop_keys"]


def check_together(
    source: RecipeSource, paths: Mapping[Key, str], *, reported: Collection[str]
) -> tuple[list[Problem], list[Key]]:
    """Compare the keys of all sections with each other.

    Args:
        source: The recipe's values, and where each was written.
        paths: The absolute path for each key that is local, see `resolve_paths`.
        reported: Keys that are wrong by themselves; one line is enough for each.

    Returns:
        The problems, and the keys that a stronger place has turned off.
    """
    sections = ReadableSections(source, paths)
    problems: dict[str, Problem] = {}
    turned_off: list[Key] = []
    idle = itertools.chain(find_idle_keys(sections), find_idle_arguments(sections))
    for key, why, fix in find_foreseen(sections):
        problems.setdefault(dotted(key), sections.problem(key, why, fix))
    for key, why, fix in idle:
        causes = [tuple(name.split(".")) for name in re.findall(_KEY, f"{why} {fix}")]
        if any(_strength(source, cause) > _strength(source, key) for cause in causes):
            turned_off.append(key)
        elif not any(sections.is_unclear(cause[1]) for cause in causes if cause[0] == "train"):
            problems.setdefault(dotted(key), sections.problem(key, why, fix))
    return [p for name, p in problems.items() if name not in reported], turned_off


_KEY = r"\b(?:model|tokenizer|data|peft|train|evaluation|dpo)\.\w+"


def _strength(source: RecipeSource, key: Key) -> int:
    """How late the place comes in which a key is written: bases, recipe, command line; -1 if none.

    For a key inside of a value that was written as a whole, it is where that was written.
    """
    if key not in source.origins and len(key) <= 2:
        return -1
    file = source.origin(key).file
    return source.files.index(file) if file in source.files else len(source.files)


def drop_keys(recipe: Recipe, keys: Collection[Key]) -> None:
    """Set keys of a recipe back to their defaults.

    Args:
        recipe: The recipe; changed in place.
        keys: As written: a source that stands alone has no number.
    """
    for key in keys:
        holder: Any = recipe
        for step in key[:-1]:
            if isinstance(holder, list):
                holder = holder[step if isinstance(step, int) else 0]
            if not isinstance(step, int):
                holder = holder[step] if isinstance(holder, dict) else getattr(holder, step)
        name = str(key[-1])
        if isinstance(holder, list):
            holder = holder[0]
        if isinstance(holder, BaseModel):
            field = type(holder).model_fields[name]
            setattr(holder, name, field.get_default(call_default_factory=True))
        elif isinstance(holder, dict):
            holder.pop(name, None)
