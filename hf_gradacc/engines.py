"""Engines that shard weights: every rank has to run as many micro-batches as the others.

FSDP2 and ZeRO gather weights in each forward and average gradients in the backward that reduces
them. So all ranks run the largest number any of them has planned: the others cut their share
finer, and where nothing is left to cut, run one row with a weight of zero. No row counts twice.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device

from hf_gradacc.batching import find_labels, slice_rows, trim_padding
from hf_gradacc.collator import make_micro_batch
from hf_gradacc.reduction import sum_over_ranks
from hf_gradacc.targets import TargetRule
from hf_gradacc.update import MicroBatch, Update, UpdateStats

__all__ = [
    "Engine",
    "agree_on_inputs",
    "count_over_ranks",
    "end_group_at_exit",
    "even_out",
    "share_first",
]


_SECONDS_TO_REST = 0.1


@dataclasses.dataclass(frozen=True)
class Engine:
    """How ranks share the work.

    Attributes:
        world_size: Number of ranks.
        lockstep: Forward and backward contain collectives, and gradients come out of them as an
            average over ranks. Otherwise ranks run alone and `reduction` sums at the end.
    """

    world_size: int = 1
    lockstep: bool = False

    @classmethod
    def of(cls, trainer: Any) -> Engine:
        """See what a Trainer was set up for."""
        return cls(
            trainer.args.world_size, bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        )

    @property
    def factor(self) -> int:
        """What a loss is multiplied by, because the engine divides gradients by it."""
        return self.world_size if self.lockstep else 1

    @property
    def sums(self) -> bool:
        """Whether gradients are ours to sum over ranks."""
        return self.world_size > 1 and not self.lockstep


def count_over_ranks(
    local: UpdateStats, *, engine: Engine, device: Any
) -> tuple[UpdateStats, list[int]]:
    """Sum what the ranks' shares hold, and tell how many micro-batches each has planned.

    One collective: each rank writes its number of micro-batches into a place of its own.

    Args:
        local: This rank's share.
        engine: How ranks share the work.
        device: Where collectives run.
    """
    counts = local.counts()
    planned = torch.zeros(engine.world_size if engine.lockstep else 0, dtype=counts.dtype)
    if engine.lockstep:
        planned[dist.get_rank() if dist.is_initialized() else 0] = local.num_micro_batches
    total = sum_over_ranks(torch.cat([counts, planned]), device=device)
    return UpdateStats.from_counts(total[: len(counts)]), total[len(counts) :].tolist()


def even_out(
    update: Update,
    num_micro_batches: int,
    *,
    halve: Callable[[MicroBatch], list[MicroBatch]],
    rule: TargetRule,
    spare: Mapping[str, Any] | None,
    copies: int = 1,
) -> Update:
    """Bring a share to a number of micro-batches.

    Args:
        update: This rank's share, with at most that many micro-batches.
        num_micro_batches: The number wanted.
        halve: Cuts a micro-batch of several rows in two.
        rule: What counts as a target; both halves need some, a mean over none is NaN.
        spare: Collated rows to run with a weight of zero where this share has none.
        copies: Collated rows of each sequence, see `slice_rows`; 0 if none can be sliced out.

    Returns:
        The same rows in as many micro-batches, the costliest first as on every other rank; those
        added for the count alone are `weightless`.
    """
    done = list(update)
    candidates = [mb for mb in done if mb.num_sequences > 1]
    while len(done) < num_micro_batches and candidates:
        largest = max(candidates, key=lambda mb: mb.num_input_tokens + mb.num_padding_tokens)
        candidates.remove(largest)
        halves = halve(largest)
        if len(halves) != 2 or not all(half.targets.under(rule) for half in halves):
            continue
        place = done.index(largest)
        done[place : place + 1] = halves
        candidates += [half for half in halves if half.num_sequences > 1]
    done.sort(key=lambda mb: -(mb.num_input_tokens + mb.num_padding_tokens))
    if len(done) < num_micro_batches:
        source = done[-1].inputs if done else spare
        assert isinstance(source, Mapping)
        if copies:
            row = _row_with_target(source, rule)
            source = trim_padding(slice_rows(source, row, copies=copies))
        idle = dataclasses.replace(make_micro_batch(source, copies=copies or 1), weightless=True)
        # In front: the last micro-batch reduces, and a real one in that place is one wait less.
        done = [idle] * (num_micro_batches - len(done)) + done
    return Update(done, update.epoch, update.index, update.num_left_out)


def agree_on_inputs(update: Update) -> Any:
    """Give every rank the same collated inputs, from a rank whose share has some.

    For streams that cannot be looked at beforehand: the model is asked with its first update, and
    all ranks have to ask it the same.
    """
    return share_first(update.micro_batches[0].inputs if len(update) else None)


def share_first(own: Any) -> Any:
    """Give every rank what the first rank that has something has; None where none has."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, send_to_device(own, "cpu"))  # each rank has a device of its own
    return next((share for share in shares if share is not None), None)


def _row_with_target(inputs: Mapping[str, Any], rule: TargetRule) -> list[int]:
    """Choose one row whose loss is a number."""
    labels = find_labels(inputs)[1]
    if rule in (TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN) and labels is not None:
        start = 1 if rule is TargetRule.NEXT_TOKEN else 0
        has = labels[..., start:].ne(-100).reshape(len(labels), -1).any(1).nonzero()
        if len(has):
            return [int(has[0])]
    return [0]


def end_group_at_exit() -> None:
    """Have gloo's threads come to rest before Python ends.

    Such a thread frees tensors of the last collective, and is aborted if Python has gone by then:
    19 of 400 exits right after one on a loaded machine (pytorch/pytorch#179291). A launcher that
    sees a process abort ends the others, which may be saving.
    """
    if dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend():
        atexit.register(_end_group, os.getpid())


def _end_group(process: int) -> None:
    # A forked child has the group, but not its threads, and would wait for them.
    if os.getpid() != process:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    # That ends no thread as long as a wrapped model holds the group (9 of 400 were aborted still).
    # What they have left to do is a matter of microseconds, once they may run Python.
    time.sleep(_SECONDS_TO_REST)
