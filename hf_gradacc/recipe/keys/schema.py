"""The JSON schema of recipes, by which editors complete and check them."""

from __future__ import annotations

from typing import Any

from hf_gradacc.recipe.keys.sections import Recipe, train_section

__all__ = ["export_schema"]


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
        "description": "Another recipe, by its path relative to this one; its values are used for "
        "keys that are missing here.",
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
