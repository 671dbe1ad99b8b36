"""A recipe in the making, and what of the other tool's file it could not hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.keys.sections import Recipe, train_section
from hf_gradacc.text import SECRET_KEY, printable

__all__ = ["Draft", "Key", "Note", "is_recipe_key", "is_secret", "show_value"]

_SECRET_NAME = re.compile(r"(^|[_.])(token|access_key)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"^(hf_|sk-|api_|wandb_v1_|ghp_)\S{12,}$|^[0-9a-f]{40}$")
_LONGEST = 90


@dataclass(frozen=True)
class Key:
    """What becomes of one key of the other tool.

    Attributes:
        target: The recipe's keys, as the table of the documentation shows them; "" for none.
        why: Without a target, what stands in its place or why nothing does; else a remark.
        changes: Leaving it out changes what is trained.
        read: Puts a value into the draft; by default it goes to `target` as it is.
    """

    target: str = ""
    why: str = ""
    changes: bool = False
    read: Callable[[Draft, Any], None] | None = None


@dataclass(frozen=True)
class Note:
    """What a user has to know of a key.

    Attributes:
        key: As the file writes it.
        value: Its value, secrets left out.
        text: What becomes of it.
        changes: What is trained is not what the file said.
        carried: It has a counterpart, of which the note says how far it goes.
    """

    key: str
    value: str
    text: str
    changes: bool
    carried: bool = False


@dataclass
class Draft:
    """Values of a recipe, by section, and notes.

    Attributes:
        written: The other tool's values.
        world_size: Processes that the file was used with; None if nobody said.
        values: The recipe's.
        notes: What the recipe does not hold, or not as it was.
    """

    written: Mapping[str, Any]
    world_size: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the other tool; null is the default."""
        value = self.written.get(name)
        return default if value is None else value

    def number(self, name: str, default: float) -> Any:
        """A number of the other tool.

        Raises:
            ConfigError: If something else is written there.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} = {value!r} is not a number: correct it first.")
        return value

    def put(self, target: str, value: Any) -> None:
        """Set a key of the recipe, such as `train.learning_rate`."""
        *sections, name = target.split(".")
        place = self.values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value

    def note(self, key: str, text: str, *, changes: bool = True, carried: bool = False) -> None:
        """Note what becomes of a key; the value is looked up, and hidden if it is a secret."""
        value: Any = self.written
        for part in re.findall(r"[^.\[\]]+", key):
            step: Any = int(part) if isinstance(value, list) else part
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                value = None
                break
        if not any(note.key == key for note in self.notes):
            shown = show_value(key, value)
            self.notes.append(Note(key, shown, text, changes, carried))

    def apply(self, table: Mapping[str, Key], *, left: str) -> None:
        """Take every key of the file in the order of its lines.

        Args:
            table: What becomes of each.
            left: What is said of one that is not in the table.
        """
        for name, value in self.written.items():
            if value is None:
                continue
            key = table.get(name)
            if is_secret(name, value):
                self.note(name, "a secret is not copied: log in, or set it in the environment",
                          changes=False)  # fmt: skip
            elif key is None:
                self.note(name, left)
            elif key.read is not None:
                key.read(self, value)
            elif key.target and not is_recipe_key(key.target):
                self.note(name, f"recipes of this release have no {key.target}")
            elif key.target:
                self.put(key.target, value)
                if key.why:
                    self.note(name, key.why, changes=key.changes, carried=True)
            elif value is not False and value != "" and value != []:
                self.note(name, key.why, changes=key.changes)


def is_recipe_key(target: str) -> bool:
    """Whether a recipe has a key, such as `peft.r` or `train.learning_rate`."""
    first, name, *_ = [*target.split("."), ""]
    field = Recipe.model_fields.get(first)
    if first == "train":
        return name in train_section().model_fields
    return name in getattr(field and field.annotation, "model_fields", {})


def is_secret(name: str, value: Any) -> bool:
    """Whether a value is, or may be, a secret."""
    if isinstance(value, dict | list | bool) or value is None:
        return False
    named = SECRET_KEY.search(name) or _SECRET_NAME.search(name)
    is_mark = name in ("pad_token", "eos_token", "bos_token", "unk_token", "image_token")
    return bool((named and not is_mark) or _SECRET_VALUE.match(str(value)))


def show_value(name: str, value: Any) -> str:
    """Write a value on one line, cut where it is long and without secrets."""
    text = printable(json.dumps(_without_secrets(name, value), ensure_ascii=False, default=str))
    text = text.replace("\n", " ")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _without_secrets(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _without_secrets(str(inner), held) for inner, held in value.items()}
    if isinstance(value, list):
        return [_without_secrets(name, held) for held in value]
    return "(not copied)" if is_secret(name, value) else value
