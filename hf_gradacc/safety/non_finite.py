"""Name what made an update NaN or infinite: micro-batch, dataset rows, first bad tensor.

A search during training would make the accelerator wait after every micro-batch. So it begins only
after the update's single check has failed: the micro-batches run again, one by one and from the
same random state, and every module's output and every gradient is examined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradacc.updates.update import MicroBatch

__all__ = ["describe_rows", "find_bad_tensor"]


def find_bad_tensor(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    run: Callable[[MicroBatch], Tensor],
) -> str | None:
    """Run micro-batches again until something is NaN or infinite, and describe it.

    Args:
        model: The bare model; its gradients are deleted.
        micro_batches: This rank's share of the update.
        run: Runs forward and backward of one micro-batch; returns its loss.

    Returns:
        A sentence that names micro-batch, rows and tensor; None if each micro-batch is finite.
    """
    for name, weight in model.named_parameters():
        if not _is_finite(weight):
            return f"the weight {name} {_kind(weight)} before the update began"
    for i, micro_batch in enumerate(micro_batches):
        found: list[str] = []
        for parameter in model.parameters():
            parameter.grad = None
        with _watching(model, found):
            loss = run(micro_batch)
        if not _is_finite(loss):
            # The gradients came after the loss, and are bad because the loss is.
            found = [text for text in found if not text.startswith("the gradient")]
            found.append(f"the loss {_kind(loss)}")
        elif not any(text.startswith("the gradient") for text in found):
            continue  # some models use infinities inside, without harm
        first = _bad_input(micro_batch.inputs) or found[0]
        where = f"micro-batch {i + 1} of {len(micro_batches)}"
        return f"in {where} ({describe_rows(micro_batch)}) {first}"
    return None


def describe_rows(micro_batch: MicroBatch, *, most: int = 16) -> str:
    """Name the dataset rows of a micro-batch.

    >>> from hf_gradacc.updates.targets import TargetCounts
    >>> describe_rows(MicroBatch({}, TargetCounts(), 2, 9, 0, rows=(4, 17)))
    'rows 4, 17 of the dataset'
    """
    rows = micro_batch.rows
    if not rows:
        return f"{micro_batch.num_sequences} rows of a stream, which have no index"
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:most]))}{more} of the dataset"


@contextmanager
def _watching(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Record the first module with a bad output, then the first bad gradient, as computed."""
    handles: list[Any] = []

    def after_forward(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            bad = None if found else _first_bad(output)
            if bad is not None:
                kind = f"{type(module).__name__} {name}" if name else type(module).__name__
                found.append(f"the output of {kind} {_kind(bad)}")

        return hook

    def after_backward(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            known = any(text.startswith("the gradient") for text in found)
            if gradient is not None and not known and not _is_finite(gradient):
                found.append(f"the gradient of {name} {_kind(gradient)}")

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(after_forward(name)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            on_accumulated: Any = parameter.register_post_accumulate_grad_hook
            handles.append(on_accumulated(after_backward(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bad_input(inputs: Any) -> str | None:
    for key, value in inputs.items() if hasattr(inputs, "items") else ():
        if isinstance(value, Tensor) and not _is_finite(value):
            return f"the input {key} {_kind(value)}"
    return None


def _first_bad(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return None if _is_finite(output) else output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return next((bad for item in output if (bad := _first_bad(item)) is not None), None)
    return None


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    return bool(torch.isfinite(value.detach()).all())


def _kind(value: Tensor) -> str:
    value = value.detach()
    nans, total = int(torch.isnan(value).sum()), value.numel()
    infinities = int(torch.isinf(value).sum())
    if total == 1:
        return "is NaN" if nans else "is infinite"
    counts = [f"{nans} NaN"] * bool(nans) + [f"{infinities} infinite"] * bool(infinities)
    return f"has {' and '.join(counts)} of {total} values"
