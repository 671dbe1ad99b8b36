"""Decide whether models compute rows that begin alike as trees, and what they keep of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hf_gradacc.errors import ConfigError
from hf_gradacc.loss.foreign_hooks import gradient_hook_inside, hook_inside
from hf_gradacc.loss.shortcuts.choose import Setting, Shortcuts
from hf_gradacc.loss.shortcuts.tree_trial import Sharing, TreeTrial, describe_failure
from hf_gradacc.updates.targets import count_targets

__all__ = [
    "choose_sharing",
    "drops_out",
    "why_not_by_options",
    "why_not_kept_by_options",
    "why_not_shared",
    "with_sharing",
]


def choose_sharing(
    models: Sequence[Any],
    inputs: Mapping[str, Any],
    loss_of: Callable[[Mapping[str, Any]], float],
    *,
    dtype: torch.dtype,
    why_not: str = "",
    why_not_kept: str = "",
    asked: bool = False,
    insists: bool = True,
    gradients_of: Callable[[Mapping[str, Any]], list[Tensor]] = lambda inputs: [],
) -> Sharing:
    """Try to compute rows as trees, unless something is known to speak against it.

    Args:
        models: The model, and others whose answers enter the loss (a reference model).
        inputs: A few rows, collated together, on the CPU.
        loss_of: Returns the loss of collated inputs, without gradients.
        dtype: The coarsest dtype of a forward.
        why_not: What speaks against it, in plain words; empty for nothing.
        why_not_kept: What speaks against keeping beginnings alone, likewise.
        asked: It was asked for by name.
        insists: It is an error if it was and would not give the same gradient.
        gradients_of: Returns the gradient of their loss by parameters; nothing if there is none.

    Raises:
        ConfigError: If it was asked for by name and would not give the same gradient.
    """
    found = Sharing(refused=why_not)
    if not why_not:
        try:
            trial = TreeTrial(models, inputs, loss_of, dtype, why_not_kept, gradients_of)
            found = trial.run()
        except Exception as error:  # an optional layout must not end a run, whatever it trips over
            found = Sharing(refused=describe_failure(error))
    if hook := gradient_hook_inside(found.bodies):
        why = f"a hook ({hook}) would be given gradients of several rows at once"
        found = Sharing(refused=why)
    elif hook := hook_inside(found.bodies):
        why = f"a hook ({hook}) would see trees in place of rows"
        found = replace(found, not_kept=why) if asked else Sharing(refused=why)
    if found.refused and asked and insists:
        raise ConfigError(
            f"layout = 'shared_prefix' would not give the same gradient: {found.refused}.\n"
            f"  Set layout = 'auto' or 'padded'."
        )
    return found


def drops_out(model: nn.Module) -> bool:
    """Return whether a model drops anything out while it trains, or draws other random numbers.

    Many drop by a number that a module keeps (``activation_dropout``, ``layerdrop``) or reads off
    its configuration, without a module for it; routers move what they see by ``jitter_noise``.
    """
    return any(map(_draws, model.modules()))


def _draws(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    forward = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    of_config = vars(module).get("config")
    read = () if forward is None else forward.co_names
    numbers = {name: getattr(of_config, name, None) for name in read} | vars(module)
    return any(
        isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)
        for name, value in numbers.items()
    )


def with_sharing(
    shortcuts: Shortcuts,
    models: Sequence[Any],
    inputs: Mapping[str, Any],
    loss_of: Callable[[Mapping[str, Any], int | None], float],
    *,
    setting: Setting,
    dtype: torch.dtype,
    gradients_of: Callable[[Mapping[str, Any], int | None], list[Tensor]],
) -> Shortcuts:
    """Let rows that begin alike be computed as trees, where that is asked for or pays.

    Args:
        shortcuts: Those chosen before.
        models: See `choose_sharing`, the trainer's own first.
        inputs: Likewise.
        loss_of: As for `choose_shortcuts`.
        setting: What else decides.
        dtype: The coarsest dtype of a forward.
        gradients_of: As for `choose_sharing`; the second argument is what to pass as the count.
    """
    asked = setting.args.layout == "shared_prefix"
    why = why_not_shared(models[0], setting, asked=asked)
    facts = setting.facts
    count = count_targets(inputs, facts.rule) if facts.wants_own_count else None
    found = choose_sharing(
        models,
        inputs,
        lambda rows: loss_of(rows, count),
        dtype=dtype,
        why_not=why,
        why_not_kept=_why_not_kept(setting),
        asked=asked,
        insists=setting.insists,
        gradients_of=lambda rows: gradients_of(rows, count),
    )
    refused = {"shared_prefix": found.refused, "kept_beginnings": found.not_kept}
    return replace(
        shortcuts,
        bodies=found.bodies,
        trees_by_rows=found.by_rows,
        keeps_beginnings=not found.not_kept,
        refused=shortcuts.refused + tuple((name, why) for name, why in refused.items() if why),
    )


def _why_not_kept(setting: Setting) -> str:
    """Return what is known to speak against keeping beginnings, empty for nothing."""
    if not setting.keeps_beginnings:
        return "weights are split between ranks"
    if setting.facts.coupling is not None:
        return "its loss takes two passes over an update"
    return why_not_kept_by_options(setting.args)


def why_not_kept_by_options(args: Any) -> str:
    """Return what a run's options alone speak against keeping beginnings, empty for nothing."""
    again = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {})
    if again and again.get("use_reentrant"):
        return "gradient checkpointing with use_reentrant = True computes layers without a graph"
    if getattr(args, "activation_offloading", False):  # TRL's
        return "activation_offloading expects each backward to read all that was saved before it"
    return ""


def why_not_shared(model: nn.Module, setting: Setting, *, asked: bool) -> str:
    """Return what is known to speak against trees before they are tried, empty for nothing."""
    if setting.splits_rows:
        return "several ranks compute each row together (cp_size, sp_size)"
    if setting.facts.pad_to_one_width:
        return "padding changes the loss of this model"
    return why_not_by_options(setting.args, drops=not asked and drops_out(model))


def why_not_by_options(args: Any, *, drops: bool) -> str:
    """Return what a run's options alone speak against trees, empty for nothing.

    Args:
        args: The options.
        drops: Whether dropout counts, which it does unless sharing is asked for by name.
    """
    if args.neftune_noise_alpha is not None:
        return "neftune_noise_alpha draws noise for each row, and a common prefix is one"
    if args.torch_compile:
        return "torch.compile would compile anew for each shape of a tree"
    if drops:
        return (
            "dropout would drop the same of a common prefix in all rows that hold it; "
            "layout = 'shared_prefix' shares them all the same"
        )
    return ""
