"""Measure how much of an optimizer's step is lost in rounding to bfloat16 or float16 weights.

An optimizer that steps on such weights says nothing of it. So its step is tried once in float32, on
some of the weights and with copies of its state, and compared with what rounding leaves of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["measure_lost_share", "sample_weights", "share_lost"]

_MOST_VALUES = 4_000_000


def share_lost(before: Tensor, after: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return what rounding loses of a step, and the step: both squared, along the step itself.

    With s the step and r what is left of it, ``1 - <r, s> / <s, s>`` is the lost share. Weights
    that do not move lose all of their step; one that moves by more than it should loses less than
    nothing, which makes up for some of those.

    Args:
        before: The weights, exact in `dtype`; float32.
        after: The same after the step; float32.
        dtype: What they are rounded to.

    >>> before, after = torch.ones(4), torch.tensor([1.001, 1.001, 1.001, 1.0078125])
    >>> lost, step = share_lost(before, after, torch.bfloat16)
    >>> round(lost / step, 3)
    0.047
    """
    step = (after - before).double()
    left = (after.to(dtype).float() - before).double()
    return float(((step - left) * step).sum()), float(step.square().sum())


def sample_weights(weights: Sequence[Parameter]) -> list[Parameter]:
    """Take some weights from all depths, at most a few million values, but at least one tensor."""
    if not weights:
        return []
    room = _MOST_VALUES
    taken = []
    stride = max(1, len(weights) // 16)
    # Every 16th part of the model first, then what is left.
    order = sorted(range(len(weights)), key=lambda i: (i % stride, i))
    for i in order:
        if weights[i].numel() <= room:
            taken.append(weights[i])
            room -= weights[i].numel()
    return taken or [min(weights, key=lambda p: p.numel())]


def measure_lost_share(optimizer: Any, weights: Sequence[Parameter]) -> float | None:
    """Try the optimizer's next step in float32, and return the share that rounding loses.

    Weights, gradients and the optimizer's state are as before when it returns.

    Args:
        optimizer: About to step; gradients are there.
        weights: Low-precision weights to try it on.

    Returns:
        The share, from 0 (nothing is lost) to 1; None if the optimizer could not be tried, or does
        not move these weights.
    """
    sample = sample_weights([p for p in weights if p.grad is not None])
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [(p, p.grad, p.grad_dtype) for p in everything]
    before = [(p, p.data, optimizer.state.get(p)) for p in sample]
    chosen = {id(p) for p in sample}
    try:
        for p, gradient, _ in gradients:
            p.grad = None  # an optimizer leaves such weights out
            if id(p) in chosen:
                p.data = p.data.float()
                p.grad_dtype = torch.float32
                p.grad = gradient.float()
        for p, _, state in before:
            if state is not None:
                optimizer.state[p] = {key: _widened(value) for key, value in state.items()}
        step = type(optimizer).step
        getattr(step, "__wrapped__", step)(optimizer)  # without the hooks of others
        parts = [share_lost(low.float(), p.data, low.dtype) for p, low, _ in before]
    except Exception:  # an optimizer of an unknown kind; the step itself will say what is wrong
        return None
    finally:
        for p, low, state in before:
            p.grad = None
            p.data = low
            if state is None:
                optimizer.state.pop(p, None)
            else:
                optimizer.state[p] = state
        for p, gradient, dtype in gradients:
            p.grad = None
            p.grad_dtype = dtype
            p.grad = gradient
    lost, whole = (sum(values) for values in zip(*parts, strict=True)) if parts else (0.0, 0.0)
    return max(0.0, lost / whole) if whole > 0 else None


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float32, copy=True)
    return copy.deepcopy(value)
