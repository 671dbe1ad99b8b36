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
from typing import Any

import torch
import torch.distributed as dist

from hf_gradacc.ranks.collectives import sum_over_ranks
from hf_gradacc.updates.update import UpdateStats

__all__ = ["Engine", "count_over_ranks", "end_group_at_exit"]

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
