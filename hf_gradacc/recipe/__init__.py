"""A recipe: one YAML file becomes a model, its data and a trainer.

Read `keys.sections` (every key), `load`, then `run`. Rooms, in the order a recipe goes through
them: `file`, `keys`, `checks`, `model`, `plan`, `quality`.
"""

import typing

from hf_gradacc._exports import load_when_asked

if typing.TYPE_CHECKING:
    from hf_gradacc.recipe.file.problems import RecipeError
    from hf_gradacc.recipe.folder import claim_folder
    from hf_gradacc.recipe.keys.sections import Recipe
    from hf_gradacc.recipe.load import load_recipe, recipe_arguments
    from hf_gradacc.recipe.model.load import apply_peft, load_model, sample_answer, save_model
    from hf_gradacc.recipe.quality.quality import add_metrics
    from hf_gradacc.recipe.quality.samples import add_samples
    from hf_gradacc.recipe.run import RecipeCallback, build_trainer, train_recipe
    from hf_gradacc.recipe.wandb import configure_wandb

__all__ = [
    "Recipe",
    "RecipeCallback",
    "RecipeError",
    "add_metrics",
    "add_samples",
    "apply_peft",
    "build_trainer",
    "claim_folder",
    "configure_wandb",
    "load_model",
    "load_recipe",
    "recipe_arguments",
    "sample_answer",
    "save_model",
    "train_recipe",
]

_MODULES = {
    "file.problems": ("RecipeError",),
    "folder": ("claim_folder",),
    "keys.sections": ("Recipe",),
    "load": ("load_recipe", "recipe_arguments"),
    "model.load": ("apply_peft", "load_model", "sample_answer", "save_model"),
    "quality.quality": ("add_metrics",),
    "quality.samples": ("add_samples",),
    "run": ("RecipeCallback", "build_trainer", "train_recipe"),
    "wandb": ("configure_wandb",),
}

if not typing.TYPE_CHECKING:  # a type checker that saw this would take any name for exported
    __getattr__, __dir__ = load_when_asked(__name__, _MODULES)
