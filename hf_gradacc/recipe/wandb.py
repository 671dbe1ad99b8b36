"""A recipe's `wandb` section: whether W&B is on, what it is told, and what the environment says.

Variables of the environment win over the section: whoever starts a run knows more than its file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from hf_gradacc.recipe.keys.sections import Recipe, WandbSection

__all__ = ["configure_wandb", "settle_reporters", "settle_tracking", "tracking_remarks"]

_VARIABLES = {
    "project": "WANDB_PROJECT",
    "name": "WANDB_NAME",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
    "mode": "WANDB_MODE",
}
"""The keys of the section that W&B has a variable for."""

_ours: dict[str, str] = {}
"""What the last recipe of this process has set, which the next one's section replaces."""


def settle_reporters(recipe: Recipe, written: Mapping[str, Any]) -> None:
    """Let a `wandb` section turn W&B on, unless `train.report_to` says who is reported to.

    The result is written into the recipe, so that a saved one means the same again.

    Args:
        recipe: The recipe; changed in place.
        written: Its values as they stand in its files and overrides.
    """
    if recipe.train.get("report_to") is None:
        recipe.train["report_to"] = "wandb" if isinstance(written.get("wandb"), dict) else "none"


def configure_wandb(recipe: Recipe) -> None:
    """Pass the recipe's W&B settings to W&B; environment variables win.

    Call it before the trainer is made.
    """
    wishes = {name: _as_text(getattr(recipe.wandb, key)) for key, name in _VARIABLES.items()}
    if recipe.samples is not None and not recipe.wandb.upload_text:
        wishes["WANDB_CONSOLE"] = "off"  # it would upload what is printed, samples included
    before = dict(_ours)
    for name, own in before.items():
        if os.environ.get(name) == own:
            del os.environ[name]
    _ours.clear()
    for name, value in wishes.items():
        if value and name != "WANDB_NAME" and name not in os.environ:
            os.environ[name] = _ours[name] = value
    wandb = sys.modules.get("wandb")
    if before not in ({}, _ours) and wandb is not None and wandb.run is None:
        wandb.teardown()  # it reads the environment once, and would go on with the recipe before


def settle_tracking(arguments: Any) -> None:
    """Let `WANDB_DISABLED` and `WANDB_NAME` win over a recipe's training arguments.

    Args:
        arguments: The `GradAccArguments`; changed in place.
    """
    if "wandb" not in arguments.report_to:
        return
    if _is_disabled():
        arguments.report_to = [name for name in arguments.report_to if name != "wandb"]
    else:
        arguments.run_name = os.environ.get("WANDB_NAME") or arguments.run_name


def tracking_remarks(recipe: Recipe, arguments: Any) -> Iterator[str]:
    """Say which keys of the section have no effect, and why.

    Args:
        recipe: The recipe.
        arguments: The training arguments made from it.
    """
    section, default = recipe.wandb, WandbSection()
    chosen = [key for key in _VARIABLES if getattr(section, key) != getattr(default, key)]
    chosen += [key for key in ("per_rank", "upload_text") if getattr(section, key)]
    if "wandb" not in (arguments.report_to or []):
        wanted = "wandb" in _listed(recipe.train.get("report_to"))
        idle = [f"wandb.{key}" for key in chosen if key != "name"]  # which is the run's own
        why = ""
        if wanted and _is_disabled():
            why = "WANDB_DISABLED is set"
        elif idle:
            why = f"report_to = {arguments.report_to or 'none'!r} leaves it out"
        if why:
            rest = f"; {', '.join(idle)} would take effect with it" if idle else ""
            yield f"W&B: off, since {why}{rest}."
        return
    for key, name in _VARIABLES.items():
        value, wins = _as_text(getattr(section, key)), os.environ.get(name)
        if wins and key in chosen and value != wins:
            yield f"W&B: {name} = {wins!r} wins over wandb.{key} = {value!r}."


def _is_disabled() -> bool:
    """Whether `WANDB_DISABLED` is set, which W&B and transformers no longer read."""
    return os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_text(value: Any) -> str | None:
    return ",".join(value) if isinstance(value, list) else value
