"""What ranks must agree on before the first update, compared in one collective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_gradacc.ranks.collectives import gather_objects, gather_vectors
from hf_gradacc.safety.identity import as_number

__all__ = ["COMPARED", "describe_disagreement", "find_disagreements"]

COMPARED = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "fp16",
    "group_by_prefix",
    "ignore_data_skip",
    "label_smoothing_factor",
    "learning_rate",
    "learning_rates",
    "load_best_model_at_end",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "loraplus_ratio",
    "lr_decay_steps",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_skipped_updates_in_a_row",
    "max_steps",
    "metric_for_best_model",
    "neftune_noise_alpha",
    "noise_scale_every",
    "num_train_epochs",
    "on_non_finite",
    "optim",
    "optim_args",
    "save_steps",
    "save_strategy",
    "warmup_steps",
    "weight_decay",
)
"""Arguments that decide the step of the optimizer, or when ranks wait for each other."""


def find_disagreements(facts: Mapping[str, Any], *, device: torch.device) -> dict[str, list[Any]]:
    """Compare facts over ranks: one collective, and another only to name what differs.

    Args:
        facts: By name, the same names on every rank.
        device: Where collectives run.

    Returns:
        For each fact that is not the same everywhere, its value on each rank.
    """
    names = sorted(facts)
    numbers = torch.tensor([as_number(facts[name]) for name in names])
    ranks = gather_vectors(numbers, device=device)
    different = [name for i, name in enumerate(names) if len(set(ranks[:, i].tolist())) > 1]
    if not different:
        return {}
    told = gather_objects({name: facts[name] for name in different})
    return {name: [rank[name] for rank in told] for name in different}


def describe_disagreement(name: str, values: list[Any]) -> str:
    """Say what the first rank has, and who has something else.

    >>> describe_disagreement("learning_rate", [0.1, 0.1, 0.2])
    'learning_rate: 0.1 on rank 0, 0.2 on rank 2'
    """
    told: dict[str, int] = {}
    for rank, value in enumerate(values):
        told.setdefault(str(value), rank)
    return f"{name}: " + ", ".join(f"{value} on rank {rank}" for value, rank in told.items())
