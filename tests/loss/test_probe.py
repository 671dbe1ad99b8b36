"""Asking the model: what the probe must find out about losses of every kind."""

import pytest
import torch
from support.reference import float64_everywhere
from support.tiny import pad, ragged_rows, tiny_llama
from torch import nn

from hf_gradacc import LossError
from hf_gradacc.loss.asking import find_mixing
from hf_gradacc.loss.probe import probe_loss
from hf_gradacc.loss.probe_rows import choose_rows_to_ask
from hf_gradacc.loss.questions import vary_targets
from hf_gradacc.updates.targets import TargetRule

ROWS = [row for row in ragged_rows(30, seed=21) if sum(x != -100 for x in row["labels"]) > 2][:3]
BATCH = pad(ROWS)
MODEL = tiny_llama().eval()


def ask(loss_of_batch, batch=BATCH, **options):
    def loss_of(inputs, count):
        with torch.no_grad(), float64_everywhere():
            return float(loss_of_batch(inputs, count))

    return probe_loss(batch, loss_of, dtype=torch.float64, **options)


def logits_of(inputs):
    return MODEL(inputs["input_ids"], inputs.get("attention_mask")).logits


def cross_entropy(logits, labels, **options):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def shifting(inputs, count=None, **options):
    return cross_entropy(logits_of(inputs)[:, :-1], inputs["labels"][:, 1:], **options)


def not_shifting(inputs, count=None):
    return cross_entropy(logits_of(inputs), inputs["labels"])


def per_row(inputs, count=None):
    mask = inputs["attention_mask"].unsqueeze(-1)
    return ((logits_of(inputs) * mask).sum(1) / mask.sum(1)).square().mean(-1).mean()


def of_its_input(inputs, count=None):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return cross_entropy(logits_of(inputs)[:, :-1], labels[:, 1:])


@pytest.mark.parametrize(
    ("loss", "rule"),
    [
        (shifting, TargetRule.NEXT_TOKEN),
        (not_shifting, TargetRule.SAME_TOKEN),
    ],
)
def test_a_loss_shows_whether_it_shifts_its_labels(loss, rule):
    facts = ask(loss)
    assert (facts.rule, facts.wants_own_count, facts.warnings) == (rule, False, ())
    assert facts.rule_error < 1e-12


def test_shifting_is_seen_even_where_rounding_hides_every_difference_of_means():
    def coarse(inputs, count):
        with torch.no_grad(), float64_everywhere():
            return round(float(shifting(inputs)), 1)

    assert probe_loss(BATCH, coarse, dtype=torch.bfloat16).rule is TargetRule.NEXT_TOKEN


def test_a_loss_over_rows_or_over_its_own_input_is_recognized_without_labels():
    batch = {k: v for k, v in BATCH.items() if k != "labels"}
    assert ask(per_row, batch).rule is TargetRule.SEQUENCE
    assert ask(of_its_input, batch).rule is TargetRule.NEXT_INPUT_TOKEN


def test_a_loss_that_needs_its_count_is_given_it():
    facts = ask(lambda inputs, count: shifting(inputs, reduction="sum") / count)
    assert (facts.rule, facts.wants_own_count) == (TargetRule.NEXT_TOKEN, True)


def test_a_sum_is_refused_whichever_way_it_is_called():
    with pytest.raises(LossError, match="not a mean over its targets"):
        ask(lambda inputs, count: shifting(inputs, reduction="sum"))


def test_a_loss_that_mixes_the_rows_of_a_batch_is_named_with_a_figure():
    def mixing(inputs, count=None):
        logits = logits_of(inputs)[:, :-1]
        logits = logits + 0.3 * logits.mean(0, keepdim=True)
        return cross_entropy(logits, inputs["labels"][:, 1:])

    facts = ask(mixing)
    assert facts.rule_error > 1e-5
    assert "Rows of a batch influence each other" in facts.warnings[0]
    assert f"{facts.rule_error:.1e}" in facts.warnings[0]


def test_a_router_loss_is_named_as_the_cause_where_the_model_has_one():
    def with_router(inputs, count=None):
        return shifting(inputs) + 0.1 * logits_of(inputs).mean((0, 1)).square().sum()

    facts = ask(with_router, has_router_loss=True)
    assert facts.rule is TargetRule.NEXT_TOKEN
    assert "its own nonlinearity" in facts.warnings[0]


@pytest.mark.parametrize("same_length", [False, True])
def test_padding_that_leaks_into_a_loss_is_noticed(same_length):
    def leaking(inputs, count=None):
        logits = logits_of(inputs) + 0.01 * inputs["input_ids"].shape[1]
        return cross_entropy(
            torch.cat([logits, logits.sum(1, keepdim=True).expand_as(logits)], -1)[:, :-1],
            inputs["labels"][:, 1:],
        )

    batch = pad([ROWS[0]] * 3) if same_length else BATCH
    assert ask(leaking, batch).pad_to_one_width
    assert not ask(shifting, batch).pad_to_one_width


def test_a_model_is_never_given_more_columns_than_it_has_positions():
    widths = []

    def noting(inputs, count=None):
        widths.append(inputs["input_ids"].shape[1])
        return shifting(inputs)

    batch = pad([ROWS[0]] * 2)
    width = batch["input_ids"].shape[1]
    ask(noting, batch, max_width=width + 9)
    assert max(widths) == width + 1  # a margin of 8: RoBERTa's positions begin at 2
    ask(noting, batch, max_width=None)
    assert max(widths) == width + 3


def test_a_model_that_cannot_take_a_narrow_row_is_padded_alike():
    def pooling(inputs, count=None):
        if inputs["input_ids"].shape[1] < BATCH["input_ids"].shape[1]:
            raise RuntimeError("output with shape [1, 4] doesn't match the broadcast shape")
        return shifting(inputs)

    assert ask(pooling).pad_to_one_width


def test_an_encoder_decoder_is_not_asked_whether_it_shifts():
    def crashing_on_no_target(inputs, count=None):
        assert inputs["labels"].ne(-100).any(), "mBART crashes here"
        return not_shifting(inputs)

    assert ask(crashing_on_no_target, encoder_decoder=True).rule is TargetRule.SAME_TOKEN


def test_experts_that_drop_tokens_only_in_training_are_named():
    from transformers import NllbMoeConfig, SwitchTransformersConfig

    model = nn.Linear(1, 1)
    assert not find_mixing(model)
    model.config = NllbMoeConfig(expert_capacity=32)
    (line,) = find_mixing(model)
    assert "takes 32 tokens" in line
    model.config = SwitchTransformersConfig()
    assert not find_mixing(model)


def test_batch_norm_is_named_unless_it_stays_in_evaluation_mode():
    """Evaluation mode, in which the model is asked, hides that it mixes rows."""

    class Pinned(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    (line,) = find_mixing(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)))
    assert line.startswith("2 BatchNorm layers normalize by the rows of a micro-batch")
    model = nn.Sequential(nn.Linear(2, 2), Pinned(2), nn.LayerNorm(2)).eval()
    assert not find_mixing(model)
    assert not model.training


def test_rows_with_targets_are_chosen_to_ask_with():
    labels = torch.full((5, 4), -100)
    labels[1, 0] = labels[3, 2] = labels[4, 3] = 7
    assert choose_rows_to_ask({"labels": labels}, count=3) == [1, 3, 4]
    assert choose_rows_to_ask({"labels": labels}, count=2) == [3, 4]


@pytest.mark.parametrize("offset", [0, 2])
def test_rows_alike_are_given_targets_of_different_number(offset):
    """On labels as narrow as an encoder-decoder's own, some are masked; none are made up."""
    ids = torch.arange(3 * 9).view(3, 9) + 1
    labels = ids.clone()
    labels[:, :4] = -100
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels[:, offset:]}
    batch["labels"] = batch["labels"].masked_fill(mask[:, offset:] == 0, -100)
    batch["labels"][1:, -2:] = -100
    varied = vary_targets(batch)["labels"]
    counts = varied[:, 1:].ne(-100).sum(1).tolist()
    assert len(set(counts)) == 3
    assert min(counts) > 0
    if offset == 0:
        assert not varied[mask == 0].ne(-100).any()
    else:
        assert not varied[batch["labels"] == -100].ne(-100).any()
    ragged = {**BATCH}
    assert vary_targets(ragged)["labels"] is ragged["labels"]
