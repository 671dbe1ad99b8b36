"""The updates since the last log row, summed up: the keys of a row and their formulas."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_gradacc.updates.update import UpdateStats

__all__ = ["StatsWindow"]


@dataclass
class StatsWindow:
    """The updates since the last log row, and the run's totals.

    Sums are taken before any division, so a window over unequal updates is right.
    """

    total: UpdateStats = field(default_factory=UpdateStats)
    num_updates: int = 0
    num_skipped: int = 0
    grad_norms: float = 0.0
    num_grad_norms: int = 0
    target_tokens_seen: int = 0
    skipped_updates: int = 0
    sequences_left_out: int = 0
    has_shared: bool = False

    def add(self, stats: UpdateStats, *, grad_norm: float | None = None) -> None:
        """Take in one finished update, summed over ranks, and the norm of its gradient."""
        self.total = self.total + stats
        if grad_norm is not None and stats.num_targets:
            self.grad_norms += grad_norm
            self.num_grad_norms += 1
        self.num_updates += 1
        self.target_tokens_seen += stats.num_targets
        self.sequences_left_out += stats.num_left_out
        self.has_shared |= stats.num_shared_tokens > 0
        if stats.num_targets == 0:
            self.num_skipped += 1
            self.skipped_updates += 1

    def metrics(self) -> dict[str, float]:
        """Compute the log row of this window; `docs/logged.md` has unit and formula of each key."""
        sums, n = self.total, max(self.num_updates, 1)
        computed = sums.num_computed_tokens
        row: dict[str, float] = {
            "effective_batch_size": sums.num_sequences / n,
            "tokens_per_update": sums.num_targets / n,
            "input_tokens_per_update": sums.num_input_tokens / n,
            "computed_tokens_per_update": computed / n,
            "padding_fraction": sums.num_padding_tokens / computed if computed else 0.0,
            "micro_batches_per_update": sums.num_micro_batches / n,
            "target_tokens_seen": self.target_tokens_seen,
            "step_seconds": sums.step_seconds / n,
        }
        if self.has_shared:
            row["shared_fraction"] = sums.num_shared_tokens / max(sums.num_input_tokens, 1)
        if self.num_grad_norms:
            row["grad_norm_mean"] = self.grad_norms / self.num_grad_norms
        if sums.step_seconds > 0:
            row["target_tokens_per_second"] = sums.num_targets / sums.step_seconds
        if self.skipped_updates:
            row["skipped_updates"] = self.skipped_updates
        if self.sequences_left_out:
            row["sequences_without_target"] = self.sequences_left_out
        return row

    def start_next(self) -> None:
        """Begin the next window; totals of the run stay."""
        self.total, self.num_updates, self.num_skipped = UpdateStats(), 0, 0
        self.grad_norms, self.num_grad_norms = 0.0, 0

    def state(self) -> dict[str, int]:
        """Return what has to survive in a checkpoint."""
        return {
            "target_tokens_seen": self.target_tokens_seen,
            "skipped_updates": self.skipped_updates,
            "sequences_left_out": self.sequences_left_out,
        }
