"""What the tests of DeepSpeed run on each rank."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from typing import Any

import torch

from hf_gradacc import GradAccTrainer

from . import rank_jobs
from .reference import float64_everywhere
from .tiny import log_rows, make_trainer

os.environ.setdefault("DS_ACCELERATOR", "cpu")

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


def config_of(stage: int, **changes: Any) -> dict[str, Any]:
    """A configuration as people write it, with small buckets so that there are several."""
    zero = {
        "stage": stage,
        "reduce_bucket_size": 500,
        "allgather_bucket_size": 500,
        "stage3_param_persistence_threshold": 20,
        "stage3_gather_16bit_weights_on_model_save": True,
        **changes.pop("zero", {}),
    }
    return {**AUTO, "zero_optimization": zero, **changes}


def allow_float64() -> None:
    """Let DeepSpeed sum and send in float64: its configuration knows no such dtype.

    `float64_everywhere` does not reach hooks that run inside of a backward.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    make = DeepSpeedEngine._configure_zero_optimizer
    if make.__module__ == __name__:
        return

    def make_in_float64(self: Any, optimizer: Any) -> Any:
        made = make(self, optimizer)
        made.communication_data_type = torch.float64
        made.ipg_buckets = {torch.float64: bucket for bucket in made.ipg_buckets.values()}
        return made

    DeepSpeedEngine.get_data_types = lambda self: (torch.float64, torch.float64)
    DeepSpeedEngine._configure_zero_optimizer = make_in_float64


class ZeroTrainer(GradAccTrainer):
    """Notes what every update's gradient is, put together from all ranks, before the step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.norms: list[float] = []

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        from deepspeed.utils import safe_get_full_grad

        if self._global_stats.num_targets:
            self.gradients.append(
                {
                    name: gradient.clone()
                    for name, p in self.model.named_parameters()
                    if p.requires_grad and (gradient := safe_get_full_grad(p)) is not None
                }
            )
        return super()._get_grad_norm(model, grad_norm=grad_norm)


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights, put together from all ranks."""
    import deepspeed

    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}


def train_zero(scenarios: dict[str, dict[str, Any]], *, stage: int) -> dict[str, Any]:
    """Train every scenario under one stage of ZeRO; each starts from the same weights."""
    warnings.simplefilter("ignore", FutureWarning)  # torch's, of calls inside DeepSpeed
    return {name: train(scenario, stage=stage) for name, scenario in scenarios.items()}


def train(scenario: dict[str, Any], *, stage: int) -> dict[str, Any]:
    """Train one scenario and give back everything the ranks must agree on."""
    if "dtype" not in scenario:
        allow_float64()
    exactly = contextlib.nullcontext() if "dtype" in scenario else float64_everywhere()
    with tempfile.TemporaryDirectory() as out, exactly:
        trainer = make_trainer(
            out,
            rank_jobs.make_rows(scenario),
            model=rank_jobs.make_model(scenario),
            trainer_class=ZeroTrainer,
            eval_dataset=rank_jobs.make_rows({**scenario, "num_rows": 7, "without_target": ()}),
            deepspeed=config_of(stage, **scenario.get("deepspeed", {})),
            **scenario["options"],
        )
        seen = rank_jobs._note_membership(trainer)
        trainer.train()
        evaluated = trainer.evaluate()
        weights = whole_weights(trainer.model)
    return {
        "gradients": trainer.gradients,
        "seen": seen,
        "weights": weights,
        "logs": [
            {k: v for k, v in row.items() if k not in rank_jobs.CLOCK_KEYS}
            for row in log_rows(trainer)
        ],
        "train_loss": trainer.state.log_history[-2].get("train_loss"),
        "eval_loss": evaluated["eval_loss"],
        "steps": trainer.state.global_step,
        "engine_steps": trainer.deepspeed.global_steps,
        "partitioned": any(hasattr(p, "ds_id") for p in trainer.model.parameters()),
    }
