"""List where the host would wait for a device, during one whole update.

There is no accelerator in the tests. So it is followed which tensors would lie on the host: what is
made without a device, what was read back, and what is computed from these. Noted is each call of a
trainer that reads numbers of any other tensor, or moves one of these in a way that is waited for.
What a model does in its own forward is left out.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from hf_gradacc import GradAccTrainer
from hf_gradacc.ranks import collectives, outcome
from hf_gradacc.trainer import runner, step
from hf_gradacc.updates import update

from .tiny import make_trainer, ragged_rows, tiny_llama

__all__ = ["HostWaits", "count_of_update"]

_READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero", "equal"}
_FACTORIES = {"tensor", "as_tensor", "zeros", "ones", "full", "empty", "arange"}
_MODULES = (collectives, outcome, runner, step)
"""All that call `start_copy`."""


class HostWaits(TorchFunctionMode):
    """Notes each call of ours, of the stock loop's or of accelerate's, by place and kind."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._on_host: dict[int, Tensor] = {}  # by storage; kept, so that no address comes again
        self._patches = contextlib.ExitStack()

    def start(self) -> None:
        """Begin to listen, and let copies that are not waited for be other tensors."""
        for module in _MODULES:
            if hasattr(module, "start_copy"):
                self._patches.enter_context(mock.patch.object(module, "start_copy", _moved))
        self._patches.enter_context(mock.patch.object(update, "start_copy", _moved))
        self.__enter__()

    def stop(self) -> None:
        """Listen no more."""
        self.__exit__(None, None, None)
        self._patches.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _moving:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_host = all(self._is_host(x) for x in tensors) if tensors else False
        has_device = "device" in kwargs or any(isinstance(x, torch.device) for x in args)
        waits = name in _READS and tensors and not is_host
        if has_device and not kwargs.get("non_blocking"):
            waits |= name in ("tensor", "as_tensor") or (name == "to" and is_host)
        if waits and (place := _caller()):
            self.places[f"{place}: {name}"] += 1
        out = func(*args, **kwargs)
        is_made_here = name in _FACTORIES and not tensors and not has_device
        if name == "cpu" or is_made_here or (is_host and not has_device):
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self._on_host[_address(x)] = x
        return out

    def _is_host(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._on_host


def _address(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()


_moving: list[bool] = []


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    _moving.append(True)
    try:
        return value.clone()
    finally:
        _moving.pop()


def _caller() -> str:
    """Name the function that called torch, if it is of a trainer; nothing inside of a forward."""
    frame = sys._getframe(2)
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    name = f"{path.stem}.{frame.f_code.co_name}"
    ours = {"hf_gradacc", "accelerate"} & {*path.parts}
    if ours or path.name in ("trainer.py", Path(__file__).name):
        while frame is not None:
            if frame.f_code.co_name == "forward" or frame.f_code.co_name == "shape":
                return ""  # of the model; or the layout, which happens on the CPU
            frame = frame.f_back
        return name
    return ""


class _OfOneUpdate(TrainerCallback):
    def __init__(self) -> None:
        self.waits = HostWaits()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.waits.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.waits.stop()


class Reads(GradAccTrainer):
    """Reads the loss of each micro-batch."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        float(loss)
        return loss


def count_of_update(*, size: int, reads: bool = False, **options: Any) -> dict[str, int]:
    """Train; return where the host would wait during the second update, and how often.

    Args:
        size: Rows of a micro-batch, of 12 in an update.
        reads: Let a subclass read each loss.
        **options: Training arguments.
    """
    callback = _OfOneUpdate()
    with tempfile.TemporaryDirectory() as out:
        make_trainer(
            out,
            ragged_rows(24, seed=3),
            model=tiny_llama(attn_implementation="sdpa", use_cache=False),
            callbacks=[callback],
            trainer_class=Reads if reads else GradAccTrainer,
            effective_batch_size=12,
            per_device_train_batch_size=size,
            logging_strategy="no",
            max_grad_norm=1.0,
            **options,
        ).train()
    return dict(callback.waits.places)
