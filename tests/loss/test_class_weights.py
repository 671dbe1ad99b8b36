"""A cross entropy with class weights is a mean over what its targets weigh, however it is cut."""

import pytest
import torch
from support.class_weights import (
    CASES,
    MIXED,
    WEIGHTS,
    collate_classes,
    of_rows,
    trained,
    weights_of_rank,
)
from support.ranks import run_ranks
from torch import nn
from torch.nn import functional

from hf_gradacc.loss.asking.answers import Loss
from hf_gradacc.loss.asking.probe import probe_loss
from hf_gradacc.loss.class_weights import ClassWeights, WeightedCalls
from hf_gradacc.updates.targets import TargetRule

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-10


def distance(one, other):
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_cut_does_not_change_the_weights(tmp_path, case):
    whole, cut = (trained(tmp_path / str(n), case, size=n) for n in (8, 2))
    assert distance(whole, cut) < EXACT
    assert not cut.facts.warnings
    assert cut.facts.class_weights is not None
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_counting_targets_instead_is_another_gradient(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", "rows", size=8)
    monkeypatch.setattr("hf_gradacc.loss.asking.evidence.Evidence.weighted", lambda self: None)
    cut = trained(tmp_path / "cut", "rows", size=2, update_passes=1)
    assert distance(whole, cut) > 1e-3
    assert any("LossTerms" in warning for warning in cut.facts.warnings)


def test_rows_of_one_class_do_not_hide_the_weights():
    """Asked with these alone, the loss is the plain mean of theirs as well."""
    torch.manual_seed(0)
    head = nn.Linear(4, 3).double()

    def compute(inputs, count):
        return functional.cross_entropy(head(inputs["x"]), inputs["labels"], weight=WEIGHTS)

    inputs = {"x": torch.randn(3, 4).double(), "labels": torch.tensor([1, 1, 1])}
    loss = Loss(model=head, compute=compute)
    facts = probe_loss(inputs, loss.ask, dtype=torch.float64, main_input="x")
    assert facts.class_weights is not None
    assert facts.rule is TargetRule.SEQUENCE


def test_a_micro_batch_whose_classes_weigh_nothing_is_left_out(tmp_path):
    whole, cut = (trained(tmp_path / str(n), "two classes", size=n) for n in (8, 1))
    assert distance(whole, cut) < EXACT


def test_evaluation_is_the_weighted_mean_of_all_rows(tmp_path):
    trainer = trained(tmp_path, "rows", size=2, per_device_eval_batch_size=3)
    batch = collate_classes(MIXED)
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = float(of_rows(trainer.model.eval()(**batch).logits, labels))
    assert trainer.evaluate(MIXED)["eval_loss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_two_ranks_train_what_one_process_does(tmp_path):
    whole = trained(tmp_path / "whole", "rows", size=8)
    weights = run_ranks(weights_of_rank, 2, folder=str(tmp_path / "ranks"))[0]
    for mine, theirs in zip(whole.model.parameters(), weights, strict=True):
        assert float((mine.detach() - torch.tensor(theirs, dtype=mine.dtype)).abs().max()) < EXACT


def test_a_call_is_seen_only_if_it_is_a_mean_with_unequal_weights():
    logits, labels = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, -100])
    entropy = functional.cross_entropy
    for call in (
        lambda: entropy(logits, labels),
        lambda: entropy(logits, labels, weight=torch.ones(3).double()),
        lambda: entropy(logits, labels, weight=WEIGHTS, reduction="sum"),
        lambda: entropy(logits, logits.softmax(-1), weight=WEIGHTS),
        lambda: (entropy(logits, labels, WEIGHTS), entropy(logits, labels, WEIGHTS)),
    ):
        with WeightedCalls() as calls:
            call()
        assert calls.only is None
    with WeightedCalls() as calls:
        value = entropy(logits, labels, WEIGHTS)
    assert calls.only.total == pytest.approx(6.2)
    summed = entropy(logits, labels, WEIGHTS, reduction="sum")
    assert float(summed) / calls.only.total == pytest.approx(float(value))


def test_targets_are_weighed_under_each_rule():
    weights = ClassWeights((1.0, 10.0, 100.0))
    batch = {"labels": torch.tensor([[2, 1, 0], [-100, 1, 1]])}
    assert weights.total(batch, TargetRule.SAME_TOKEN) == 131
    assert weights.total(batch, TargetRule.NEXT_TOKEN) == 31
    assert weights.total({"labels": torch.tensor([2, 0])}, TargetRule.SEQUENCE) == 101
