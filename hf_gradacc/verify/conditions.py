"""Under what conditions `hf_gradacc.verify` compares gradients: nothing random, little rounding."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers.utils import logging

from hf_gradacc.loss.asking.ask import held_in_mode

__all__ = ["compared_in", "own_log_level", "without_autocast", "without_dropout"]


@contextlib.contextmanager
def own_log_level() -> Iterator[None]:
    """Restore Transformers' verbosity, which every trainer sets from its arguments."""
    before = logging.get_verbosity()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode even where a trainer calls ``model.train()``."""
    with held_in_mode(model, training=False):
        model.train = lambda mode=True: model  # type: ignore[method-assign]
        try:
            yield
        finally:
            del model.train


@contextlib.contextmanager
def without_autocast(arguments: Any) -> Iterator[Any]:
    """A copy of a run's arguments without mixed precision, and Accelerate's state to match.

    That state is one per process and refuses another precision; it is put back afterwards for the
    trainer the user may have made before.
    """
    if arguments.mixed_precision == "no":
        yield arguments
        return
    plain = copy.copy(arguments)
    plain.bf16 = plain.fp16 = False
    plain.mixed_precision = "no"
    shared = AcceleratorState._shared_state
    before = dict(shared)
    shared.clear()
    try:
        yield plain
    finally:
        shared.clear()
        shared.update(before)


@contextlib.contextmanager
def compared_in(model: nn.Module) -> Iterator[torch.dtype]:
    """Hold half-precision weights in float32 for a while, unless their kernels refuse it.

    A cast from bfloat16 or float16 to float32 and back loses nothing. Quantized weights stay, and
    so does a model with flash attention, which takes half precision only.
    """
    own = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    half = own & {torch.bfloat16, torch.float16}
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    stays = "flash" in attention or any(not p.is_floating_point() for p in model.parameters())
    if not half or stays:
        yield min(own, key=lambda dtype: torch.finfo(dtype).bits)
        return
    tensors = [*model.parameters(), *model.buffers()]
    before = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in half]
    for tensor, _ in before:
        tensor.data = tensor.data.float()
    try:
        yield torch.float32
    finally:
        for tensor, dtype in before:
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)
