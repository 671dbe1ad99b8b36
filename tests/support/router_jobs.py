"""What the tests of router losses train, in one process and on ranks."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from .rank_jobs import FSDP2, SEQUENTIAL, WholeGradients, allow_sharding_on_cpu
from .reference import float64_everywhere
from .tiny import VOCABULARY, make_trainer, ragged_rows

SHARES = {
    "unequal numbers of micro-batches": {"num_rows": 5, "effective_batch_size": 5},
    "a rank without a row": {"num_rows": 3, "effective_batch_size": 2},
}
"""Whose last update is looked at, with one row in a micro-batch, on two ranks."""


def tiny_mixtral(*, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A mixture of experts whose router loss weighs enough to be seen."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    return MixtralForCausalLM(MixtralConfig(**options | changes)).to(dtype)


def train_router(*, num_rows: int, effective_batch_size: int, **options: Any) -> dict[str, Any]:
    """Train in float64 without moving a weight; return the last update's gradient and log row."""
    recorder = WholeGradients()
    with tempfile.TemporaryDirectory() as out, float64_everywhere():
        trainer = make_trainer(
            out,
            ragged_rows(num_rows, seed=3),
            model=tiny_mixtral(),
            callbacks=[recorder],
            effective_batch_size=effective_batch_size,
            learning_rate=0.0,
            **{"per_device_train_batch_size": 1, **SEQUENTIAL, **options},
        )
        trainer.train()
    gradients = [gradient for gradient in recorder.gradients if gradient]
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    return {"gradient": gradients[-1], "row": rows[-1]}


def train_on_ranks(*, sharded: bool) -> dict[str, Any]:
    """Train each share of `SHARES` on this rank."""
    options: dict[str, Any] = {}
    if sharded:
        allow_sharding_on_cpu()
        config = {**FSDP2["fsdp_config"], "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"]}
        options = {**FSDP2, "fsdp_config": config}
    return {name: train_router(**share, **options) for name, share in SHARES.items()}
