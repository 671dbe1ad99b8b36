"""A loss of several terms: each is divided by its own count over the whole update."""

import pytest
import torch
from support.loss_terms import (
    ROWS,
    Counted,
    Miscounted,
    Named,
    Summed,
    distance,
    gradient_at_once,
    gradients_of_rank,
    make,
    parts_of,
    whole_loss,
)
from support.ranks import run_ranks
from support.tiny import pad
from transformers import Trainer

from hf_gradacc import ConfigError, LossError, LossTerm, LossTerms

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-12


@pytest.mark.parametrize(("kind", "size"), [(Named, 2), (Counted, 1), (Counted, 5)])
def test_the_cut_does_not_change_the_gradient(tmp_path, kind, size):
    trainer, kept = make(tmp_path, kind, per_device_train_batch_size=size)
    trainer.train()
    loss, expected = gradient_at_once()
    assert distance(kept.gradients[0], expected) < EXACT
    assert not trainer.facts.warnings
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["loss"] == pytest.approx(loss, rel=1e-6)
    with torch.no_grad():
        fresh = make(tmp_path / "fresh", kind)[0].model.train()
        tokens, per_row, per_token = parts_of(fresh, pad(ROWS))
    logged = [row[f"loss/{name}"] for name in ("tokens", "rows", "distance")]
    assert logged == pytest.approx(
        [float(tokens), 0.5 * float(per_row.mean()), 0.1 * float(per_token.mean())], rel=1e-9
    )


def test_counts_known_beforehand_need_no_forward_ahead(tmp_path):
    ahead, known = (
        make(tmp_path / k.__name__, k, per_device_train_batch_size=5) for k in (Named, Counted)
    )
    calls = []
    for trainer, _ in (ahead, known):
        trainer.train()
        calls.append(trainer.facts.coupling is not None)
    assert calls == [True, False]
    with pytest.raises(ConfigError, match="count_terms"):
        make(tmp_path / "one", Named, update_passes=1)[0].train()


def test_one_sum_of_all_terms_is_another_gradient_in_one_pass(tmp_path):
    trainer, kept = make(tmp_path, Summed, per_device_train_batch_size=2, update_passes=1)
    trainer.train()
    assert distance(kept.gradients[0], gradient_at_once()[1]) > 1e-3
    assert trainer.facts.warnings


@pytest.mark.parametrize("term", ["tokens", "rows", "distance"])
def test_a_term_weighed_by_another_count_is_another_gradient(tmp_path, term, monkeypatch):
    trainer, kept = make(tmp_path, Counted, per_device_train_batch_size=2)
    weights_of = type(trainer)._make_runner

    def swapped(self, model):
        runner = weights_of(self, model)
        own = runner._weights_of_terms

        def wrong(trainer, micro_batch):
            weights = own(trainer, micro_batch)
            other = "rows" if term != "rows" else "tokens"
            return {**weights, term: weights[other]}

        runner._weights_of_terms = wrong
        return runner

    monkeypatch.setattr(type(trainer), "_make_runner", swapped)
    trainer.train()
    assert distance(kept.gradients[0], gradient_at_once()[1]) > 1e-4


@pytest.mark.slow
def test_two_ranks_train_what_one_process_does(tmp_path):
    loss, expected = gradient_at_once()
    for of_kinds in run_ranks(gradients_of_rank, 2, folder=str(tmp_path)):
        for gradients, log in of_kinds:
            own = [torch.tensor(g, dtype=torch.float64) for g in gradients]
            assert distance(own, expected) < EXACT
            row = next(row for row in log if "loss" in row)
            total = sum(row[key] for key in row if key.startswith("loss/"))
            assert total == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize(("kind", "size"), [(Named, 5), (Counted, 2)])
def test_evaluation_divides_each_term_by_its_count_over_all_batches(tmp_path, kind, size):
    trainer, _ = make(tmp_path, kind, per_device_eval_batch_size=size)
    metrics = trainer.evaluate(ROWS)
    with torch.no_grad():
        expected = float(whole_loss(trainer.model.eval(), ROWS))
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-9)
    names = {key for key in metrics if key.startswith("eval_loss/")}
    assert names == {"eval_loss/tokens", "eval_loss/rows", "eval_loss/distance"}
    assert "eval_perplexity" not in metrics


def test_a_count_that_disagrees_with_its_term_is_named(tmp_path):
    trainer, _ = make(tmp_path, Miscounted)
    with pytest.raises(LossError, match=r"count_terms says .* for the term 'distance'"):
        trainer.train()


def test_a_loss_function_may_return_terms(tmp_path):
    def loss_func(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        entropy = torch.nn.functional.cross_entropy(logits, targets)
        return LossTerms(entropy=entropy, size=outputs.logits.square().mean((1, 2)).mean())

    runs = []
    for size in (13, 2):
        trainer, kept = make(
            tmp_path / str(size),
            Trainer,
            per_device_train_batch_size=size,
            compute_loss_func=loss_func,
        )
        trainer.train()
        runs.append(kept.gradients[0])
    assert {term.name for term in trainer.facts.terms} == {"entropy", "size"}
    assert distance(runs[1], runs[0]) < 1e-9 or trainer.facts.misfit


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        (lambda: LossTerms(), "no term"),
        (lambda: LossTerms(a=torch.zeros(3)), r"'a' is \(3,\)"),
        (lambda: LossTerms(a=LossTerm(1.0, 3)), "'a' is float"),
        (lambda: LossTerms(a=torch.zeros(())) / 2, "GradAccMixin"),
    ],
)
def test_what_is_no_loss_is_named(terms, said):
    with pytest.raises(LossError, match=said):
        terms()
