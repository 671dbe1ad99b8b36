"""What a run is, in a dictionary: batch, plan, versions, hardware, model, parity check."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from hf_gradacc.tracking.mfu import count_parameters
from hf_gradacc.tracking.parity_file import read_parity
from hf_gradacc.updates.batches import updates_of

__all__ = ["describe_batch", "describe_hardware", "describe_model", "describe_run", "versions"]

BATCH_OPTIONS = (
    "effective_batch_size",
    "tokens_per_update",
    "max_tokens_per_micro_batch",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "incomplete_update",
    "group_by_prefix",
    "layout",
    "target_only_logits",
    "accumulate_grads_in_fp32",
    "low_precision_updates",
    "on_non_finite",
    "noise_scale_every",
)
"""Options that say how an update is made; those a version of the package lacks are left out."""


PACKAGES = ("hf_gradacc", "torch", "transformers", "accelerate", "datasets", "peft", "trl", "wandb")


def describe_run(
    args: Any, *, state: Any = None, model: Any = None, train_dataloader: Any = None
) -> dict[str, Any]:
    """Gather all facts of a run.

    Args:
        args: A `TrainingArguments`, with `GradAccOptions` or without.
        state: The `TrainerState`, for the number of updates planned.
        model: The model, wrapped or not.
        train_dataloader: What the stock Trainer hands to callbacks.
    """
    facts: dict[str, Any] = {
        "batch": describe_batch(args, train_dataloader),
        "versions": versions(),
        "hardware": describe_hardware(args),
        "parity": read_parity(args.output_dir, model=model),
    }
    if state is not None:
        facts["updates"] = state.max_steps
    if model is not None:
        facts["model"] = describe_model(model)
    return facts


def describe_batch(args: Any, train_dataloader: Any = None) -> dict[str, Any]:
    """Return what an update is: as requested, and as computed for this run.

    Returns:
        "requested": the options as the user wrote them; "effective_batch_size" or
        "tokens_per_update": the one that decides, over all ranks; "world_size"; and, where the
        loader is ours, "max_sequences_per_micro_batch", "max_tokens_per_micro_batch", and
        "shares_prefixes" if rows that begin alike are computed as trees in some updates;
        "families" and "rows_in_families" if those are drawn together.
    """
    requested = {name: getattr(args, name) for name in BATCH_OPTIONS if hasattr(args, name)}
    facts: dict[str, Any] = {"requested": requested, "world_size": getattr(args, "world_size", 1)}
    train_dataloader = updates_of(train_dataloader)
    sampler = getattr(train_dataloader, "batch_sampler", None)
    if requested.get("tokens_per_update"):
        facts["tokens_per_update"] = requested["tokens_per_update"]
    elif getattr(sampler, "effective_batch_size", None):
        facts["effective_batch_size"] = sampler.effective_batch_size  # type: ignore[union-attr]
    else:
        facts["effective_batch_size"] = requested.get("effective_batch_size") or (
            args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * facts["world_size"]
        )
    collator = getattr(train_dataloader, "collate_fn", None)
    for ours, theirs in (
        ("max_sequences_per_micro_batch", "max_sequences"),
        ("max_tokens_per_micro_batch", "max_tokens"),
    ):
        if hasattr(collator, theirs):
            facts[ours] = getattr(collator, theirs)
    # An update that measures the noise scale computes rows, and with 1 each update does.
    if getattr(collator, "shares_prefixes", False) and getattr(args, "noise_scale_every", 0) != 1:
        facts["shares_prefixes"] = True
    if families := getattr(sampler, "families", None):
        facts["families"], facts["rows_in_families"] = len(families), families.num_rows
    return facts


def versions() -> dict[str, str]:
    """Return the versions of what decides a run's numbers."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_hardware(args: Any) -> dict[str, Any]:
    """Name the devices and how many there are of them."""
    facts: dict[str, Any] = {
        "device": str(getattr(args, "device", "cpu")),
        "world_size": getattr(args, "world_size", 1),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["device_name"] = properties.name
        facts["device_memory_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
    return facts


def describe_model(model: Any) -> dict[str, Any]:
    """Name the model and count its parameters."""
    while hasattr(model, "module"):
        model = model.module
    total, trained = count_parameters(model)
    config = getattr(model, "config", None)
    name = config.get("name_or_path") if isinstance(config, Mapping) else None
    name = name or getattr(config, "_name_or_path", None) or None
    return {
        "class": type(model).__name__,
        "name_or_path": name,
        "num_parameters": total,
        "num_trainable_parameters": trained,
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
    }
