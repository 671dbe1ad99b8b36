"""Which ranks of a run train other rows, and which share theirs.

Tensor parallelism splits a model's layers, context and sequence parallelism split a row. The ranks
between which a layer or a row is split train the same rows: together they are one *replica*.
Membership, counts and the sizes of updates go by replicas. By ranks they would be wrong: each row
would be counted once for every rank that holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_gradacc.errors import ConfigError

__all__ = ["RankLayout"]


@dataclass(frozen=True)
class RankLayout:
    """The place of this rank in a run.

    The ranks of a replica follow each other, as in the device meshes of accelerate
    (``ParallelismConfig._get_mesh``), transformers (``initialize_distributed_mesh``) and DeepSpeed:
    ranks 0 and 1 of 2 x 2 are the first replica.

    Attributes:
        rank: This rank, of all.
        world_size: Number of all ranks.
        tp_size: Ranks that split each layer: tensor parallelism. Each has the whole loss.
        cp_size: Ranks that split each row: context parallelism. Each has its part of the loss.
        sp_size: The same: sequence parallelism.

    >>> layout = RankLayout(rank=5, world_size=8, tp_size=2)
    >>> layout.num_replicas, layout.replica, layout.speaks
    (4, 2, False)
    """

    rank: int = 0
    world_size: int = 1
    tp_size: int = 1
    cp_size: int = 1
    sp_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size % self.ranks_per_replica:
            raise ConfigError(
                f"{self.world_size} ranks cannot be split into replicas of "
                f"{self.ranks_per_replica} (tp_size = {self.tp_size}, cp_size = {self.cp_size}, "
                f"sp_size = {self.sp_size}): start a multiple of that many."
            )

    @cached_property
    def row_parts(self) -> int:
        """Ranks between which each row is split."""
        return self.cp_size * self.sp_size

    @cached_property
    def ranks_per_replica(self) -> int:
        """Ranks that train the same rows."""
        return self.tp_size * self.row_parts

    @cached_property
    def num_replicas(self) -> int:
        """Replicas of the model that train rows of their own: the data-parallel size."""
        return self.world_size // self.ranks_per_replica

    @cached_property
    def replica(self) -> int:
        """The replica that this rank is part of: the data-parallel rank."""
        return self.rank // self.ranks_per_replica

    @cached_property
    def speaks(self) -> bool:
        """Whether this rank is the one that its replica is counted by."""
        return self.rank % self.ranks_per_replica == 0

    @cached_property
    def num_parts(self) -> int:
        """Parts that an update's loss is the sum of: one a rank, but for those that repeat it."""
        return self.world_size // self.tp_size

    @cached_property
    def row_part(self) -> int:
        """Which part of a row this rank holds."""
        return self.rank % self.ranks_per_replica // self.tp_size

    @cached_property
    def num_evaluating(self) -> int:
        """Groups of ranks that evaluate rows of their own: DeepSpeed splits rows in training only.

        accelerate deals rows like that, see ``prepare_data_loader``.
        """
        return self.world_size // (self.tp_size * self.cp_size)

    @cached_property
    def evaluating(self) -> int:
        """The group that this rank evaluates with."""
        return self.rank // (self.tp_size * self.cp_size)

    def once(self, counts: Tensor) -> Tensor:
        """Return counts such that a sum over all ranks has each replica's once.

        Args:
            counts: What this replica's rows hold, the same on all of its ranks.

        Returns:
            The counts on the rank that speaks, zeros on the others.
        """
        return counts if self.speaks else torch.zeros_like(counts)
