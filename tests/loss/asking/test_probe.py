"""Asking the model: what the probe must find out about losses of every kind."""

import pytest
import torch
from support.reference import float64_everywhere
from support.tiny import pad, ragged_rows, tiny_llama
from torch import nn

from hf_gradacc.loss.asking.answers import Answer
from hf_gradacc.loss.asking.ask import find_mixing
from hf_gradacc.loss.asking.probe import probe_loss
from hf_gradacc.loss.asking.questions import vary_padding, vary_targets
from hf_gradacc.loss.asking.rows import choose_rows_to_ask
from hf_gradacc.updates.targets import TargetRule

ROWS = [row for row in ragged_rows(30, seed=21) if sum(x != -100 for x in row["labels"]) > 2][:3]
BATCH = pad(ROWS)
MODEL = tiny_llama().eval()


def ask(loss_of_batch, batch=BATCH, **options):
    def loss_of(inputs, count):
        with torch.no_grad(), float64_everywhere():
            return Answer(float(loss_of_batch(inputs, count)))

    return probe_loss(batch, loss_of, **{"dtype": torch.float64, **options})


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
            return Answer(round(float(shifting(inputs)), 1))

    assert probe_loss(BATCH, coarse, dtype=torch.bfloat16).rule is TargetRule.NEXT_TOKEN


def test_a_loss_over_rows_or_over_its_own_input_is_recognized_without_labels():
    batch = {k: v for k, v in BATCH.items() if k != "labels"}
    assert ask(per_row, batch).rule is TargetRule.SEQUENCE
    assert ask(of_its_input, batch).rule is TargetRule.NEXT_INPUT_TOKEN


def test_a_loss_that_needs_its_count_is_given_it():
    facts = ask(lambda inputs, count: shifting(inputs, reduction="sum") / count)
    assert (facts.rule, facts.wants_own_count) == (TargetRule.NEXT_TOKEN, True)


def test_a_sum_is_told_from_a_mean_whether_or_not_it_takes_its_count():
    facts = ask(lambda inputs, count: shifting(inputs, reduction="sum"))
    assert (facts.rule, facts.weighing, facts.wants_own_count) == ("next_token", "sum", False)
    assert facts.warnings == ()
    assert "a sum over its targets" in facts.notes[0]

    def divided(inputs, count):
        loss = shifting(inputs, reduction="sum")
        return loss if count is None else loss / count

    facts = ask(divided)
    assert (facts.rule, facts.weighing, facts.wants_own_count) == ("next_token", "mean", True)
    assert facts.notes == ()


def test_a_sum_is_told_from_a_mean_through_padding_rounding_and_rows_without_a_target():
    def leaking(inputs, count=None):
        logits = logits_of(inputs) + 0.01 * inputs["input_ids"].shape[1]
        both = torch.cat([logits, logits.sum(1, keepdim=True).expand_as(logits)], -1)
        return cross_entropy(both[:, :-1], inputs["labels"][:, 1:], reduction="sum")

    facts = ask(leaking)
    assert (facts.weighing, facts.pad_to_one_width) == ("sum", True)

    def summed(inputs, count=None):
        return shifting(inputs, reduction="sum")

    assert ask(summed, dtype=torch.bfloat16).weighing == "sum"
    assert ask(shifting, dtype=torch.bfloat16).weighing == "mean"

    def of_rows(inputs, count=None):
        mask = inputs["attention_mask"].unsqueeze(-1)
        return ((logits_of(inputs) * mask).sum(1) / mask.sum(1)).square().mean(-1).sum()

    labels = BATCH["labels"].clone()
    labels[0, 1:] = -100
    assert ask(of_rows, {**BATCH, "labels": labels}).weighing == "sum"


def test_a_loss_that_is_neither_trains_on_with_the_figure():
    facts = ask(lambda inputs, count: shifting(inputs, reduction="sum").sqrt())
    assert facts.weighing == "mean"
    assert "the loss of 3 rows together differs" in facts.warnings[0]


def test_a_mean_is_settled_by_five_forwards():
    asked = []

    def noting(inputs, count=None):
        asked.append(inputs["input_ids"].shape)
        return shifting(inputs)

    assert not ask(noting).pad_to_one_width
    assert len(asked) == 5
    together, *alone, wide = asked
    assert [shape[0] for shape in alone] == [1, 1, 1]
    assert wide[1] > together[1]


def test_a_loss_that_is_not_a_number_is_said_to_tell_nothing():
    facts = ask(lambda inputs, count: shifting(inputs) * float("nan"))
    assert facts.rule in (TargetRule.NEXT_TOKEN, TargetRule.SAME_TOKEN)
    assert "nan before the first update" in facts.warnings[0]


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
    widths.clear()
    ask(noting, batch, max_width=width + 8)
    assert max(widths) == width


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
        assert varied[:, 0].ne(-100).tolist() == [False, False, True]
    else:
        assert not varied[batch["labels"] == -100].ne(-100).any()
    narrow = {"labels": torch.tensor([[3, -100, -100], [3, 4, -100], [5, 6, 7]])}
    of_ctc = vary_targets(narrow)["labels"].ne(-100).sum(1).tolist()
    assert of_ctc == [1, 1, 3]  # neither as many in each row, nor none in any
    unequal = {key: value.clone() for key, value in BATCH.items()}
    assert vary_targets(unequal)["labels"][:, 1:].equal(unequal["labels"][:, 1:])


def test_the_first_row_is_cut_short_and_all_are_padded_where_rows_are_plain_text():
    varied = vary_padding(BATCH, pad_token_id=0)
    width = BATCH["input_ids"].shape[1]
    lengths = BATCH["attention_mask"].sum(1).tolist()
    assert varied["attention_mask"].sum(1).tolist() == [3, *lengths[1:]]
    assert varied["input_ids"].shape[1] == max(lengths) + 3
    assert varied["input_ids"][0, 3:].eq(0).all()
    assert varied["labels"][0, 3:].eq(-100).all()
    assert varied["input_ids"][1:, :width].equal(BATCH["input_ids"][1:])
    assert vary_padding(BATCH, pad_token_id=7, max_width=width)["labels"].shape[1] == width
    answers = {**BATCH, "start_positions": torch.tensor([4, 1, 1])}
    assert vary_padding(answers, pad_token_id=7)["attention_mask"].equal(BATCH["attention_mask"])


def test_rows_of_a_large_model_are_cut_around_their_first_target():
    ids = torch.arange(1, 41).repeat(2, 1)
    labels = torch.where(ids > 30, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    cut = vary_padding(batch, pad_token_id=0, longest=8)
    assert cut["input_ids"][1].tolist() == [26, 27, 28, 29, 30, 31, 32, 33, 0, 0, 0]
    assert cut["labels"][1].tolist() == [-100] * 5 + [31, 32, 33] + [-100] * 3
