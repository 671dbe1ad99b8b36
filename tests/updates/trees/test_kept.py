"""Which beginnings are kept: those that pay, of neighbours that fit into no one micro-batch."""

import itertools
import random
import time

import numpy as np
import pytest

from hf_gradacc.updates.limits import Limits
from hf_gradacc.updates.trees.cost import HELD, TreeCost
from hf_gradacc.updates.trees.kept import MOST_KEPT, choose_kept, count_kept, plan_with_kept
from hf_gradacc.updates.trees.plan import GrownTrees, plan_trees
from hf_gradacc.updates.trees.prefixes import count_common, count_distinct_tokens, sort_by_prefix

KEEPS = TreeCost(3072, by_rows=True, keeps=True)


def rows_behind(heads, *, seed=0, low=50, high=250):
    """Rows behind beginnings: pairs of tokens in the beginning and rows that have it."""
    draw = random.Random(seed)
    rows = []
    for length, count in heads:
        head = [draw.randrange(9999) for _ in range(length)]
        rows += [
            head + [draw.randrange(9999) for _ in range(draw.randint(low, high))]
            for _ in range(count)
        ]
    draw.shuffle(rows)
    return rows


def plan(rows, cost=KEEPS, **limits):
    return plan_with_kept(sort_by_prefix(rows), cost, Limits(overhead_tokens=64, **limits))


def beginnings_of(rows, made):
    pairs = zip(made.pieces, made.trees, strict=True)
    return [tuple(rows[piece[0]][: trees.kept]) for piece, trees in pairs]


def computed(rows, made):
    return sum(trees.num_computed for trees in made.trees) + count_kept(beginnings_of(rows, made))


UPDATES = {
    "one head": [(600, 64)],
    "two heads": [(600, 30), (300, 30)],
    "heads and loners": [(700, 25), (0, 20), (150, 12)],
    "a small one": [(600, 4), (0, 10)],
}


@pytest.mark.parametrize("budget", [1024, 2048, 4096])
@pytest.mark.parametrize("name", UPDATES)
def test_micro_batches_hold_what_was_planned_and_no_more(name, budget):
    rows = rows_behind(UPDATES[name])
    made = plan(rows, max_tokens=budget)
    assert sorted(itertools.chain(*made.pieces)) == list(range(len(rows)))
    for piece, trees in zip(made.pieces, made.trees, strict=True):
        assert trees == trees.counted([np.array(rows[i]) for i in piece])
        if not trees.kept:
            continue
        head = rows[piece[0]][: trees.kept]
        assert all(rows[i][: trees.kept] == head and len(rows[i]) > trees.kept for i in piece)
        assert trees.kept <= MOST_KEPT * budget
        held = trees.kept + trees.num_tokens + HELD * trees.kept * len(piece)
        assert len(piece) == 1 or held <= budget


@pytest.mark.parametrize("seed", range(8))
def test_what_is_shared_behind_a_kept_beginning_is_computed_once_a_micro_batch(seed):
    """Trees of one micro-batch need not be neighbours, and share what all between them share."""
    draw = random.Random(seed)
    head = [draw.randrange(9999) for _ in range(200)]
    rows = [head]
    while len(rows) < 120:  # each goes on from somewhere in another
        row = draw.choice(rows)
        rows.append(row[: draw.randint(200, len(row))] + [draw.randrange(9999) for _ in range(30)])
    made = plan(rows[1:], max_tokens=500)
    num_kept = 0
    for piece, trees in zip(made.pieces, made.trees, strict=True):
        num_kept += trees.kept > 0
        assert trees == trees.counted([np.array(rows[1 + i]) for i in piece])
    assert num_kept > 2


@pytest.mark.parametrize(("head", "count"), [(700, 40), (700, 5), (400, 40), (60, 200)])
def test_trees_behind_a_kept_beginning_leave_each_of_their_rows_room_for_it(head, count):
    """Rows of a tree attend to the beginning one by one, however few tokens they add."""
    numbers = itertools.count(10_000)
    rows = [
        [*range(head), *[2000 + i] * 10, next(numbers), next(numbers)]
        for i in range(10)
        for _ in range(count)
    ]
    made = plan(rows, max_tokens=1024)
    assert any(trees.kept for trees in made.trees)
    assert max(map(len, made.pieces)) > 1
    for piece, trees in zip(made.pieces, made.trees, strict=True):
        assert trees.kept + trees.num_tokens + HELD * trees.kept * len(piece) <= 1024


@pytest.mark.parametrize("budget", [1024, 2048, 4096, 100_000])
@pytest.mark.parametrize("name", UPDATES)
def test_a_plan_with_kept_beginnings_never_costs_more(name, budget):
    rows = rows_behind(UPDATES[name])
    plain = plan_trees(sort_by_prefix(rows), KEEPS, Limits(max_tokens=budget, overhead_tokens=64))
    assert plan(rows, max_tokens=budget).cost <= plain.cost


def test_a_head_of_all_rows_is_computed_once():
    rows = rows_behind([(600, 64)])
    distinct = count_distinct_tokens(sort_by_prefix(rows))
    for budget in (1024, 2048, 4096):
        made = plan(rows, max_tokens=budget)
        assert computed(rows, made) == distinct
        plain = plan(rows, TreeCost(3072, by_rows=True), max_tokens=budget)
        assert sum(trees.num_tokens for trees in plain.trees) > 1.15 * distinct
    assert computed(rows, plan(rows, max_sequences=8)) == distinct


def test_each_of_two_heads_is_kept_for_its_own_rows():
    rows = rows_behind([(600, 30), (300, 30)])
    kept = beginnings_of(rows, plan(rows, max_tokens=2048))
    runs = [len(beginning) for beginning, _ in itertools.groupby(kept) if beginning]
    assert sorted(runs) == [300, 600]  # in one run of micro-batches each


def test_a_head_within_a_head_is_kept_where_that_is_cheaper():
    draw = random.Random(1)
    outer = [draw.randrange(9999) for _ in range(100)]
    rows = [outer + row for row in rows_behind([(800, 30), (700, 30)])]
    kept = {len(beginning) for beginning in beginnings_of(rows, plan(rows, max_tokens=4096))}
    assert kept - {0} == {900, 800}


def test_every_row_has_a_token_behind_what_is_kept():
    rows = rows_behind([(300, 30)])
    head = rows[0][: count_common(np.array(rows[0]), np.array(rows[1]))]
    rows += [head, [*head, 7]]
    kept = {len(beginning) for beginning in beginnings_of(rows, plan(rows, max_tokens=1500))}
    assert kept == {len(head) - 1}


@pytest.mark.parametrize(
    ("cost", "limits"),
    [
        (TreeCost(3072, by_rows=True), {"max_tokens": 2048}),
        (TreeCost(3072, keeps=True), {"max_tokens": 2048}),
        (KEEPS, {}),
        (KEEPS, {"max_tokens": 100_000}),
        (KEEPS, {"max_tokens": 700}),
    ],
    ids=["not asked for", "under a mask", "no limit", "fits", "takes too much room"],
)
def test_nothing_is_kept_where_it_may_not_or_need_not_be(cost, limits):
    rows = rows_behind([(600, 40)])
    found = sort_by_prefix(rows)
    all_limits = Limits(overhead_tokens=64, **limits)
    assert choose_kept(found, cost, all_limits) == []
    assert plan(rows, cost, **limits) == plan_trees(found, cost, all_limits)


def test_a_beginning_shorter_than_another_pass_costs_is_not_kept():
    rows = rows_behind([(20, 40)])
    limits = Limits(max_tokens=2048, overhead_tokens=1024)
    assert choose_kept(sort_by_prefix(rows), KEEPS, limits) == []


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_beginning_as_long_as_the_budget_is_planned_like_any_other(beyond):
    rows = rows_behind([(600 + beyond, 8)])
    made = plan(rows, max_tokens=600)
    assert sorted(itertools.chain(*made.pieces)) == list(range(8))
    assert not any(trees.kept for trees in made.trees)


def test_rows_that_a_collator_has_changed_keep_nothing():
    grown = GrownTrees(((0, 1),), (9,), by_rows=True, kept=2)
    rows = [np.array(row) for row in ([5, 6, 7], [5, 6, 8, 9])]
    assert grown.counted(rows).kept == 2
    assert grown.counted(rows).sizes == (3,)
    for other in ([5, 7, 8], [5, 6], [5]):
        found = grown.counted([rows[0], np.array(other)])
        assert found.kept == 0
        assert found.sizes == (count_distinct_tokens(sort_by_prefix([rows[0], other])),)


def test_planning_takes_time_in_proportion_to_the_rows():
    seconds = []
    for count in (500, 4000):
        found = sort_by_prefix(rows_behind([(200, count), (100, count)], high=60))
        started = time.process_time()
        choose_kept(found, KEEPS, Limits(max_tokens=2048, overhead_tokens=64))
        seconds.append(time.process_time() - started)
    assert seconds[1] < 30 * seconds[0]
