"""What couples the rows of an update, so that its loss is no mean over them: two passes.

The experts of a mixture are balanced over all tokens, each row of a contrastive loss is compared
with all others. Such a loss needs little of the whole update: which share of the tokens each expert
has, or the embeddings of all rows. A first pass without gradients gathers that, over all
micro-batches and ranks; given it, a second computes the gradient of each micro-batch by itself, and
the gradients add up exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hf_gradacc.updates.update import MicroBatch

__all__ = ["Coupling", "Exchange", "ForwardEnded"]


class ForwardEnded(Exception):  # noqa: N818 - no error
    """Ends a forward of the first pass: all that couples its rows has been gathered."""


@dataclass(frozen=True)
class Exchange:
    """How the ranks put together what each has gathered; every rank makes the same calls.

    Attributes:
        add_up: Sums a tensor of one shape over all ranks.
        gather: Collects a picklable object of each; those of ranks that train the same rows once.
        place: This rank's place in what `gather` returns.
    """

    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gather: Callable[[Any], list[Any]] = lambda own: [own]
    place: int = 0


class Coupling(Protocol):
    """Gathers what couples rows in a first pass, and puts it to use in a second.

    The micro-batches that have a weight are gathered in their order, and applied in the same.
    Forwards of both passes begin with the same random state, and `gathering` runs without
    gradients. One that has an attribute ``watched``, a sequence of parameters, is checked by their
    gradients, too.
    """

    @property
    def note(self) -> str:
        """Say in plain words what is done and what it costs. Told before training."""

    def begin(self) -> None:
        """Forget the last attempt at an update."""

    def gathering(self, micro_batch: MicroBatch, *, may_end: bool) -> AbstractContextManager[None]:
        """Watch the forward of a micro-batch in the first pass.

        Args:
            micro_batch: The micro-batch, as collated.
            may_end: The forward may be ended by `ForwardEnded` once all is gathered. It may not if
                it has collectives that other ranks wait in.
        """

    def couple(self, exchange: Exchange) -> None:
        """Put together what all ranks have gathered; some may have no micro-batch.

        Called once between the passes, with gradients enabled.
        """

    def applying(self, index: int, *, scale: float) -> AbstractContextManager[None]:
        """Let a micro-batch of the second pass know of the whole update.

        Args:
            index: Which of those gathered on this rank.
            scale: What this micro-batch's part of the update's loss is to be multiplied by. The
                loss of the micro-batch is divided by it before the backward.
        """

    def loss_of(self, own: Tensor) -> Tensor:
        """Return what to run the backward of, for a loss that was computed while applying."""

    def metrics(self) -> dict[str, Tensor | float]:
        """Return figures of the whole update for the log, the same on all ranks; on the device."""
