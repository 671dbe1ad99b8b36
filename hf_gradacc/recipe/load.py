"""Recipes: a YAML file, checked to the last key before anything is loaded.

    recipe = load_recipe("recipes/quickstart.yaml", overrides=["peft=lora"])
    arguments = recipe_arguments(recipe)

Reading is in `source` and `reading`, what is interpolated in `interpolation`, the keys in
`sections`, checking in `checks` and `values`, wording in `problems`.
Everything wrong with a file is found in one go and said in one error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hf_gradacc.compat import options_as_installed
from hf_gradacc.data.section import PAIR_TASKS
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.checks.checks import check_section, find_remote_code, resolve_paths
from hf_gradacc.recipe.checks.metrics import is_lower_better
from hf_gradacc.recipe.checks.together import check_together, drop_keys
from hf_gradacc.recipe.checks.values import check_values, machine_problems
from hf_gradacc.recipe.file.interpolation import allow_variables
from hf_gradacc.recipe.file.problems import Origin, Problem, RecipeError, without_consequences
from hf_gradacc.recipe.file.source import read_recipe
from hf_gradacc.recipe.folder import find_source_problem
from hf_gradacc.recipe.keys.pairs import is_trl_installed, options_of_pairs
from hf_gradacc.recipe.keys.sections import Recipe, arguments_class, train_section
from hf_gradacc.recipe.sweep import settle_sweep
from hf_gradacc.recipe.wandb import settle_reporters, settle_tracking
from hf_gradacc.safety.withheld import name_values

__all__ = ["load_recipe", "recipe_arguments"]


def load_recipe(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    allow_env: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Recipe:
    """Read, merge, check and complete a recipe.

    Relative paths in a file start at that file's folder, those in an override at the current
    one; `output.dir` always starts at the current one.

    Args:
        path: A YAML file.
        overrides: `key.sub=value` or `--key.sub=value`, applied last, in order.
        allow_env: Variables of the environment that the recipe may read beside those that any may.
        trust_remote_code: Let the recipe run code that its model's repository ships, if it asks
            for that.

    Raises:
        RecipeError: With every problem of the file, its bases and the overrides.
    """
    try:
        readable = allow_variables(allow_env)
    except ValueError as error:
        raise ConfigError(f"allow_env: {error}.") from None
    source = read_recipe(Path(path), overrides=overrides, readable=readable)
    values = source.values
    problems = list(check_section(Recipe, values, (), source))
    if not trust_remote_code:
        problems += find_remote_code(source)
    section = values.get("train")
    if isinstance(section, dict):
        problems += check_section(train_section(), section, ("train",), source)
    parts = [re.split(r"[.\[]", problem.key) for problem in problems]
    faulty = {part[1] for part in parts if part[0] == "train" and len(part) > 1}
    paths, missing = resolve_paths(source)
    problems += missing + check_values(source, faulty=faulty)
    reported = {problem.key for problem in problems}
    found, turned_off = check_together(source, paths, reported=reported)
    problems += found
    problems = [*source.problems, *without_consequences(problems, of=source.problems)]
    if problems:
        raise RecipeError(map(source.by_name, problems))
    recipe = Recipe.model_validate(values)
    recipe.train = train_section().model_validate(recipe.train).model_dump(exclude_unset=True)
    for key, place in paths.items():
        if key[0] == "data":
            getattr(recipe.data, str(key[1]))[key[2]].path = place
        elif key[0] == "train":
            recipe.train[str(key[1])] = place
        else:
            setattr(getattr(recipe, str(key[0])), str(key[1]), place)
    drop_keys(recipe, turned_off)
    settle_reporters(recipe, values)
    recipe.output.dir = recipe.output.dir or f"runs/{Path(path).stem}"
    recipe.wandb.name = recipe.wandb.name or Path(path).stem
    settle_sweep(recipe)
    recipe.keep_from_environment(source.from_environment)
    if why := find_source_problem(recipe):
        fix = "name a folder of its own, such as runs/mine"
        origin = source.origin(("output", "dir"))
        raise RecipeError([Problem("output.dir", why, fix, origin, recipe.output.dir)])
    return recipe


def recipe_arguments(recipe: Recipe, *, elsewhere: bool = False, **changes: Any) -> Any:
    """The GradAccArguments of a recipe.

    Args:
        recipe: A checked recipe.
        elsewhere: The run will be on another machine, so this one need not be fit for it.
        changes: Training arguments to set on top of it.

    Raises:
        RecipeError: If the options cannot hold on this machine, such as bf16 without support,
            Liger kernels or 4 bits without their packages, or a folder that cannot be written.
    """
    options: dict[str, Any] = {"output_dir": recipe.output.dir, "run_name": recipe.wandb.name}
    options |= {"project": recipe.wandb.project, "wandb_per_rank": recipe.wandb.per_rank}
    options |= {"wandb_report": recipe.wandb.report, "wandb_upload_text": recipe.wandb.upload_text}
    options |= {"loraplus_ratio": recipe.peft.loraplus_ratio}
    kind = arguments_class()
    if recipe.model.task in PAIR_TASKS and is_trl_installed():  # a plan does without
        from hf_gradacc.recipe.pair_trainers import defaults_of_ours

        kind = arguments_class(recipe.model.task)
        options |= defaults_of_ours(kind) | options_of_pairs(recipe)
    if recipe.evaluation.early_stopping_patience is not None:
        # The model that it stops for, unless the recipe says otherwise.
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    best = recipe.train.get("metric_for_best_model")
    if best is not None:  # stock takes all that is no loss for better when higher
        options["greater_is_better"] = not is_lower_better(best)
    # null takes an inherited value back: the default holds.
    options |= {name: value for name, value in recipe.train.items() if value is not None}
    options |= changes
    if options.get("ddp_backend") and "LOCAL_RANK" not in os.environ:
        why = "joins several processes, and this run has one"
        fix = "start it with `torchrun --nproc-per-node 8 -m hf_gradacc train ...`, or leave it out"
        here = Origin("this machine")
        raise RecipeError([Problem("train.ddp_backend", why, fix, here, options["ddp_backend"])])
    if options.get("push_to_hub"):  # a model that is half trained is pushed if a recipe says so
        options.setdefault("hub_strategy", "end")
    try:
        arguments = kind(**options_as_installed(options, kind))
    except (ValueError, TypeError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        fix = "change the options it names"
        raise RecipeError([Problem("train", why, fix, Origin("recipe"))]) from error
    settle_tracking(arguments)
    from hf_gradacc.loss.refusals import refuse_steps_in_backward

    refuse_steps_in_backward(arguments, num_replicas=1)
    fields = {("output", "dir"): "output_dir", ("wandb", "name"): "run_name"}
    fields |= {("wandb", "project"): "project"}
    fields |= {("train", name): name for name in recipe.train if name not in changes}
    held = recipe.from_environment
    written = {field: held[key] for key, field in fields.items() if key in held}
    name_values(
        arguments,
        {name: found.by_name(getattr(arguments, name, None)) for name, found in written.items()},
    )
    problems = [] if elsewhere else list(machine_problems(recipe, arguments))
    if problems:
        raise RecipeError(problems)
    return arguments
