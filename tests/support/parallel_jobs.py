"""What the tests of models that are split between ranks run on each rank."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import (
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    modeling_utils,
)

from hf_gradacc.ranks import tensor_parallel
from hf_gradacc.ranks.layout import RankLayout

from .rank_jobs import WholeGradients, _note_membership, allow_sharding_on_cpu, whole
from .reference import float64_everywhere
from .resume_jobs import StopAfter
from .tiny import PLAIN, make_trainer, pad, ragged_rows, timeless_log_rows, tiny_llama

NUM_ROWS = 9
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "max_grad_norm": 0.5}
OPTIONS: dict[str, Any] = {
    "effective_batch_size": 4,
    "per_device_train_batch_size": 1,
    "train_sampling_strategy": "sequential",
    "include_num_input_tokens_seen": True,
}
_SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSES = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "experts": Qwen3MoeForCausalLM}
DTYPES = {"experts": torch.float32}  # torch divides experts of other dtypes twice


def write_models(folder: Path) -> None:
    """Write the models that ranks load their parts of."""
    torch.manual_seed(0)
    models = {
        "llama": tiny_llama(num_key_value_heads=2),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**_SMALL)).double(),
        "experts": Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**_SMALL, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)


def load(folder: Any, name: str, split: dict[str, int] | None = None) -> Any:
    """Load one of them, whole or this rank's part; with an adapter if the name ends in one."""
    from transformers.distributed.configuration_utils import DistributedConfig

    name, _, adapter = name.partition(" + ")
    options: dict[str, Any] = {"attn_implementation": "eager"}
    if split is not None:
        options["distributed_config"] = DistributedConfig(**split)
    if name == "experts":
        options["experts_implementation"] = "eager"  # the others multiply no float64
    dtype = DTYPES.get(name, torch.float64)
    model = CLASSES[name].from_pretrained(Path(folder, name), dtype=dtype, **options)
    if not adapter:
        return model
    torch.manual_seed(1)
    layers = ["q_proj", "up_proj"]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)


def train_split(folder: str, scenarios: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each scenario, one after the other, in one process group."""
    if "WORLD_SIZE" in os.environ:
        allow_sharding_on_cpu()
    return {name: _train(folder, **scenario) for name, scenario in scenarios.items()}


def train_with_mistakes(
    folder: str, scenario: dict[str, Any], mistakes: Sequence[str]
) -> dict[str, Any]:
    """Train one scenario with each mistake; give the gradient of its first update."""
    allow_sharding_on_cpu()
    gradients = {}
    for mistake in mistakes:
        with break_on_purpose(mistake):
            gradients[mistake] = _train(folder, **scenario, max_steps=1)["gradients"][0]
    return gradients


def _train(
    folder: str, *, model: str, split: dict[str, int] | None = None, **options: Any
) -> dict[str, Any]:
    recorder, out = WholeGradients(), options.pop("out", None)
    resume, stop = options.pop("resume", None), options.pop("stop", None)
    num_rows, predicts = options.pop("num_rows", NUM_ROWS), options.pop("predicts", False)
    unwritable = options.pop("unwritable", None)
    is_double = DTYPES.get(model, torch.float64) is torch.float64
    with (
        tempfile.TemporaryDirectory() as own_out,
        float64_everywhere() if is_double else contextlib.nullcontext(),
        full_disk(unwritable),
    ):
        trainer = make_trainer(
            out or own_out,
            ragged_rows(num_rows, seed=3),
            model=load(folder, model, split),
            callbacks=[recorder, StopAfter(stop)],
            eval_dataset=ragged_rows(7, seed=5),
            **{**OPTIONS, **options},
        )
        seen = _note_membership(trainer)
        begun = _weights(trainer.model) if " + " in model else {}
        trainer.train(resume_from_checkpoint=resume)
        evaluated = trainer.evaluate()
        predicted = trainer.predict(ragged_rows(7, seed=5)).predictions if predicts else None
        return {
            "gradients": recorder.gradients,
            "seen": seen,
            "begun": begun,
            "weights": _weights(trainer.model),
            "logs": timeless_log_rows(trainer),
            "eval_loss": evaluated["eval_loss"],
            "predicted": predicted,
            "layout": trainer.rank_layout,
            "steps": trainer.state.global_step,
            "saved": sorted(p.name for p in Path(out or own_out).glob("checkpoint-*")),
            "is_split": any(hasattr(p, "device_mesh") for p in trainer.model.parameters()),
        }


@contextlib.contextmanager
def full_disk(unwritable: str | None) -> Iterator[None]:
    """Fail on the first rank where weights are written, or arguments, which is after a barrier."""
    if unwritable is None or os.environ["RANK"] != "0":
        yield
        return

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    place: Any = modeling_utils if unwritable == "safe_save_file" else torch
    before = getattr(place, unwritable)
    setattr(place, unwritable, fail)
    try:
        yield
    finally:
        setattr(place, unwritable, before)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def train_with_stock(folder: str, split: dict[str, int]) -> dict[int, Any]:
    """Train one update of four rows with the stock Trainer, in one micro-batch and in four."""
    allow_sharding_on_cpu()
    gradients = {}
    for steps in (1, 4):
        recorder = WholeGradients()
        with tempfile.TemporaryDirectory() as out, float64_everywhere():
            Trainer(
                model=load(folder, "qwen3", split),
                args=TrainingArguments(
                    output_dir=out,
                    per_device_train_batch_size=4 // steps,
                    gradient_accumulation_steps=steps,
                    train_sampling_strategy="sequential",
                    **{**PLAIN, "max_steps": 1},
                ),
                data_collator=pad,
                train_dataset=ragged_rows(NUM_ROWS, seed=3),
                callbacks=[recorder],
            ).train()
        gradients[steps] = recorder.gradients[0]
    return gradients


@contextlib.contextmanager
def break_on_purpose(mistake: str) -> Iterator[None]:
    """Make one mistake that a test must see."""
    once, apart = RankLayout.once, tensor_parallel.gradients_apart
    has_partial = tensor_parallel._has_partial_weights
    if mistake == "counted by every rank":
        RankLayout.once = lambda self, counts: counts
    elif mistake == "gradients are summed again":
        tensor_parallel.gradients_apart = lambda model: contextlib.nullcontext()
    elif mistake == "held back where it is summed again":
        tensor_parallel._has_partial_weights = lambda model, config: False
    else:
        raise AssertionError(mistake)
    try:
        yield
    finally:
        RankLayout.once, tensor_parallel.gradients_apart = once, apart
        tensor_parallel._has_partial_weights = has_partial
