"""A recipe as it was run, beside the model it made; and the JSON schema editors check by."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from hf_gradacc.recipe_sections import Recipe
from hf_gradacc.recipe_source import SECRET_KEY
from hf_gradacc.recipe_train import train_section
from hf_gradacc.tracking_state import remember

__all__ = ["RecipeCallback", "export_schema", "resolved_recipe", "save_recipe"]

FILE_NAME = "recipe.yaml"


def resolved_recipe(recipe: Recipe) -> dict[str, Any]:
    """Every key with its value, paths absolute and interpolations filled in; without secrets."""
    values: dict[str, Any] = _without_secrets(recipe.model_dump())
    return values


def save_recipe(recipe: Recipe, folder: str | Path) -> Path:
    """Write the resolved recipe. Running it again repeats the run.

    Args:
        recipe: The recipe that was run.
        folder: Where the model is saved; made if need be.

    Returns:
        The file written.
    """
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "peft")
    )
    header = f"# The recipe of this run, completed. Made with {versions}.\n"
    # `$` would be read as an interpolation when the file is loaded again.
    text = yaml.safe_dump(_escape(resolved_recipe(recipe)), sort_keys=False, allow_unicode=True)
    path.write_text(header + text, encoding="utf-8")
    return path


class RecipeCallback(TrainerCallback):
    """Saves the recipe when training begins, and files it with the W&B run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it on the first rank only."""
        if not state.is_world_process_zero:
            return
        remember(state, saves_model=True)  # whoever runs a recipe saves the model at its end
        save_recipe(self.recipe, args.output_dir)
        if "wandb" in (args.report_to or []):
            import wandb

            if wandb.run is not None:
                config = {"recipe": resolved_recipe(self.recipe)}
                wandb.run.config.update(config, allow_val_change=True)


def export_schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors that complete and check YAML.

    The first line `# yaml-language-server: $schema=recipe.schema.json` makes them use it.
    """
    schema = Recipe.model_json_schema()
    train = train_section().model_json_schema()
    schema["$defs"] |= train.pop("$defs", {})
    schema["properties"]["train"] = train
    schema["properties"]["base"] = {
        "type": "string",
        "description": "Another recipe, relative to this one, whose values hold where this one "
        "says nothing.",
    }
    # With a base, what is missing here may stand there.
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "hf_gradacc recipe"
    _accept_short_forms(schema)
    for section in (train, *schema["$defs"].values(), schema):
        for field in section.get("properties", {}).values():
            _accept_null_and_references(field)
    return schema


def _accept_null_and_references(field: dict[str, Any]) -> None:
    """Any key takes `null`, which is its default, and `${section.key}`."""
    about: dict[str, Any] = {
        name: field.pop(name) for name in ("title", "description", "default") if name in field
    }
    types = field.pop("anyOf", None) or [dict(field)]
    field.clear()
    known = [*types, {"type": "string", "pattern": r"\$\{"}]
    field.update(about, anyOf=known if {"type": "null"} in known else [*known, {"type": "null"}])


def _accept_short_forms(schema: dict[str, Any]) -> None:
    """Describe what validators take beside the full form: a path for a source, a word for peft."""
    source = {"$ref": "#/$defs/SourceSection"}
    one = {"anyOf": [{"type": "string"}, source]}
    for name in ("train", "eval"):
        field = schema["$defs"]["DataSection"]["properties"][name]
        field.pop("type", None)
        field.pop("items", None)
        several = {"type": "array", "items": one}
        field["anyOf"] = [*one["anyOf"], several, {"type": "null"}]
    methods = schema["$defs"]["PeftSection"]["properties"]["method"]["enum"]
    schema["properties"]["peft"] = {
        "anyOf": [{"$ref": "#/$defs/PeftSection"}, {"enum": methods}],
        "description": "Train a small part of the model; a method's name, or a section.",
    }


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_secrets(inner)
            for name, inner in value.items()
            if not SECRET_KEY.search(str(name))
        }
    return [_without_secrets(inner) for inner in value] if isinstance(value, list) else value


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _escape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
