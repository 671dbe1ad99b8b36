"""What the keys of a recipe mean together: keys without effect, and what would end a run later."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

from hf_gradacc.recipe.foreseen import find_foreseen
from hf_gradacc.recipe.idle_arguments import find_idle_arguments
from hf_gradacc.recipe.idle_keys import columns_read, find_idle_keys
from hf_gradacc.recipe.problems import Key, Problem, dotted
from hf_gradacc.recipe.readable import ReadableSections
from hf_gradacc.recipe.sections import Recipe
from hf_gradacc.recipe.source import RecipeSource

__all__ = ["check_together", "drop_overridden"]


def check_together(
    source: RecipeSource, paths: Mapping[Key, str], *, reported: Collection[str]
) -> list[Problem]:
    """Compare the keys of all sections with each other.

    Args:
        source: The recipe's values, and where each was written.
        paths: The absolute path for each key that is local, see `resolve_paths`.
        reported: Keys that are wrong by themselves; one line is enough for each.
    """
    sections = ReadableSections(source, paths)
    problems: dict[str, Problem] = {}
    for key, why, fix in itertools.chain(
        find_foreseen(sections), find_idle_keys(sections), find_idle_arguments(sections)
    ):
        if dotted(key) not in reported:
            problems.setdefault(dotted(key), sections.problem(key, why, fix))
    return list(problems.values())


def drop_overridden(recipe: Recipe) -> None:
    """Take out what a stronger place has made idle, so that the saved recipe holds no such key.

    `train.max_steps` on a command line wins over the epochs of the file, and a child's format over
    the columns that its base names for another one.
    """
    if (recipe.train.get("max_steps") or -1) > 0:
        recipe.train.pop("num_train_epochs", None)
    data = recipe.data
    formats = {source.format or data.format for source in (*data.train, *data.eval)}
    read = columns_read(formats)
    data.columns = {name: column for name, column in data.columns.items() if name in read}
