"""Hooks that somebody has put on a model, who may look at what its layers compute.

Cheaper ways to a loss are tried on a model as it stands. That a hook only looks, the loss does not
tell: on the LM head it would be handed hidden states in place of logits, and on a layer trees in
place of rows. Nor does it tell what a hook makes of gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

__all__ = ["HOOKS", "foreign_hooks", "gradient_hook_inside", "hook_around", "hook_inside"]

_OF_GRADIENTS = ("_backward_pre_hooks", "_backward_hooks")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", *_OF_GRADIENTS)
"""Attributes of a module with the hooks that a call of it runs."""

_LIBRARIES = {"accelerate", "deepspeed", "hf_gradacc", "peft", "torch", "transformers", "wandb"}
"""Whose hooks do not look at what layers compute, or do so in a way that is known here."""


def foreign_hooks(module: nn.Module, kinds: Sequence[str] = HOOKS) -> Iterator[str]:
    """Name the hooks of somebody's own that a call of a module runs."""
    attributes = vars(module)
    for kind in kinds:
        for hook in attributes.get(kind, {}).values():
            while isinstance(hook, functools.partial):
                hook = hook.func
            home = str(getattr(hook, "__module__", "") or "")
            if home.partition(".")[0] not in _LIBRARIES:
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                yield f"{name} on {type(module).__name__}"


def hook_inside(bodies: Iterable[nn.Module]) -> str:
    """Name a hook of somebody's own that sees what layers compute; empty if there is none.

    In front of a whole body there are rows, and the gradients behind it are those of rows again.

    Args:
        bodies: All layers of a model, without its head.
    """
    names = (
        name
        for body in bodies
        for part in body.modules()
        for name in foreign_hooks(part, ["_forward_hooks"] if part is body else HOOKS)
    )
    return next(names, "")


def gradient_hook_inside(bodies: Iterable[nn.Module]) -> str:
    """Name one that is given gradients inside of a body; empty if there is none."""
    parts = (part for body in bodies for part in body.modules() if part is not body)
    return next((name for part in parts for name in foreign_hooks(part, _OF_GRADIENTS)), "")


def hook_around(model: nn.Module, head: nn.Module | None) -> str:
    """Name a hook of somebody's own that sees logits; empty if there is none.

    Args:
        model: The model; inside of it is the one that calls its head.
        head: Its LM head.
    """
    for module in model.modules():
        for name in foreign_hooks(module):
            if module is head or any(part is head for part in module.modules()):
                return name
    return ""
