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

__all__ = ["MemoryBudget", "free_memory", "is_out_of_memory", "single_row_error"]

# What allocators say that do not raise torch.OutOfMemoryError. Each is a RuntimeError of torch's.
_MESSAGES = (
    "out of memory",  # CUDA, HIP, XPU, MPS
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "hipErrorOutOfMemory",
    "PT_DEVMEM Allocation failed",  # Gaudi
    "RESOURCE_EXHAUSTED",  # XLA
)


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
    """

    cap: int | None = None
    ceiling: int | None = None
    clean_updates: int = 0
    patience: int = 256
    _on_trial: bool = False

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
        if self._on_trial:
            self.patience, self._on_trial = self.patience * 2, False
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
        self.cap, self.clean_updates, self._on_trial = self.cap * 2, 0, True
        if self.ceiling is not None and self.cap >= self.ceiling:
            self.cap = self.ceiling = None

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        kept = ("cap", "ceiling", "clean_updates", "patience")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in kept}}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Begin a run, with what a checkpoint kept if there is one."""
        fresh = MemoryBudget()
        attributes = (saved or fresh.state())["attributes"]
        for name, value in attributes.items():
            setattr(self, name, value)
        self._on_trial = False


def single_row_error(
    *, length: int, row: int | None, tried: Sequence[str], evaluation: bool = False
) -> MemoryBudgetError:
    """Say that one sequence alone does not fit, what was tried, and what would help."""
    which = "one sequence" if row is None or row < 0 else f"row {row} of the dataset"
    size = f" of {length:,} tokens" if length > 1 else ""
    if evaluation:
        options = "max_length when tokenizing, or prediction_loss_only = True"
    else:
        options = (
            "max_length when tokenizing, gradient_checkpointing = True (its activations are then "
            "computed twice instead of kept), layout = 'packed' or target_only_logits = True "
            "(fewer logits), a chunked loss (use_liger_kernel = True), LoRA, or a smaller optimizer"
        )
    return MemoryBudgetError(
        f"{which}{size} does not fit into memory, even alone in its micro-batch.\n"
        f"  Tried: {'; '.join(tried) or 'the row alone'}.\n"
        f"  Set: {options}."
    )
