"""What to change in a recipe, in lines that can be copied into it, with the reason beside each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_gradacc.recipe_memory import MemoryEstimate
from hf_gradacc.recipe_plan import RecipePlan

__all__ = ["give_advice"]

USABLE_MEMORY = 0.9
"""Share of a GPU's memory that an estimate may fill: allocator and kernels take some, too."""


def give_advice(
    plan: RecipePlan,
    *,
    memory: MemoryEstimate | None = None,
    gpu_memory: float | None = None,
    peft: str = "none",
) -> Iterator[str]:
    """What would make these updates fit or cheaper, or is likely not meant.

    Args:
        plan: The updates.
        memory: What a rank will need.
        gpu_memory: Bytes a rank has, where that is known.
        peft: The recipe's `peft.method`.
    """
    if memory is not None and gpu_memory is not None and memory.total > USABLE_MEMORY * gpu_memory:
        yield _make_it_fit(plan, memory, USABLE_MEMORY * gpu_memory, peft)
    by_size, by_tokens = plan.ways[1], plan.ways[2]
    if plan.budget is None and by_size.padding_fraction > 0.1:
        budget = int(max(plan.lengths.max(), 2 ** round(np.log2(by_size.largest / 2))))
        yield (
            f"train.max_tokens_per_micro_batch: {budget}   # padding is "
            f"{by_size.padding_fraction:.0%}; a token budget cuts it, the gradient stays the same"
        )
    if plan.budget is not None and plan.lengths.max() > plan.budget:
        yield (
            f"train.max_tokens_per_micro_batch: {plan.lengths.max()}   # the longest row does not "
            f"fit {plan.budget} and is planned alone; or cut rows with data.max_length"
        )
    if plan.budget is not None and by_tokens.padding_fraction > 0.25:
        smaller = max(int(plan.lengths.max()), plan.budget // 2)
        yield (
            f"train.max_tokens_per_micro_batch: {smaller}   # smaller micro-batches hold rows of "
            f"more equal length (padding is {by_tokens.padding_fraction:.0%} now)"
        )
    if 4 * plan.last_update < plan.sequences_per_update.most and plan.updates_per_epoch > 1:
        yield (
            f"train.incomplete_update: drop   # an epoch's last update holds {plan.last_update} "
            f"of {plan.sequences_per_update.most:.0f} sequences, at the full learning rate"
        )
    if plan.sequences_per_update.least < plan.world_size:
        yield "train.effective_batch_size: larger   # some ranks have no sequence in some updates"


def _make_it_fit(plan: RecipePlan, memory: MemoryEstimate, usable: float, peft: str) -> str:
    """The first of these that is enough: smaller micro-batches, recomputing, fewer weights."""
    longest = int(plan.lengths.max())
    state = (memory.weights + memory.gradients + memory.optimizer) / memory.shards
    per_token = (memory.activations + memory.logits) / plan.chosen.largest
    reason = f"estimated {memory.total / 1e9:.1f} GB exceed {usable / 1e9:.1f} GB"
    fits = int((usable - state) / per_token) if per_token else 0
    if fits >= longest:
        fits = max(longest, fits - fits % 256)
        return f"train.max_tokens_per_micro_batch: {fits}   # {reason}; the gradient stays the same"
    if usable > state and not memory.recomputed:
        return f"train.activation_checkpointing: true   # {reason}, even for the longest row alone"
    if usable > state:
        return f"data.max_length: {max(1, fits)}   # {reason}, even for the longest row alone"
    reason = f"weights, gradients and optimizer alone take {state / 1e9:.1f} GB per rank"
    if peft == "none":
        return f"peft.method: lora   # {reason}; or train.fsdp over several GPUs"
    smaller = "" if peft == "qlora" else "peft.method: qlora, "
    return f"{smaller}model.name: a smaller one   # {reason}; or more GPUs with train.fsdp"
