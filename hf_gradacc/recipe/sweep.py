"""W&B sweeps: a place for each run, and a check of the sweep's file against its recipe.

The agent of a sweep draws parameters and starts `hf-gradacc train RECIPE --key=value ...`. Whatever
it may draw is tried on the recipe here, before the first run.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.file.problems import Key, Origin, Problem, RecipeError
from hf_gradacc.recipe.file.reading import read_yaml
from hf_gradacc.recipe.file.source import COMMAND_LINE
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.recipe.shipped import find_recipe
from hf_gradacc.text import nearest

__all__ = ["Sweep", "check_sweep", "describe_sweep", "settle_sweep"]

_METHODS = ("grid", "random", "bayes")
_ARGUMENTS = ("${args}", "${args_no_hyphens}")
_MISREAD = {
    "${args_no_boolean_flags}": "leaves out what is false",
    "${args_no_equals}": "puts a blank between key and value",
    "${args_json}": "is JSON",
    "${args_json_file}": "is a file",
    "${args_append_hydra}": "begins keys with +",
    "${args_override_hydra}": "begins keys with ++",
}
"""How W&B would pass parameters in a way that hf-gradacc does not read."""


def settle_sweep(recipe: Recipe) -> None:
    """Give a run that a sweep's agent has started a name and a folder of its own.

    Args:
        recipe: The recipe, its name and folder settled; changed in place.
    """
    sweep, run = (_harmless(os.environ.get(name)) for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"))
    if sweep and run:
        recipe.output.dir = f"{recipe.output.dir}-sweep-{sweep}/{run}"
        recipe.wandb.name = f"{recipe.wandb.name}-{run}"


def _harmless(name: str | None) -> str:
    return re.sub(r"[^\w.-]", "-", name or "").strip(".")


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every parameter fits its recipe.

    Attributes:
        path: Its file.
        method: How W&B draws.
        parameters: What may be drawn for each key, in words.
        metric: What W&B compares runs by, in words; "" if it compares none.
        num_runs: Runs of a grid; None if it goes on until it is stopped.
        project: Where it goes, unless its file says so.
        folder: Where runs go; SWEEP and RUN stand for the ids that W&B gives.
    """

    path: Path
    method: str
    parameters: dict[str, str]
    metric: str
    num_runs: int | None
    project: str | None
    folder: str


def describe_sweep(sweep: Sweep) -> Iterator[str]:
    """Say what a sweep will do, and how to start it."""
    runs = "until it is stopped" if sweep.num_runs is None else f"{sweep.num_runs} runs"
    number = len(sweep.parameters)
    yield f"Sweep of {number} parameter{'s' * (number != 1)}, {sweep.method}, {runs}"
    width = max(map(len, [*sweep.parameters, "metric"]))
    for key, drawn in sweep.parameters.items():
        yield f"  {key:<{width}}  {drawn}"
    if sweep.metric:
        yield f"  {'metric':<{width}}  {sweep.metric}"
    yield f"  {'folders':<{width}}  {sweep.folder}"
    yield "Start it, and an agent on each machine or GPU; the first command prints the id:"
    project = f"--project {sweep.project} " if sweep.project else ""
    yield f"  wandb sweep {project}{sweep.path}"
    yield "  wandb agent ENTITY/PROJECT/SWEEP"


def check_sweep(recipe: str, path: Path, **options: Any) -> Sweep:
    """Try every value that a sweep may draw on its recipe.

    Of a range both ends are tried, and a number between them.

    Args:
        recipe: The recipe's file, or the name of one that ships.
        path: The sweep's file, as `wandb sweep` takes it.
        options: As for `load_recipe`.

    Raises:
        RecipeError: With all that is wrong, by the lines of the sweep's file.
    """
    from hf_gradacc.recipe.load import load_recipe

    if not path.is_file():
        raise ConfigError(f"SWEEP = {str(path)!r} is not a file: name the sweep's YAML file.")
    values, lines = read_yaml(path)
    file = find_recipe(recipe)
    problems = [
        Problem(key, why, fix, _line(lines, (key,), path), value)
        for key, why, fix, value in _faults(values, recipe, file)
    ]
    section = values.get("parameters")
    parameters = dict(section) if isinstance(section, dict) else {}
    problems += _read_as_text(values, path, lines)
    drawn: dict[str, list[Any]] = {}
    for name, spec in parameters.items():
        try:
            drawn[name] = _candidates(spec, is_grid=values.get("method") == "grid")
        except ValueError as error:
            origin = _line(lines, ("parameters", name), path)
            problems.append(Problem(f"parameters.{name}", str(error), "", origin))
    fixed = [token for token in _command(values) if "=" in token and "${" not in token]
    loaded: Recipe | None = None
    for overrides in _draws(drawn):
        given = [f"--{name}={value}" for name, value in overrides.items()]
        try:
            loaded = load_recipe(file, overrides=[*fixed, *given], **options)
        except RecipeError as error:
            problems += [_in_sweep(one, lines, path) for one in error.problems]
    if loaded is not None:
        problems += _faults_of_metric(values, loaded, _line(lines, ("metric",), path))
    if problems or loaded is None:
        raise RecipeError(problems)
    sizes = [len(spec["values"]) if "values" in spec else 1 for spec in parameters.values()]
    metric = values.get("metric") or {}
    return Sweep(
        path=path,
        method=values["method"],
        parameters={name: _in_words(spec) for name, spec in parameters.items()},
        metric=f"{metric['name']}, {metric.get('goal', 'minimize')}" if metric else "",
        num_runs=math.prod(sizes) if values["method"] == "grid" else None,
        project=None if values.get("project") else loaded.wandb.project,
        folder=f"{loaded.output.dir}-sweep-SWEEP/RUN",
    )


def _faults(
    values: Mapping[str, Any], recipe: str, file: Path
) -> Iterator[tuple[str, str, str, Any]]:
    """Yield key, reason, way out and value of what is wrong whatever is drawn."""
    method, metric = values.get("method"), values.get("metric")
    if method not in _METHODS:
        guess = nearest(str(method), _METHODS)
        fix = f"did you mean {guess}?" if guess else f"use one of {', '.join(_METHODS)}"
        yield "method", "is no method of W&B's sweeps", fix, method
    if not isinstance(values.get("parameters"), dict) or not values["parameters"]:
        yield "parameters", "names nothing to draw", "add `train.learning_rate: {...}`", ...
    for key in ("method", "early_terminate"):
        needs = values.get(key) == "bayes" if key == "method" else key in values
        if needs and not (isinstance(metric, dict) and metric.get("name")):
            yield key, "compares runs by a metric", "add `metric: {name: eval/loss, ...}`", ...
    command = _command(values)
    launch = f'["${{env}}", "${{interpreter}}", -m, hf_gradacc, train, {recipe}, "${{args}}"]'
    if "command" not in values:
        fix = f"add `program: hf_gradacc` and `command: {launch}`"
        yield "command", "is missing, so that no recipe is trained", fix, ...
        return
    for token in command:
        if token in _MISREAD:
            yield "command", f"{token} {_MISREAD[token]}", "write ${args} instead", ...
    if not any(token in (*_ARGUMENTS, *_MISREAD) for token in command):
        yield "command", "passes no parameters on", "add ${args} at its end", ...
    if not any(_is_recipe(token, file) for token in command):
        yield "command", f"does not train {recipe}", f"write {launch}", ...


def _read_as_text(
    values: Mapping[str, Any], path: Path, lines: Mapping[Key, Origin]
) -> Iterator[Problem]:
    """Find the numbers that are text to W&B, which reads YAML by an older rule than recipes do."""
    theirs = yaml.safe_load(path.read_text("utf-8"))
    for name, spec in dict(values.get("parameters") or {}).items():
        for key, value in spec.items() if isinstance(spec, dict) else ():
            other = theirs["parameters"][name].get(key)
            pairs = zip(value, other, strict=True) if isinstance(value, list) else [(value, other)]
            for ours, seen in pairs:
                if isinstance(ours, int | float) and isinstance(seen, str):
                    where = _line(lines, ("parameters", name, key), path)
                    why, fix = "is text to W&B", f"write {ours!r}, or 1.0e-5 with a point"
                    yield Problem(f"parameters.{name}.{key}", why, fix, where, seen)


def _command(values: Mapping[str, Any]) -> list[str]:
    command = values.get("command")
    return [str(token) for token in command] if isinstance(command, list) else []


def _is_recipe(token: str, file: Path) -> bool:
    try:
        return find_recipe(token).resolve() == file.resolve()
    except (ConfigError, OSError, ValueError):
        return False


def _faults_of_metric(values: Mapping[str, Any], recipe: Recipe, origin: Origin) -> list[Problem]:
    found = []
    reporters = recipe.train.get("report_to")
    if "wandb" not in (reporters if isinstance(reporters, list) else [reporters]):
        fix = "add a `wandb:` section, or wandb to train.report_to"
        found.append(Problem("", "its recipe does not report to W&B", fix, origin))
    metric = values.get("metric")
    name = str(metric.get("name")) if isinstance(metric, dict) else ""
    if not name:
        return found
    if "/" not in name:
        is_eval = name.startswith("eval_")
        meant = f"eval/{name.removeprefix('eval_')}" if is_eval else f"train/{name}"
        fix = f"did you mean {meant}?"
        why = "is none of the run's keys, which W&B has under train/ and eval/"
        found.append(Problem("metric.name", why, fix, origin, name))
    elif name.startswith("eval/") and not (recipe.data.eval or recipe.data.holdout):
        fix = "set data.holdout or data.eval, or take train/loss"
        found.append(Problem("metric.name", "needs held-out rows", fix, origin, name))
    return found


# ---- what may be drawn -------------------------------------------------------------------------
def _candidates(spec: Any, *, is_grid: bool) -> list[Any]:
    """Return the values to try for one parameter.

    Raises:
        ValueError: If W&B could not draw from it.
    """
    if not isinstance(spec, dict):
        raise ValueError("is no distribution: write {values: [...]}, or {min: ..., max: ...}")
    if "parameters" in spec:
        raise ValueError("is nested: write dotted keys, such as train.learning_rate")
    if "value" in spec:
        return [spec["value"]]
    if "values" in spec:
        if not isinstance(spec["values"], list) or not spec["values"]:
            raise ValueError("has no values: write them as a list")
        return list(spec["values"])
    kind = str(spec.get("distribution", ""))
    if is_grid:
        raise ValueError("is a range, and a grid takes values: write {values: [...]}")
    names = ("mu", "sigma") if "normal" in kind else ("min", "max")
    ends = [spec.get(name) for name in names]
    numbers = [float(end) for end in ends if isinstance(end, int | float)]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"has no {names[0]} and {names[1]}")
    if "normal" in kind:
        low, high = numbers[0] - numbers[1], numbers[0] + numbers[1]
    else:
        low, high = numbers
        if low > high:
            raise ValueError(f"has min = {ends[0]} above max = {ends[1]}")
    if "log" in kind and not kind.endswith("_values"):  # W&B takes exponents there
        low, high = math.exp(low), math.exp(high)
    if kind.startswith("q_"):
        step = float(spec.get("q", 1))
        low, high = round(low / step) * step, round(high / step) * step
    is_whole = kind in ("int_uniform", "") and all(isinstance(end, int) for end in ends)
    if is_whole:
        return [int(low), int(high)]
    return [low, low + (high - low) * 0.381966, high]


def _draws(drawn: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield each value of each parameter once, the others at their first."""
    first = {name: values[0] for name, values in drawn.items()}
    yield first
    for name, values in drawn.items():
        for value in values[1:]:
            yield {**first, name: value}


def _in_words(spec: Mapping[str, Any]) -> str:
    if "value" in spec:
        return str(spec["value"])
    if "values" in spec:
        return ", ".join(map(str, spec["values"]))
    kind = str(spec.get("distribution", "uniform"))
    low, high = ("mu", "sigma") if "normal" in kind else ("min", "max")
    return f"{kind}, {low} {spec[low]}, {high} {spec[high]}"


def _in_sweep(problem: Problem, lines: Mapping[Key, Origin], path: Path) -> Problem:
    """Say of a problem on the command line in which line of the sweep its key stands."""
    if problem.origin.file != COMMAND_LINE:
        return problem
    origin = _line(lines, ("parameters", problem.key), path)
    return Problem(problem.key, problem.why, problem.fix, origin, problem.value)


def _line(lines: Mapping[Key, Origin], key: Collection[str], path: Path) -> Origin:
    names = tuple(key)
    for length in range(len(names), 0, -1):
        if (found := lines.get(names[:length])) is not None:
            return found
    return Origin(str(path))
