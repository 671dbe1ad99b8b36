"""What `hf_gradacc.verify` found, as figures and in words."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

from hf_gradacc.errors import LossError
from hf_gradacc.verify.preflight import Preflight

__all__ = ["ParityReport"]


@dataclass(frozen=True)
class ParityReport:
    """What `verify_parity` found.

    Attributes:
        problems: Why it failed, in plain words; empty if it passed.
        warnings: What the trainer says about this loss.
        reference: ``whole batch`` or, where that did not fit, ``single rows``.
        dtype: What the gradients were compared in.
        tolerance: Largest `error` that passes.
        num_sequences: Rows compared.
        num_targets: Terms of the loss that the trainer counted.
        num_targets_reached: Predictions that the loss has a gradient for; None if the model
            returns no logits to look at.
        target_rule: What the loss was found to take its mean over.
        num_micro_batches: Pieces the plan cut the rows into.
        loss: Mean loss of the update.
        error: ``|g - g_reference| / |g_reference|`` of our plan.
        scale: The multiple of the reference in it; 1 is right.
        share_error: With a router loss in one pass: `error` against ``sum_i (n_i / N) * loss_i``
            over the same micro-batches, and what passes or fails. The rest of `error` is the router
            loss's own nonlinearity, which no weight can remove.
        stock_error: The same of the stock Trainer with as many micro-batches; None if not run.
        stock_scale: The same.
        stock_note: Why it was not run.
        preflight: What the most expensive micro-batch costs; None if not asked for.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    reference: str = "whole batch"
    dtype: str = "float32"
    tolerance: float = nan
    num_sequences: int = 0
    num_targets: int = 0
    num_targets_reached: int | None = None
    target_rule: str = ""
    num_micro_batches: int = 0
    loss: float = nan
    error: float = nan
    scale: float = nan
    share_error: float | None = None
    stock_error: float | None = None
    stock_scale: float | None = None
    stock_note: str = ""
    preflight: Preflight | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems

    def raise_if_failed(self) -> None:
        """Raise a `LossError` that lists the problems, if there are any."""
        if self.problems:
            raise LossError("\n".join(self.problems))

    def __str__(self) -> str:
        lines = [f"{'PASS' if self.passed else 'FAIL'}  gradient of an update of this model"]
        if self.num_micro_batches:
            lines += [
                f"  rows          {self.num_sequences:,}, {self.num_targets:,} targets "
                f"({self.target_rule}), loss {self.loss:.6g}",
                f"  reference     {self.reference}, {self.dtype}",
                f"  ours          error {self.error:.1e}, scale {self.scale:.6f}, "
                f"{self.num_micro_batches:,} micro-batches "
                f"(up to {self.tolerance:.0e} is rounding)",
            ]
        if self.share_error is not None:
            lines.append(
                f"  router loss   error {self.share_error:.1e} against its share-weighted sum; the "
                f"rest is its own nonlinearity"
            )
        if self.stock_error is not None:
            lines.append(
                f"  stock         error {self.stock_error:.1e}, scale {self.stock_scale:.6f}"
            )
        elif self.stock_note:
            lines.append(f"  stock         {self.stock_note}")
        if self.preflight is not None:
            lines.append(f"  preflight     {self.preflight}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines)
