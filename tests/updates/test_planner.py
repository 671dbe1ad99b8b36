"""The planner: every sequence once, every limit kept, as few micro-batches as possible."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gradacc import ConfigError, plan_micro_batches
from hf_gradacc.updates.planner import count_padding, plan_packed_micro_batches

lengths_of_rows = st.lists(st.integers(1, 60), max_size=40)
limits = st.none() | st.integers(1, 120)


@given(lengths_of_rows, limits, st.none() | st.integers(1, 12), st.booleans())
def test_every_sequence_is_planned_exactly_once(lengths, max_tokens, max_sequences, keep_order):
    plan = plan_micro_batches(
        lengths, max_tokens=max_tokens, max_sequences=max_sequences, keep_order=keep_order
    )
    assert sorted(i for piece in plan for i in piece) == list(range(len(lengths)))
    assert all(plan)


@given(lengths_of_rows, st.integers(1, 120), st.integers(1, 12), st.booleans())
def test_every_limit_is_kept_unless_one_sequence_alone_exceeds_it(
    lengths, max_tokens, max_sequences, keep_order
):
    plan = plan_micro_batches(
        lengths, max_tokens=max_tokens, max_sequences=max_sequences, keep_order=keep_order
    )
    for piece in plan:
        assert len(piece) <= max_sequences
        assert len(piece) == 1 or len(piece) * max(lengths[i] for i in piece) <= max_tokens


@given(lengths_of_rows, limits, st.none() | st.integers(1, 12))
def test_a_plan_is_the_same_each_time_and_its_longest_micro_batch_comes_first(
    lengths, max_tokens, max_sequences
):
    plan = plan_micro_batches(lengths, max_tokens=max_tokens, max_sequences=max_sequences)
    assert plan == plan_micro_batches(lengths, max_tokens=max_tokens, max_sequences=max_sequences)
    widths = [max(lengths[i] for i in piece) for piece in plan]
    assert widths == sorted(widths, reverse=True)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), limits, st.none() | st.integers(1, 4))
def test_no_cut_of_the_sorted_sequences_has_fewer_micro_batches_or_as_few_and_less_padding(
    lengths, max_tokens, max_sequences
):
    plan = plan_micro_batches(lengths, max_tokens=max_tokens, max_sequences=max_sequences)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def allowed(piece):
        tokens = len(piece) * max(lengths[i] for i in piece)
        return len(piece) == 1 or (
            len(piece) <= (max_sequences or len(piece)) and tokens <= (max_tokens or tokens)
        )

    best = min(
        (len(pieces), count_padding(lengths, pieces))
        for pieces in (
            [order[a:b] for a, b in itertools.pairwise((0, *cuts, len(order)))]
            for k in range(len(order))
            for cuts in itertools.combinations(range(1, len(order)), k)
        )
        if all(map(allowed, pieces))
    )
    assert (len(plan), count_padding(lengths, plan)) == best


def test_sorting_removes_most_of_the_padding():
    lengths = [5, 60, 7, 55, 6, 58, 8, 61]
    as_drawn = plan_micro_batches(lengths, max_sequences=2, keep_order=True)
    assert count_padding(lengths, as_drawn) == 208
    assert count_padding(lengths, plan_micro_batches(lengths, max_sequences=2)) == 6


@pytest.mark.parametrize("limit", ["max_tokens", "max_sequences"])
def test_a_limit_below_one_is_refused_by_name(limit):
    with pytest.raises(ConfigError, match=f"{limit} = 0 leaves no room"):
        plan_micro_batches([3], **{limit: 0})


@given(lengths_of_rows, limits, st.integers(0, 40))
def test_a_micro_batch_more_is_made_only_where_it_saves_more_than_it_costs(
    lengths, max_tokens, overhead
):
    def cost(plan):
        return count_padding(lengths, plan) + overhead * len(plan)

    weighed = plan_micro_batches(lengths, max_tokens=max_tokens, overhead_tokens=overhead)
    fewest = plan_micro_batches(lengths, max_tokens=max_tokens)
    assert sorted(i for piece in weighed for i in piece) == list(range(len(lengths)))
    assert cost(weighed) <= cost(fewest)


@given(lengths_of_rows, limits, st.none() | st.integers(1, 12))
def test_a_packed_plan_keeps_every_sequence_and_limit(lengths, max_tokens, max_sequences):
    plan = plan_packed_micro_batches(lengths, max_tokens=max_tokens, max_sequences=max_sequences)
    assert sorted(i for piece in plan for i in piece) == list(range(len(lengths)))
    for piece in plan:
        total = sum(lengths[i] for i in piece)
        assert max_tokens is None or len(piece) == 1 or total <= max_tokens
        assert max_sequences is None or len(piece) <= max_sequences
