"""Hold the values of a recipe against its sections, and word every disagreement."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hf_gradacc.recipe_report import Key, Problem, dotted, nearest
from hf_gradacc.recipe_sections import Recipe
from hf_gradacc.recipe_source import SECRET_KEY, RecipeSource
from hf_gradacc.recipe_train import RESERVED, train_section

__all__ = ["check_section"]


def check_section(
    model: type[BaseModel], values: dict[str, Any], prefix: Key, source: RecipeSource
) -> list[Problem]:
    """Find every way in which values do not fit a section.

    Args:
        model: The section's class.
        values: What the recipe says.
        prefix: Where the section stands in the recipe.
        source: Knows the line of each value.
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        grouped: dict[Key, list[ErrorDetails]] = {}
        for details in error.errors(include_url=False):
            grouped.setdefault(_existing(details["loc"], values), []).append(details)
        misspelt = {
            guess
            for key, details in grouped.items()
            if details[0]["type"] == "extra_forbidden" and (guess := _sibling(model, key))
        }
        return [
            _problem(model, key, details, prefix, source)
            for key, details in grouped.items()
            # `trian: ...` is one mistake, not a misspelt key and a missing one.
            if not (details[0]["type"] == "missing" and key in misspelt)
        ]
    return []


def _problem(
    model: type[BaseModel], key: Key, details: list[ErrorDetails], prefix: Key, source: RecipeSource
) -> Problem:
    where, full, kind = source.origin((*prefix, *key)), dotted((*prefix, *key)), details[0]["type"]
    # A secret in the wrong place is not repeated on a screen or in a log.
    hidden = kind == "missing" or any(SECRET_KEY.search(str(part)) for part in key)
    value = ... if hidden else details[0]["input"]
    if kind == "missing":
        return Problem(full, "is missing", f"add `{key[-1]}:`", where)
    if kind == "extra_forbidden":
        name = str(key[-1])
        if prefix == ("train",) and name in RESERVED:
            return Problem(full, "belongs elsewhere", RESERVED[name], where, value)
        guess = _sibling(model, key)
        if guess is not None:
            return Problem(
                full, "no such key", f"did you mean {dotted((*prefix, *guess))}?", where, value
            )
        elsewhere = _elsewhere(name)
        fix = f"did you mean {elsewhere}?" if elsewhere else _known(model, key)
        return Problem(full, "no such key", fix, where, value)
    if kind == "value_error":
        why = details[0]["msg"].removeprefix("Value error, ")
        return Problem(full, "does not hold together", why, where)
    reasons = dict.fromkeys(_sentence(one) for one in details)
    return Problem(full, "has a wrong value", " or ".join(reasons), where, value)


def _sentence(details: ErrorDetails) -> str:
    """Pydantic's message, and the nearest word where the value should be one of a few."""
    message = details["msg"][0].lower() + details["msg"][1:]
    if details["type"] == "literal_error" and isinstance(details["input"], str):
        words = details["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        guess = nearest(details["input"], words)
        return f"{message}; did you mean {guess}?" if guess else message
    return message


def _existing(location: Sequence[str | int], values: Any) -> Key:
    """The part of pydantic's location that is a key of the recipe; the rest names union members."""
    key: list[str | int] = []
    part: Any
    for part in location:
        is_index = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if is_index or (isinstance(values, dict) and part in values):
            values = values[part]
        elif isinstance(values, dict) and part == 0:
            continue  # a source written without its list
        elif isinstance(values, dict) and part == location[-1]:
            return (*key, part)  # a missing key
        else:
            break
        key.append(part)
    return tuple(key)


def _fields(model: type[BaseModel], key: Sequence[str | int]) -> type[BaseModel] | None:
    """The section class at `key`, through lists and optional types."""
    current: Any = model
    for part in key:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None
        current = _section_in(field.annotation)
        if current is None:
            return None
    return current


def _section_in(hint: Any) -> type[BaseModel] | None:
    # `list[int]` is an instance of type, too, and no argument for issubclass.
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return hint if issubclass(hint, BaseModel) else None
    found = (_section_in(argument) for argument in typing.get_args(hint))
    return next((section for section in found if section is not None), None)


def _sibling(model: type[BaseModel], key: Key) -> Key | None:
    section = _fields(model, key[:-1])
    guess = nearest(str(key[-1]), section.model_fields) if section else None
    return None if guess is None else (*key[:-1], guess)


def _known(model: type[BaseModel], key: Key) -> str:
    section = _fields(model, key[:-1])
    names = list(section.model_fields) if section else []
    return f"known keys: {', '.join(names)}" if 0 < len(names) < 30 else "remove it"


def _elsewhere(name: str) -> str | None:
    """A key of that very name in another section."""
    for section, field in Recipe.model_fields.items():
        inner = train_section() if section == "train" else _section_in(field.annotation)
        if inner is not None and name in inner.model_fields:
            return f"{section}.{name}"
    return None
