"""The `train` section: every field of GradAccArguments, checked by the type it declares."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

__all__ = ["RESERVED", "arguments_class", "train_section"]

RESERVED = {
    "output_dir": "set output.dir",
    "run_name": "set wandb.name",
    "project": "set wandb.project",
    "wandb_per_rank": "set wandb.per_rank",
    "wandb_report": "set wandb.report",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN; a recipe holds no secret",
    "local_rank": "leave it to the launcher",
}
"""Fields that another section owns, and what to write instead."""


def arguments_class() -> type[Any]:
    """GradAccArguments, imported late because torch and transformers take seconds to load."""
    from hf_gradacc.arguments import GradAccArguments

    return GradAccArguments


@cache
def train_section() -> type[BaseModel]:
    """A pydantic model with a field for each option; only those set are passed on."""
    arguments = arguments_class()
    hints = typing.get_type_hints(arguments)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        # Declared as text for the command line's sake; what it wants is a boolean.
        plain = bool | str if field.name == "fsdp" else _plain(hints[field.name])
        if field.init and field.name not in RESERVED and plain is not None:
            described = Field(default=None, description=field.metadata.get("help"))
            fields[field.name] = (plain | None, described)
    config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    model: type[BaseModel] = create_model("TrainSection", __config__=config, **fields)
    model.__doc__ = "Any field of GradAccArguments, so any field of transformers.TrainingArguments."
    return model


def _plain(hint: Any) -> Any:
    """A hint as YAML can express it: an enum by its values; None for what needs Python objects."""
    if _is_enum(hint):
        words = tuple(str(member.value) for member in hint)
        return Annotated[Literal[words], BeforeValidator(_no)] if "no" in words else Literal[words]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        # `SchedulerType | str` accepts any text by its type, but only a few words by its code.
        enums = [member for member in members if _is_enum(member)]
        plain = [_plain(member) for member in members if not (enums and member is str)]
        known = tuple(member for member in plain if member is not None)
        return typing.Union[known] if known else None  # noqa: UP007 - known at run time only
    if isinstance(hint, type) and hint.__module__ != "builtins":
        return None
    return hint


def _no(value: Any) -> Any:
    """YAML reads an unquoted `no` as false."""
    return "no" if value is False else value


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)
