"""How much a forward keeps for its backward: the model's own forward is asked, without values.

torch's fake tensors have shapes and types and no memory. A forward over them hands every tensor
that the backward will need to a hook, which adds up their sizes. Layers of one stack keep alike, so
the first two are run and the others are counted.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["kept_for_backward"]


def kept_for_backward(
    model: Any, *, tokens: int, compute: torch.dtype | None = None
) -> tuple[int, int] | None:
    """Return the bytes that a model below its head keeps of one row, and those of one layer.

    Args:
        model: On the meta device, with adapters if it trains some; it is taken apart.
        tokens: Length of the row. What is kept grows with it in proportion.
        compute: The type that autocast computes in; None without.

    Returns:
        Both figures; None if the model is not one stack of layers, or cannot run without values.
    """
    stack = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=None)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    if stack is None or len(stack) != layers or layers < 2 or model.config.is_encoder_decoder:
        return None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            del stack[2:]
            model.to_empty(device="cpu")
            model.train()
            two = _run(model, tokens=tokens, compute=compute, layers=2)
            del stack[1:]
            one = _run(model, tokens=tokens, compute=compute, layers=1)
    except Exception:  # a forward that looks at values, or wants other inputs
        return None
    return one + (layers - 1) * (two - one), two - one


def _run(model: Any, *, tokens: int, compute: torch.dtype | None, layers: int) -> int:
    """Run the model below its head, and add up what it keeps that is no weight of its own."""
    model.config.get_text_config().num_hidden_layers = layers
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its number is not given again
        return tensor

    casting = contextlib.nullcontext() if compute is None else torch.autocast("cpu", compute)
    with casting, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    return sum(storage.nbytes() for storage in kept.values())
