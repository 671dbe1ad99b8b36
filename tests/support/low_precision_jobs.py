"""Steps on low-precision weights, on every rank."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from hf_gradacc.errors import ConfigError

from .rank_jobs import FSDP2, allow_sharding_on_cpu
from .tiny import make_trainer, ragged_rows, tiny_llama

_STEPS = {"optim": "adamw_torch", "learning_rate": 1e-4, "max_steps": 3, "effective_batch_size": 8}


def step_on_copies(out: str) -> dict[str, Any]:
    """Train bfloat16 weights that every rank holds, in both ways to keep a step."""
    found: dict[str, Any] = {}
    for mode in ("master", "stochastic"):
        trainer = _make(f"{out}/{mode}", low_precision_updates=mode)
        trainer.train()
        found[mode] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        found[f"{mode}, float32"] = dict(trainer.optimizer_steps.masters)
    return found


def step_on_parts(out: str) -> dict[str, str]:
    """Train bfloat16 weights that FSDP2 splits; give what each mode is answered."""
    allow_sharding_on_cpu()
    told: list[str] = []
    logger: Any = logging.get_logger("hf_gradacc.trainer.optimizer.low_precision")
    logger.warning_once = told.append
    found = {}
    for mode in ("auto", "master"):
        trainer = _make(f"{out}/{mode}", low_precision_updates=mode, **FSDP2)
        told.clear()
        try:
            trainer.train()
            found[mode] = " ".join(told)
        except ConfigError as error:
            found[mode] = f"refused: {error}"
    return found


def _make(out: str, **options: Any) -> Any:
    rows = ragged_rows(24, seed=3)
    return make_trainer(out, rows, model=tiny_llama(dtype=torch.bfloat16), **_STEPS, **options)
