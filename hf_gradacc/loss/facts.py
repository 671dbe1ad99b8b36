"""What asking finds out about a loss, and how close two answers have to be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hf_gradacc.loss.class_weights import ClassWeights
from hf_gradacc.loss.coupling import Coupling
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.update import MicroBatch

__all__ = [
    "Compared",
    "LossFacts",
    "TermFacts",
    "Weighing",
    "differ",
    "gradients_differ",
    "have_moved",
    "rounding_of",
]

Compared = Literal["loss", "rows_gradient", "shortcut", "isolation", "update_gradient"]
"""What two evaluations are compared by; `rounding_of` says how far apart they may be.

- ``loss``: the loss of rows together and of each by itself, with padding and without.
- ``rows_gradient``: the gradient of the last parameters, of rows together and of each by itself.
- ``shortcut``: a loss or hidden states computed another way.
- ``isolation``: hidden states computed the same way beside other neighbours, which may not reach
  them. Rounding is zero but for a mixture of experts, whose batches are then composed otherwise.
- ``update_gradient``: all of an update's gradient, accumulated and at once (`verify_parity`).
"""

# Relative. Most losses of transformers are computed in float32 even if the model is float64.
_ROUNDING: dict[str, dict[torch.dtype, float]] = {
    kind: dict(
        zip((torch.float64, torch.float32, torch.float16, torch.bfloat16), limits, strict=True)
    )
    for kind, limits in {
        "loss": (5e-7, 2e-5, 2e-2, 4e-2),
        "rows_gradient": (5e-5, 2e-3, 1e-1, 1e-1),
        "shortcut": (1e-6, 5e-5, 5e-3, 3e-2),
        "isolation": (1e-7, 1e-5, 1e-3, 5e-3),
        "update_gradient": (1e-6, 1e-4, 2e-2, 5e-2),
    }.items()
}


Weighing = Literal["mean", "sum", "micro_batch", "terms"]
"""How the losses of micro-batches make up that of their update.

- ``mean``: each is a mean over its targets and weighs as many of them as it has.
- ``sum``: each is a sum, and they add up.
- ``micro_batch``: nothing is known, and each weighs alike, as in the stock Trainer.
- ``terms``: each has several terms, which are weighed one by one, see `TermFacts`.
"""


@dataclass(frozen=True)
class TermFacts:
    """What one term of a loss is divided by, see `hf_gradacc.loss.terms.LossTerms`.

    Attributes:
        name: Its name.
        facts: What was found out about it; None if it says its own count.
        is_sum: It says its count, and is not divided by it yet.
    """

    name: str
    facts: LossFacts | None
    is_sum: bool = False

    def size_of(self, micro_batch: MicroBatch, said: Mapping[str, float]) -> float:
        """What a micro-batch's part is a mean over, or is to be divided by.

        Args:
            micro_batch: The micro-batch.
            said: What the trainer counted for terms that say their count.
        """
        return said[self.name] if self.facts is None else self.facts.size_of(micro_batch)

    def weight(self, size: float, *, of: float) -> float:
        """What a micro-batch's term is multiplied by, to be its part of the update's.

        Args:
            size: Of the micro-batch, see `size_of`.
            of: Of the whole update, over all ranks.
        """
        if self.facts is not None and self.facts.weighing == "sum":
            return 1.0
        if size == 0:
            return 0.0
        return 1 / of if self.is_sum else size / of


@dataclass(frozen=True)
class LossFacts:
    """What was found out about a loss.

    Attributes:
        rule: What its targets are.
        weighing: Whether it is a mean over them, a sum, or neither as far as is known.
        wants_own_count: It must be called with ``num_items_in_batch`` set to its own targets to be
            a mean; otherwise it is called with None.
        pad_to_one_width: Padding changes its value, so an update's micro-batches need one width.
        draws: It draws random numbers in every forward.
        class_weights: It is a mean over the weights of its targets; None if all weigh alike.
        terms: Its terms, if they are weighed one by one.
        coupling: What couples rows, and takes an update in two passes; None if nothing does.
        misfit: In plain words, how far the losses of rows are from adding up; empty if they do.
        rule_error: Relative difference between the loss of rows together and the weighted mean of
            the loss of each.
        padding_error: Relative difference that padding made.
        other_warnings: In plain words, what else is not exact.
    """

    rule: TargetRule
    weighing: Weighing = "mean"
    wants_own_count: bool = False
    pad_to_one_width: bool = False
    draws: bool = False
    class_weights: ClassWeights | None = None
    terms: tuple[TermFacts, ...] = ()
    coupling: Coupling | None = None
    misfit: str = ""
    rule_error: float = 0.0
    padding_error: float = 0.0
    other_warnings: tuple[str, ...] = ()

    @cached_property
    def is_plain(self) -> bool:
        """Whether the loss is one number that nothing but its weight is done to."""
        return not self.terms and self.coupling is None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say in plain words what is not exact, and by how much."""
        return ((self.misfit,) if self.misfit else ()) + self.other_warnings

    @property
    def notes(self) -> tuple[str, ...]:
        """Say in plain words what is exact but may surprise."""
        if self.coupling is not None:
            return (self.coupling.note,)
        if self.terms:
            said = ", ".join(
                f"{term.name} by {'its own count' if term.facts is None else term.facts.counted}"
                for term in self.terms
            )
            return (
                f"each term of the loss is divided by its count over the whole update: {said}.",
            )
        if self.class_weights is not None:
            weights = ", ".join(f"{weight:.4g}" for weight in self.class_weights.weights[:8])
            more = ", ..." if len(self.class_weights.weights) > 8 else ""
            return (
                f"the loss weighs its classes ({weights}{more}): a micro-batch weighs what its "
                f"targets weigh together, so the gradient is that of the whole update at once.",
            )
        if self.weighing != "sum":
            return ()
        return (
            "the loss is a sum over its targets, not a mean: the losses of micro-batches are added "
            "up, so the gradient is that of the whole update at once and grows with its size.",
        )

    @property
    def counted(self) -> str:
        """Say what the loss is divided by."""
        if self.weighing == "sum":
            return "nothing (a sum)"
        if self.class_weights is not None:
            return "what its targets weigh"
        names = {TargetRule.SEQUENCE: "rows", TargetRule.INPUT_TOKEN: "tokens"}
        names[TargetRule.NEXT_INPUT_TOKEN] = "tokens"
        return names.get(self.rule, "target tokens")

    @property
    def kept_by(self) -> TargetRule:
        """By which rule a row is worth training: a term may count rows without a target."""
        counts_rows = any(
            term.facts is None or term.facts.rule is TargetRule.SEQUENCE for term in self.terms
        )
        return TargetRule.SEQUENCE if counts_rows else self.rule

    def size_of(self, micro_batch: MicroBatch) -> float:
        """What a micro-batch's mean is divided by: its targets, or what they weigh together."""
        if self.class_weights is None:
            return micro_batch.targets.under(self.rule)
        return self.class_weights.total(micro_batch.inputs, self.rule)

    def divisor(
        self, micro_batch: MicroBatch, *, of: float, num_micro_batches: int, factor: int = 1
    ) -> float:
        """Compute what the loss of a micro-batch is divided by: the inverse of its weight.

        A Python float: in float32 it would cost 6e-8 of precision.

        Args:
            micro_batch: The micro-batch.
            of: The size of the whole update, over all ranks, see `size_of`.
            num_micro_batches: Micro-batches of the update, over all ranks.
            factor: The engine divides gradients by it, see `Engine.factor`.

        >>> from hf_gradacc.updates.targets import TargetCounts
        >>> three = MicroBatch({}, TargetCounts(sequence=3), 3, 9, 0)
        >>> LossFacts(TargetRule.SEQUENCE).divisor(three, of=12, num_micro_batches=2)
        4.0
        >>> summed = LossFacts(TargetRule.SEQUENCE, "sum")
        >>> summed.divisor(three, of=1, num_micro_batches=2, factor=2)
        0.5
        """
        if self.weighing in ("sum", "terms"):
            return 1 / factor
        if self.weighing == "micro_batch":
            return num_micro_batches / factor
        return of / (self.size_of(micro_batch) * factor)


def rounding_of(dtype: torch.dtype, kind: Compared = "loss") -> float:
    """Return how far apart two evaluations may be by rounding alone, relative.

    Args:
        dtype: What the model computes in; one that is not in the table counts as float32.
        kind: What is compared.

    >>> rounding_of(torch.bfloat16), rounding_of(torch.float32, "update_gradient")
    (0.04, 0.0001)
    """
    limits = _ROUNDING[kind]
    return limits.get(dtype, limits[torch.float32])


def gradients_differ(
    actual: Sequence[Tensor], expected: Sequence[Tensor], *, dtype: torch.dtype
) -> bool:
    """Return whether two gradients of the same rows differ by more than rounding explains.

    Args:
        actual: One tensor for each parameter; none if there is no gradient.
        expected: Likewise.
        dtype: The coarsest dtype of a forward.
    """
    limit = rounding_of(dtype, "rows_gradient")
    whole = math.sqrt(sum(float(theirs.double().square().sum()) for theirs in expected))
    return any(
        # Where a gradient should be zero it is rounding.
        not float((mine - theirs).double().norm())
        <= limit * max(float(theirs.double().norm()), 0.1 * whole)
        for mine, theirs in zip(actual, expected, strict=True)
    )


def have_moved(
    actual: Tensor,
    expected: Tensor,
    *,
    dtype: torch.dtype,
    rows: Tensor | None = None,
    kind: Compared = "shortcut",
) -> bool:
    """Return whether any hidden state moved by more than rounding explains.

    Each is compared by itself, since a leak reaches some only. Rounding of a hidden state is
    allowed four times that of a loss, which is a mean over many.

    Args:
        actual: Hidden states ``[..., hidden]``.
        expected: What they should be.
        dtype: What the model computes in.
        rows: Which of them to compare, a mask over all dimensions but the last; None for all.
        kind: See `rounding_of`.
    """
    if actual.shape != expected.shape:
        return True
    if rows is not None:
        actual, expected = actual[rows.to(actual.device)], expected[rows.to(actual.device)]
    wide = torch.float64 if actual.device.type != "mps" else torch.float32
    size = expected.to(wide).norm(dim=-1).clamp_min(1e-30)
    moved = (actual.to(wide) - expected.to(wide)).norm(dim=-1) / size
    return not float(moved.max()) <= 4 * rounding_of(dtype, kind)


def differ(a: float, b: float) -> float:
    """Relative difference; two NaNs are alike, one NaN is not.

    >>> differ(2.0, 1.5)
    0.25
    """
    if math.isnan(a) and math.isnan(b):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if a == b else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-12)
