"""Recipes: a YAML file, checked to the last key before anything is loaded.

    recipe = load_recipe("recipes/quickstart.yaml", overrides=["peft=lora"])
    arguments = recipe_arguments(recipe)

Reading is in `recipe_source`, the keys in `recipe_sections` and `recipe_train`, checking in
`recipe_check`, wording in `recipe_report`. Everything wrong with a file is found in one go and
said in one error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_gradacc.recipe_check import check_section
from hf_gradacc.recipe_report import Key, Origin, Problem, RecipeError, dotted
from hf_gradacc.recipe_sections import Recipe
from hf_gradacc.recipe_source import RecipeSource, read_recipe
from hf_gradacc.recipe_train import arguments_class, train_section

__all__ = ["Recipe", "RecipeError", "configure_wandb", "load_recipe", "recipe_arguments"]

LOCAL_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".text")


def load_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, check and complete a recipe.

    Relative paths in a file start at that file's folder, those in an override at the current
    one; `output.dir` always starts at the current one.

    Args:
        path: A YAML file.
        overrides: `key.sub=value`, applied last, in order.

    Raises:
        RecipeError: With every problem of the file, its bases and the overrides.
    """
    source = read_recipe(Path(path), overrides=overrides)
    values = source.values
    problems = list(check_section(Recipe, values, (), source))
    section = values.get("train")
    if isinstance(section, dict):
        problems += check_section(train_section(), section, ("train",), source)
    if problems:
        raise RecipeError(problems)
    recipe = Recipe.model_validate(values)
    recipe.train = train_section().model_validate(recipe.train).model_dump(exclude_unset=True)
    problems += _find_paths(recipe, source)
    if problems:
        raise RecipeError(problems)
    recipe.output.dir = recipe.output.dir or f"runs/{Path(path).stem}"
    recipe.wandb.name = recipe.wandb.name or Path(path).stem
    return recipe


def recipe_arguments(recipe: Recipe, **changes: Any) -> Any:
    """The GradAccArguments of a recipe.

    Raises:
        RecipeError: If the options contradict each other.
    """
    options: dict[str, Any] = {"output_dir": recipe.output.dir, "run_name": recipe.wandb.name}
    options |= {"project": recipe.wandb.project, "wandb_per_rank": recipe.wandb.per_rank}
    # null takes an inherited value back: the default holds.
    options |= {name: value for name, value in recipe.train.items() if value is not None}
    options |= changes
    try:
        return arguments_class()(**options)
    except (ValueError, TypeError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        fix = "change the options it names"
        raise RecipeError([Problem("train", why, fix, Origin("recipe"))]) from error


def configure_wandb(recipe: Recipe) -> None:
    """Tell W&B where the recipe wants its run; what the environment already says stays.

    Call it before the trainer is made.
    """
    section = recipe.wandb
    wishes = {
        "WANDB_PROJECT": section.project,
        "WANDB_ENTITY": section.entity,
        "WANDB_RUN_GROUP": section.group,
        "WANDB_TAGS": ",".join(section.tags),
        "WANDB_NOTES": section.notes,
        "WANDB_MODE": section.mode,
    }
    for name, value in wishes.items():
        if value:
            os.environ.setdefault(name, value)


def _find_paths(recipe: Recipe, source: RecipeSource) -> list[Problem]:
    """Make local paths absolute, and report those that lead nowhere."""
    problems: list[Problem] = []
    for part in ("train", "eval"):
        sources = getattr(recipe.data, part)
        for index, one in enumerate(sources):
            folder = source.folder(("data", part, index))
            found = (folder / Path(one.path).expanduser()).resolve()
            pattern = any(letter in one.path for letter in "*?[")
            exists = (
                any(folder.glob(one.path)) if pattern and one.path[0] != "/" else found.exists()
            )
            key: Key = ("data", part, index) if len(sources) > 1 else ("data", part)
            if exists:
                one.path = str(found)
            elif _looks_local(one.path) and not pattern:
                fix = f"{found} does not exist"
                problems.append(
                    Problem(dotted(key), "no such file", fix, source.origin(key), one.path)
                )
    for name in ("model", "tokenizer"):
        section = getattr(recipe, name)
        if section.name is not None:
            folder = source.folder((name, "name"))
            found = (folder / Path(section.name).expanduser()).resolve()
            if found.is_dir():
                section.name = str(found)
            elif _looks_local(section.name):
                fix = f"{found} does not exist"
                where = source.origin((name, "name"))
                problems.append(Problem(f"{name}.name", "no such folder", fix, where, section.name))
    return problems


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.endswith(LOCAL_SUFFIXES)
