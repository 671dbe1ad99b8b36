"""Put rows that were collated one by one under one another, as their collator would have.

What a collator pads with, and on which side, is learned from the collator: a narrow row collated
alone is compared with the same row beside a wider one, under the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_gradacc.updates.batch import labels_of, slice_rows, widen

__all__ = ["CannotJoin", "Joiner", "same_values"]


class CannotJoin(Exception):  # noqa: N818  (no user sees it: it is told in one line)
    """Collated rows cannot be put together; says why."""


class Joiner:
    """Joins batches of one row each.

    Attributes:
        paddings: What each feature is padded with, and whether in front, as far as learned.
    """

    def __init__(self) -> None:
        self.paddings: dict[str, tuple[Any, bool]] = {}

    def __call__(
        self, parts: Sequence[Mapping[str, Any]], beside: Callable[[int, int], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Join rows.

        Args:
            parts: What the collator made of each row alone.
            beside: Collates row ``i`` in front of row ``j``, under the seed of row ``i``.

        Returns:
            One batch: tensors and lists end to end, everything else as it is in each part.

        Raises:
            CannotJoin: If the collator does something else, or its padding is no one value.
        """
        if any(part.keys() != parts[0].keys() for part in parts):
            raise CannotJoin("rows have different features")
        unknown = [key for key in _ragged(parts) if key not in self.paddings]
        if unknown:
            self._learn(unknown, parts, beside)
        return {key: self._join(key, [part[key] for part in parts]) for key in parts[0]}

    def _join(self, key: str, values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor) and first.ndim:
            shape = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]
            fill, left = self.paddings.get(key, (0, False))
            return torch.cat([widen(v, shape, fill=fill, left=left) for v in values])
        if isinstance(first, list):
            return [item for value in values for item in value]
        if all(same_values(first, value) for value in values[1:]):
            return first
        raise CannotJoin(f"each row has a `{key}` of its own, and a batch has one")

    def _learn(
        self,
        keys: list[str],
        parts: Sequence[Mapping[str, Any]],
        beside: Callable[[int, int], Mapping[str, Any]],
    ) -> None:
        """Learn how features are padded, from up to four narrow rows beside the widest."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {key: [] for key in keys}
        for key in keys:
            sizes = [part[key][0].numel() for part in parts]
            widest = max(range(len(parts)), key=sizes.__getitem__)
            narrow = [i for i in range(len(parts)) if sizes[i] < sizes[widest]][:4]
            for i in narrow:
                together = slice_rows(beside(i, widest), [0], rows_per_sequence=len(parts[i][key]))
                for other in keys:
                    seen[other].append((parts[i][other], together[other]))
        found = {key: _paddings_that_fit(seen[key]) for key in keys}
        agree = [sum(fits[left][1] for fits in found.values() if left in fits) for left in (0, 1)]
        for key, fits in found.items():
            if fits:
                left = agree[1] > agree[0] if len(fits) == 2 else 1 in fits
                self.paddings[key] = (fits[int(left)][0], bool(left))
        for key in found.keys() - self.paddings.keys():
            self.paddings[key] = self._masked_padding(key, parts[0], seen[key])

    def _masked_padding(
        self, key: str, part: Mapping[str, Any], pairs: list[tuple[Tensor, Tensor]]
    ) -> tuple[Any, bool]:
        """Return the commonest value in padding that holds several, if a mask hides them all.

        A collator may draw for padding, too. Labels are not hidden by a mask.
        """
        mask = part.get("attention_mask")
        fill, left = self.paddings.get("attention_mask", (1, False))
        is_hidden = fill == 0 and isinstance(mask, Tensor) and mask.shape == part[key].shape
        if not is_hidden or key == labels_of(part)[0]:
            raise CannotJoin(f"`{key}` is not padded with one value")
        padding = torch.cat([wide[_padding_in(wide, alone, left=left)] for alone, wide in pairs])
        return padding.mode().values.item(), left


def _ragged(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the features whose rows have different shapes."""
    ragged = []
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        if not all(type(value) is type(first) for value in values):
            raise CannotJoin(f"`{key}` has several types")
        if not isinstance(first, Tensor):
            continue
        if any(v.ndim != first.ndim or v.dtype != first.dtype for v in values):
            raise CannotJoin(f"`{key}` has several ranks or dtypes")
        if first.ndim and any(v.shape[1:] != first.shape[1:] for v in values):
            ragged.append(key)
    return ragged


def _paddings_that_fit(pairs: list[tuple[Tensor, Tensor]]) -> dict[int, tuple[Any, float]]:
    """Return what may pad a feature: by side (1 in front), the value and how well rows agree.

    Args:
        pairs: A row alone, and the same row beside a wider one.
    """
    fits: dict[int, tuple[Any, float]] = {}
    for left in (0, 1):
        fills: list[Tensor] = []
        agree = 0.0
        for alone, wide in pairs:
            if alone.ndim != wide.ndim or any(
                a > w for a, w in zip(alone.shape, wide.shape, strict=True)
            ):
                continue
            is_padding = _padding_in(wide, alone, left=bool(left))
            fills.append(wide[is_padding])
            same = wide[~is_padding].eq(alone.reshape(-1))
            agree += float(same.float().mean()) if alone.numel() else 0.0
        padding = torch.cat(fills) if fills else torch.empty(0)
        if padding.numel() and bool(padding.eq(padding[0]).all()):
            fits[left] = (padding[0].item(), agree)
    return fits


def _padding_in(wide: Tensor, alone: Tensor, *, left: bool) -> Tensor:
    """Return where a row beside a wider one is padding, as booleans."""
    own = [
        slice(w - a, w) if left else slice(0, a)
        for a, w in zip(alone.shape[1:], wide.shape[1:], strict=True)
    ]
    is_padding = torch.ones_like(wide, dtype=torch.bool)
    is_padding[(slice(None), *own)] = False
    return is_padding


def same_values(a: Any, b: Any) -> bool:
    """Compare two values, whatever they are made of."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b) if a.shape == b.shape else _same_but_for_padding(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_values, a, b))
    return bool(a == b)


def _same_but_for_padding(a: Tensor, b: Tensor) -> bool:
    narrow, wide = (a, b) if a.numel() < b.numel() else (b, a)
    return any(agree == 1.0 for _, agree in _paddings_that_fit([(narrow, wide)]).values())
