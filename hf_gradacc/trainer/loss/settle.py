"""Turn what ``compute_loss`` returned into the loss that the stock step divides: terms, couplings.

A `LossTerms` is weighed term by term. Where rows are coupled, the second pass puts the loss that
its gradient is taken of in the place of the micro-batch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.loss.added_mean import AddedMean
from hf_gradacc.loss.coupling import Coupling
from hf_gradacc.loss.terms import LossTerms
from hf_gradacc.ranks.collectives import sum_over_ranks

__all__ = ["LossSettler", "collecting", "settled"]


class LossSettler:
    """Weighs the terms of the micro-batch that runs, and adds them up for the log.

    Attributes:
        added: A mean over tokens that a trainer behind the mixin adds to one over pairs.
        weights: What each term of this micro-batch is multiplied by; None to leave its own loss.
        coupling: What rows are coupled by, while a micro-batch of the second pass runs.
        seen: The terms that were returned last; None if it was a plain loss.
        returned: All that were returned since it was emptied, None for a plain loss; None itself
            if nobody asks.
    """

    def __init__(self) -> None:
        self.added: AddedMean | None = None
        self.weights: dict[str, float | Tensor] | None = None
        self.coupling: Coupling | None = None
        self.seen: LossTerms | None = None
        self.returned: list[LossTerms | None] | None = None
        self._depth = 0
        self._of_attempt: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}  # of this rank, since the last log row
        self._figures: dict[str, float | Tensor] = {}  # of all ranks, since then
        self._num_updates = 0

    def call_behind(self, compute: Callable[[], Any]) -> Any:
        """Call the ``compute_loss`` behind the mixin; see `call`."""
        if self.added is None:
            return self.call(compute)
        return self.call(partial(self.added.take_apart, compute))

    def call(self, compute: Callable[[], Any]) -> Any:
        """Call a ``compute_loss``, and return a tensor where it returned terms.

        Of several around each other, the innermost that sees terms weighs them, and the outermost
        has the last word.
        """
        if self._depth == 0:
            self.seen = None
        self._depth += 1
        try:
            result = compute()
        finally:
            self._depth -= 1
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        if isinstance(loss, LossTerms):
            self.seen, loss = loss, self._weigh(loss)
        if self._depth == 0:
            if self.returned is not None:
                self.returned.append(self.seen)
            if self.coupling is not None:
                loss = self.coupling.loss_of(loss)
        return (loss, *outputs) if isinstance(result, tuple) else loss

    def _weigh(self, terms: LossTerms) -> Tensor:
        if self.weights is None:
            return terms.own_loss()
        parts = terms.weighed(self.weights)
        for name, part in parts.items():
            part = part.detach()
            before = self._of_attempt.get(name)
            self._of_attempt[name] = part if before is None else before + part.to(before.device)
        total = torch.zeros((), device=terms.value_of(next(iter(terms))).device)
        for part in parts.values():
            total = total + part.to(total.device)
        return total

    # ---- the log -------------------------------------------------------------------------------

    def begin_attempt(self) -> None:
        """Forget the terms of an attempt that failed."""
        self._of_attempt, self.weights = {}, None

    def end_update(self, coupling: Coupling | None) -> None:
        """Take what the update's last attempt added up into the log row."""
        self.weights = None
        for name, value in self._of_attempt.items():
            before = self._sums.get(name)
            self._sums[name] = value if before is None else before + value
        self._of_attempt = {}
        if coupling is not None:
            for key, figure in coupling.metrics().items():
                self._figures[key] = self._figures.get(key, 0.0) + figure
        self._num_updates += 1

    def hand_over(self, trainer: Any) -> dict[str, float]:
        """Return the means over the updates since the last row; at most one collective.

        Args:
            trainer: The trainer; what its loss is made of is the same on all ranks.
        """
        n, device = self._num_updates, trainer.args.device
        row = {key: float(figure) / n for key, figure in self._figures.items()} if n else {}
        names = [] if trainer.facts is None else [term.name for term in trainer.facts.terms]
        if names and n:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            zero = torch.zeros((), dtype=dtype, device=device)
            own = [self._sums.get(name, zero).to(device, dtype) for name in names]
            sums = sum_over_ranks(torch.stack(own), device=device).tolist()
            row |= {f"loss/{name}": value / n for name, value in zip(names, sums, strict=True)}
        self._sums, self._figures, self._num_updates = {}, {}, 0
        return row


def settled(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Let a subclass's ``compute_loss`` return terms, and a second pass replace its loss."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._loss_settler.call(lambda: compute_loss(self, *args, **kwargs))

    return wrapped


@contextlib.contextmanager
def collecting(settler: LossSettler) -> Iterator[list[LossTerms | None]]:
    """Collect the terms that are returned inside."""
    before, settler.returned = settler.returned, []
    try:
        yield settler.returned
    finally:
        settler.returned = before
