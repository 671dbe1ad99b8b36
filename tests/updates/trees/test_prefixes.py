"""Rows become trees that hold each row once, no common prefix twice, and cost the least."""

import itertools
import math
import random
import time
import tracemalloc

import numpy as np
import pytest
import torch
from support.alike import paths

from hf_gradacc.updates.limits import Limits
from hf_gradacc.updates.trees import prefixes
from hf_gradacc.updates.trees.cost import BRANCH, TreeCost
from hf_gradacc.updates.trees.plan import (
    fill_bins,
    grow_trees,
    plan_shared_micro_batches,
    trees_of,
)
from hf_gradacc.updates.trees.prefixes import Sorted, count_distinct_tokens, sort_by_prefix

SEEDS = range(0, 60, 10)
"""Each of ten sets of rows."""
COSTS = [TreeCost(), TreeCost(4), TreeCost(40), TreeCost(40, masked=1.0), TreeCost(4000)]
COSTS += [TreeCost(by_rows=True), TreeCost(400, by_rows=True)]


def sets_of_rows(seed, *, most=12):
    return [random_rows(one, most=most) for one in range(seed, seed + 10)]


def stretched(rows, cost):
    """Rows of twenty times as many tokens where a row in a tree costs some tokens by itself."""
    return [[token for token in row for _ in range(20)] for row in rows] if cost.by_rows else rows


def random_rows(seed, *, most=12):
    """Rows over three tokens, so that many begin alike; some are empty, some there twice."""
    draw = random.Random(seed)
    rows = [
        [draw.randrange(3) for _ in range(draw.randrange(9))] for _ in range(draw.randint(1, most))
    ]
    for _ in range(draw.randrange(4)):
        row = draw.choice(rows)
        rows.append(row[: draw.randint(0, len(row))] + [draw.randrange(3)] * draw.randrange(4))
    return rows


def prefixes_of(rows):
    """The tokens of a tree: each beginning of a row that ends in it."""
    return {tuple(row[: n + 1]) for row in rows for n in range(len(row))}


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_share_all_that_any_two_rows_have_in_common(seed):
    for rows in sets_of_rows(seed):
        found = sort_by_prefix(rows)
        assert sorted(found.order.tolist()) == list(range(len(rows)))
        assert found.lengths.tolist() == [len(rows[i]) for i in found.order]
        for place, shared in enumerate(found.shared.tolist()):
            before = [rows[i] for i in found.order[:place]]
            row = rows[found.order[place]]
            assert shared == max((common(row, other) for other in before), default=0)


def common(a, b):
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.mark.parametrize("rounds", [0, 1, 3, 24])
@pytest.mark.parametrize("seed", SEEDS)
def test_parting_runs_in_rounds_sorts_as_comparing_whole_rows_does(monkeypatch, seed, rounds):
    monkeypatch.setattr(prefixes, "_FEW_ROWS", 2)
    monkeypatch.setattr(prefixes, "_MOST_ROUNDS", rounds)
    monkeypatch.setattr(prefixes, "_TOKENS_AT_ONCE", 1024)
    draw = random.Random(seed)
    heads = [[draw.randrange(-3, 300) for _ in range(n)] for n in (15, 16, 17, 47, 600)]
    for rows in sets_of_rows(seed, most=40):
        # Zeros, which also stand where a row ends, and beginnings longer than is looked at once.
        rows = [draw.choice(heads)[: draw.randrange(700)] + row for row in rows] + [[0], [0, 0], []]
        found = sort_by_prefix(rows)
        keys = [np.array(row, dtype="<i4").tobytes() for row in rows]
        assert found.order.tolist() == sorted(range(len(rows)), key=keys.__getitem__)
        pairs = itertools.pairwise([rows[i] for i in found.order])
        assert found.shared.tolist() == [0, *(common(a, b) for a, b in pairs)]


@pytest.mark.parametrize("seed", SEEDS)
def test_distinct_tokens_are_the_distinct_beginnings_of_rows(seed):
    for rows in sets_of_rows(seed):
        assert count_distinct_tokens(sort_by_prefix(rows)) == len(prefixes_of(rows))


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_rows_may_be_lists_arrays_or_tensors_of_any_integers(make):
    rows = [[5, 6, 7], [5, 6], [2**31 + 5, 6], [-1, 6], [5, 6, 7]]
    found = sort_by_prefix([make(row) for row in rows])
    assert count_distinct_tokens(found) == len(prefixes_of(rows)) == 7


def test_ids_beyond_32_bits_are_not_taken_for_those_they_wrap_to():
    found = sort_by_prefix([[5, 6], [2**32 + 5, 6]])
    assert found.shared.tolist() == [0, 0]


@pytest.mark.parametrize("cost", COSTS, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_tree_holds_its_rows_once_and_each_of_their_beginnings_once(seed, cost):
    for rows in sets_of_rows(seed):
        found = sort_by_prefix(rows)
        trees = grow_trees(found, cost)
        assert [start for start, *_ in trees] == [0, *(stop for _, stop, _ in trees[:-1])]
        assert trees[-1][1] == len(rows)
        for start, stop, size in trees:
            inside = [rows[i] for i in found.order[start:stop]]
            assert size == len(prefixes_of(inside))


@pytest.mark.parametrize("cost", COSTS, ids=str)
@pytest.mark.parametrize("limits", [{}, {"max_sequences": 2}, {"max_tokens": 7}], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_cut_into_runs_of_neighbours_is_cheaper(seed, limits, cost):
    for rows in sets_of_rows(seed, most=5):
        rows = stretched(rows, cost)
        if cost.by_rows and "max_tokens" in limits:
            limits = {"max_tokens": 140}
        found = sort_by_prefix(rows)
        trees = grow_trees(found, cost, Limits(**limits))
        least = cheapest(found, rows, cost, **limits)
        paid = sum(price_of([rows[i] for i in found.order[a:b]], cost) for a, b, _ in trees)
        assert paid == pytest.approx(least, rel=1e-12)


def price_of(inside, cost):
    """What rows cost as one tree, or one row by itself."""
    if len(inside) == 1:
        return float(cost.row(len(inside[0])))
    if not cost.by_rows:
        return float(cost.tree(len(prefixes_of(inside))))
    price = float(cost.row(len(inside[0])))
    for place, row in enumerate(inside[1:], 1):
        own = len(row) - max(common(row, other) for other in inside[:place])
        attends = cost.masked * len(row) / cost.attention_length if cost.attention_length else 0
        price += own * (1 + attends) + BRANCH
    return price


def cheapest(found, rows, cost, *, max_sequences=99, max_tokens=10**9):
    """Try all cuts of the sorted rows into runs."""
    n, least = len(rows), float("inf")
    for count in range(n):
        for places in itertools.combinations(range(1, n), count):
            price = 0.0
            for start, stop in itertools.pairwise([0, *places, n]):
                inside = [rows[i] for i in found.order[start:stop]]
                size = len(prefixes_of(inside))
                if cost.by_rows:  # keys and values of all tokens lie there
                    size += (sum(map(len, inside)) - size) / 8
                fits = len(inside) <= max_sequences and size <= max_tokens
                price += price_of(inside, cost) if fits or len(inside) == 1 else float("inf")
            least = min(least, price)
    return least


def test_a_prefix_too_short_to_pay_for_its_wider_tree_is_not_shared():
    rows = [[1, *range(100, 140)], [1, *range(200, 240)]]
    assert len(grow_trees(sort_by_prefix(rows), TreeCost(20))) == 2
    assert len(grow_trees(sort_by_prefix(rows), TreeCost())) == 1


@pytest.mark.parametrize("cost", [TreeCost(40), TreeCost(400, by_rows=True)], ids=str)
@pytest.mark.parametrize("overhead", [0, 10**6])
@pytest.mark.parametrize("max_sequences", [None, 2, 3])
@pytest.mark.parametrize("max_tokens", [None, 6, 15])
def test_a_plan_keeps_its_limits_and_every_row(max_tokens, max_sequences, overhead, cost):
    if max_tokens is not None and cost.by_rows:
        max_tokens *= 20
    num_shared = num_common = 0
    for seed in range(40):
        rows = stretched(random_rows(seed), cost)
        limits = Limits(max_tokens, max_sequences, overhead)
        plan = plan_shared_micro_batches(rows, cost, limits)
        if plan.cost == math.inf:  # nothing is worth sharing
            assert len(grow_trees(sort_by_prefix(rows), cost, limits)) == len(rows)
            continue
        num_shared += 1
        assert sorted(itertools.chain(*plan.pieces)) == list(range(len(rows)))
        for piece, trees in zip(plan.pieces, plan.trees, strict=True):
            assert sorted(itertools.chain(*trees.rows)) == list(range(len(piece)))
            for inside, size in zip(trees.rows, trees.sizes, strict=True):
                assert size == len(prefixes_of([rows[piece[i]] for i in inside]))
            assert max_sequences is None or len(piece) <= max_sequences
            assert max_tokens is None or trees.num_computed <= max_tokens or len(piece) == 1
            tokens = [rows[i] for i in piece]
            assert trees == trees.counted([np.array(row) for row in tokens])
            if cost.by_rows:  # trees stand in one row, and there share what did not pay to join
                assert trees.num_computed == len(prefixes_of(tokens))
                num_common += trees.common > 0
    assert num_shared >= 15
    # Twenty equal tokens pay to be shared: trees that share them were cut by a limit.
    is_cut = max_tokens is not None and max_sequences is None
    assert num_common > 0 or not (cost.by_rows and is_cut)


@pytest.mark.parametrize("max_sequences", [None, 1, 3])
@pytest.mark.parametrize("max_tokens", [None, 6, 15])
def test_two_micro_batches_that_fit_in_one_are_one_where_each_costs_much(max_tokens, max_sequences):
    for seed in range(40):
        plan = plan_shared_micro_batches(
            random_rows(seed),
            TreeCost(40),
            Limits(max_tokens, max_sequences, overhead_tokens=10**6),
        )
        both = zip(plan.pieces, plan.trees, strict=True)
        for (a, one), (b, other) in itertools.pairwise(both):
            together = (len(one.sizes) + len(other.sizes)) * max(*one.sizes, *other.sizes)
            is_full = max_tokens is not None and together > max_tokens
            assert is_full or (max_sequences is not None and len(a) + len(b) > max_sequences)


@pytest.mark.parametrize("held_by_each", [0.0, 2.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_each_tree_goes_into_the_first_micro_batch_with_room(seed, held_by_each):
    draw = random.Random(seed)
    for rows in sets_of_rows(seed, most=40):
        found = sort_by_prefix(stretched(rows, COSTS[-1]))
        limits = Limits(draw.choice([None, 90, 400]), draw.choice([None, 2, 5]))
        trees = grow_trees(found, TreeCost(by_rows=True), limits)
        draw.shuffle(trees)
        expected = []
        for tree in trees:
            for inside in expected:
                if fits([*inside, tree], found, limits, held_by_each):
                    inside.append(tree)
                    break
            else:
                expected.append([tree])
        assert fill_bins(trees, found, limits, held_by_each=held_by_each) == expected


def fits(trees, found, limits, held_by_each):
    rows = sum(last - first for first, last, _ in trees)
    shared = sum(int(found.shared[first + 1 : last].sum()) for first, last, _ in trees)
    tokens = sum(size for *_, size in trees) + shared / 8 + held_by_each * rows
    most_tokens, most_rows = limits.max_tokens or math.inf, limits.max_sequences or math.inf
    return tokens <= most_tokens and rows <= most_rows


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_costs_what_it_says(seed):
    cost = TreeCost(40)
    for rows in sets_of_rows(seed):
        plan = plan_shared_micro_batches(rows, cost, Limits(max_tokens=20, overhead_tokens=5))
        price = 0.0 if plan.trees else math.inf
        for trees in plan.trees:
            one = cost.row if trees.are_rows else cost.tree
            price += 5 + len(trees.sizes) * float(one(max(trees.sizes)))
        assert plan.cost == pytest.approx(price)


def test_no_rows_make_no_plan():
    plan = plan_shared_micro_batches([], TreeCost())
    assert (plan.pieces, plan.trees) == ([], [])
    assert grow_trees(sort_by_prefix([]), TreeCost()) == []


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_rows_with_nothing_in_common_are_never_planned_as_trees(cost):
    rows = [[i, *range(i)] for i in range(3, 20)]
    plan = plan_shared_micro_batches(rows, cost, Limits(max_tokens=60))
    assert sorted(itertools.chain(*plan.pieces)) == list(range(len(rows)))
    assert not plan.pays(math.inf, least_saving=0.0)
    assert trees_of(rows, cost) is None


def test_trees_of_a_micro_batch_hold_its_rows():
    rows = paths(seed=3)
    grown = trees_of(rows, TreeCost(400))
    assert sorted(itertools.chain(*grown.rows)) == list(range(len(rows)))
    for inside, size in zip(grown.rows, grown.sizes, strict=True):
        assert size == len(prefixes_of([rows[i] for i in inside]))


def deep_rows(count):
    """Conversations: a system prompt, one of 8 documents, one of some questions, an answer."""
    draw = np.random.default_rng(0)

    def some(size):
        return draw.integers(0, 50_000, size)

    system, documents = some(512), [some(256) for _ in range(8)]
    questions = [[some(128) for _ in range(count // 400)] for _ in documents]
    for _ in range(count):
        which = int(draw.integers(8))
        question = questions[which][int(draw.integers(len(questions[which])))]
        yield np.concatenate(
            [system, documents[which], question, some(int(draw.integers(10, 400)))]
        )


@pytest.fixture(scope="module")
def many_rows():
    return list(deep_rows(20_000))


def plan_many(rows, *, by_rows=False):
    cost = TreeCost(6 * 2048, by_rows=by_rows)
    return plan_shared_micro_batches(rows, cost, Limits(max_tokens=16_384, overhead_tokens=1024))


def cpu_seconds(rows, *, by_rows):
    took = []
    for _ in range(3):
        start = time.process_time()
        plan_many(rows, by_rows=by_rows)
        took.append(time.process_time() - start)
    return min(took)


@pytest.mark.parametrize("by_rows", [False, True])
def test_planning_deep_rows_takes_time_in_proportion_to_them(many_rows, by_rows):
    half = cpu_seconds(many_rows[:10_000], by_rows=by_rows)
    whole = cpu_seconds(many_rows, by_rows=by_rows)
    assert half < 2, f"{half:.2f} s for 10,000 rows of 11 million tokens; 0.12 s were measured"
    assert whole < 4 * half


def test_planning_takes_memory_in_proportion_to_rows(many_rows):
    peaks = []
    for rows in (many_rows[:5_000], many_rows[:10_000]):
        tracemalloc.start()
        plan_many(rows)
        peaks.append(tracemalloc.get_traced_memory()[1] / sum(map(len, rows)))
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 8, "a copy of the tokens in 32 bits, and little else"


def test_sharing_is_found_at_every_depth(many_rows):
    plan = plan_many(many_rows[:10_000])
    tokens = sum(map(len, many_rows[:10_000]))
    computed = sum(trees.num_computed for trees in plan.trees)
    assert computed < 0.35 * tokens


def test_what_is_sorted_is_arrays_of_integers():
    found = sort_by_prefix(paths())
    assert isinstance(found, Sorted)
    assert {part.dtype for part in (found.order, found.lengths, found.shared)} == {
        np.dtype("int64")
    }
