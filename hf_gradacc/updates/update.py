"""An update as an object: its micro-batches on their way to a device, and its row of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_gradacc.updates.batch import tokens_of_batch
from hf_gradacc.updates.targets import TargetCounts, TargetRule
from hf_gradacc.updates.trees.kept import count_kept
from hf_gradacc.updates.trees.plan import GrownTrees

__all__ = ["MicroBatch", "Update", "UpdateStats", "start_copies", "start_copy"]

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class MicroBatch:
    """One forward and backward on one rank.

    Attributes:
        inputs: What the model's forward takes, on the CPU until its turn.
        targets: Targets under each rule.
        num_sequences: Rows.
        num_input_tokens: Tokens fed in that are not padding.
        num_padding_tokens: Tokens computed and thrown away.
        rows: Dataset indices of the rows, empty for streams.
        lengths: Cost of each row as the planner saw it, empty if the plan is a user's own.
        places: Each row's place in this rank's share, likewise; with it and `lengths` the share
            can be planned again.
        weightless: Run only for its collectives, because all ranks run equally many; adds nothing.
        rows_per_sequence: Rows of the inputs that each sequence became; 2 for pairs, see
            `slice_rows`; None if they cannot be told apart.
        num_decoder_tokens: How many of the input tokens are labels, fed to a decoder.
        num_decoder_padding: How much of the padding pads those.
        trees: The rows as trees whose common prefixes are computed once; None to compute rows.
        num_shared_tokens: Input tokens that are not computed, since a row before has them, or they
            are kept.
        beginning: The tokens that all rows begin with and that are kept, see `GrownTrees`.
    """

    inputs: Any
    targets: TargetCounts
    num_sequences: int
    num_input_tokens: int
    num_padding_tokens: int
    rows: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    weightless: bool = False
    rows_per_sequence: int | None = 1
    num_decoder_tokens: int = 0
    num_decoder_padding: int = 0
    trees: GrownTrees | None = None
    num_shared_tokens: int = 0
    beginning: tuple[int, ...] = ()

    def as_trees(self, trees: GrownTrees | None) -> MicroBatch:
        """Compute the rows as trees if they can be, and count what that computes.

        Args:
            trees: As planned. A collator may have cut rows off or written into them, so their
                tokens are counted anew.
        """
        if trees is None or trees.are_rows:
            return self
        tokens = tokens_of_batch(self.inputs)
        if tokens is not None and len(tokens) == sum(map(len, trees.rows)):
            self.trees = trees = trees.counted(tokens)
            self.num_shared_tokens = self.num_input_tokens - trees.num_tokens
            self.num_padding_tokens = trees.num_computed - trees.num_tokens
            self.beginning = tuple(tokens[trees.rows[0][0]].tolist()[: trees.kept])
        return self

    def without_beginning(self) -> MicroBatch:
        """Compute what the rows begin with in this micro-batch, and keep nothing."""
        if self.trees is not None and self.trees.kept:
            self.as_trees(replace(self.trees, kept=0))
        return self

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.num_input_tokens + self.num_padding_tokens - self.num_shared_tokens

    def pin_memory(self) -> MicroBatch:
        """Let the DataLoader pin the tensors, as it does for plain dicts."""
        from torch.utils.data._utils.pin_memory import pin_memory

        self.inputs = pin_memory(self.inputs)  # type: ignore[no-untyped-call]
        return self


@dataclass(eq=False)
class Update:
    """One rank's share of one optimizer step. The DataLoader yields these, one per step.

    Attributes:
        micro_batches: The plan, collated; empty on a rank that has no sequence in this update.
        epoch: Epoch the update belongs to.
        index: Which update of the epoch.
        num_left_out: Sequences left out because nothing in them is a target.
        position: Where a stream stands after this update, see `UpdateStream.start_at`.
        max_tokens: The token budget it was planned with, if any.
        takes_trees: It was planned as trees if those save enough.
    """

    micro_batches: list[MicroBatch]
    epoch: int = 0
    index: int = 0
    num_left_out: int = 0
    position: dict[str, Any] | None = None
    max_tokens: int | None = None
    takes_trees: bool = True

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def with_targets(self, rule: TargetRule) -> Update:
        """Leave out micro-batches in which `rule` finds no target: their mean would be NaN."""
        return self.keeping([mb for mb in self.micro_batches if mb.targets.under(rule) > 0])

    def keeping(self, kept: list[MicroBatch]) -> Update:
        """Leave out all other micro-batches; their sequences are counted as left out."""
        num_kept = sum([mb.num_sequences for mb in kept])
        num_left_out = sum([mb.num_sequences for mb in self.micro_batches]) - num_kept
        return Update(kept, self.epoch, self.index, self.num_left_out + num_left_out)

    def stats(self, rule: TargetRule) -> UpdateStats:
        """Add up what this rank's share holds."""
        micro_batches = self.micro_batches
        beginnings = [mb.beginning for mb in micro_batches]
        num_kept = count_kept(beginnings) if any(beginnings) else 0
        return UpdateStats(
            num_targets=sum([mb.targets.under(rule) for mb in micro_batches]),
            num_sequences=sum([mb.num_sequences for mb in micro_batches]),
            num_input_tokens=sum([mb.num_input_tokens for mb in micro_batches]),
            num_padding_tokens=sum([mb.num_padding_tokens for mb in micro_batches]),
            num_micro_batches=len(micro_batches),
            num_left_out=self.num_left_out,
            num_decoder_tokens=sum([mb.num_decoder_tokens for mb in micro_batches]),
            num_decoder_padding=sum([mb.num_decoder_padding for mb in micro_batches]),
            num_shared_tokens=sum([mb.num_shared_tokens for mb in micro_batches]) - num_kept,
        )

    def pin_memory(self) -> Update:
        """Let the DataLoader pin every micro-batch."""
        for micro_batch in self.micro_batches:
            micro_batch.pin_memory()
        return self


@dataclass(frozen=True)
class UpdateStats:
    """What an update consumed, over the ranks it was summed over.

    Attributes:
        num_targets: Positions whose prediction entered the loss.
        num_sequences: Sequences with at least one target.
        num_input_tokens: Tokens fed in, without padding.
        num_padding_tokens: Tokens computed and thrown away.
        num_micro_batches: Forward and backward passes.
        num_left_out: Sequences without a target.
        num_decoder_tokens: How many of the input tokens were labels, fed to a decoder.
        num_decoder_padding: How much of the padding padded those.
        num_shared_tokens: How many of the input tokens were not computed, but shared with a row
            that begins alike.
        step_seconds: Wall time from asking for the data to the end of the optimizer step.
    """

    num_targets: int = 0
    num_sequences: int = 0
    num_input_tokens: int = 0
    num_padding_tokens: int = 0
    num_micro_batches: int = 0
    num_left_out: int = 0
    num_decoder_tokens: int = 0
    num_decoder_padding: int = 0
    num_shared_tokens: int = 0
    step_seconds: float = 0.0

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that went through the model, padding included."""
        return self.num_input_tokens + self.num_padding_tokens - self.num_shared_tokens

    @property
    def num_encoder_tokens(self) -> int:
        """Count the tokens of the main input, as stock's ``num_input_tokens_seen`` does."""
        return self.num_input_tokens - self.num_decoder_tokens

    @property
    def num_encoder_padding(self) -> int:
        """Count what pads the main input."""
        return self.num_padding_tokens - self.num_decoder_padding

    def __add__(self, other: UpdateStats) -> UpdateStats:
        return UpdateStats(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def counts(self) -> Tensor:
        """Return the integer fields as one int64 vector, summed over ranks in one collective."""
        return torch.tensor(
            [getattr(self, f.name) for f in fields(self) if f.name != "step_seconds"],
            dtype=torch.int64,
        )

    @classmethod
    def from_counts(cls, counts: Tensor) -> UpdateStats:
        """Undo `counts`."""
        names = [f.name for f in fields(cls) if f.name != "step_seconds"]
        return cls(**dict(zip(names, map(int, counts.tolist()), strict=True)))


def start_copies(
    inputs: dict[str, Any], positions: Tensor | None, device: torch.device
) -> tuple[dict[str, Any], Any]:
    """Queue the copies of a micro-batch, each tensor's once: labels may have two names."""
    copies = {id(value): start_copy(value, device) for value in inputs.values()}
    return {key: copies[id(value)] for key, value in inputs.items()}, start_copy(positions, device)


def start_copy(value: Any, device: torch.device) -> Any:
    """Queue the copy of a tensor to the device; the host does not wait for it."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        # From pageable memory the host would wait until the copy has been staged.
        value = value if value.is_pinned() else _pinned(value)
    return value.to(device, non_blocking=True)


def _pinned(value: Tensor) -> Tensor:
    """Return a copy in pinned memory; where the host has none left, the tensor itself.

    CUDA calls that "out of memory" too, but no finer cut gives the host more of it. Any other error
    comes again with the copy.
    """
    try:
        return value.pin_memory()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        message = str(error).strip().partition("\n")[0]
        logger.warning_once(
            f"the host has no pinned memory left ({message}): copies to the device are waited for. "
            f"`ulimit -l` limits it; dataloader_pin_memory = False needs less."
        )
        return value
