"""An estimate of the memory a recipe needs, from the model's config alone.

Weights, gradients, optimizer state and master weights are counted. What a forward keeps for its
backward is added up over the model's own forward, run without values. For models that cannot run so
it follows Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(34 bytes per token, layer and hidden unit in half precision, attention scores not stored). It is an
estimate: the allocator, kernels and the framework add to it. `hf-gradacc verify` runs the largest
micro-batch and measures.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_gradacc.loss.shortcuts.chunked import rows_per_chunk
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.recipe.model.load import apply_peft, empty_model
from hf_gradacc.recipe.plan.activations import kept_for_backward
from hf_gradacc.safety.low_precision import choose_rounding, state_values
from hf_gradacc.trainer.optimizer.muon import find_hidden_matrices

__all__ = ["MemoryEstimate", "anonymous_bytes", "estimate_memory"]

_TRL_TILE = (4096, 32768)
"""Positions and words whose logits TRL's loss of pairs holds at a time, at most."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes on one rank.

    Attributes:
        num_parameters: All weights of the model, those of its adapter included.
        num_trainable: Those that train.
        weights: Bytes of weights.
        gradients: Bytes of gradients, float32 sums for half-precision weights included.
        optimizer: Bytes of optimizer state.
        masters: Bytes of float32 values that low-precision weights are rounded from.
        activations: Bytes kept for the backward of the largest micro-batch, and of one layer more
            while it runs backward.
        logits: Bytes of its logits and their gradient; of a chunk of them where the loss is
            taken in chunks.
        new_gradient: Bytes of the largest weight's gradient while it is computed, beside its sum: a
            low-precision one in its own type, widened, and summed over chunks of the loss.
        float32_sums: Bytes of `gradients` that go beyond the weights' own type.
        step: Bytes the optimizer's step takes beside all that is kept from update to update, when
            there are no activations.
        reference: Bytes of the frozen copy that a whole model is compared with by DPO.
        shards: Ranks that weights, gradients and optimizer state are spread over.
        recomputed: Whether activations are recomputed in the backward.
    """

    num_parameters: int
    num_trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    masters: int = 0
    new_gradient: int = 0
    float32_sums: int = 0
    step: int = 0
    reference: int = 0
    shards: int = 1
    recomputed: bool = False

    @property
    def state(self) -> int:
        """What is there through all of an update, on each rank."""
        kept = self.weights + self.reference + self.gradients + self.optimizer + self.masters
        return kept // self.shards

    @property
    def total(self) -> int:
        """Everything together, when most of it is there."""
        return self.state + max(self.activations + self.logits + self.new_gradient, self.step)


def estimate_memory(
    recipe: Recipe,
    *,
    tokenizer: Any,
    arguments: Any,
    largest: int,
    largest_as_rows: int = 0,
    label_names: list[str] | None = None,
    world_size: int = 1,
    available: float | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one rank.

    Args:
        recipe: The recipe.
        tokenizer: Its tokenizer; decides the vocabulary of a model from a config.
        arguments: Its `GradAccArguments`.
        largest: Tokens of the largest micro-batch, padding included.
        largest_as_rows: Tokens of its rows, if they share prefixes that are computed once. Keys
            and values, hidden states behind the layers, and logits are those of rows.
        label_names: Classification: the classes.
        world_size: Ranks.
        available: Bytes of the device, which decide on master weights; unknown by default.
    """
    model = empty_model(recipe.model, tokenizer=tokenizer, label_names=label_names, here=False)
    config = model.config.get_text_config()
    bytes_each = _BYTES.get(str(model.dtype).removeprefix("torch."), 4)
    total = sum(p.numel() for p in model.parameters())
    in_embeddings = model.get_input_embeddings().weight.numel()
    model = apply_peft(model, recipe.peft, task=recipe.model.task)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with_adapter = sum(p.numel() for p in model.parameters())
    weights = with_adapter * bytes_each
    if recipe.peft.method == "qlora":  # half a byte and a scale per block; embeddings stay
        weights = int((total - in_embeddings) * 0.53) + in_embeddings * 2
    trained_bytes = 4 if recipe.peft.method != "none" else bytes_each
    sharded = bool(recipe.train.get("fsdp") or recipe.train.get("deepspeed"))
    # Gradients of bf16 and fp16 weights are float32 until each is cast for the optimizer.
    widened = trained_bytes < 4 and arguments.accumulate_grads_in_fp32 is not False
    float32_sums = trainable * (4 - trained_bytes) if widened and not sharded else 0
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    rounding = "plain"
    if trained_bytes < 4 and not sharded:
        rounding = arguments.low_precision_updates
        if rounding == "auto" and available is None:
            rounding = "master"  # the larger, where nobody knows
        elif rounding == "auto":
            free = int(available or 0) - weights
            rounding = choose_rounding(num_weights=trainable, optimizer=optimizer, free_bytes=free)
    if rounding != "plain":
        float32_sums = trainable * (4 - trained_bytes)
    states = trainable * state_values(optimizer)
    if optimizer == "muon":
        matrices = find_hidden_matrices(model)
        rest = (p for p in model.parameters() if p.requires_grad and id(p) not in matrices)
        states += sum(p.numel() for p in rest)
    state_bytes = 1 if "8bit" in optimizer else trained_bytes if rounding == "plain" else 4
    largest_weight = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
    compute = 2 if recipe.train.get("bf16") or recipe.train.get("fp16") else bytes_each
    recomputed = bool(
        recipe.train.get("activation_checkpointing")
        or recipe.train.get("gradient_checkpointing")
        or (recipe.train.get("fsdp_config") or {}).get("activation_checkpointing")
    )
    layers = config.num_hidden_layers + (getattr(config, "num_decoder_layers", 0) or 0)
    kept, of_layer = _activations(model, config, tokens=largest, compute=compute, layers=layers)
    if recomputed:  # the input of each layer, and one layer anew
        kept = largest * config.hidden_size * compute * layers
    shared = max(0, largest_as_rows - largest)
    if shared:
        in_layer = shared * _keys_and_values(config) * compute
        of_layer += in_layer
        # Behind the layers hidden states and their gradient.
        kept += in_layer * (0 if recomputed else layers) + 2 * shared * config.hidden_size * compute
    task = recipe.model.task
    classes = config.vocab_size if task not in ("classification", "reward") else 0
    at_once = positions = largest + shared
    if task == "dpo":
        at_once, classes = min(positions, _TRL_TILE[0]), min(classes, _TRL_TILE[1])
    copies = task == "dpo" and recipe.peft.method == "none"
    if task == "causal_lm" and arguments.chunked_loss is not False:
        device_type = arguments.device.type
        at_once = min(
            positions, rows_per_chunk(classes, width=config.hidden_size, device_type=device_type)
        )
    return MemoryEstimate(
        num_parameters=with_adapter,
        num_trainable=trainable,
        weights=weights,
        gradients=trainable * trained_bytes + float32_sums,
        optimizer=states * state_bytes,
        masters=trainable * 4 if rounding == "master" else 0,
        activations=kept + of_layer,
        # The logits in the model's type, and in float32 for the loss with their gradient.
        logits=at_once * classes * (compute + 4 + 4),
        new_gradient=0 if sharded else largest_weight * (4 if trained_bytes == 4 else 10),
        float32_sums=float32_sums,
        step=trainable * 4 if rounding == "stochastic" else 0,
        reference=weights if copies and not recipe.dpo.precompute_ref_log_probs else 0,
        shards=world_size if sharded else 1,
        recomputed=recomputed,
    )


def anonymous_bytes() -> int:
    """Return the memory of this process that is no mapped file; 0 where the system hides it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _keys_and_values(config: Any) -> int:
    """Return the numbers that a layer keeps of a token others attend to."""
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * size * (getattr(config, "num_key_value_heads", None) or heads)


def _activations(
    model: Any, config: Any, *, tokens: int, compute: int, layers: int
) -> tuple[int, int]:
    """Return the bytes that a forward keeps for its backward, and those of one layer."""
    own = 2 if str(model.dtype) in ("torch.bfloat16", "torch.float16") else 4
    casts_to = torch.bfloat16 if compute < own else None
    found = kept_for_backward(model, tokens=tokens, compute=casts_to)
    if found is not None:
        return found
    of_layer = 17 * config.hidden_size * compute * tokens
    return of_layer * layers, of_layer
