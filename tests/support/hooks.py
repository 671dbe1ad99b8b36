"""Hooks that tests watch a model with, and that must not be taken for a user's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["of_no_user"]


def of_no_user(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Let a hook count as torch's own: what looks into layers would rule out trees in them."""

    @functools.wraps(hook)
    def called(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    called.__module__ = "torch"
    return called
