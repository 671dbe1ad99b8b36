"""Whatever rows share and however they are cut: gradient, loss and counts are those of the rows."""

import pytest
import torch
from support.random_runs import run_from
from support.reference import model_loss, reference_gradient, relative_error
from support.tiny import log_rows, pad

from hf_gradacc.loss.trees.kept import KeptBeginning
from hf_gradacc.updates.trees.plan import GrownTrees

FAST = (0, 1, 2, 5, 14, 16, 24, 41)
"""Among them runs that keep beginnings, and whose trees have tokens in common."""
MORE = sorted({*range(60)} - {*FAST})


def differences(run):
    """What of a run is not as a count by hand, and one pass over each update's rows, say."""
    found = []
    trained = [n for n, row in enumerate(run.rows) if any(x != -100 for x in row["labels"][1:])]
    seen = sorted(index for members in run.members for index in members)
    if seen != sorted(trained * run.settings["num_train_epochs"]):
        found.append("rows trained twice or never")
    model, losses = run.trainer.model, []
    for update, (members, log) in enumerate(zip(run.members, log_rows(run.trainer), strict=True)):
        rows = [run.rows[index] for index in members]
        if not rows:
            continue
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(run.weights[update][name])

        def noted(model, batch):
            losses.append(model_loss(model, batch))
            return losses[-1]

        expected = reference_gradient(model, rows, pad, loss_of=noted)
        counted = {
            "loss": pytest.approx(float(losses[-1].detach()), rel=1e-12),
            "effective_batch_size": len(rows),
            "tokens_per_update": sum(x != -100 for row in rows for x in row["labels"][1:]),
            "input_tokens_per_update": sum(len(row["input_ids"]) for row in rows),
        }
        if run.settings.get("noise_scale_every") is None:  # else some run again
            counted["computed_tokens_per_update"] = run.computed[update]
        found += [
            f"{key} of {update}: {log[key]} for {value}"
            for key, value in counted.items()
            if log[key] != value
        ]
        if not relative_error(run.gradients[update], expected) < 1e-11:
            found.append(f"gradient of {update}")
    return found


@pytest.mark.parametrize("seed", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_a_run_from_a_number_is_that_of_its_rows(seed):
    with run_from(seed) as run:
        assert differences(run) == [], run.settings


def test_runs_from_numbers_notice_what_they_are_for(monkeypatch):
    """A beginning's gradient that is not sent back, and tokens that are counted twice."""
    monkeypatch.setattr(KeptBeginning, "close", lambda self: None)
    monkeypatch.setattr(GrownTrees, "num_tokens", property(lambda trees: sum(trees.sizes)))
    found = []
    for seed in (14, 16, 41):
        with run_from(seed) as run:
            found += differences(run)
    assert any("gradient" in line for line in found)
    assert any("computed" in line for line in found)
