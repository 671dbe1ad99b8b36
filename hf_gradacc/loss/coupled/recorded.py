"""What a network returned for each row: recorded in one run, joined over runs, taken apart again.

A *cut* is a callable between the network and its loss: a module, or a method of the trainer. Its
calls are told apart by their order. A call returns tensors, in whatever structure; how the rows lie
in each is a `RowLayout`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from hf_gradacc.updates.batch import widen

__all__ = [
    "CallKey",
    "Cut",
    "Returned",
    "RowLayout",
    "instead_of",
    "join_outputs",
    "layout_of",
    "part_of",
    "returned_by",
]

CallKey = tuple[int, int]
"""Which cut, and which of its calls in one forward."""


@dataclass(frozen=True)
class Cut:
    """A callable that is an attribute of an object.

    Attributes:
        owner: The object.
        name: The attribute.
    """

    owner: Any
    name: str

    @staticmethod
    def of(module: nn.Module) -> Cut:
        """Cut at the outputs of a module, as its callers see them: behind its hooks."""
        is_compiled = module._compiled_call_impl is not None
        return Cut(module, "_compiled_call_impl" if is_compiled else "_call_impl")


@dataclass(frozen=True)
class Returned:
    """What one call returned, taken apart.

    Attributes:
        leaves: Tensors, and whatever else lies between them.
        spec: How they are put together.
    """

    leaves: list[Any]
    spec: TreeSpec

    @staticmethod
    def of(result: Any) -> Returned:
        """Take apart dictionaries, lists, tuples and the outputs of transformers' models."""
        return Returned(*tree_flatten(result))


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a micro-batch lie in the first dimension of a tensor.

    Attributes:
        per_row: Entries of each row; 0 if the tensor is the same for all rows.
        interleaved: The entries of a row follow each other. Otherwise all first entries come first.
    """

    per_row: int = 1
    interleaved: bool = False

    def by_row(self, tensor: Tensor, num_rows: int) -> Tensor:
        """Reshape ``[rows * per_row, ...]`` to ``[rows, per_row, ...]``."""
        rest = tensor.shape[1:]
        if self.interleaved:
            return tensor.reshape(num_rows, self.per_row, *rest)
        return tensor.reshape(self.per_row, num_rows, *rest).transpose(0, 1)

    def merged(self, by_row: Tensor) -> Tensor:
        """Undo `by_row`.

        >>> layout = RowLayout(per_row=2)
        >>> layout.merged(layout.by_row(torch.arange(6), 3)).tolist()
        [0, 1, 2, 3, 4, 5]
        """
        order = by_row if self.interleaved else by_row.transpose(0, 1)
        return order.reshape(-1, *by_row.shape[2:])


@contextlib.contextmanager
def instead_of(
    cuts: Sequence[Cut], handle: Callable[[CallKey, Callable[..., Any], Any, Any], Any]
) -> Iterator[None]:
    """Hand the calls of cuts to a function; calls inside of such a call are left alone.

    Args:
        cuts: What is called.
        handle: Called with the call's key, the callable itself, and its arguments by position and
            by name; returns what the caller gets.
    """
    counts, is_inside = [0] * len(cuts), False
    originals = [getattr(cut.owner, cut.name) for cut in cuts]

    def make(index: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside
            if is_inside:
                return originals[index](*args, **kwargs)
            key = (index, counts[index])
            counts[index] += 1
            is_inside = True
            try:
                return handle(key, originals[index], args, kwargs)
            finally:
                is_inside = False

        return call

    before = [vars(cut.owner).get(cut.name) for cut in cuts]
    for index, cut in enumerate(cuts):
        vars(cut.owner)[cut.name] = make(index)
    try:
        yield
    finally:
        for cut, own in zip(cuts, before, strict=True):
            if own is None:
                vars(cut.owner).pop(cut.name, None)
            else:
                vars(cut.owner)[cut.name] = own


def returned_by(cuts: Sequence[Cut], run: Callable[[], Any]) -> dict[CallKey, Returned]:
    """Run something, and return what the calls of cuts returned meanwhile."""
    found: dict[CallKey, Returned] = {}

    def handle(key: CallKey, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        found[key] = Returned.of(result)
        return result

    with instead_of(cuts, handle):
        run()
    return found


def layout_of(
    whole: Tensor, parts: Sequence[Tensor], sizes: Sequence[int], *, tolerance: float
) -> RowLayout | None:
    """Find how rows lie in what a call returned, from all rows together and from some at a time.

    Args:
        whole: Of all rows.
        parts: Of some of them, in their order.
        sizes: Rows of each part.
        tolerance: How far apart two values may be by rounding alone, relative to the largest.

    Returns:
        The layout; None if what one row got depends on the others.

    >>> pairs = torch.tensor([1.0, 2.0, -1.0, -2.0])
    >>> layout_of(pairs, [pairs[::2], pairs[1::2]], [1, 1], tolerance=0.0)
    RowLayout(per_row=2, interleaved=False)
    """
    num_rows = sum(sizes)
    if all(part.shape == whole.shape and _alike(part, whole, tolerance) for part in parts):
        return RowLayout(per_row=0)
    if whole.ndim == 0 or len(whole) == 0 or len(whole) % num_rows:
        return None
    per_row = len(whole) // num_rows
    if any(part.ndim != whole.ndim or len(part) != size * per_row
           for part, size in zip(parts, sizes, strict=True)):  # fmt: skip
        return None
    for interleaved in (False, True):
        layout = RowLayout(per_row, interleaved)
        joined = join_outputs(parts, sizes, layout, range(num_rows))
        if joined.shape == whole.shape and _alike(joined, whole, tolerance):
            return layout
    return None


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.dtype != b.dtype or not a.is_floating_point():
        return torch.equal(a, b)
    finite = b.double().nan_to_num(0, 0, 0) if b.device.type != "mps" else b.nan_to_num(0, 0, 0)
    largest = float(finite.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * largest, equal_nan=True)


def join_outputs(
    parts: Sequence[Tensor],
    sizes: Sequence[int],
    layout: RowLayout,
    order: Sequence[int],
    *,
    left: bool = False,
) -> Tensor:
    """Put what several forwards returned together, as one of all their rows would return it.

    Args:
        parts: What each returned; narrower ones are widened by zeros.
        sizes: Rows of each.
        layout: How they lie.
        order: Which row comes at each place; rows are counted over the parts.
        left: Widen in front.
    """
    if layout.per_row == 0:
        return parts[0]
    shape = [max(sizes_) for sizes_ in zip(*(part.shape[1:] for part in parts), strict=True)]
    by_row = torch.cat(
        [
            layout.by_row(widen(part, shape, fill=0, left=left), size)
            for part, size in zip(parts, sizes, strict=True)
        ]
    )
    return layout.merged(by_row[torch.as_tensor(list(order)).to(by_row.device)])


def part_of(
    joined: Tensor, layout: RowLayout, places: Sequence[int], like: torch.Size, *, left: bool
) -> Tensor:
    """Take the rows of one forward out again.

    Args:
        joined: Laid out as `join_outputs` does.
        layout: How rows lie.
        places: Where the rows are among all of them.
        like: The shape that the forward returned.
        left: Padding was put in front.
    """
    if layout.per_row == 0:
        return joined
    by_row = layout.by_row(joined, len(joined) // layout.per_row)
    part = layout.merged(by_row[torch.as_tensor(list(places)).to(by_row.device)])
    for dim, width in enumerate(like[1:], start=1):
        start = part.shape[dim] - width if left else 0
        part = part.narrow(dim, start, width)
    return part
