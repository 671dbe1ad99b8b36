"""Let an optimizer step on float32 values of bfloat16 and float16 weights.

A bfloat16 weight of 0.02 has neighbours 1.2e-4 away. An AdamW step at a learning rate of 1e-5 is a
twelfth of that, so rounding gives the old weight back, update after update. Here the step is taken
in float32 and rounded afterwards: the float32 value is kept as a master weight, or rounding goes up
or down at random such that its mean is the float32 value.

While the optimizer steps, each weight *is* its float32 value: ``weight.data`` is exchanged, and so
optimizer, parameter groups and tied weights stay as they are, and the optimizer's state is float32
from its first step on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["LowPrecisionUpdates", "Rounding", "choose_rounding", "round_at_random", "state_values"]

Rounding = Literal["master", "stochastic", "plain"]
"""What becomes of a step: kept in float32, rounded at random, or taken in the weight's type."""

_LARGEST_SHARE = 0.5

# Optimizer state per trainable weight, in values; Adam keeps two moments.
_STATES = {"adamw": 2, "adam": 2, "adafactor": 0, "sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}
_STATES["muon"] = 1  # of matrices; it steps on the others as AdamW does


class LowPrecisionUpdates:
    """Exchanges low-precision weights for float32 ones around each step of an optimizer.

    Args:
        optimizer: A torch optimizer; hooks around its ``step`` do the work.
        weights: The weights to exchange, by name.
        keeps_masters: Keep the float32 values from step to step. Otherwise they are made for each
            step, and rounded at random.
        seed: Returns the seed for the rounding of the step that has just been taken. It must be the
            same on ranks that hold the same weights.
    """

    def __init__(
        self,
        optimizer: Any,
        weights: Mapping[str, Parameter],
        *,
        keeps_masters: bool,
        seed: Callable[[], int],
    ) -> None:
        self.optimizer = optimizer
        self.weights = dict(weights)
        self.keeps_masters = keeps_masters
        self._seed = seed
        self._masters: dict[str, Tensor] = {}
        self._low: dict[str, Tensor] = {}
        for weight in self.weights.values():  # what an optimizer makes before its first step
            state = optimizer.state.get(weight) or {}
            state.update({k: v.float() for k, v in state.items() if _is_low(v)})
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._widen(only_with_gradient=True)),
            optimizer.register_step_post_hook(lambda *_: self._round()),
        ]

    def detach(self) -> None:
        """Let the optimizer step on the weights themselves again."""
        for handle in self._handles:
            handle.remove()
        for weight in self.weights.values():
            if weight.grad is None:
                weight.grad_dtype = weight.dtype

    @contextlib.contextmanager
    def widened(self) -> Iterator[None]:
        """Let weights be float32 meanwhile: an optimizer loads its state in their type."""
        self._widen(only_with_gradient=False)
        try:
            yield
        finally:
            self.undo()

    def undo(self) -> None:
        """Give weights back the values and the type they had before a step that failed."""
        for name, low in self._low.items():
            self.weights[name].data = low
        self._low.clear()

    def masters(self) -> dict[str, Tensor]:
        """Return the float32 value of every weight, by name."""
        return {name: self._wide(name) for name in self.weights} if self.keeps_masters else {}

    def load_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Take float32 values for weights that are rounded from them; others keep their own."""
        for name, weight in self.weights.items():
            if name in masters and masters[name].shape == weight.shape:
                self._masters[name] = masters[name].to(weight.device, torch.float32)

    def _widen(self, *, only_with_gradient: bool) -> None:
        for name, weight in self.weights.items():
            gradient = weight.grad
            if only_with_gradient and gradient is None:
                continue
            wide = self._wide(name)
            self._low[name] = weight.data
            weight.grad = None  # torch compares its type with that of the weight
            weight.data = wide
            weight.grad_dtype = torch.float32
            if gradient is not None:
                weight.grad = gradient.to(torch.float32)

    def _round(self) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for name, low in self._low.items():
            weight = self.weights[name]
            if self.keeps_masters:
                low.copy_(weight.data)
            else:
                if low.device not in generators:
                    generators[low.device] = torch.Generator(low.device)
                    generators[low.device].manual_seed(self._seed())
                low.copy_(round_at_random(weight.data, low.dtype, generators[low.device]))
            weight.data = low
        self._low.clear()

    def _wide(self, name: str) -> Tensor:
        """Return the float32 value of a weight; what others wrote into the weight counts."""
        low = self.weights[name].detach()
        master = self._masters.get(name)
        if master is None or master.device != low.device:
            master = low.to(torch.float32, copy=True)
        else:
            # A comparison on the host would make it wait for the device.
            unchanged = master.to(low.dtype) == low
            master = torch.where(unchanged, master, low.to(torch.float32), out=master)
        if self.keeps_masters:
            self._masters[name] = master
        return master


def round_at_random(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 values up or down, with chances that make the mean the value itself.

    Args:
        values: Float32, of any shape. NaN and infinities stay what they are.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        generator: Draws the chances, on the device of the values.

    Returns:
        The rounded values, in `dtype`.

    >>> third = torch.full((100_000,), 1 + 1 / 256)  # halfway between two bfloat16 numbers
    >>> rounded = round_at_random(third, torch.bfloat16, torch.Generator().manual_seed(0))
    >>> sorted(set(rounded.tolist())), round(rounded.float().mean().item(), 4)
    ([1.0, 1.0078125], 1.0039)
    """
    info = torch.finfo(dtype)
    # The distance between neighbours is a power of 2, so dividing by it and multiplying are exact.
    exponent = torch.frexp(values).exponent - 1
    exponent.clamp_(min=round(torch.tensor(info.tiny).log2().item()))
    spacing = torch.ldexp(torch.full_like(values, info.eps), exponent)
    scaled = values / spacing
    below = scaled.floor()
    chance = torch.rand(values.shape, generator=generator, device=values.device)
    rounded = (below + (chance < scaled - below)) * spacing
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def state_values(optimizer: str) -> int:
    """Return how many values an optimizer keeps for each weight, by its name in ``optim``.

    >>> state_values("adamw_torch_fused"), state_values("sgd")
    (2, 0)
    """
    return next((n for name, n in _STATES.items() if name in optimizer), 2)


def choose_rounding(*, num_weights: int, optimizer: str, free_bytes: int | None) -> Rounding:
    """Choose what ``low_precision_updates = "auto"`` stands for.

    Master weights, if gradients summed in float32, float32 optimizer state and the masters take at
    most half of the memory that is free once the weights are there. The other half is left for
    activations, and an update that does not fit there is cut finer. If memory is short, or unknown,
    the optimizer steps on the weights as they are.

    Args:
        num_weights: Trainable weights of low precision.
        optimizer: Its name in ``optim``.
        free_bytes: Free memory of the device; None if it is unknown.

    >>> choose_rounding(num_weights=10**9, optimizer="adamw_torch", free_bytes=40 * 10**9)
    'master'
    >>> choose_rounding(num_weights=10**9, optimizer="adamw_torch", free_bytes=20 * 10**9)
    'plain'
    """
    needed = num_weights * 4 * (2 + state_values(optimizer))
    return "plain" if free_bytes is None or needed > _LARGEST_SHARE * free_bytes else "master"
