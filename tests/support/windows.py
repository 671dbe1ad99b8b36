"""Small windows for tiny models, so that rows are longer than what a token sees."""

from __future__ import annotations

from typing import Any

from .zoo_configs import CONFIG_MAPPING, _defaults

__all__ = ["windows_of"]

_WIDTHS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
_WIDTHS += ("sliding_window_size", "attention_window_size", "keep_window_size", "index_topk")
_WIDTHS += ("floor_scale", "index_block_size")


def windows_of(model_type: str, width: int) -> dict[str, Any]:
    """Return fields that give a model windows and chunks of some tokens, where it has any."""
    fields = _defaults(CONFIG_MAPPING[model_type])
    found: dict[str, Any] = {name: width for name in _WIDTHS if name in fields}
    if "use_sliding_window" in fields:
        found |= {"use_sliding_window": True}
    if "max_window_layers" in fields:
        found |= {"max_window_layers": 1}
    return found
