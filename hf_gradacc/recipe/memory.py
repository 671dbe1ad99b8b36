"""An estimate of the memory a recipe needs, from the model's config alone.

Weights, gradients and optimizer state are counted; activations follow Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models" (34 bytes per token, layer and
hidden unit in half precision, 2 where activations are recomputed, attention scores not stored).
It is an estimate: the allocator, kernels and the framework add to it. `hf-gradacc verify` runs
the largest micro-batch and measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_gradacc.loss.chunked import rows_per_chunk
from hf_gradacc.recipe.model import apply_peft, empty_model
from hf_gradacc.recipe.sections import Recipe

__all__ = ["MemoryEstimate", "estimate_memory"]

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


# Optimizer state per trainable weight, in values; Adam keeps two moments.
_STATES = {"adamw": 2, "adam": 2, "adafactor": 0, "sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes on one rank.

    Attributes:
        num_parameters: All weights of the model.
        num_trainable: Those that train.
        weights: Bytes of weights.
        gradients: Bytes of gradients, float32 sums for half-precision weights included.
        optimizer: Bytes of optimizer state.
        activations: Bytes kept for the backward of the largest micro-batch.
        logits: Bytes of its logits and their gradient; of a chunk of them where the loss is
            taken in chunks.
        float32_sums: Bytes of `gradients` that go beyond the weights' own type.
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
    float32_sums: int = 0
    shards: int = 1
    recomputed: bool = False

    @property
    def total(self) -> int:
        """Everything together."""
        state = (self.weights + self.gradients + self.optimizer) // self.shards
        return state + self.activations + self.logits


def estimate_memory(
    recipe: Recipe,
    *,
    tokenizer: Any,
    arguments: Any,
    largest: int,
    label_names: list[str] | None = None,
    world_size: int = 1,
) -> MemoryEstimate:
    """Estimate the memory of one rank.

    Args:
        recipe: The recipe.
        tokenizer: Its tokenizer; decides the vocabulary of a model from a config.
        arguments: Its `GradAccArguments`.
        largest: Tokens of the largest micro-batch, padding included.
        label_names: Classification: the classes.
        world_size: Ranks.
    """
    model = empty_model(recipe.model, tokenizer=tokenizer, label_names=label_names, here=False)
    config = model.config.get_text_config()
    bytes_each = _BYTES.get(str(model.dtype).removeprefix("torch."), 4)
    total = sum(p.numel() for p in model.parameters())
    in_embeddings = model.get_input_embeddings().weight.numel()
    model = apply_peft(model, recipe.peft, task=recipe.model.task)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in model.parameters()) * bytes_each
    if recipe.peft.method == "qlora":  # half a byte and a scale per block; embeddings stay
        weights = int((total - in_embeddings) * 0.53) + in_embeddings * 2
    trained_bytes = 4 if recipe.peft.method != "none" else bytes_each
    sharded = bool(recipe.train.get("fsdp") or recipe.train.get("deepspeed"))
    # Gradients of bf16 and fp16 weights are float32 until each is cast for the optimizer.
    widened = trained_bytes < 4 and arguments.accumulate_grads_in_fp32 is not False
    float32_sums = trainable * (4 - trained_bytes) if widened and not sharded else 0
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    states = next((n for name, n in _STATES.items() if name in optimizer), 2)
    eight_bit = "8bit" in optimizer
    compute = 2 if recipe.train.get("bf16") or recipe.train.get("fp16") else bytes_each
    recomputed = bool(
        recipe.train.get("activation_checkpointing")
        or recipe.train.get("gradient_checkpointing")
        or (recipe.train.get("fsdp_config") or {}).get("activation_checkpointing")
    )
    layers = config.num_hidden_layers + (getattr(config, "num_decoder_layers", 0) or 0)
    per_token = config.hidden_size * compute * (1 if recomputed else 17)
    one_layer = 17 * config.hidden_size * compute if recomputed else 0
    classes = config.vocab_size if recipe.model.task != "classification" else 0
    at_once = largest
    if recipe.model.task == "causal_lm" and arguments.chunked_loss is not False:
        device_type = arguments.device.type
        at_once = min(largest, rows_per_chunk(classes, device_type=device_type))
    return MemoryEstimate(
        num_parameters=total,
        num_trainable=trainable,
        weights=weights,
        gradients=trainable * trained_bytes + float32_sums,
        optimizer=trainable * states * (1 if eight_bit else trained_bytes),
        activations=largest * (per_token * layers + one_layer),
        # The logits in the model's type, and in float32 for the loss with their gradient.
        logits=at_once * classes * (compute + 4 + 4),
        float32_sums=float32_sums,
        shards=world_size if sharded else 1,
        recomputed=recomputed,
    )
