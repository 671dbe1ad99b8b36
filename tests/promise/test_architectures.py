"""The promise, architecture by architecture and head by head.

Each case trains one update of eleven ragged rows with the real trainer in micro-batches of 3, 3, 3
and 2, and compares what reached the optimizer with one backward over the whole update padded
together (`support.reference`). `benchmarks/exactness.py --all` asks it of everything else.
"""

import pytest
import torch
from support import reference, zoo_configs
from support.zoo import CASES, Case, case_named
from support.zoo_runs import count_micro_batch, train_ours, train_stock

pytestmark = pytest.mark.slow

EXACT = 1e-10

PLAIN = [case for case in CASES if not case.router_loss]
ROUTED = [case for case in CASES if case.router_loss]


def whole_gradient(case: Case) -> reference.Gradient:
    model = case.build()
    return reference.reference_gradient(model, case.rows(), case.collator(model))


def ours(case: Case, **options):
    model = case.build()
    return train_ours(model, case.rows(), case.collator(model), **options)


def test_the_cases_span_forty_architectures_and_every_head():
    assert len(CASES) >= 60
    assert len(set(CASES)) == len(CASES)
    assert len({case.model_type for case in CASES}) >= 40
    assert {case.head for case in CASES} == {
        *("causal", "seq2seq", "mlm", "tok", "single", "regression", "multilabel", "qa", "mc")
    }


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_the_accumulated_gradient_is_that_of_the_whole_update(case):
    with reference.float64_everywhere():
        run = ours(case)
        expected = whole_gradient(case)
    assert [len(batch["input_ids"]) for batch in run.micro_batches] != [11]
    assert len(run.micro_batches) == 4
    assert reference.relative_error(run.gradient, expected) <= EXACT
    assert run.warnings == []


@pytest.mark.parametrize(
    ("case", "seed"), [("convbert-single", 2), ("convbert-multilabel", 2), ("doge-causal", 0)]
)
def test_padding_that_only_rows_not_looked_at_would_show_is_found(case, seed):
    """A convolution reaches the first token only of very short rows; Doge keeps the best tokens."""
    case = case_named(case)
    with reference.float64_everywhere():
        model, rows = case.build(), case.rows(seed=seed)
        run = train_ours(model, rows, case.collator(model), per_device_train_batch_size=3)
        model = case.build()
        expected = reference.reference_gradient(model, rows, case.collator(model))
    assert reference.relative_error(run.gradient, expected) <= EXACT


@pytest.mark.parametrize("case", ROUTED, ids=str)
def test_a_router_loss_is_that_of_the_whole_update(case):
    with reference.float64_everywhere():
        run = ours(case)
        expected = whole_gradient(case)
    assert run.warnings == []
    assert reference.relative_error(run.gradient, expected) <= EXACT


def test_in_one_pass_a_router_loss_counts_once_and_by_share():
    """What is left is that it multiplies two means over a micro-batch, and the warning says so."""
    case = case_named("mixtral-causal-router")
    with reference.float64_everywhere():
        run = ours(case, update_passes=1)
        counts = [count_micro_batch(case.head, b, shifts=True) for b in run.micro_batches]
        shared = reference.share_weighted_gradient(case.build(), run.micro_batches, counts)
        whole = whole_gradient(case)
    assert reference.relative_error(run.gradient, shared) <= EXACT
    assert 1e-5 < reference.relative_error(run.gradient, whole) < 3e-4
    assert "its own nonlinearity" in run.warnings[0]


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("llama-causal", 1.0),
        ("gpt2-causal", 0.98),  # counts the first label of row 0
        ("bert-mlm", 4.0),  # takes num_items_in_batch, ignores it
        ("t5-seq2seq", 4.0),
        ("bert-single", 4.0),
        ("xlnet-mc", None),
        ("bert-qa", None),
    ],
)
def test_the_stock_trainer_is_as_far_off_as_the_readme_says(name, scale):
    """Where this fails after an upgrade, stock has been repaired and the README owes it a line."""
    case = case_named(name)
    with reference.float64_everywhere():
        model = case.build()
        run = train_stock(model, case.rows(), case.collator(model))
        expected = whole_gradient(case)
    error = reference.relative_error(run.gradient, expected)
    if scale == 1.0:
        assert error <= EXACT
        return
    assert error > 1e-3
    if scale is not None:
        assert reference.scale(run.gradient, expected) == pytest.approx(scale, rel=0.15)


@pytest.mark.parametrize("name", ["gpt2-causal", "t5-seq2seq", "bert-mlm", "roberta-single"])
@pytest.mark.parametrize(
    "mistake",
    [
        reference.mean_of_means,
        reference.sum_of_means,
        reference.unshifted_count,
        reference.world_size_forgotten,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_the_usual_mistakes_are_rejected(name, mistake):
    case = case_named(name)
    if mistake is reference.unshifted_count and case.head != "causal":
        pytest.skip("only a causal LM shifts")
    with reference.float64_everywhere():
        model = case.build()
        rows, collator = case.rows(), case.collator(model)
        cut = [rows[:1], rows[1:6], rows[6:]]
        batches = [dict(collator(part)) for part in cut]
        counts = [count_micro_batch(case.head, b, shifts=True) for b in batches]
        right = reference.share_weighted_gradient(model, batches, counts)
        wrong = mistake(model, batches, counts)
        whole = whole_gradient(case)
    assert reference.relative_error(right, whole) <= EXACT
    assert reference.relative_error(wrong, whole) > 1e-3


def test_the_reference_sees_one_part_in_a_million():
    """A weight off by 1e-6 is far outside of the tolerance: float64 is kept all the way."""
    case = case_named("llama-causal")
    with reference.float64_everywhere():
        model = case.build()
        batch = dict(case.collator(model)(case.rows()))
        off = reference.weighted_gradient(model, [batch], [1 + 1e-6])
        whole = whole_gradient(case)
    assert all(gradient.dtype is torch.float64 for gradient in whole.values())
    assert reference.relative_error(off, whole) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("name", ["llama-causal", "gpt2-causal", "opt-causal", "bloom-causal"])
def test_padding_on_the_left_is_exact_too(name):
    """GPT-2 counts positions from the edge, padding included: there width matters.

    First labels are masked, as they are behind a prompt. A first label that is kept has padding in
    front of it, or not, as its row's neighbours have it: what the loss is then nobody can say.
    """
    case = case_named(name)
    rows = [{**row, "labels": [-100, *row["labels"][1:]]} for row in case.rows()]
    with reference.float64_everywhere():
        model = case.build()
        collator = case.collator(model)
        collator.tokenizer.padding_side = "left"
        run = train_ours(model, rows, collator)
        expected = reference.reference_gradient(case.build(), rows, collator)
        right = reference.reference_gradient(case.build(), rows, case.collator(model))
    assert reference.relative_error(run.gradient, expected) <= EXACT
    assert (reference.relative_error(right, expected) > 1e-3) == (name == "gpt2-causal")


@pytest.mark.parametrize("name", ["llama-causal", "bert-qa", "t5-seq2seq", "bart-single"])
@pytest.mark.parametrize("tokens", [1, 20, 40, 1000])
def test_a_budget_of_tokens_cuts_without_a_trace(name, tokens):
    case = case_named(name)
    with reference.float64_everywhere():
        run = ours(case, max_tokens_per_micro_batch=tokens)
        expected = whole_gradient(case)
    assert (len(run.micro_batches) == 1) == (tokens == 1000)
    assert reference.relative_error(run.gradient, expected) <= EXACT


@pytest.mark.parametrize("capacity", [64, 10_000])
def test_experts_that_drop_tokens_are_warned_about_and_keep_their_capacity(capacity, monkeypatch):
    """NLLB-MoE writes its capacity in eval mode: asking must not change how it trains."""
    small = {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": capacity}
    monkeypatch.setitem(zoo_configs.OVERRIDES, "nllb-moe", small)
    case = case_named("nllb-moe-seq2seq")
    with reference.float64_everywhere():
        run = ours(case)
        expected = whole_gradient(case)
        shared = reference.share_weighted_gradient(
            case.build(),
            run.micro_batches,
            [count_micro_batch(case.head, batch, shifts=False) for batch in run.micro_batches],
        )
    assert f"each expert takes {capacity} tokens of a micro-batch" in " ".join(run.warnings)
    assert reference.relative_error(run.gradient, shared) <= EXACT
    assert (reference.relative_error(run.gradient, expected) <= EXACT) == (capacity == 10_000)


def test_labels_padded_with_a_token_are_exact_and_warned_about():
    """FSMT's own helper unmasks the labels it is given, in place."""
    case = case_named("fsmt-seq2seq")
    with reference.float64_everywhere():
        run = ours(case)
        expected = whole_gradient(case)
    assert reference.relative_error(run.gradient, expected) <= EXACT
    assert "the model learns to predict padding" in " ".join(run.warnings)
