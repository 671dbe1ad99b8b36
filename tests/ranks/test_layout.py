"""Which ranks share rows: the arithmetic of replicas."""

from __future__ import annotations

import pytest
import torch

from hf_gradacc.errors import ConfigError
from hf_gradacc.ranks.layout import RankLayout


@pytest.mark.parametrize(
    "sizes", [{}, {"tp_size": 2}, {"cp_size": 4}, {"tp_size": 2, "sp_size": 2}]
)
def test_replicas_are_neighbours_and_one_rank_of_each_speaks(sizes):
    ranks = [RankLayout(rank, 8, **sizes) for rank in range(8)]
    size = ranks[0].ranks_per_replica
    assert [r.replica for r in ranks] == [rank // size for rank in range(8)]
    assert sum(r.speaks for r in ranks) == ranks[0].num_replicas == 8 // size
    assert {r.replica for r in ranks if r.speaks} == set(range(8 // size))


def test_a_sum_over_all_ranks_counts_each_replica_once():
    ranks = [RankLayout(rank, 6, tp_size=3) for rank in range(6)]
    counts = [torch.tensor([5, 2]) if r.replica == 0 else torch.tensor([7, 1]) for r in ranks]
    total = sum(r.once(c) for r, c in zip(ranks, counts, strict=True))
    assert total.tolist() == [12, 3]
    assert counts[1].tolist() == [5, 2]  # not changed in place


def test_ranks_that_split_layers_repeat_the_loss_and_ranks_that_split_rows_share_it():
    layout = RankLayout(5, 8, tp_size=2, cp_size=2)
    assert (layout.num_replicas, layout.num_parts, layout.row_part) == (2, 4, 0)
    assert [RankLayout(r, 8, tp_size=2, cp_size=2).row_part for r in range(4)] == [0, 0, 1, 1]


def test_ranks_that_make_no_whole_replica_are_refused():
    with pytest.raises(ConfigError, match="6 ranks cannot be split into replicas of 4"):
        RankLayout(0, 6, tp_size=4)
