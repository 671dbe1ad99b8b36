"""Float32 products of linear layers by oneDNN, on CPUs where torch's BLAS is slow.

torch multiplies float32 matrices with MKL, whose AVX-512 kernels run on Intel's processors alone;
others are given AVX2 kernels. oneDNN, which torch brings along and uses for bfloat16 and for
compiled models, goes by what a processor can do: 2.3 times as fast on an AMD EPYC that
computes AVX-512 in whole units. One that computes it in halves (family 25) gains 1.1 and loses that
to kernels compiled for ever new numbers of rows.

A linear layer and its two gradients are three products ``a @ b.T``, and for the time of a
micro-batch large layers take them from oneDNN. The layers stay what they are: each gets an instance
``forward``, which is removed again.
"""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "cpu_family",
    "cpu_vendor",
    "find_linears",
    "is_onednn_faster",
    "is_onednn_faster_here",
    "matmul",
    "onednn_linears",
    "why_no_onednn",
]

# oneDNN compiles a kernel for every new number of rows, most micro-batches' that is: 0.2 to 0.8 ms.
# A model of width 128 lost 4 % by it, with one of width 256 an update takes 0.6 of the time.
_SMALLEST_SIDE, _SMALLEST_WEIGHT, _FEWEST_ROWS = 32, 2**16, 32

_COMPUTES_IN_HALVES = 25
"""The last family of AMD's whose AVX-512 is two halves."""


def why_no_onednn() -> str:
    """Return why oneDNN cannot multiply here, empty if it can."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch was built without oneDNN"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no oneDNN product of dense matrices"
    return ""


def is_onednn_faster(*, vendor: str, family: int, instructions: str, has_mkl: bool) -> bool:
    """Return whether oneDNN multiplies faster than torch's BLAS on such a CPU.

    Decided by what is known of the CPU, not by timing: a resumed run has to choose as before to
    give the same bits.

    Args:
        vendor: As `cpu_vendor` gives it.
        family: As `cpu_family` gives it.
        instructions: As ``torch.backends.cpu.get_cpu_capability`` gives them.
        has_mkl: MKL is torch's BLAS.

    >>> is_onednn_faster(vendor="AuthenticAMD", family=26, instructions="AVX512", has_mkl=True)
    True
    >>> is_onednn_faster(vendor="GenuineIntel", family=6, instructions="AVX512", has_mkl=True)
    False
    """
    computes_whole = "Intel" not in vendor and family > _COMPUTES_IN_HALVES
    return has_mkl and instructions == "AVX512" and computes_whole


def is_onednn_faster_here() -> bool:
    """Return whether oneDNN multiplies faster than torch's BLAS on this machine."""
    return is_onednn_faster(
        vendor=cpu_vendor(),
        family=cpu_family(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        has_mkl=torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
    )


def cpu_vendor() -> str:
    """Return the vendor of the CPU, such as AuthenticAMD or GenuineIntel; empty if unknown."""
    # Windows writes "AMD64 Family 25 ..., AuthenticAMD" there.
    return _cpu_fact("vendor_id") or platform.processor()


def cpu_family() -> int:
    """Return the family of the CPU as its vendor counts them; 0 if unknown."""
    written = re.search(r"\d+", _cpu_fact("cpu family")) or re.search(
        r"(?<=Family )\d+", platform.processor()
    )
    return int(written.group()) if written else 0


def _cpu_fact(name: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""


def find_linears(model: nn.Module, *, leave_out: nn.Module | None = None) -> list[nn.Linear]:
    """Find the layers whose products are worth it: plain ones, of float32 weights, large enough.

    Args:
        model: Not wrapped.
        leave_out: A layer that somebody else computes.
    """
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear  # a subclass does more, or other things
        and module is not leave_out
        and "forward" not in vars(module)
        and _is_plain(module.weight)
        and min(module.weight.shape) >= _SMALLEST_SIDE
        and module.weight.numel() >= _SMALLEST_WEIGHT
    ]


def _is_plain(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not hasattr(x, "ds_id")  # ZeRO-3's, which are empty but while a module runs
    )


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias`` by oneDNN, without a graph.

    Args:
        a: ``[..., k]``, float32, not empty.
        b: ``[n, k]``; any strides.
        bias: ``[n]``.

    Returns:
        ``[..., n]``.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` and its gradients, each by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        # With create_graph a gradient is differentiated again, which oneDNN's product is not.
        times = _differentiable_matmul if torch.is_grad_enabled() else matmul
        return (
            times(rows, weight.t()).view(x.shape) if wants_x else None,
            times(rows.t(), flat.t()) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _differentiable_matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t()


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    """Compute a linear layer by oneDNN; by torch if that is as fast or the only way allowed."""
    known = _is_plain(module.weight) and type(x) is Tensor and x.dtype == torch.float32
    few = x.numel() < _FEWEST_ROWS * module.in_features
    if not known or few or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, module.weight, module.bias)
    result: Tensor = _Linear.apply(x, module.weight, module.bias)  # type: ignore[no-untyped-call]
    return result


@contextlib.contextmanager
def onednn_linears(modules: Iterable[nn.Linear]) -> Iterator[None]:
    """Let linear layers multiply by oneDNN for as long as the context lasts.

    The backward pass has to run inside too, in case it computes the forward again (gradient
    checkpointing). Nothing of it stays on the layers.

    Args:
        modules: From `find_linears`.
    """
    changed: list[nn.Linear] = []
    try:
        for module in modules:
            vars(module)["forward"] = partial(_forward, module)  # in front of the class's
            changed.append(module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]
