"""What a run says of rows that are drawn together, and what it refuses."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers.utils import logging

from hf_gradacc.errors import ConfigError
from hf_gradacc.loss.shortcuts.choose import Shortcuts
from hf_gradacc.safety.waiting import telling_for
from hf_gradacc.updates.trees.families import Families

__all__ = ["refuse_own_loader", "tell_families", "tell_if_nothing_is_shared", "telling_of_search"]

logger = logging.get_logger(__name__)


def telling_of_search(trainer: Any) -> contextlib.AbstractContextManager[None]:
    """Say that families are looked for if that takes over two seconds."""
    if not trainer.args.group_by_prefix:
        return contextlib.nullcontext()
    return telling_for(trainer, "looking for rows that begin alike (group_by_prefix)")


def tell_families(families: Families | None) -> None:
    """Say that there are none, if rows were to be drawn together."""
    if families is not None and not families:
        logger.warning_once(
            "group_by_prefix = True finds no rows to draw together: none have an eighth of their "
            "tokens in common beyond what rows share that meet by chance. They are shuffled one by "
            "one."
        )


def tell_if_nothing_is_shared(
    args: Any, families: Families | None, shortcuts: Shortcuts | None
) -> None:
    """Say that rows are drawn together for nothing, if the model computes each of them whole."""
    if families and (shortcuts is None or not shortcuts.bodies):
        why = shortcuts.reason("shared_prefix") if shortcuts is not None else ""
        why = why or "the model could not be asked"
        logger.warning_once(
            f"group_by_prefix = True draws rows together that begin alike, and each of them is "
            f"computed whole (layout = {args.layout!r}: {why}). The rows of an update resemble "
            f"each other for nothing: leave it out."
        )


def refuse_own_loader(trainer: Any) -> None:
    """Refuse to draw rows together where a subclass loads them.

    Raises:
        ConfigError: If they were to be.
    """
    if trainer.args.group_by_prefix:
        raise ConfigError(
            f"group_by_prefix = True: {type(trainer).__name__}.get_train_dataloader says which "
            f"rows meet. Leave one of the two out."
        )
