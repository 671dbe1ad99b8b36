"""What the tokens of trees see, as each implementation of attention wants to be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

from hf_gradacc.loss.trees.attention import Marker
from hf_gradacc.loss.trees.layout import Trees

__all__ = ["ATTENTIONS", "takes_rows", "tree_masks", "why_no_masks"]

ATTENTIONS = ("eager", "sdpa", "flex_attention")
"""Implementations of attention that take a mask of any shape."""

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def tree_masks(
    trees: Trees,
    config: Any,
    *,
    dtype: torch.dtype,
    mark: Callable[[Marker], None] | None = None,
) -> Any:
    """Make the masks of trees, as a model's body takes them.

    Args:
        trees: On the device of the model.
        config: The configuration of the body: its attention, windows, kinds of layers.
        dtype: What the model computes in.
        mark: From `attending_by_rows`, if attention is computed row by row.

    Returns:
        One mask ``[trees, 1, width, width]``, or a flex attention's of that shape; or one for each
        kind of layer, where the configuration names kinds.
    """
    makes: dict[str, Callable[[], Any]] = {
        _FULL: lambda: make(),
        _SLIDING: lambda: make(window=config.sliding_window),
        _CHUNKED: lambda: make(chunk=config.attention_chunk_size),
    }

    def make(**limits: int | None) -> Any:
        if mark is not None and trees.groups and config._attn_implementation == "sdpa":
            marker = _marker(trees, **limits)
            mark(marker)
            return marker.mask
        return _mask(trees, config, dtype=dtype, **limits)

    kinds = _kinds_of_layers(config)
    if kinds and kinds != [_FULL]:
        return {kind: makes[kind]() for kind in kinds}
    # A window that the configuration names is nobody's where all layers are named as full.
    window = None if kinds else getattr(config, "sliding_window", None)
    return makes[_FULL if window is None else _SLIDING]()


def _kinds_of_layers(config: Any) -> list[str]:
    """Return the kinds of layers that a configuration names, none if it names none."""
    return sorted(set(getattr(config, "layer_types", None) or ()))


def takes_rows(config: Any) -> bool:
    """Return whether trees may stand in one row: no mask over all of them has to be computed."""
    return str(getattr(config, "_attn_implementation", "")) in ("sdpa", "flex_attention")


def why_no_masks(config: Any) -> str:
    """Return why masks of trees cannot be made for a body, empty if they can."""
    attention = str(getattr(config, "_attn_implementation", "") or "no attention")
    if attention not in ATTENTIONS:
        return f"{attention} takes no mask of any shape: use sdpa, flex_attention or eager"
    others = [k for k in _kinds_of_layers(config) if k not in (_FULL, _SLIDING, _CHUNKED)]
    if others:
        return (
            f"its layers of {', '.join(others)} carry a state from one token to the next, or "
            f"choose what they attend to"
        )
    return ""


def _marker(trees: Trees, *, window: int | None = None, chunk: int | None = None) -> Marker:
    assert trees.places is not None
    num_trees, width = trees.ids.shape
    mask = torch.ones((), dtype=torch.bool, device=trees.ids.device)
    masks = [group.mask(window=window, chunk=chunk) for group in trees.groups]
    return Marker(mask.expand(num_trees, 1, width, width), trees.groups, masks, trees.places)


def _mask(
    trees: Trees,
    config: Any,
    *,
    window: int | None = None,
    chunk: int | None = None,
    dtype: torch.dtype,
) -> Any:
    ends, positions = trees.ends, trees.positions
    num_trees, width = ends.shape

    def sees(tree: Any, _: Any, i: Any, j: Any) -> Any:
        seen = (j <= i) & (i < ends[tree, j])
        # Windows and chunks count along the row, that is from the root, not over the tree.
        if window is not None:
            seen = seen & (positions[tree, i] - positions[tree, j] < window)
        if chunk is not None:
            seen = seen & (positions[tree, i] // chunk == positions[tree, j] // chunk)
        return seen

    if config._attn_implementation == "flex_attention":
        return create_block_mask(sees, num_trees, None, width, width, device=ends.device)
    every = torch.arange(num_trees, device=ends.device)[:, None, None]
    place = torch.arange(width, device=ends.device)
    seen = sees(every, None, place[:, None], place[None, :]).unsqueeze(1)
    if config._attn_implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )
