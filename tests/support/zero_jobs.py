"""What the tests of DeepSpeed run on each rank."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

from hf_gradacc import GradAccError, GradAccTrainer, NonFiniteError
from hf_gradacc.ranks.deepspeed import UpdateEngine
from hf_gradacc.tracking.run_facts import describe_model

from . import rank_jobs
from .rank_jobs import scenario_rows
from .reference import float64_everywhere
from .resume_jobs import train_and_report
from .tiny import log_rows, make_trainer, ragged_rows, timeless_log_rows, tiny_llama

os.environ.setdefault("DS_ACCELERATOR", "cpu")

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


def set_up(*, has_fp16: bool = False) -> None:
    """State what DeepSpeed would find out about this machine, so that all machines are alike.

    On CPUs it compiles collectives of its own for inference, if it finds a compiler: minutes on a
    busy machine, and a build that is killed leaves a lock that every later one waits for. Here
    ranks talk through gloo alone, and a build is an error.

    Args:
        has_fp16: What to say of the processor. DeepSpeed asks torch, which says so of Intel's with
            AVX512-FP16 alone.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.builder import OpBuilder

    # Not `import deepspeed.comm.torch as backend`: that package's `torch` is torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    OpBuilder.jit_load = _refuse_to_build
    get_accelerator().is_fp16_supported = lambda: has_fp16
    warnings.simplefilter("ignore", FutureWarning)


def _refuse_to_build(builder: Any, verbose: bool = True) -> Any:
    raise AssertionError(f"DeepSpeed wants to compile {builder.name} inside of a test")


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
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    make = DeepSpeedEngine._configure_zero_optimizer
    if make.__module__ == __name__:
        return

    def make_in_float64(self: Any, optimizer: Any) -> Any:
        made = make(self, optimizer)
        made.communication_data_type = torch.float64
        made.ipg_buckets = dict.fromkeys([torch.float64], *made.ipg_buckets.values())
        return made

    def check_as_float32(self: Any, ds_config: Any, dtype: torch.dtype | None) -> None:
        self.dtype = torch.float32

    DeepSpeedEngine.get_data_types = lambda self: (torch.float64, torch.float64)
    DeepSpeedEngine._configure_zero_optimizer = make_in_float64
    # ZeRO-3 refuses a dtype it does not know, but only where the processor has fp16: elsewhere it
    # takes bfloat16 for any. Weights that are there already keep theirs whatever this says.
    InsertPostInitMethodToModuleSubClasses._set_dtype = check_as_float32


BAD_TOKEN = 47  # a token whose loss or gradient goes bad


class ZeroTrainer(GradAccTrainer):
    """Notes the gradient of every update, put together from all ranks, before the step."""

    poison: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients: list[dict[str, torch.Tensor]] = []

    def _clip_grad_norm(self, model: Any) -> Any:
        self._note_gradient()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if not self.args.max_grad_norm:
            self._note_gradient()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _note_gradient(self) -> None:
        if self.last_update.stats.num_targets:
            self.gradients.append(
                {
                    name: gradient.clone()
                    for name, p in self.model.named_parameters()
                    if p.requires_grad and (gradient := whole_gradient(p)) is not None
                }
            )


class PoisonedTrainer(ZeroTrainer):
    """A loss that is NaN, or infinite, or whose gradient is NaN, where one token is in a row."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        bad = model.training and bool((inputs["input_ids"] == BAD_TOKEN).any())
        if self.poison == "gradient":
            # On all ranks the same graph, or ZeRO-3 would wait for ever. Adds 0, where bad with
            # the derivative 0 / 0.
            offset = 0.0 if bad else 1.0
            loss = loss + ((outputs["logits"].sum() * 0.0 + offset).sqrt() - offset)
        elif bad:
            loss = loss * math.nan if self.poison == "loss" else loss + math.inf
        return (loss, outputs) if return_outputs else loss


def whole_gradient(parameter: Any) -> torch.Tensor | None:
    """The gradient of a weight, put together from all ranks where they share it."""
    if not hasattr(parameter, "_hp_mapping") and not hasattr(parameter, "ds_id"):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    gradient: torch.Tensor | None = safe_get_full_grad(parameter)
    return gradient


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights, put together from all ranks."""
    parameters = dict(model.named_parameters())
    gathered: Any = contextlib.nullcontext()
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gathered:
        return {name: p.detach().clone() for name, p in parameters.items()}


def rows_of(scenario: dict[str, Any]) -> Any:
    """The rows of a scenario, some with the token that goes bad."""
    if "poisoned" not in scenario:
        return scenario_rows(scenario)
    rows = scenario_rows(scenario)
    for i, row in enumerate(rows):
        row["input_ids"] = [min(token, BAD_TOKEN - 1) for token in row["input_ids"]]
        if i in scenario["poisoned"]:
            row["input_ids"][0] = BAD_TOKEN
    return rows


def break_on_purpose(mistake: str) -> None:
    """Make one of the mistakes that are easily made with this engine."""
    import hf_gradacc.ranks.deepspeed as module
    from hf_gradacc.ranks.deepspeed import DeepSpeed

    class SteppingInBackward(UpdateEngine):
        def backward(self, loss: Any, sync_gradients: bool = True, **kwargs: Any) -> None:
            DeepSpeedEngineWrapper.backward(self, loss, sync_gradients, **kwargs)

        def step(self) -> float | None:
            return self.get_global_grad_norm()

    class AlwaysTheLast(UpdateEngine):
        def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
            self.reduces_now = True
            super().backward(loss, *args, **kwargs)

    class Counting(UpdateEngine):
        def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
            super().backward(loss, *args, **{**kwargs, "scale_wrt_gas": True})

    if mistake == "accelerate steps in every backward":
        ZeroTrainer._note_gradient = lambda self: None  # it is gone by then
    if mistake == "the average over ranks is forgotten":
        DeepSpeed.factor = property(lambda self: 1)
    else:
        module.UpdateEngine = {
            "accelerate steps in every backward": SteppingInBackward,
            "every backward is the last": AlwaysTheLast,
            "the engine divides by what it counts": Counting,
        }[mistake]


def train_zero(
    scenarios: dict[str, dict[str, Any]],
    *,
    stage: int | None = None,
    mistake: str | None = None,
    has_fp16: bool = False,
) -> dict[str, Any]:
    """Train every scenario under one stage of ZeRO, or none; all start from the same weights."""
    if mistake is not None:
        break_on_purpose(mistake)
    if stage is not None:
        set_up(has_fp16=has_fp16)
    return {name: train_under(scenario, stage=stage) for name, scenario in scenarios.items()}


def train_under(scenario: dict[str, Any], *, stage: int | None) -> dict[str, Any]:
    """Train one scenario and give back everything the ranks must agree on."""
    in_float64 = "dtype" not in scenario
    options = dict(scenario["options"])
    if stage is None:
        for name in ("bf16", "fp16"):
            options.pop(name, None)
    else:
        options["deepspeed"] = config_of(stage, **copy.deepcopy(scenario.get("deepspeed", {})))
        if in_float64:
            allow_float64()
    error = None
    with (
        tempfile.TemporaryDirectory() as out,
        float64_everywhere() if in_float64 else contextlib.nullcontext(),
    ):
        trainer = make_trainer(
            out,
            rows_of(scenario),
            model=rank_jobs.make_model(scenario),
            trainer_class=PoisonedTrainer if "poisoned" in scenario else ZeroTrainer,
            eval_dataset=scenario_rows({**scenario, "num_rows": 7, "without_target": ()}),
            **options,
        )
        trainer.poison = scenario.get("kind")
        try:
            trainer.train()
        except NonFiniteError as caught:
            error = str(caught)
        evaluated = trainer.evaluate()
        weights = whole_weights(trainer.model)
    return {
        "error": error,
        "gradients": trainer.gradients,
        "weights": weights,
        "logs": timeless_log_rows(trainer),
        "eval_loss": evaluated["eval_loss"],
        "steps": trainer.state.global_step,
        "engine_steps": trainer.deepspeed.global_steps if stage else len(trainer.gradients),
        "num_parameters": describe_model(trainer.model)["num_parameters"],
        "partitioned": any(hasattr(p, "ds_id") for p in trainer.model.parameters()),
    }


def train_in_parts(out: str, *, stage: int, **job: Any) -> dict[str, Any]:
    """Train, perhaps only so far, perhaps from a checkpoint; in float32, as DeepSpeed does."""
    set_up()
    trainer: Any = None

    def note(made: Any) -> None:
        nonlocal trainer
        trainer = made

    try:
        report = train_and_report(
            out,
            prepare=note,
            dtype=torch.float32,
            deepspeed=config_of(stage),
            eval_dataset=ragged_rows(5, seed=9),
            **job,
        )
    except GradAccError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    report["weights"] = whole_weights(trainer.model)
    report["found"] = sorted(p.name for p in Path(out).iterdir() if p.is_dir())
    return report


def evaluate_first(out: str) -> float:
    """Evaluate a model that was not trained; the last batch is filled up on one rank."""
    set_up()
    with float64_everywhere():
        trainer = make_trainer(
            out,
            ragged_rows(4),
            eval_dataset=ragged_rows(7, seed=5),
            per_device_eval_batch_size=2,
            deepspeed=config_of(3),
        )
        return float(trainer.evaluate()["eval_loss"])


def train_twice(out: str) -> str:
    """Call `train` a second time on one trainer, and give what it says."""
    set_up()
    trainer = make_trainer(
        out, ragged_rows(4), model=tiny_llama(dtype=torch.float32), deepspeed=config_of(2)
    )
    trainer.train()
    try:
        trainer.train()
    except GradAccError as error:
        return str(error)
    return "it trained"


def train_in_fp16(out: str, *, stage: int, scale_power: int) -> dict[str, Any]:
    """Train with a dynamic loss scale; DeepSpeed lets few CPUs do it, though torch lets any."""
    set_up(has_fp16=True)
    trainer = make_trainer(
        out,
        ragged_rows(16, seed=3),
        model=tiny_llama(dtype=torch.float32),
        deepspeed=config_of(
            stage,
            fp16={"enabled": "auto", "initial_scale_power": scale_power, "hysteresis": 1},
        ),
        fp16=True,
        **{"effective_batch_size": 4, "per_device_train_batch_size": 1},
    )
    trainer.train()
    return {
        "logs": log_rows(trainer),
        "scale": trainer.deepspeed.optimizer.loss_scale,
        "skipped_by_engine": trainer.deepspeed.skipped_steps,
    }


def train_a_recipe(recipe: Any, **changes: Any) -> dict[str, Any]:
    """Train a recipe with its own engine, evaluate and save."""
    set_up()
    from hf_gradacc.recipe.run import train_recipe

    result = train_recipe(recipe, **changes)
    return {
        "losses": [row["loss"] for row in log_rows(result.trainer)],
        "eval_loss": result.metrics.get("eval_loss"),
        "weights": whole_weights(result.trainer.model),
        "stage": result.trainer.deepspeed.zero_optimization_stage(),
    }
