"""Add up the gradient of a half-precision LM head in float32, chunk by chunk.

A chunk adds ``scores.T @ rows``, a matrix as large as the head: ``[vocab, hidden]``. A plain
product is rounded to 16 bits, written, read again and added to the sum: 12 bytes for each weight
and chunk, and slower than the product itself for large vocabularies. Kernels that add into float32
move 8 and round nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["add_product", "adds_into_float32", "multiplies_half_slowly"]


def add_product(total: Tensor | None, scores: Tensor, narrow: Tensor, rows: Tensor) -> Tensor:
    """Add ``scores.T @ rows`` to a sum, in place; the first of a sum is the sum.

    Args:
        total: ``[vocab, hidden]`` in the type of `scores`; None for a first chunk.
        scores: ``[chunk, vocab]``, gradients of the logits in float32 or wider.
        narrow: The same in the type of `rows`, as a linear layer's backward would be handed them.
        rows: ``[chunk, hidden]``, what the head was given, in half precision.
    """
    wide, device_type = scores.dtype, rows.device.type
    if device_type == "cpu" and multiplies_half_slowly():
        rows = rows.to(wide)
        return torch.mm(scores.t(), rows) if total is None else total.addmm_(scores.t(), rows)
    if adds_into_float32(device_type, rows.dtype):
        if total is None:
            return torch.mm(narrow.t(), rows, out_dtype=wide)
        return torch.addmm(total, narrow.t(), rows, out_dtype=wide, out=total)
    share = torch.mm(narrow.t(), rows)
    return share.to(wide) if total is None else total.add_(share)


@functools.cache
def multiplies_half_slowly() -> bool:
    """Return whether this CPU multiplies in float32 faster than in half precision.

    All but those with tiles of bf16 (Intel's AMX) do: without them a product of bf16 takes four
    times as long (an Intel Xeon with AVX-512).
    """
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return has_tiles is None or not has_tiles()


@functools.cache
def adds_into_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether a device adds a product of half precision into a float32 matrix, in place.

    CUDA and XPU do in recent releases of torch. Tried, once, and not asked of a version.

    >>> adds_into_float32("cpu", torch.bfloat16)
    False
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        left = torch.full((16, 16), 1 + 2**-7, dtype=dtype, device=device_type)
        total = torch.mm(left, left, out_dtype=torch.float32)
        torch.addmm(total, left, left, out_dtype=torch.float32, out=total)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    # Each number is a sum of 32 squares, which 16 bits cannot hold.
    return bool(total.eq(32 * (1 + 2**-7) ** 2).all())
