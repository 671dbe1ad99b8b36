"""Hostile recipes and damaged files: none may end in a traceback, hang, or tell a secret.

    PYTHONPATH=tests python -m benchmarks.fuzz [recipes=1000] [plausible=1000] [data=300] [runs=300]
        [first=0]

Hostile recipes are loaded. Plausible ones, drawn from all keys, are resolved to all that reaches a
run, and a key without which the same reaches it counts as failed. Data files are prepared.

Every case is drawn from its number, which an error names.
"""

from __future__ import annotations

import collections
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import datasets
from support import every_key, fuzzing, plausible

from hf_gradacc import GradAccError
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.run import save_recipe
from hf_gradacc.tracking.report import build_report

RUN = Path(__file__).parents[1] / "docs/example_report/batch-64"


def fuzz_recipes(first: int, count: int, folder: Path) -> collections.Counter[str]:
    """Load recipes, and count how they ended."""

    def load(file: Path, overrides: list[str]) -> str:
        recipe = load_recipe(file, overrides=overrides)
        return save_recipe(recipe, folder / "saved").read_text("utf-8")

    ends: collections.Counter[str] = collections.Counter()
    for seed in range(first, first + count):
        try:
            ends[fuzzing.try_recipe(seed, folder, load)] += 1
        except Exception as error:
            ends[f"FAILED {type(error).__name__}"] += 1
            print(f"recipe {seed}:\n{''.join(traceback.format_exception(error)[-4:])}")
    return ends


def fuzz_each(
    try_one: Callable[[int, Path], str], first: int, count: int, folder: Path
) -> collections.Counter[str]:
    """Try numbered cases, and count how they ended."""
    ends: collections.Counter[str] = collections.Counter()
    for seed in range(first, first + count):
        try:
            end = try_one(seed, folder)
        except Exception as error:
            end = f"FAILED {type(error).__name__}"
            print(f"{try_one.__name__} {seed}:\n{''.join(traceback.format_exception(error)[-4:])}")
        if end.startswith("IDLE"):
            print(f"{try_one.__name__} {seed}: {end}")
            end = f"FAILED {end}"
        ends[end] += 1
    return ends


def fuzz_runs(first: int, count: int, folder: Path) -> collections.Counter[str]:
    """Write reports of damaged runs, and count how they ended."""
    ends: collections.Counter[str] = collections.Counter()
    for seed in range(first, first + count):
        run = folder / f"run-{seed}"
        fuzzing.spoil_run(seed, RUN, run)
        try:
            with fuzzing.alarm(5.0):
                build_report([run], html=run / "report.html")
            ends["written"] += 1
        except GradAccError as error:
            ends["refused" if "\x1b" not in str(error) else "FAILED escape"] += 1
        except Exception as error:
            ends[f"FAILED {type(error).__name__}"] += 1
            print(f"run {seed}:\n{''.join(traceback.format_exception(error)[-4:])}")
    return ends


def main() -> None:
    """Run all kinds, and exit with 1 if a case failed."""
    options = {"recipes": 1000, "plausible": 1000, "data": 300, "runs": 300, "first": 0}
    options |= {name: int(value) for name, value in (a.split("=") for a in sys.argv[1:])}
    os.environ |= dict.fromkeys(fuzzing.VARIABLES, fuzzing.SECRET)
    os.environ |= {"HF_HUB_OFFLINE": "1", "USER": fuzzing.SECRET}
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        recipes = fuzz_recipes(options["first"], options["recipes"], Path(name))
        runs = fuzz_runs(options["first"], options["runs"], Path(name))
        every_key.make_folder(Path(name))
        datasets.config.HF_DATASETS_CACHE = Path(name) / "cache"
        datasets.disable_progress_bars()
        first = options["first"]
        likely = fuzz_each(plausible.try_plausible, first, options["plausible"], Path(name))
        data = fuzz_each(plausible.try_data, first, options["data"], Path(name))
    print(f"recipes: {dict(recipes)}\nrun files: {dict(runs)}")
    print(f"plausible recipes: {dict(likely)}\ndata files: {dict(data)}")
    sys.exit(any("FAILED" in end for end in (*recipes, *runs, *likely, *data)))


if __name__ == "__main__":
    main()
