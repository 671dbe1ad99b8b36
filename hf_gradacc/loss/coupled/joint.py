"""The loss of rows that ran in several forwards, from what the network returned in each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from hf_gradacc.errors import LossError
from hf_gradacc.loss.coupled.absent import Absent
from hf_gradacc.loss.coupled.recorded import (
    CallKey,
    Cut,
    Returned,
    RowLayout,
    instead_of,
    join_outputs,
)
from hf_gradacc.loss.coupling import ForwardEnded
from hf_gradacc.updates.batch import PAD_VALUES, can_slice_rows, order_blocks, slice_rows
from hf_gradacc.updates.recut import join_rows
from hf_gradacc.updates.update import MicroBatch

__all__ = ["Leaf", "LeafKey", "Part", "Recording", "joint_loss", "recording"]

LeafKey = tuple[int, int, int]
"""Which cut, which of its calls, and which of what that returned."""


@dataclass(frozen=True)
class Leaf:
    """One thing that a call returns.

    Attributes:
        layout: How rows lie in a tensor; None for anything else.
        needs_gradient: Whether the network can be trained through it.
        constant: What to hand out if it is no tensor.
        sizes: Of the dimensions behind the rows; None for one as wide as the inputs.
    """

    layout: RowLayout | None
    needs_gradient: bool = False
    constant: Any = None
    sizes: tuple[int | None, ...] = ()


@dataclass
class Recording:
    """What is recorded, and how the loss is computed from it.

    Attributes:
        cuts: Where the network ends.
        specs: How what each call returns is put together.
        leaves: What each call returns.
        compute: Returns the loss of collated inputs.
        device: Where the model runs.
        left: Padding goes in front.
        wrappers: Returns the cuts of wrappers around the model, each with what to call instead.
        unused: Outputs that the loss does not need.
        unused_inputs: Inputs that it does not need, beside the network.
    """

    cuts: list[Cut]
    specs: dict[CallKey, TreeSpec]
    leaves: dict[LeafKey, Leaf]
    compute: Callable[[Mapping[str, Any]], Tensor]
    device: torch.device
    left: bool = False
    wrappers: Callable[[], list[tuple[Cut, Any]]] = list
    unused: set[LeafKey] = field(default_factory=set)
    unused_inputs: set[str] = field(default_factory=set)

    def layout(self, key: LeafKey) -> RowLayout:
        """Return how rows lie in a tensor that is recorded."""
        layout = self.leaves[key].layout
        assert layout is not None
        return layout

    def tensors(self) -> list[LeafKey]:
        """List what is a tensor, used or not."""
        return [key for key, leaf in self.leaves.items() if leaf.layout is not None]

    def called_otherwise(self) -> LossError:
        """Return the error for a forward that does not do what the one that was watched did."""
        names = ", ".join(dict.fromkeys(type(cut.owner).__name__ for cut in self.cuts))
        return LossError(
            f"the loss compares rows with each other, and for this micro-batch it does not call "
            f"{names} as it did for the rows it was asked with: as often, and for outputs of the "
            f"same structure. Set update_passes = 1 to compare only rows of one micro-batch."
        )


@dataclass(frozen=True)
class Part:
    """What one forward of the first pass left behind.

    Attributes:
        num_rows: Its rows.
        rows_per_sequence: See `MicroBatch`.
        rows: Dataset indices of the rows, empty if they are not known.
        places: Their places in the rank's share, likewise.
        inputs: Collated inputs; those that the loss does not need have no values.
        outputs: What the network returned, likewise.
        rank: Whose share that is.
    """

    num_rows: int
    rows_per_sequence: int
    rows: tuple[int, ...]
    places: tuple[int, ...]
    inputs: dict[str, Any]
    outputs: dict[LeafKey, Tensor]
    rank: int = 0

    def on(self, device: str | torch.device) -> Part:
        """Move what has values to a device."""

        def moved(value: Any) -> Any:
            has_values = isinstance(value, Tensor) and value.device.type != "meta"
            return value.to(device) if has_values else value

        return replace(
            self,
            inputs={key: moved(value) for key, value in self.inputs.items()},
            outputs={key: moved(value) for key, value in self.outputs.items()},
        )


@contextlib.contextmanager
def recording(
    what: Recording, micro_batch: MicroBatch, *, may_end: bool = False
) -> Iterator[list[Part]]:
    """Record what the network returns inside; the list holds it afterwards.

    Args:
        what: What to record.
        micro_batch: What runs inside.
        may_end: End the forward by `ForwardEnded` after the last call.

    Raises:
        LossError: If the rows of the micro-batch cannot be told apart, or the network is called
            otherwise than it was.
    """
    outputs: dict[LeafKey, Tensor] = {}
    seen: set[CallKey] = set()
    parts: list[Part] = []

    def handle(key: CallKey, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        returned = Returned.of(result)
        if key not in what.specs or returned.spec != what.specs[key]:
            raise what.called_otherwise()
        seen.add(key)
        for place, value in enumerate(returned.leaves):
            leaf = (*key, place)
            if what.leaves[leaf].layout is not None:
                # A copy: a slice would keep all of what it was cut from.
                is_used = leaf not in what.unused
                outputs[leaf] = value.detach().clone() if is_used else _without_values(value)
        if may_end and len(seen) == len(what.specs):
            raise ForwardEnded
        return result

    try:
        with instead_of(what.cuts, handle):
            yield parts
    except ForwardEnded:
        parts.append(_part(what, micro_batch, outputs))
        raise
    if len(seen) != len(what.specs):
        raise what.called_otherwise()
    parts.append(_part(what, micro_batch, outputs))


def _part(what: Recording, micro_batch: MicroBatch, outputs: dict[LeafKey, Tensor]) -> Part:
    n, per_sequence = micro_batch.num_sequences, micro_batch.rows_per_sequence
    if per_sequence is None or not can_slice_rows(
        micro_batch.inputs, n, rows_per_sequence=per_sequence
    ):
        raise LossError(
            f"the loss compares rows with each other, and the {n} rows of a micro-batch cannot be "
            f"told apart in what the data collator returned. Return tensors of one entry a row, or "
            f"set update_passes = 1 to compare only rows of one micro-batch."
        )
    for key, output in outputs.items():
        per_row, sizes = what.layout(key).per_row, what.leaves[key].sizes
        fits = all(want in (None, have) for want, have in zip(sizes, output.shape[1:], strict=True))
        if per_row and (len(output) != n * per_row or not fits):
            raise what.called_otherwise()
    inputs = {
        key: _without_values(value)
        if key in what.unused_inputs and isinstance(value, Tensor)
        else value
        for key, value in micro_batch.inputs.items()
    }
    rows, places = micro_batch.rows, micro_batch.places
    return Part(
        n,
        per_sequence,
        tuple(rows) if len(rows) == n else (),
        tuple(places) if len(places) == n else (),
        inputs,
        outputs,
    )


def joint_loss(
    what: Recording, parts: Sequence[Part]
) -> tuple[Tensor, dict[LeafKey, Tensor], list[int]]:
    """Compute the loss of all rows at once, with what was recorded in place of the network.

    Args:
        what: What was recorded.
        parts: Of all rows, in an order that is the same on all ranks.

    Returns:
        The loss; what it was handed, to be differentiated by; and which row stands at each place,
        rows being counted over the parts.

    Raises:
        LossError: If it needs what was not recorded.
    """
    sizes, order = [part.num_rows for part in parts], _order(parts)
    handed: dict[LeafKey, Tensor] = {}
    results: dict[CallKey, list[Any]] = {key: [] for key in what.specs}
    for key, leaf in what.leaves.items():
        value: Any = leaf.constant
        if leaf.layout is not None:
            outputs = [part.outputs[key] for part in parts]
            value = join_outputs(outputs, sizes, leaf.layout, order, left=what.left)
            if key in what.unused:
                value = Absent.like(value, device=what.device)
            else:
                value = handed[key] = value.detach().requires_grad_(leaf.needs_gradient)
        results[key[:2]].append(value)

    def handle(key: CallKey, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if key not in results:
            raise what.called_otherwise()
        is_real = [isinstance(v, Tensor) and not isinstance(v, Absent) for v in results[key]]
        # Copies, since a loss may write into them.
        values = [v.clone() if real else v for v, real in zip(results[key], is_real, strict=True)]
        return tree_unflatten(values, what.specs[key])

    with contextlib.ExitStack() as stack:
        for wrapper, inner in what.wrappers():
            stack.enter_context(instead_of([wrapper], _calling(inner)))
        stack.enter_context(instead_of(what.cuts, handle))
        loss = what.compute(_joined_inputs(what, parts, order))
    if isinstance(loss, Absent) or loss.device.type == "meta":
        raise LossError(
            "the loss of this update needs of its rows what it did not need of those it was asked "
            "with, so that was not kept. Set update_passes = 1 to compare only rows of one "
            "micro-batch."
        )
    return loss, handed, order


def _calling(inner: Any) -> Callable[..., Any]:
    """Call the model inside of a wrapper, without what the wrapper does for other ranks."""

    def handle(key: CallKey, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    return handle


def _order(parts: Sequence[Part]) -> list[int]:
    """Order the rows of all parts alike, however they were cut: by their places in the dataset.

    Rows of a stream have none. They stay in the order of their rank's share.
    """
    has_rows = all(part.rows for part in parts)
    keys: list[tuple[int, ...]] = []
    for index, part in enumerate(parts):
        for i in range(part.num_rows):
            row = part.rows[i] if has_rows else 0
            keys.append((row, part.rank, part.places[i] if part.places else 0, index, i))
    return sorted(range(len(keys)), key=keys.__getitem__)


def _joined_inputs(what: Recording, parts: Sequence[Part], order: Sequence[int]) -> dict[str, Any]:
    fills = {
        key: next((fill for name, fill in PAD_VALUES.items() if key.endswith(name)), 0)
        for key in parts[0].inputs
    }
    per_sequence, sizes = parts[0].rows_per_sequence, [part.num_rows for part in parts]
    joined = join_rows([part.inputs for part in parts], fills=fills, left=what.left)
    joined = order_blocks(joined, sizes, rows_per_sequence=per_sequence)
    joined = slice_rows(joined, order, rows_per_sequence=per_sequence)
    return {
        key: Absent.like(value, device=what.device)
        if isinstance(value, Tensor) and value.device.type == "meta"
        else value
        for key, value in joined.items()
    }


def _without_values(value: Tensor) -> Tensor:
    return value.detach().to("meta")
