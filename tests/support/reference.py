"""What an update's gradient must be, computed without a line of the package.

``reference_gradient`` pads all rows of the update together, runs the model once in float64 and
differentiates the model's own loss: torch's mean over every target. The broken variants below it
are the mistakes people make; a test that cannot tell them from the truth proves nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Batch = dict[str, Tensor]
Gradient = dict[str, Tensor]


class EverythingInFloat64(TorchFunctionMode):
    """Turn each request for float32 into one for float64.

    Transformers' losses call ``logits.float()``, norms ``.to(torch.float32)``, softmaxes
    ``dtype=torch.float32``; left alone, a float64 test would see errors of 1e-8 everywhere and
    could not tell a wrong weight of one part in a million from rounding.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


@contextlib.contextmanager
def float64_everywhere() -> Iterator[None]:
    """Run a block with float64 as the default and the only floating dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with EverythingInFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


def gradient_of(model: nn.Module) -> Gradient:
    """A copy of the gradient of every parameter that has one."""
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss: the mean over the targets of ``batch``."""
    outputs = model(**batch)
    return outputs["loss"] if isinstance(outputs, dict) else outputs[0]


def weighted_gradient(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: Sequence[float],
    *,
    loss_of: Callable[[nn.Module, Batch], Tensor] = model_loss,
) -> Gradient:
    """The gradient of ``sum(weight * loss(batch))``; leaves no gradient behind."""
    model.zero_grad(set_to_none=True)
    for batch, weight in zip(batches, weights, strict=True):
        (loss_of(model, batch) * weight).backward()
    gradient = gradient_of(model)
    model.zero_grad(set_to_none=True)
    return gradient


def reference_gradient(
    model: nn.Module,
    rows: Sequence[Any],
    collator: Callable[[list[Any]], Batch],
    *,
    loss_of: Callable[[nn.Module, Batch], Tensor] = model_loss,
) -> Gradient:
    """The gradient of the whole update: padded together, one forward, one backward."""
    return weighted_gradient(model, [dict(collator(list(rows)))], [1.0], loss_of=loss_of)


def share_weighted_gradient(
    model: nn.Module, batches: Sequence[Batch], counts: Sequence[int]
) -> Gradient:
    """``sum_i (n_i / N) * loss_i`` over a given cut: what a router loss can be exact against."""
    total = sum(counts)
    return weighted_gradient(model, batches, [count / total for count in counts])


# The mistakes: each takes a cut and its true counts, and is wrong in one way.


def mean_of_means(model: nn.Module, batches: Sequence[Batch], counts: Sequence[int]) -> Gradient:
    """Every micro-batch weighs the same, whatever it holds."""
    return weighted_gradient(model, batches, [1 / len(batches)] * len(batches))


def sum_of_means(model: nn.Module, batches: Sequence[Batch], counts: Sequence[int]) -> Gradient:
    """Nothing divides: the gradient is as many times too large as there are micro-batches."""
    return weighted_gradient(model, batches, [1.0] * len(batches))


def unshifted_count(model: nn.Module, batches: Sequence[Batch], counts: Sequence[int]) -> Gradient:
    """Counts the first label of each row, which a causal LM never predicts."""
    wrong = [int((batch["labels"] != -100).sum()) for batch in batches]
    return share_weighted_gradient(model, batches, wrong)


def world_size_forgotten(
    model: nn.Module, batches: Sequence[Batch], counts: Sequence[int], *, world_size: int = 2
) -> Gradient:
    """Ranks average their gradients and nobody multiplies by their number."""
    total = sum(counts) * world_size
    return weighted_gradient(model, batches, [count / total for count in counts])


def relative_error(actual: Gradient, expected: Gradient) -> float:
    """``|actual - expected| / |expected|`` over all parameters; a missing gradient is zeros."""
    difference = torch.zeros((), dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    for name in actual.keys() | expected.keys():
        left, right = actual.get(name), expected.get(name)
        if left is None or right is None:
            present = right if left is None else left
            assert present is not None
            difference += present.double().square().sum()
            size += present.double().square().sum() if left is None else 0.0
            continue
        difference += (left.double() - right.double()).square().sum()
        size += right.double().square().sum()
    return float((difference / size).sqrt())


def scale(actual: Gradient, expected: Gradient) -> float:
    """The least-squares multiplier of ``expected`` in ``actual``: 1 is right, 4 is GA times."""
    dot = sum(
        float((actual[n].double() * g.double()).sum()) for n, g in expected.items() if n in actual
    )
    return dot / sum(float(g.double().square().sum()) for g in expected.values())


def assert_same_updates(
    actual: Sequence[Gradient], expected: Sequence[Gradient], *, tolerance: float = 1e-12
) -> None:
    """Compare update by update, relative to the largest entry: symmetry leaves some with none."""
    assert len(actual) == len(expected) > 0
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.keys() == theirs.keys()
        scale = max(float(gradient.abs().max()) for gradient in theirs.values())
        assert scale > 0
        for name, gradient in theirs.items():
            assert float((mine[name] - gradient).abs().max()) <= tolerance * scale, name
