"""Evaluate the models of recipes on some ranks, for `tests.recipe.test_quality`."""

from __future__ import annotations

import datasets

from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.run import build_trainer

__all__ = ["evaluate_recipes"]


def evaluate_recipes(runs: list[tuple[str, list[str]]], cache: str) -> list[dict[str, float]]:
    """Build the trainers of recipes, and return what the evaluation of each measures.

    Args:
        runs: Path and overrides of each recipe.
        cache: Where prepared rows lie.
    """
    datasets.config.HF_DATASETS_CACHE = cache
    measured = []
    for path, overrides in runs:
        trainer, _ = build_trainer(load_recipe(path, overrides=overrides))
        found = trainer.evaluate()
        measured.append({k: v for k, v in found.items() if not k.endswith(("time", "second"))})
    return measured
