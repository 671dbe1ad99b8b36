"""A loss that compares rows with each other, exact in any cut: its network runs twice.

Such a loss looks at rows together only in the end, at what the network returned for each: an
embedding, say. So

1. a first pass without gradients records that for every micro-batch, on all ranks;
2. ``compute_loss`` runs once on all rows of the update, and is handed what was recorded in place of
   the network. Its gradient by that is the one of the whole update;
3. a second pass runs each micro-batch again and sends its rows of that gradient backwards.

This is the gradient cache of Gao et al. (arXiv 2101.06983), for losses that nobody has to write
anew. Where the network ends is found by trying, see `hf_gradacc.loss.coupled.cuts`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.errors import MemoryBudgetError
from hf_gradacc.loss.coupled.joint import LeafKey, Part, Recording, joint_loss, recording
from hf_gradacc.loss.coupled.recorded import CallKey, Returned, instead_of, part_of
from hf_gradacc.loss.coupling import Exchange
from hf_gradacc.updates.update import MicroBatch

__all__ = ["Replay"]


class Replay:
    """Couples the rows of an update by what the network returned for each, see `Coupling`.

    Args:
        what: What is recorded.
        numbers_per_row: How many numbers that is.
    """

    def __init__(self, what: Recording, *, numbers_per_row: int) -> None:
        self.what = what
        self.note = (
            f"the loss compares rows with each other, or adds up means over other things than rows "
            f"(LossTerms would do in one pass), so it is taken once over all rows of an "
            f"update, on all ranks. A first pass without gradients keeps {numbers_per_row:,} "
            f"numbers of each row for it; a second computes the gradient of the whole update, in "
            f"the memory of one micro-batch. update_passes = 1 saves the first, and compares only "
            f"rows of one micro-batch."
        )
        self._parts: list[Part] = []
        self._shares: list[float] = []
        self._gradients: list[dict[LeafKey, Tensor]] = []
        self._of_parameters: list[tuple[Tensor, Tensor]] = []
        self._loss = torch.zeros(())
        self._index, self._scale = 0, 1.0
        self._pulls: list[Tensor] = []
        self._did_not_fit = False

    def begin(self) -> None:
        """Forget the last attempt at an update."""
        self._parts, self._shares, self._gradients, self._of_parameters = [], [], [], []

    @contextlib.contextmanager
    def gathering(self, micro_batch: MicroBatch, *, may_end: bool) -> Iterator[None]:
        """Record what the network returns for the rows of a micro-batch.

        Raises:
            LossError: See `recording`.
        """
        parts: list[Part] = []
        try:
            with recording(self.what, micro_batch, may_end=may_end) as parts:
                yield
        finally:
            self._parts += parts

    def couple(self, exchange: Exchange) -> None:
        """Compute the loss of the whole update, and its gradient by what the network returned.

        Raises:
            MemoryBudgetError: If there is no memory for it, the second time.
        """
        alone = exchange == Exchange()
        own = [replace(part, rank=exchange.place) for part in self._parts]
        self._parts = []
        # A loss may draw, and has to draw the same on all ranks.
        seed = int(torch.randint(2**31, ()))
        told = exchange.gather((seed, own if alone else [part.on("cpu") for part in own]))
        parts = [part for _, of_rank in told for part in of_rank]
        if not alone:
            parts = [part.on(self.what.device) for part in parts]
        if not parts:
            return
        start = sum(len(of_rank) for _, of_rank in told[: exchange.place])
        try:
            with torch.random.fork_rng(_devices(self.what.device)):
                torch.manual_seed(told[0][0])
                self._differentiate(parts, own=range(start, start + len(own)))
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if not self._did_not_fit:  # memory may only have been fragmented
                self._did_not_fit = True
                raise
            raise MemoryBudgetError(
                f"out of memory while the loss was taken of {sum(p.num_rows for p in parts)} rows, "
                f"after the network had run ({str(error).splitlines()[0]}).\n  It compares all "
                f"rows of an update with each other, however small micro-batches are. Use a "
                f"smaller effective_batch_size, or update_passes = 1."
            ) from error
        self._did_not_fit = False

    def _differentiate(self, parts: Sequence[Part], *, own: range) -> None:
        loss, handed, order = joint_loss(self.what, parts)
        by = {key: tensor for key, tensor in handed.items() if tensor.requires_grad}
        parameters = _parameters_behind(loss, by.values())
        gradients = torch.autograd.grad(loss, [*by.values(), *parameters], allow_unused=True)
        of_outputs = [(k, g) for k, g in zip(by, gradients, strict=False) if g is not None]
        of_parameters = zip(parameters, gradients[len(by) :], strict=True)
        self._of_parameters = [(p, g) for p, g in of_parameters if g is not None]
        self._loss = loss.detach()
        place_of = {row: place for place, row in enumerate(order)}
        first = 0
        for index, part in enumerate(parts):
            if index in own:
                places = [place_of[first + i] for i in range(part.num_rows)]
                self._shares.append(part.num_rows / len(order))
                self._gradients.append(
                    {key: self._of_part(key, g, places, part) for key, g in of_outputs}
                )
            first += part.num_rows

    def _of_part(self, key: LeafKey, gradient: Tensor, places: Sequence[int], part: Part) -> Tensor:
        """Take a micro-batch's part out of a gradient; of what all rows share, its share."""
        layout, shape = self.what.layout(key), part.outputs[key].shape
        if layout.per_row == 0:
            return gradient * self._shares[-1]
        return part_of(gradient, layout, places, shape, left=self.what.left)

    @contextlib.contextmanager
    def applying(self, index: int, *, scale: float) -> Iterator[None]:
        """Take hold of what the network returns for a micro-batch, to send its gradient back."""
        self._index, self._scale, self._pulls = index, scale, []
        gradients = self._gradients[index]

        def handle(key: CallKey, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            for place, value in enumerate(Returned.of(result).leaves):
                gradient = gradients.get((*key, place))
                if gradient is not None and value.requires_grad:
                    # At once, since a loss may write into it.
                    self._pulls.append(_pull(value, gradient))
            return result

        try:
            with instead_of(self.what.cuts, handle):
                yield
        finally:
            self._pulls = []

    def loss_of(self, own: Tensor) -> Tensor:
        """Return this micro-batch's share of the update's loss, with its part of the gradient.

        Args:
            own: The loss among its own rows. It is thrown away.
        """
        share = self._shares[self._index]
        total = (self._loss * share).to(own.device)
        for pull in self._pulls:
            total = total + pull.to(own.device)
        for parameter, gradient in self._of_parameters:
            total = total + _pull(parameter, gradient * share).to(own.device)
        return total * self._scale

    def metrics(self) -> dict[str, Tensor | float]:
        """Return nothing: the loss says all."""
        return {}


class _Pull(torch.autograd.Function):
    """A zero whose gradient by a tensor is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        dtype = torch.promote_types(value.dtype, torch.float32)
        return torch.zeros((), dtype=dtype, device=value.device)

    @staticmethod
    def backward(ctx: Any, *above: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * above[0]).to(gradient.dtype), None


def _pull(value: Tensor, gradient: Tensor) -> Tensor:
    zero: Tensor = _Pull.apply(value, gradient)  # type: ignore[no-untyped-call]
    return zero


def _parameters_behind(loss: Tensor, known: Any) -> list[Tensor]:
    """Find the tensors that a loss can be differentiated by, but for those that are known.

    A scale, a classifier or centers, of the loss itself or of the model beside its network.
    """
    ids = {id(tensor) for tensor in known}
    found: list[Tensor] = []
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in ids:
            found.append(variable)
        waiting += [behind for behind, _ in node.next_functions]
    return found


def _devices(device: torch.device) -> list[torch.device]:
    return [] if device.type in ("cpu", "mps") else [device]


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
