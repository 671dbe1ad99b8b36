"""Look whether weights and optimizer state are worth saving: finite, or the run is lost already.

The gradient of each update is checked, but not what the optimizer makes of it. A learning rate that
is too high or an epsilon that is 0 in float16 leaves NaN, and nobody looks at weights after the
last update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradacc.ranks.split_state import local_part

__all__ = ["find_bad_value", "state_to_save", "weights_to_save"]

NamedTensors = Iterable[tuple[str, Tensor, bool]]
"""Name, tensor, and whether infinities in it are bad."""


def weights_to_save(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the trained weights, this rank's part of each.

    Buffers and frozen weights are left out: no update changed them, and masks hold infinities.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            yield f"the weight {name}", getattr(weight, "ds_tensor", weight), True


def state_to_save(
    optimizer: Any, *, names: Mapping[int, str], masters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield what an optimizer keeps of each weight, and weights that only it holds.

    Args:
        optimizer: The optimizer, in whatever wrappers; or None.
        names: The names of the model's weights, by `id`.
        masters: Float32 values of weights.
    """
    for name, master in masters.items():
        yield f"the float32 value of {name}", master, True
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        for weight in group["params"]:
            name = names.get(id(weight), f"a weight of group {index}")
            if id(weight) not in names:  # DeepSpeed's own float32 parts
                yield name, weight, True
            state = optimizer.state.get(weight) if hasattr(optimizer, "state") else None
            for key, value in (state or {}).items():
                if isinstance(value, Tensor):
                    yield f"{key} of {name} in the optimizer", value, False


def find_bad_value(tensors: NamedTensors) -> str | None:
    """Describe the first tensor that holds NaN, or infinities where those are bad.

    One number per tensor is computed, and read from each device at once.

    >>> find_bad_value([("the weight w", torch.tensor([1.0, torch.nan]), True)])
    'the weight w has 1 NaN of 2 values'
    """
    found: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor, bool]]] = {}
    for name, tensor, is_bounded in tensors:
        for local in _plain_parts(local_part(tensor).detach()):
            if local.is_floating_point() and local.numel() and local.device.type != "meta":
                kind = (local.device, local.dtype)
                found.setdefault(kind, []).append((name, local, is_bounded))
    for named in found.values():
        locals_ = [local for _, local, _ in named]
        largest = torch.stack(list(torch._foreach_norm(locals_, torch.inf)))
        bounded = torch.tensor([is_bounded for *_, is_bounded in named]).to(largest.device)
        is_bad = largest.isnan() | (largest.isinf() & bounded)
        for (name, local, _), bad in zip(named, is_bad.tolist(), strict=True):
            if bad:
                return f"{name} {_counted(local)}"
    return None


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor, or those it is made of: torchao's states hold 8 bits and their scales."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from _plain_parts(getattr(tensor, name))


def _counted(values: Tensor) -> str:
    counts = {"NaN": int(values.isnan().sum()), "infinite": int(values.isinf().sum())}
    parts = [f"{count:,} {kind}" for kind, count in counts.items() if count]
    return f"has {' and '.join(parts)} of {values.numel():,} values"
