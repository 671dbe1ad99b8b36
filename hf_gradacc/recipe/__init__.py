"""A recipe: one YAML file becomes a model, its data and a trainer.

Read `sections` (every key), `load`, then `run`.
"""

import typing

from hf_gradacc._exports import load_when_asked

if typing.TYPE_CHECKING:
    from hf_gradacc.recipe.folder import claim_folder
    from hf_gradacc.recipe.load import load_recipe, recipe_arguments
    from hf_gradacc.recipe.model import apply_peft, load_model, sample_answer, save_model
    from hf_gradacc.recipe.problems import RecipeError
    from hf_gradacc.recipe.quality import add_metrics
    from hf_gradacc.recipe.run import RecipeCallback, build_trainer, train_recipe
    from hf_gradacc.recipe.samples import add_samples
    from hf_gradacc.recipe.sections import Recipe
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
    "folder": ("claim_folder",),
    "load": ("load_recipe", "recipe_arguments"),
    "model": ("apply_peft", "load_model", "sample_answer", "save_model"),
    "problems": ("RecipeError",),
    "quality": ("add_metrics",),
    "run": ("RecipeCallback", "build_trainer", "train_recipe"),
    "samples": ("add_samples",),
    "sections": ("Recipe",),
    "wandb": ("configure_wandb",),
}

if not typing.TYPE_CHECKING:  # a type checker that saw this would take any name for exported
    __getattr__, __dir__ = load_when_asked(__name__, _MODULES)
