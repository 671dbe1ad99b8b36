"""What a micro-batch may hold, and what one more of them costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["NO_LIMITS", "Limits"]


@dataclass(frozen=True)
class Limits:
    """How large micro-batches may be, and how few of them there should be.

    Attributes:
        max_tokens: Most tokens that a micro-batch may compute, padding included; what is longer by
            itself is planned alone. None for no limit.
        max_sequences: Most sequences in a micro-batch; None for no limit.
        overhead_tokens: What one more micro-batch costs, in computed tokens.
    """

    max_tokens: int | None = None
    max_sequences: int | None = None
    overhead_tokens: int = 0

    def within(self, max_tokens: int | None) -> Limits:
        """Take another limit on tokens besides; None for none.

        >>> Limits(max_tokens=512).within(100).max_tokens, Limits(512).within(None).max_tokens
        (100, 512)
        """
        both = [limit for limit in (self.max_tokens, max_tokens) if limit is not None]
        return replace(self, max_tokens=min(both, default=None))


NO_LIMITS = Limits()
"""Everything may go into one micro-batch."""
