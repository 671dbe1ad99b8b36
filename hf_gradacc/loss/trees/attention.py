"""Attention over trees, row by row: a row's own tokens attend to the tokens they descend from.

A mask over a whole tree computes a square of which most is masked. Here the own tokens of each row
are the queries of one call and all tokens of the row its keys, so that no more is computed than the
tokens of trees have to attend to. Rows of like size share a call.

For as long as a micro-batch runs, this stands in front of Transformers' ``sdpa`` in its table of
attentions, which is made for that. It takes the calls whose mask is a marker that it knows, and
passes all others on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_gradacc.loss.trees.held import Held, in_front, repeat
from hf_gradacc.updates.update import start_copy

__all__ = [
    "Group",
    "Marker",
    "RowAttention",
    "attending_by_rows",
    "group_rows",
]

_CALL = 4096
"""What one more call costs, in pairs of a query and a key that are computed and masked."""

_NAME = "sdpa"


@dataclass(frozen=True)
class Group:
    """Rows whose attention is computed in one call.

    Attributes:
        queries: Where the own tokens of each row are ``[rows, most own]``; what pads them names
            the last again.
        keys: Where all tokens of each row are ``[rows, most tokens]``, likewise.
        num_own: Own tokens of each row ``[rows]``.
        num_tokens: All tokens of each row ``[rows]``.
        real: Which of the flattened queries pad nothing ``[own tokens of all rows]``.
        num_kept: Tokens that are kept stand in front of those of every row. Its queries see them,
            and they are not among its keys.
    """

    queries: Tensor
    keys: Tensor
    num_own: Tensor
    num_tokens: Tensor
    real: Tensor
    num_kept: int = 0

    @property
    def are_whole(self) -> bool:
        """Whether all tokens of every row are its own."""
        return self.queries.shape == self.keys.shape and not self.num_kept

    def to(self, device: torch.device) -> Group:
        """Copy to a device."""
        names = ("queries", "keys", "num_own", "num_tokens", "real")
        return replace(self, **{name: start_copy(getattr(self, name), device) for name in names})

    def mask(self, *, window: int | None = None, chunk: int | None = None) -> Tensor | None:
        """Return which keys each query sees ``[rows, 1, queries, keys]``; None for those before it.

        Args:
            window: Tokens of the row that a query sees, itself among them.
            chunk: A query sees no token of the row before its chunk of this many.
        """
        widest = self.num_kept + self.keys.shape[1]
        if self.are_whole and all(n is None or n >= widest for n in (window, chunk)):
            return None
        here = self.keys.device
        number = torch.arange(self.queries.shape[1], device=here)
        number = torch.minimum(number, self.num_own[:, None] - 1)
        before = self.num_kept + self.num_tokens - self.num_own
        query = before[:, None] + number  # its place in the row
        query, key = query[:, :, None], torch.arange(widest, device=here)
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        if chunk is not None:
            seen = seen & (query // chunk == key // chunk)
        return seen.unsqueeze(1)


def group_rows(
    paths: Sequence[Sequence[int]], num_own: Sequence[int], *, num_kept: int = 0
) -> tuple[list[Group], Tensor]:
    """Put rows of like size into one call of attention each.

    Args:
        paths: Where the tokens of each row are.
        num_own: How many of them, at its end, are its own; rows without any attend to nothing new.
        num_kept: See `Group`.

    Returns:
        The groups, and where each token is among all queries of theirs ``[tokens]``, one group
        after the other.
    """
    rows = [
        (num_kept + len(path), own, row)
        for row, (path, own) in enumerate(zip(paths, num_own, strict=True))
        if own
    ]
    rows.sort(key=lambda row: (row[0] != row[1], -row[0], -row[1]))
    groups: list[Group] = []
    inside: list[tuple[int, int, int]] = []
    pairs = most_own = most_tokens = 0
    for tokens, own, row in rows:
        wide = max(most_own, own) * max(most_tokens, tokens) * (len(inside) + 1)
        is_whole = tokens == own
        changes = bool(inside) and (inside[0][0] == inside[0][1]) != is_whole
        if inside and (changes or wide - pairs - own * tokens > _CALL):
            groups.append(_make_group(inside, paths, num_kept))
            inside, pairs, most_own, most_tokens = [], 0, 0, 0
        inside.append((tokens, own, row))
        pairs += own * tokens
        most_own, most_tokens = max(most_own, own), max(most_tokens, tokens)
    if inside:
        groups.append(_make_group(inside, paths, num_kept))
    # Counted in the queries of all groups, what pads them included.
    starts = np.cumsum([0, *(group.queries.numel() for group in groups)])
    found = [group.real + int(start) for group, start in zip(groups, starts, strict=False)]
    order = torch.cat([group.queries.reshape(-1)[group.real] for group in groups])
    places = torch.empty_like(order)
    places[order] = torch.cat(found)
    return groups, places


def _make_group(
    rows: Sequence[tuple[int, int, int]], paths: Sequence[Sequence[int]], num_kept: int
) -> Group:
    rows = [(tokens - num_kept, own, row) for tokens, own, row in rows]
    most_tokens, most_own = max(row[0] for row in rows), max(row[1] for row in rows)
    queries = torch.empty(len(rows), most_own, dtype=torch.int64)
    keys = torch.empty(len(rows), most_tokens, dtype=torch.int64)
    for place, (tokens, own, row) in enumerate(rows):
        path = torch.as_tensor(paths[row], dtype=torch.int64)
        keys[place, :tokens], keys[place, tokens:] = path, path[-1]
        queries[place, :own], queries[place, own:] = path[tokens - own :], path[-1]
    num_tokens, num_own = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    real = (torch.arange(most_own) < num_own[:, None]).reshape(-1).nonzero()[:, 0]
    return Group(queries, keys, num_own, num_tokens, real, num_kept)


@dataclass(frozen=True)
class Marker:
    """What stands for the mask of trees in the calls of attention.

    Attributes:
        mask: The mask that is passed through the model: of the right shape, without content.
        groups: The rows, call by call.
        masks: What each group sees.
        places: See `group_rows`.
    """

    mask: Tensor
    groups: Sequence[Group]
    masks: Sequence[Tensor | None]
    places: Tensor

    @cached_property
    def queries(self) -> Tensor:
        """Where the queries of all groups are, one group after the other."""
        return torch.cat([group.queries.reshape(-1) for group in self.groups])

    @cached_property
    def keys(self) -> Tensor:
        """Where their keys are, likewise."""
        return torch.cat([group.keys.reshape(-1) for group in self.groups])


Kept = Mapping[int, tuple[Held, Held]]
"""Keys and values of kept tokens ``[tokens, heads, width]``, by the ``id`` of the attention."""


class RowAttention:
    """Stands in front of an attention: takes the calls that have a marker in place of a mask.

    Args:
        stock: The attention.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self._known: dict[int, tuple[Marker, Kept | None]] = {}
        self._caught: dict[int, list[tuple[Tensor, Tensor, bool]]] | None = None

    def mark(self, marker: Marker, kept: Kept | None = None) -> None:
        """Take the calls with this marker, before the model runs.

        Args:
            marker: What stands for the mask.
            kept: What all rows see in front of their own tokens.
        """
        self._known[_storage_of(marker.mask)] = marker, kept

    @contextlib.contextmanager
    def catching(self) -> Iterator[dict[int, list[tuple[Tensor, Tensor, bool]]]]:
        """Catch the keys and values of all calls that have no marker.

        Yields:
            By the ``id`` of the module that calls: key and value of each call, and whether it ran
            with gradients.
        """
        self._caught = {}
        try:
            yield self._caught
        finally:
            self._caught = None

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend as ``sdpa`` does."""
        marker, kept = self._known.get(_storage_of(attention_mask), (None, None))
        if marker is None or marker.mask.shape != attention_mask.shape:
            if self._caught is not None:
                call = key, value, torch.is_grad_enabled()
                self._caught.setdefault(id(module), []).append(call)
            found: tuple[Tensor, None] = self.stock(
                module, query, key, value, attention_mask, **kwargs
            )
            return found
        held = None if kept is None else kept[id(module)]
        return _attend(self.stock, marker, held, module, query, key, value, **kwargs), None


@contextlib.contextmanager
def attending_by_rows() -> Iterator[RowAttention]:
    """Let ``sdpa`` compute trees row by row for as long as the context lasts.

    Yields:
        What has to be told each marker before the model runs.
    """
    stock: Any = ALL_ATTENTION_FUNCTIONS[_NAME]
    ALL_ATTENTION_FUNCTIONS[_NAME] = attention = RowAttention(stock)
    try:
        yield attention
    finally:
        del ALL_ATTENTION_FUNCTIONS[_NAME]
        if ALL_ATTENTION_FUNCTIONS[_NAME] is not stock:  # somebody had put theirs in front
            ALL_ATTENTION_FUNCTIONS[_NAME] = stock


def _storage_of(mask: Any) -> int:
    """Return what tells a marker's mask from any other; 0 for what is no tensor.

    Layers that are computed again in a backward are given it detached: another object.
    """
    return mask.untyped_storage().data_ptr() if isinstance(mask, Tensor) else 0


def _attend(
    stock: Any,
    marker: Marker,
    kept: tuple[Held, Held] | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Return what each token's query found ``[1, tokens, heads, width]``."""
    if kwargs.get("position_bias") is not None:
        raise ValueError("a learned bias of positions is not one of trees")
    kwargs.pop("is_causal", None)
    groups, places = marker.groups, marker.places
    spread: Any = _Spread.apply
    collect: Any = _Collect.apply
    queries, keys = marker.queries, marker.keys
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    of_keys, of_values = (None, None) if kept is None else kept
    each = zip(
        marker.masks,
        _split(spread(query, queries, places), [group.queries for group in groups]),
        _split(repeat(key, keys), [group.keys for group in groups], of_keys),
        _split(repeat(value, keys), [group.keys for group in groups], of_values),
        strict=True,
    )
    found = [
        stock(module, q, k, v, mask, is_causal=mask is None, **kwargs)[0].flatten(0, 1)
        for mask, q, k, v in each
    ]
    collected: Tensor = collect(torch.cat(found), queries, places)
    return collected.unsqueeze(0)


def _split(states: Tensor, places: Sequence[Tensor], kept: Held | None = None) -> list[Tensor]:
    """Split ``[tokens of all groups, heads, width]`` into ``[rows, heads, seq, width]`` of each.

    Kept tokens are put in front of every row.
    """
    split = torch.split(states, [of_group.numel() for of_group in places])
    parts = [
        part.view(*of_group.shape, *states.shape[1:])
        for part, of_group in zip(split, places, strict=True)
    ]
    if kept is not None:
        parts = [in_front(kept, part) for part in parts]
    return [part.transpose(1, 2) for part in parts]


class _Spread(torch.autograd.Function):
    """Take each token to its place among the queries; what pads those is given the last again.

    Autograd would add gradients up token by token. But each token is one query, and nothing reads
    what a query that pads has found, so that its gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, queries: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return states.index_select(0, queries)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


class _Collect(torch.autograd.Function):
    """The way back: take what each token's query has found to the token."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, queries: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_queries = len(queries)
        return found.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.num_queries, *grad.shape[1:])
        return whole.index_copy_(0, places, grad), None, None
