"""Dealing to ranks: every row once, on every rank alike, and no rank slower than it has to be."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.dealing import deal_by_cost, deal_rows
from hf_gradacc.updates.dealing_updates import deal_update
from hf_gradacc.updates.limits import Limits
from hf_gradacc.updates.planner import plan_micro_batches

rows_of_an_update = st.lists(st.integers(0, 300), max_size=40)
ranks = st.integers(1, 6)
ways = st.fixed_dictionaries(
    {
        "max_tokens": st.none() | st.integers(1, 900),
        "max_sequences": st.none() | st.integers(1, 9),
        "overhead_tokens": st.integers(0, 100),
        "attention_length": st.none() | st.integers(1, 500),
        "lockstep": st.booleans(),
    }
)


def deal(lengths, num_ranks, *, attention_length=None, lockstep=False, **limits):
    return deal_rows(
        lengths,
        num_ranks,
        Limits(**limits),
        attention_length=attention_length,
        lockstep=lockstep,
    )


def plan(lengths, share, *, max_tokens=None, max_sequences=None, overhead_tokens=0, **rest):
    """The micro-batches of one rank, as lengths."""
    own = [lengths[i] for i in sorted(share)]
    pieces = plan_micro_batches(
        own,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        overhead_tokens=overhead_tokens,
    )
    return [[own[i] for i in piece] for piece in pieces]


def seconds(lengths, shares, *, attention_length=None, lockstep=False, overhead_tokens=0, **limits):
    """What the slowest rank takes; ranks in step wait for the slowest in every micro-batch."""

    def cost(piece):
        row = max(piece) * ((attention_length or 0) + max(piece) if attention_length else 1)
        return len(piece) * row + overhead_tokens * (attention_length or 1)

    plans = [plan(lengths, s, overhead_tokens=overhead_tokens, **limits) for s in shares]
    costs = [sorted(map(cost, pieces), reverse=True) for pieces in plans]
    if lockstep:
        return sum(map(max, itertools.zip_longest(*costs, fillvalue=0)))
    return max(map(sum, costs), default=0)


@given(rows_of_an_update, ranks, ways)
def test_every_row_is_dealt_once_and_no_rank_is_empty_that_need_not_be(lengths, num_ranks, way):
    shares = deal(lengths, num_ranks, **way)
    assert len(shares) == num_ranks
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert sum(1 for share in shares if not share) == max(0, num_ranks - len(lengths))
    assert shares == deal(lengths, num_ranks, **way)


@given(rows_of_an_update, ranks, ways)
def test_the_slowest_rank_is_never_slower_than_with_rows_dealt_one_by_one(lengths, num_ranks, way):
    attends = way["attention_length"]
    costs = [n * (attends + n) if attends else n for n in lengths]
    alone = deal_by_cost(costs, num_ranks)
    assert seconds(lengths, deal(lengths, num_ranks, **way), **way) <= seconds(
        lengths, alone, **way
    )


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "lognormal", "heavy-tail"])
@pytest.mark.parametrize("limit", [{"max_sequences": 8}, {"max_tokens": 2000}], ids=str)
def test_the_slowest_rank_is_no_slower_than_under_batch_rebalance(kind, num_ranks, limit):
    """With 64 tokens of overhead to our plan; theirs counts none, nor a limit of 8 rows."""
    way = {"overhead_tokens": 64, "attention_length": 6 * 1024, **limit}
    ours = theirs = 0
    for seed in range(12):
        lengths = draw_lengths(kind, seed)
        ours += seconds(lengths, deal(lengths, num_ranks, **way), **way)
        theirs += max(
            sum(
                len(piece) * max(piece) * (6 * 1024 + max(piece)) + 64 * 6 * 1024
                for piece in rebalanced(lengths, num_ranks, rank)
            )
            for rank in range(num_ranks)
        )
    assert ours <= theirs


def draw_lengths(kind, seed):
    draw = random.Random(seed)
    return [
        {
            "normal": lambda: int(min(max(draw.gauss(209, 70), 60), 510)),
            "lognormal": lambda: int(min(max(draw.lognormvariate(5.2, 0.9), 16), 2048)),
            "heavy-tail": lambda: int(min(40 * draw.paretovariate(1.3), 2048)),
        }[kind]()
        for _ in range(64)
    ]


def rebalanced(lengths, num_ranks, rank):
    from transformers import trainer_pt_utils as stock

    if not hasattr(stock, "BatchRebalanceSampler"):
        pytest.skip("transformers deals no batches by cost before 5.16")
    sampler = stock.BatchRebalanceSampler(
        lengths=lengths,
        effective_batch_size=len(lengths),
        dp_size=num_ranks,
        grad_accum=len(lengths) // (8 * num_ranks),
        rank=rank,
        shuffle=False,
    )
    return [[lengths[i] for i in batch] for batch in sampler]


def test_a_row_longer_than_all_others_together_is_alone_and_no_rank_gets_most_of_the_rest():
    shares = deal_rows([900, *[10] * 30], 4, Limits(max_sequences=8, overhead_tokens=8))
    assert sorted(map(len, shares))[0] == 1 < 8 <= sorted(map(len, shares))[1]


def test_what_a_budget_became_while_training_moves_no_row_to_another_rank():
    """Ranks tune and shrink their budgets each by itself, and must deal alike all the same."""
    lengths = draw_lengths("lognormal", 3)
    before, after = (UpdateCollator(list, max_tokens=1024) for _ in range(2))
    for collator in (before, after):
        collator.share_budget()
    after.max_tokens = 16_384
    assert deal_update(before, lengths, 3) == deal_update(after, lengths, 3)
    asked = (UpdateCollator(list, max_tokens=size) for size in (1024, 16_384))
    few, many = (deal_update(collator, lengths, 3) for collator in asked)
    assert few != many  # a budget somebody asked for does count


def test_packed_rows_are_dealt_one_by_one():
    lengths = [60, 59, 20, 20, 20, 20, 20, 20]
    collator = UpdateCollator(list, max_tokens=120)
    together = deal_update(collator, lengths, 2)
    collator.packed = True
    assert deal_update(collator, lengths, 2) == deal_by_cost(lengths, 2) != together


def test_rows_that_are_padded_alike_or_of_unknown_length_are_dealt_by_number():
    collator = UpdateCollator(list, max_sequences=8)
    assert sorted(map(len, deal_update(collator, [0] * 10, 3))) == [3, 3, 4]
    collator.pad_to_one_width = True
    assert sorted(map(len, deal_update(collator, [90, *[3] * 9], 3))) == [3, 3, 4]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 6))
def test_dealing_gives_each_sequence_to_one_rank_and_keeps_ranks_in_balance(costs, num_ranks):
    shares = deal_by_cost(costs, num_ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    # Graham 1969: within 4/3 - 1/(3m) of the best deal, which is at least the mean and the maximum.
    least = max(max(costs, default=0), -(-sum(costs) // num_ranks))
    # A bound on the optimum from the costs alone: two of the m + 1 largest share a rank.
    largest = sorted(costs, reverse=True)[: num_ranks + 1]
    if len(largest) > num_ranks:
        least = max(least, largest[-1] + largest[-2])
    assert max(loads, default=0) <= (4 / 3) * least + max(costs, default=0) / 3
    assert sum(1 for share in shares if not share) == max(0, num_ranks - len(costs))
