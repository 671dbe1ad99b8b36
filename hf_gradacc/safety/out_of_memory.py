"""Out of memory: recognize the error, free memory, and explain a row that does not fit alone."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_gradacc.errors import MemoryBudgetError

__all__ = ["free_memory", "is_out_of_memory", "message_of", "single_row_error"]

# Messages of allocators that do not raise torch.OutOfMemoryError but a RuntimeError.
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
    "FIND was unable to find an engine",  # cuDNN's convolutions if no workspace fits
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that an allocation failed, on any backend.

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
    """Delete gradients and empty the allocators' caches.

    Call it outside of the ``except`` block. While an exception is handled, its traceback keeps the
    frames of the failed forward alive, and with them every activation.
    """
    if model is not None:
        for parameter in model.parameters():
            parameter.grad = None
    gc.collect()
    for backend in ("cuda", "xpu", "mps", "npu", "mlu"):
        module: Any = getattr(torch, backend, None)
        if module is not None and hasattr(module, "empty_cache") and module.is_available():
            module.empty_cache()


def message_of(error: BaseException) -> str:
    """Return the first line of an error's message. The error itself keeps activations alive.

    >>> message_of(RuntimeError("CUDA error: out of memory\\nCompile with ..."))
    'CUDA error: out of memory'
    """
    return str(error).strip().partition("\n")[0]


def single_row_error(
    *,
    length: int,
    row: int | None,
    tried: Sequence[str],
    message: str = "",
    evaluation: bool = False,
) -> MemoryBudgetError:
    """Make the error for a sequence that does not fit alone: what was tried, and what helps.

    Args:
        length: Tokens of the sequence; 1 or less if unknown.
        row: Its place in the dataset.
        tried: What was tried, in order.
        message: The allocator's message, if it was this rank that ran out.
        evaluation: It happened in an evaluation.
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
    reason = f"\n  The allocator said: {message}" if message else ""
    return MemoryBudgetError(
        f"{which}{size} does not fit into memory, even alone in its micro-batch.\n"
        f"  Tried: {'; '.join(tried) or 'the row alone'}.{reason}\n"
        f"  Set: {options}."
    )
