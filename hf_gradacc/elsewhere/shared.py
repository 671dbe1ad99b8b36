"""What both tools write alike: chat templates, precision, adapters, fractions of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hf_gradacc.data.section import Task
from hf_gradacc.elsewhere.draft import Draft
from hf_gradacc.errors import ConfigError

__all__ = [
    "IN_TURNS",
    "Places",
    "known_optimizers",
    "note_names_of_turns",
    "put_optimizer",
    "put_preferences",
    "put_template",
    "put_warmup",
    "to_list",
]

IN_TURNS = "sets are drawn in turns, small ones again; to balance them: weight: rows of each set"
"""What several sets are here, and one pile in both other tools."""

_TEMPLATES = {
    "chatml": "chatml", "gemma": "gemma", "gemma2": "gemma", "llama3": "llama3", "phi": "phi3",
    "phi_3": "phi3", "phi3": "phi3", "mistral": "mistral", "mistral_v1": "mistral",
    "zephyr": "zephyr",
}  # fmt: skip
"""Their names of templates that ship with us too."""


class Places:
    """Where relative paths of a file lead, and how the recipe writes them.

    Args:
        file: The other tool's file.
        out: The folder that the recipe is written into.
    """

    def __init__(self, file: Path, out: Path) -> None:
        self._starts = [Path.cwd(), file.absolute().parent]
        self._out = out.absolute()

    def find(self, path: str) -> Path | None:
        """The file or folder that a path names: from the current folder, or from the file's own."""
        for start in self._starts:
            place = start / Path(path).expanduser()
            try:
                if place.exists():
                    return place
            except (OSError, ValueError):
                return None
        return None

    def written(self, path: str) -> str:
        """A path as the recipe writes it: from its own folder; one that leads nowhere as it is."""
        place = self.find(path)
        if place is None or Path(path).is_absolute():
            return path
        relative = os.path.relpath(place, self._out)
        return relative if relative.startswith(".") else f"./{relative}"


@cache
def known_optimizers() -> frozenset[str]:
    """The names that `train.optim` takes."""
    from transformers.training_args import OptimizerNames

    from hf_gradacc.arguments import OUR_OPTIMIZERS

    return frozenset([*(member.value for member in OptimizerNames), *OUR_OPTIMIZERS])


def put_optimizer(draft: Draft, value: Any, *, key: str) -> None:
    """Write an optimizer that there is here; `key` is what the file calls it."""
    if value in known_optimizers():
        draft.put("train.optim", value)
    else:
        draft.note(key, "no such optimizer; the default, adamw_torch_fused, is used")


def to_list(value: Any) -> list[Any]:
    """Read `a,b`, a list or a single value as a list.

    >>> to_list("q_proj, v_proj"), to_list(["a"]), to_list(3)
    (['q_proj', 'v_proj'], ['a'], [3])
    """
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list) else [value]


def put_template(draft: Draft, key: str, name: str) -> None:
    """Take a chat template by its name, where we have one of the same family."""
    if name in _TEMPLATES:
        draft.put("tokenizer.chat_template", _TEMPLATES[name])
    elif name not in ("tokenizer_default", "tokenizer"):
        draft.note(key, "the tokenizer's own template is used; see tokenizer.chat_template")


def put_preferences(draft: Draft, task: Task) -> None:
    """Train on pairs of answers, a chosen and a rejected one."""
    draft.put("model.task", task)
    draft.put("data.format", "preference")


def put_warmup(draft: Draft) -> bool:
    """Take a warm-up in updates or as a share of them; return whether the file has one."""
    steps, share = draft.get("warmup_steps"), draft.get("warmup_ratio")
    if steps:
        draft.put("train.warmup_steps", steps)
    elif share:
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise ConfigError(f"warmup_ratio = {share!r} is no share of a run: use 0 to below 1.")
        draft.put("train.warmup_steps", float(share))  # below 1 it is a share
    return steps is not None or share is not None


def note_names_of_turns(
    draft: Draft, key: str, names: Mapping[str, str], *, role: str, content: str
) -> None:
    """Note roles and contents of turns under names that are not read."""
    if names.get(role, "role") not in ("role", "from"):
        draft.note(key, "the role of a turn is read from `role` or `from`: rename it in the rows")
    if names.get(content, "content") not in ("content", "value"):
        draft.note(key, "a turn is read from `content` or `value`: rename it in the rows")
