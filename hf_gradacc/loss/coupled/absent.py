"""A tensor that has a shape but no values: it stands for what a loss is not supposed to need.

Whatever is computed of it has no values either, and costs no memory. So one run shows whether a
loss depends on a tensor: put an `Absent` in its place, and see whether a number comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["Absent"]

_IN_PLACE = {"__setitem__", "copy_"}


class Absent(Tensor):
    """A tensor without values, on torch's meta device; it names the device it stands for.

    What needs its values raises: reading a number, branching, choosing rows by it, writing it into
    a tensor that has values.

    >>> embeddings = Absent.like(torch.ones(3, 2), device=torch.device("cpu"))
    >>> (embeddings @ torch.ones(2, 5)).shape, type(embeddings.sum()).__name__
    (torch.Size([3, 5]), 'Absent')
    """

    _stands_on: torch.device

    @staticmethod
    def like(tensor: Tensor, *, device: torch.device) -> Absent:
        """Make one of a tensor's shape and dtype.

        Args:
            tensor: Any tensor; its values are not kept.
            device: What ``.device`` answers.
        """
        meta = tensor.detach().as_subclass(Tensor).to("meta")
        absent: Absent = meta.as_subclass(Absent)
        absent._stands_on = device
        return absent

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute shapes alone."""
        kwargs = kwargs or {}
        found = [x for x in _tensors((args, kwargs)) if isinstance(x, Absent)]
        device = found[0]._stands_on
        if func == Tensor.device.__get__:
            return device
        name = getattr(func, "__name__", "")
        writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if (writes and not isinstance(args[0], Absent)) or kwargs.get("out") is not None:
            raise RuntimeError(f"{name} would write what has no values into a tensor that has some")
        if func in (Tensor.cpu, Tensor.cuda):
            return args[0]
        if func is Tensor.to:
            args = tuple("meta" if _is_device(arg) else arg for arg in args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
            return tree_map(lambda x: cls._of(x, device), result) if _tensors(result) else result

    @classmethod
    def _of(cls, result: Any, device: torch.device) -> Any:
        if not isinstance(result, Tensor):
            return result
        absent = result.as_subclass(cls)
        absent._stands_on = device
        return absent


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return value.as_subclass(Tensor).to("meta") if isinstance(value, Tensor) else value


def _is_device(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, (torch.device, int)) and not isinstance(value, bool)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, tree)
    return found
