"""Out of memory: recognize the error, free memory, and explain a row that does not fit alone."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_gradacc.errors import MemoryBudgetError

__all__ = [
    "advice_on_pieces",
    "free_memory",
    "is_out_of_memory",
    "message_of",
    "single_row_error",
]

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


_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables that set the allocator up; the first since torch 2.9, the others before."""


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


_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def advice_on_pieces(message: str) -> str:
    """Return what helps if as much memory was free as was asked for, in pieces; else nothing.

    Micro-batches of uneven length leave gaps between blocks. CUDA's allocator joins them if it is
    told to before the process starts.

    Args:
        message: What the allocator said.

    >>> advice_on_pieces("CUDA out of memory. Tried to allocate 1.50 GiB. (...) and 3.25 GiB is "
    ...     "reserved by PyTorch but unallocated.")
    '3.25 GiB were free, but in pieces: start with PYTORCH_ALLOC_CONF=expandable_segments:True.'
    """
    asked = re.search(rf"Tried to allocate {_SIZE}", message)
    free = re.search(rf"{_SIZE} is reserved by PyTorch but unallocated", message)
    settings = [os.environ.get(name, "") for name in _SETTINGS]
    if asked is None or free is None or any("expandable_segments:True" in s for s in settings):
        return ""
    if float(free[1]) * _UNITS[free[2]] < float(asked[1]) * _UNITS[asked[2]]:
        return ""
    size = f"{free[1]} {free[2]}"
    return f"{size} were free, but in pieces: start with {_SETTINGS[0]}=expandable_segments:True."


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
    if advice := advice_on_pieces(message):
        reason += f"\n  {advice}"
    return MemoryBudgetError(
        f"{which}{size} does not fit into memory, even alone in its micro-batch.\n"
        f"  Tried: {'; '.join(tried) or 'the row alone'}.{reason}\n"
        f"  Set: {options}."
    )
