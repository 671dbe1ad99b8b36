"""Out of memory: tell it from other errors, make room, and know how large a micro-batch may be."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_gradacc.errors import MemoryBudgetError
from hf_gradacc.phases import Phase

__all__ = [
    "MemoryBudget",
    "free_memory",
    "is_out_of_memory",
    "outside_error",
    "single_row_error",
    "words_of",
]

# What allocators say that do not raise torch.OutOfMemoryError. Each is a RuntimeError of torch's.
_MESSAGES = (
    "out of memory",  # CUDA, HIP, XPU, MPS, NPU, MLU, MUSA; "CUDA error: out of memory"
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on Windows
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuBLASLt, cuDNN 8, cuSOLVER, cuSPARSE, hipBLAS
    "ALLOCATION_FAILED",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "CUFFT_ALLOC_FAILED",
    "rocblas_status_memory_error",
    "miopenStatusAllocFailed",
    "hipErrorOutOfMemory",
    "cudaErrorMemoryAllocation",
    "UR_RESULT_ERROR_OUT_OF_",  # XPU: ..._DEVICE_MEMORY, ..._HOST_MEMORY, ..._RESOURCES
    "PT_DEVMEM Allocation failed",  # Gaudi
    "RESOURCE_EXHAUSTED",  # XLA
    "FIND was unable to find an engine",  # cuDNN's convolutions where no workspace fits
)

_PLACES: dict[Phase | None, tuple[str, str]] = {
    "data": (
        "while rows were loaded",
        "a dataset and a collator that keep off the device",
    ),
    "forward_backward": (
        "beside the micro-batches, in a callback or in the sum over ranks",
        "a smaller max_tokens_per_micro_batch, which leaves room for what runs there",
    ),
    "optimizer": (
        "in clipping or in the optimizer's step",
        "a smaller optimizer (optim = 'adamw_8bit' or 'adafactor'), LoRA, FSDP2, or "
        "accumulate_grads_in_fp32 = False",
    ),
    None: (
        "between updates, in evaluation, a callback or a save",
        "eval_accumulation_steps = 1 (predictions then wait on the host) or "
        "prediction_loss_only = True",
    ),
}


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an allocator gave up, whichever backend's it is.

    >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, MemoryBudgetError) or not isinstance(error, RuntimeError):
        return False
    return any(message in str(error) for message in _MESSAGES)


def free_memory(model: nn.Module | None = None) -> None:
    """Drop gradients and give cached blocks back.

    Call it outside of the ``except`` block: while an exception is being handled its traceback
    keeps the frames of the failed forward alive, and with them every activation.
    """
    if model is not None:
        for parameter in model.parameters():
            parameter.grad = None
    gc.collect()
    for backend in ("cuda", "xpu", "mps", "npu", "mlu"):
        module: Any = getattr(torch, backend, None)
        if module is not None and hasattr(module, "empty_cache") and module.is_available():
            module.empty_cache()


@dataclass(eq=False)
class MemoryBudget(TrainerCallback, ExportableState):
    """The size of micro-batch that memory turned out to allow. Saved with every checkpoint.

    What somebody asked for is a limit as well; this one comes on top. It halves with each failure
    until the micro-batch that failed no longer fits, and tries the next larger size again after
    many updates without one: what used the memory may have gone.

    Attributes:
        cap: Most tokens a micro-batch may compute, as the planner counts; None for no limit.
        ceiling: What failed first; a cap that has grown back to that is dropped.
        clean_updates: Updates since the last failure or growth.
        patience: Updates to wait before the next try. Doubles whenever a try fails.
        on_trial: The cap has grown since the last failure.
    """

    cap: int | None = None
    ceiling: int | None = None
    clean_updates: int = 0
    patience: int = 256
    on_trial: bool = False

    def propose(self, cost: int, *, num_rows: int, asked: int | None) -> int | None:
        """Halve until a micro-batch of this cost is cut; None if it is a single row.

        Args:
            cost: Tokens of the micro-batch that failed, as the planner counts them.
            num_rows: Its sequences.
            asked: The user's own limit on tokens, if there is one.

        >>> MemoryBudget().propose(3000, num_rows=4, asked=8192)
        2048
        >>> MemoryBudget().propose(3000, num_rows=4, asked=None)
        1500
        """
        if num_rows <= 1:
            return None
        limits = [limit for limit in (asked, self.cap) if limit is not None]
        cap = min(limits, default=cost)
        while cap >= cost:
            cap //= 2
        return max(cap, 1)

    def shrink_to(self, cap: int, *, asked: int | None = None, cost: int | None = None) -> None:
        """Take a smaller cap, the same on all ranks.

        Args:
            cap: See `propose`.
            asked: The user's own limit on tokens.
            cost: Tokens of the micro-batch that failed.
        """
        if self.on_trial:
            self.patience, self.on_trial = self.patience * 2, False
        if self.ceiling is None:
            self.ceiling = asked or cost or cap * 2
        self.cap, self.clean_updates = cap, 0

    def note_success(self) -> None:
        """Count an update that went through; after many, allow twice as much."""
        if self.cap is None:
            return
        self.clean_updates += 1
        if self.clean_updates < self.patience:
            return
        self.cap, self.clean_updates, self.on_trial = self.cap * 2, 0, True
        if self.ceiling is not None and self.cap >= self.ceiling:
            self.cap = self.ceiling = None

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        kept = ("cap", "ceiling", "clean_updates", "patience", "on_trial")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in kept}}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Begin a run, with what a checkpoint kept if there is one."""
        fresh = MemoryBudget()
        attributes = (saved or fresh.state())["attributes"]
        for name, value in attributes.items():
            setattr(self, name, value)


def words_of(error: BaseException) -> str:
    """Give the first line of what an allocator said. The error itself keeps activations alive.

    >>> words_of(RuntimeError("CUDA error: out of memory\\nCompile with ..."))
    'CUDA error: out of memory'
    """
    return str(error).strip().partition("\n")[0]


def single_row_error(
    *,
    length: int,
    row: int | None,
    tried: Sequence[str],
    said: str = "",
    evaluation: bool = False,
) -> MemoryBudgetError:
    """Say that one sequence alone does not fit, what was tried, and what would help.

    Args:
        length: Tokens of the sequence, 1 or less if nobody knows.
        row: Its place in the dataset.
        tried: What was tried, in order.
        said: The allocator's own words, where this rank heard them.
        evaluation: It was in an evaluation.
    """
    which = "one sequence" if row is None or row < 0 else f"row {row} of the dataset"
    size = f" of {length:,} tokens" if length > 1 else ""
    if evaluation:
        options = (
            "max_length when tokenizing, prediction_loss_only = True, or eval_accumulation_steps "
            "= 1 (predictions of earlier batches then wait on the host)"
        )
    else:
        options = (
            "max_length when tokenizing, gradient_checkpointing = True (its activations are then "
            "computed twice instead of kept), layout = 'packed', chunked_loss = True or "
            "use_liger_kernel = True (fewer logits at once), LoRA, or a smaller optimizer"
        )
    heard = f"\n  The allocator said: {said}" if said else ""
    return MemoryBudgetError(
        f"{which}{size} does not fit into memory, even alone in its micro-batch.\n"
        f"  Tried: {'; '.join(tried) or 'the row alone'}.{heard}\n"
        f"  Set: {options}."
    )


def outside_error(error: BaseException, *, phase: Phase | None, update: int) -> MemoryBudgetError:
    """Say where memory ran out, if not in a forward or backward: a finer cut is no help there.

    Args:
        error: What the allocator raised.
        phase: What the update was at, None between updates.
        update: Its number, from 1; 0 before the first one has begun.
    """
    place, options = _PLACES[phase]
    if update == 0:
        place = "before the first update, while the model was asked how its loss counts"
        options = "a smaller model, or LoRA: not even a few short rows fit, without gradients"
    step = f" (update {update})" if update else ""
    halves = "\n  Weights may have been stepped in part." if phase == "optimizer" and update else ""
    after = f"{halves}\n  Go on from the last checkpoint with:" if update else "\n  Set:"
    return MemoryBudgetError(f"out of memory {place}{step}: {words_of(error)}{after} {options}.")
