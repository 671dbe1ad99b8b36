"""TRL's trainers on trees: the prompt of a pair once, in the policy and in the reference."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch

pytest.importorskip("trl")

from support.common_prompts import watching_calls
from support.trl_cases import (
    CASES,
    IN_PIECES,
    NUM_ROWS,
    ROWS_PER_UPDATE,
    WHOLE,
    assert_same,
    prompted_rows,
    run,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:trl.*"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]

NAMES = {
    "dpo": "a reference of its own",
    "dpo_sft": "the same, and a loss of two terms",
    "dpo_aot": "the same, and a loss that compares pairs, so two passes",
    "dpo_lora": "a reference that is the model without its adapter",
    "reward": "a score for each answer",
    "tpo_alpha": "three answers to a prompt",
    "kto": "no pairs, but prompts that come back",
    "kto_kl": "the same, and other rows beside them",
    "sft": "rows of prompts that come back",
}
# TRL's fused head gives float32 gradients of its own weights, whatever the model is in.
TOLERANCE = dict.fromkeys(NAMES, 1e-12) | dict.fromkeys(("dpo", "kto", "sft"), 1e-6)
OUR_OWN = {"grad_norm", "epoch", "step", "learning_rate"}


def train(name, **options):
    """Train two updates of prompted rows; KTO's KL pairs rows of a batch, whose size must stay."""
    kept = []
    pieces = WHOLE | {"max_tokens_per_micro_batch": 250} if name == "kto_kl" else IN_PIECES
    options = {**pieces, "layout": "shared_prefix", "prepare": kept.append} | options
    with watching_calls() as calls:
        result = run(name, mixed=True, rows=partial(prompted_rows, name), **options)
    return result, calls, kept


@cache
def whole(name):
    """TRL's own trainer on the whole update at once."""
    return run(name, mixed=False, rows=partial(prompted_rows, name), **WHOLE)


def is_a_time(key):
    return key.endswith(("_runtime", "_time", "_per_second"))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_computed_once_give_the_gradient_of_trl_on_the_whole_update(name):
    shared, calls, _ = train(name)
    assert_same(shared.gradients, whole(name).gradients, TOLERANCE[name])
    trained = [tree for tree, wanted in zip(calls.of_trees, calls.trained, strict=True) if wanted]
    assert trained
    assert all(trained)
    if name != "kto_kl":  # every second call of whose bodies has other rows
        assert all(calls.of_trees)
    if name in ("dpo", "dpo_lora"):  # of each micro-batch: the policy, and the reference
        answers = len(calls.of_trees) - 2 * len(trained)
        assert answers == 6, "besides the trial, which asks both three times"
    for row, theirs in zip(shared.rows, whole(name).rows, strict=True):
        assert row["shared_fraction"] > 0.3
        assert row["computed_tokens_per_update"] < 0.65 * row["input_tokens_per_update"]
        left_out = OUR_OWN if name in CASES else {*theirs} - {"loss"}  # see `test_trl`
        expected = {key: value for key, value in theirs.items() if key not in left_out}
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["dpo_lora", "reward"])
def test_the_budget_counts_what_pairs_compute(name):
    options = {"effective_batch_size": NUM_ROWS, "max_tokens_per_micro_batch": 150}
    shared, calls, _ = train(name, **options)
    widths = [w for w, wanted in zip(calls.widths, calls.trained, strict=True) if wanted]
    assert max(widths) <= 150
    assert sum(widths) == shared.rows[0]["computed_tokens_per_update"]
    plain, _, _ = train(name, layout="padded", **options)
    assert shared.num_micro_batches[0] < 0.6 * plain.num_micro_batches[0]
    assert_same(shared.gradients, plain.gradients, 1e-12)


@pytest.mark.parametrize("name", ["dpo_lora", "reward"])
def test_pairs_of_trees_stay_together_when_an_update_does_not_fit(name):
    failed = []

    def break_once(trainer):
        def hook(module, args, kwargs):
            ids = kwargs["input_ids"]
            if module.training and torch.is_grad_enabled() and len(ids) > 8 and not failed:
                failed.append(len(ids))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

        trainer.model.register_forward_pre_hook(hook, with_kwargs=True)

    pieces = WHOLE | {"effective_batch_size": ROWS_PER_UPDATE, "max_tokens_per_micro_batch": 10_000}
    shared, calls, _ = train(name, prepare=break_once, **pieces)
    assert failed == [2 * ROWS_PER_UPDATE]
    assert shared.num_micro_batches[0] > 1
    assert calls.num_trained_trees > 2
    assert_same(shared.gradients, whole(name).gradients, TOLERANCE[name])


def test_a_reference_that_was_asked_before_leaves_the_policy_its_trees():
    """It was asked with rows as they are: nothing of the model was known yet."""
    shared, calls, _ = train("dpo_lora", precompute_ref_log_probs=True)
    assert_same(shared.gradients, whole("dpo_lora").gradients, 1e-12)
    assert all(calls.of_trees)
    assert len(calls.of_trees) - calls.num_trained_trees == 3, "the trial"


@pytest.mark.parametrize("name", ["dpo_lora", "reward", "sft"])
def test_pairs_are_evaluated_as_trees_once_the_model_was_asked(name):
    results, num_calls = [], []
    for layout in ("shared_prefix", "padded"):
        options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 5}
        _, calls, (trainer,) = train(name, layout=layout, **options)
        rows = [row for row in trainer.state.log_history if "eval_loss" in row]
        assert len(rows) == 2
        results += [{k: v for k, v in row.items() if not is_a_time(k)} for row in rows]
        num_calls.append(calls.num_trees - calls.num_trained_trees)
    _, training, _ = train(name)
    per_batch = 2 if name == "dpo_lora" else 1
    assert num_calls == [training.num_trees - training.num_trained_trees + 2 * per_batch, 0]
    assert len(results[0]) >= 4
    for shared, plain in zip(results[:2], results[2:], strict=True):
        assert shared == pytest.approx(plain, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_trainers_that_lay_their_rows_out_in_the_loss_train_as_before(name):
    """What they are given has no input_ids, and no rows of a pair to tell apart."""
    result, calls, _ = train(name, layout="auto")
    assert calls.num_trees == 0
    assert_same(result.gradients, whole(name).gradients, 1e-12)
