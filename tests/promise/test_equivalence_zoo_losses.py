"""Exactness where the loss is not the model's own: smoothing, custom functions, overridden methods.

References are written out with torch: its own cross entropy with its own label smoothing, over the
whole update in one pass.
"""

import pytest
import torch
from support import reference
from support.zoo import case_named
from support.zoo_runs import train_ours
from torch.nn.functional import cross_entropy

from hf_gradacc import GradAccTrainer

pytestmark = pytest.mark.slow

EXACT = 1e-10
EPSILON = 0.1


def token_loss(logits, labels, *, shifts, **options):
    """Torch's mean over all targets of the batch."""
    if shifts:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, **options)


def compare(case, loss_of, **options):
    """The gradient that reached the optimizer against `loss_of` over the whole update."""
    with reference.float64_everywhere():
        model = case.build()
        run = train_ours(model, case.rows(), case.collator(model), **options)
        again = case.build()
        expected = reference.reference_gradient(
            again, case.rows(), case.collator(again), loss_of=loss_of
        )
    assert len(run.micro_batches) == 4
    return reference.relative_error(run.gradient, expected)


@pytest.mark.parametrize(
    ("name", "shifts"),
    [
        ("llama-causal", True),
        ("gpt2-causal", True),  # stock shifts for its name only
        ("bart-causal", False),  # stock shifts though the model does not
        ("t5-seq2seq", False),
        ("marian-seq2seq", False),
        ("bert-mlm", False),
        ("modernbert-tok", False),
    ],
)
def test_label_smoothing_is_torchs_own_over_the_whole_update(name, shifts):
    def smoothed(model, batch):
        logits = model(**batch).logits
        return token_loss(logits, batch["labels"], shifts=shifts, label_smoothing=EPSILON)

    assert compare(case_named(name), smoothed, label_smoothing_factor=EPSILON) <= EXACT


def test_label_smoothing_of_a_classifier_counts_sequences():
    def smoothed(model, batch):
        return cross_entropy(model(**batch).logits, batch["labels"], label_smoothing=EPSILON)

    case = case_named("bert-single")
    assert compare(case, smoothed, label_smoothing_factor=EPSILON) <= EXACT


def test_label_smoothing_keeps_the_router_loss():
    case = case_named("olmoe-causal-router")

    def smoothed(model, batch):
        outputs = model(**batch)
        smooth = token_loss(outputs.logits, batch["labels"], shifts=True, label_smoothing=EPSILON)
        return smooth + model.config.router_aux_loss_coef * outputs.aux_loss

    def without_router(model, batch):
        logits = model(**batch).logits
        return token_loss(logits, batch["labels"], shifts=True, label_smoothing=EPSILON)

    with reference.float64_everywhere():
        model = case.build()
        run = train_ours(model, case.rows(), case.collator(model), label_smoothing_factor=EPSILON)
        whole = (case.build(), case.rows(), case.collator(model))
        kept = reference.reference_gradient(*whole, loss_of=smoothed)
        lost = reference.reference_gradient(*whole, loss_of=without_router)
    assert reference.relative_error(run.gradient, kept) <= EXACT
    assert reference.relative_error(run.gradient, lost) > 1e-4


def squared(model, batch):
    """A custom loss that no model has: the mean over targets of a squared probability deficit."""
    return squared_of(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])


def squared_of(outputs, labels, *, reduction="mean"):
    probabilities = outputs["logits"][:, :-1].softmax(-1)
    targets = labels[:, 1:]
    kept = targets != -100
    deficit = 1 - probabilities.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return getattr(deficit[kept].square(), reduction)()


def plain_mean(outputs, labels, num_items_in_batch=None):
    return squared_of(outputs, labels)


def either(outputs, labels, num_items_in_batch=None):
    if num_items_in_batch is None:
        return squared_of(outputs, labels)
    return squared_of(outputs, labels, reduction="sum") / num_items_in_batch


def needs_the_count(outputs, labels, num_items_in_batch=None):
    return squared_of(outputs, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("function", [plain_mean, either, needs_the_count])
def test_a_loss_function_is_exact_with_and_without_the_count(function):
    assert compare(case_named("llama-causal"), squared, compute_loss_func=function) <= EXACT


class PlainMean(GradAccTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = squared_of(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class UsesTheCount(GradAccTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = either(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("trainer_class", [PlainMean, UsesTheCount])
def test_an_overridden_compute_loss_is_exact(trainer_class):
    assert compare(case_named("llama-causal"), squared, trainer_class=trainer_class) <= EXACT


def test_a_custom_loss_without_shift_is_counted_without_shift():
    def unshifted(outputs, labels, num_items_in_batch=None):
        return token_loss(outputs["logits"], labels, shifts=False)

    def expected(model, batch):
        return token_loss(model(**batch).logits, batch["labels"], shifts=False)

    error = compare(case_named("llama-causal"), expected, compute_loss_func=unshifted)
    assert error <= EXACT


def test_a_sum_is_that_of_the_whole_update():
    def a_sum(outputs, labels, num_items_in_batch=None):
        return squared_of(outputs, labels, reduction="sum")

    def expected(model, batch):
        return squared_of(model(**batch), batch["labels"], reduction="sum")

    assert compare(case_named("llama-causal"), expected, compute_loss_func=a_sum) <= EXACT


def test_a_mean_over_sequences_of_means_counts_sequences():
    """A denominator nobody declared is found by asking."""

    def row_means(outputs, labels, num_items_in_batch=None):
        rows = zip(outputs["logits"], labels, strict=True)
        losses = [token_loss(x[None], y[None], shifts=True) for x, y in rows]
        return torch.stack(losses).mean()

    def expected(model, batch):
        return row_means(model(**batch), batch["labels"])

    assert compare(case_named("llama-causal"), expected, compute_loss_func=row_means) <= EXACT
