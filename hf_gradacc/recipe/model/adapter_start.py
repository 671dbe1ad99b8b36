"""LoRA that begins as a part of the base's weights (PiSSA, OLoRA), and what is saved of it.

Such an adapter takes `s·B0·A0` out of each weight, and trains from there: the model is
`W - s·B0·A0 + s·B·A`. Loaded on the base as it is, as `W + s·B·A`, that would be another model.
peft's own loading takes the same part out again, which costs a decomposition of each weight, and is
wrong where that draws at random (`pissa_niter_4`). So the final adapter is saved as plain LoRA of
twice the rank, `W + s·[B, -B0]·[A; A0]`, which is the trained model on the base as it is.
Checkpoints hold A and B alone, since a resumed run takes B0 and A0 out of the base again.

peft has this too (`path_initial_model_for_weight_conversion`), through a folder for the initial
adapter; but it drops `modules_to_save` and the magnitudes of DoRA.
"""

from __future__ import annotations

import contextlib
import copy
import re
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a recipe is checked with this file, before torch is needed
    from torch import Tensor

__all__ = ["keep_start", "needs_data", "needs_weights", "plain_when_saved"]

_starts: weakref.WeakKeyDictionary[Any, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def needs_weights(kind: Any) -> bool:
    """Whether `init_lora_weights` decomposes the base's weights.

    >>> [needs_weights(kind) for kind in ("pissa", "pissa_niter_4", "olora", "gaussian", True)]
    [True, True, True, False, False]
    """
    return isinstance(kind, str) and (
        kind.lower() in ("olora", "mica", "loftq", "orthogonal") or _is_pissa(kind)
    )


def needs_data(kind: Any) -> bool:
    """Whether `init_lora_weights` measures the model on rows, which peft leaves to a script.

    >>> [needs_data(kind) for kind in ("eva", "corda", "lora_ga", "pissa")]
    [True, True, True, False]
    """
    return isinstance(kind, str) and kind.lower() in ("eva", "corda", "lora_ga")


def keep_start(model: Any) -> None:
    """Note A0 and B0 of an adapter that took them out of the base; none of other adapters.

    Args:
        model: A model that peft has just wrapped. Copies go to the host's memory.
    """
    kind = model.peft_config["default"].init_lora_weights
    if isinstance(kind, str) and (kind.lower() == "olora" or _is_pissa(kind)):
        _starts[model] = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in model.named_parameters()
            if re.search(r"\.lora_[AB]\.", name)
        }


@contextlib.contextmanager
def plain_when_saved(model: Any) -> Iterator[None]:
    """Let a model save its adapter as plain LoRA of the base as it is.

    Args:
        model: The unwrapped model. One whose adapter took nothing out of the base saves as ever.
    """
    start = _starts.get(model)
    if start is None:
        yield
        return
    save, config = model.save_pretrained, model.peft_config["default"]

    def save_plain(folder: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        state = model.state_dict() if state_dict is None else state_dict
        model.peft_config["default"] = _twice_as_wide(config)
        try:
            save(folder, *args, state_dict=_beside_start(state, start), **kwargs)
        finally:
            model.peft_config["default"] = config

    model.save_pretrained = save_plain
    try:
        yield
    finally:
        del model.save_pretrained


def _is_pissa(kind: str) -> bool:
    return re.fullmatch(r"pissa(_niter_\d+)?", kind) is not None


def _beside_start(state: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay each A over A0, and each B beside -B0."""
    import torch

    joined = dict(state)
    for name, first in start.items():
        now = state[name]
        first = first.to(now.device, now.dtype)
        is_a = ".lora_A." in name
        joined[name] = torch.cat([now, first]) if is_a else torch.cat([now, -first], dim=1)
    return joined


def _twice_as_wide(config: Any) -> Any:
    """The config of that adapter: as many more ranks, at the same scale."""
    wide = copy.deepcopy(config)
    # Scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
    more = 2**0.5 if config.use_rslora else 2
    wide.init_lora_weights = True
    wide.r, wide.lora_alpha = 2 * config.r, more * config.lora_alpha
    wide.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    wide.alpha_pattern = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
    return wide
