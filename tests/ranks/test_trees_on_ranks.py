"""Updates of trees on several ranks have the gradients of one, whatever each computes as trees."""

import functools

import pytest
from support.common_prompts import rows_of_prompts
from support.kept_rows import rows_behind
from support.ranks import run_ranks
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import pad, tiny_llama
from support.tree_jobs import NUM_ROWS, PER_UPDATE, train_kept, train_trees

pytestmark = pytest.mark.slow

RUNS = {
    "DDP": {},
    "DDP under a budget": {"max_tokens_per_micro_batch": 80},
    "FSDP2": {"sharded": True},
    "FSDP2 under a budget": {"sharded": True, "max_tokens_per_micro_batch": 80},
}


@functools.cache
def truth():
    """The gradient of each update at once, step by step."""
    rows = rows_of_prompts(NUM_ROWS, seed=1, prompts=2)
    gradients = []
    with float64_everywhere():
        model = tiny_llama()
        for start in range(0, NUM_ROWS, PER_UPDATE):
            gradient = reference_gradient(model, rows[start : start + PER_UPDATE], pad)
            gradients.append(gradient)
            for name, parameter in model.named_parameters():
                parameter.data -= 0.1 * gradient[name]
    return gradients


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_of_trees_take_the_steps_of_the_whole_batch(name):
    ranks = run_ranks(train_trees, 2, **RUNS[name])
    for rank in ranks:
        assert rank["trees"] >= 2
        for mine, expected in zip(rank["gradients"], truth(), strict=True):
            assert relative_error(mine, expected) < 1e-11
        assert rank["logs"][0]["shared_fraction"] > 0.2
        assert rank["eval_trees"] > rank["trees"]
    assert ranks[0]["eval_loss"] == pytest.approx(ranks[1]["eval_loss"], rel=1e-12)


def test_ranks_whose_clocks_settle_differently_take_the_steps_of_the_whole_batch():
    """Each cuts its share by itself, and ranks in lockstep wait for the one with more pieces."""
    options = {"sharded": True, "max_tokens_per_micro_batch": 80}
    ranks = run_ranks(train_trees, 2, on_rows=1, **options)
    assert ranks[0]["trees"] >= 2
    assert ranks[1]["trees"] == 0
    for rank in ranks:
        for mine, expected in zip(rank["gradients"], truth(), strict=True):
            assert relative_error(mine, expected) < 1e-11


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_on_two_ranks_see_the_tree(reentrant):
    kwargs = {"use_reentrant": reentrant}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    for rank in run_ranks(train_trees, 2, in_float64=False, **options):
        assert rank["trees"] >= 2
        assert relative_error(rank["gradients"][0], truth()[0]) < 1e-6


def gradients_behind_beginnings(*, times=1):
    """Of the three updates of `train_kept`, each gradient taken so many times."""
    with float64_everywhere():
        model = tiny_llama(attn_implementation="sdpa")
        wanted = []
        for _ in range(3):
            found = reference_gradient(model, rows_behind(), pad)
            wanted.append({name: times * gradient for name, gradient in found.items()})
            for name, parameter in model.named_parameters():
                parameter.data -= 0.1 * wanted[-1][name]
    return wanted


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_ranks_keep_beginnings_where_a_backward_may_run_by_itself(sharded):
    wanted = gradients_behind_beginnings()
    ranks = run_ranks(train_kept, 2, sharded=sharded)
    assert any(rank["kept"] for rank in ranks) is not sharded
    for rank in ranks:
        assert ("split between ranks" in rank["why"]) is sharded
        for mine, expected in zip(rank["gradients"], wanted, strict=True):
            assert relative_error(mine, expected) < 1e-11


def test_a_step_that_runs_its_rows_twice_on_two_ranks_keeps_no_beginning():
    wanted = gradients_behind_beginnings(times=2)
    for rank in run_ranks(train_kept, 2, twice=True):
        for mine, expected in zip(rank["gradients"], wanted, strict=True):
            assert relative_error(mine, expected) < 1e-11


@pytest.mark.parametrize(
    ("found", "agreed"),
    [
        ({"keeps_beginnings": False}, (True, True, False)),
        ({"keeps_beginnings": False, "trees_by_rows": False}, (False, False, False)),
    ],
    ids=["keeps nothing", "needs a mask"],
)
def test_ranks_agree_on_what_trees_cost_since_they_deal_rows_by_it(found, agreed):
    wanted = gradients_behind_beginnings()
    for rank in run_ranks(train_kept, 2, finds_on_first=found):
        assert rank["way"] == rank["costs_of"] == agreed
        for mine, expected in zip(rank["gradients"], wanted, strict=True):
            assert relative_error(mine, expected) < 1e-11


def test_two_ranks_train_the_families_that_one_draws():
    options = {"group_by_prefix": True, "train_sampling_strategy": "random"}
    alone = train_trees(**options)
    for rank in run_ranks(train_trees, 2, **options):
        assert rank["trees"] >= 2
        for mine, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            assert relative_error(mine, expected) < 1e-11
