"""Targets: what a loss takes its mean over."""

import pytest
import torch

from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.targets import TargetRule, can_have_target, count_all_targets, count_targets

LABELS = torch.tensor([[5, 6, 7, -100], [-100, -100, 8, 9], [4, -100, -100, -100]])


def count(rule, **inputs):
    return count_all_targets(inputs, num_sequences=3, num_input_tokens=10).under(rule)


def test_a_causal_lm_never_predicts_the_first_label_of_a_row():
    assert count(TargetRule.NEXT_TOKEN, labels=LABELS) == 4
    assert count(TargetRule.SAME_TOKEN, labels=LABELS) == 6


def test_shift_labels_already_stand_where_they_are_predicted():
    assert count(TargetRule.NEXT_TOKEN, labels=LABELS, shift_labels=LABELS) == 6


def test_a_batch_says_itself_how_many_rows_and_tokens_it_feeds_in():
    ids, mask = torch.zeros(3, 4, dtype=torch.int64), LABELS.ne(-100).long()
    batch = {"input_ids": ids, "labels": LABELS}
    masked = {**batch, "attention_mask": mask}
    counts = {rule: count_targets(batch, rule) for rule in TargetRule}
    assert list(counts.values()) == [4, 6, 3, 12, 9]
    assert count_targets(masked, TargetRule.INPUT_TOKEN) == 6
    assert count_targets(masked, TargetRule.NEXT_INPUT_TOKEN) == 3
    assert count_targets(masked, TargetRule.SEQUENCE, num_sequences=1) == 1


def test_an_image_is_one_input_token_whatever_its_size():
    images = {"pixel_values": torch.zeros(3, 2, 5, 5), "labels": torch.tensor([1, 0, 2])}
    assert count_targets(images, TargetRule.INPUT_TOKEN, main_input="pixel_values") == 3


def test_a_micro_batch_is_counted_as_the_model_was_asked():
    """What a loss was found to count by, and what weighs it in training, must be one figure."""
    images = {"pixel_values": torch.zeros(3, 2, 5, 5), "labels": torch.tensor([1, 0, 2])}
    sound = {"input_features": torch.zeros(3, 4, 6), "attention_mask": torch.ones(3, 6)}
    text = {"input_ids": LABELS.clamp(min=0), "labels": LABELS}
    for main_input, batch in (
        ("pixel_values", images),
        ("input_features", sound),
        ("input_ids", text),
        ("input_ids", {**text, "attention_mask": LABELS.ne(-100).long()}),
    ):
        trained = make_micro_batch(batch, main_input=main_input).targets
        for rule in TargetRule:
            assert count_targets(batch, rule, main_input=main_input) == trained.under(rule)


def test_a_classifier_has_one_target_per_labelled_sequence():
    assert count(TargetRule.SEQUENCE, labels=torch.tensor([1, 0, 2])) == 3
    assert count(TargetRule.SEQUENCE, labels=torch.tensor([1, -100, 2])) == 2
    assert count(TargetRule.SEQUENCE, labels=torch.zeros(3, 4)) == 3
    assert count(TargetRule.SEQUENCE) == 3


def test_an_answer_outside_of_the_text_is_no_target():
    inputs = {"input_ids": torch.zeros(3, 6, dtype=torch.int64)}
    starts = torch.tensor([0, 5, 6])
    assert count(TargetRule.SEQUENCE, start_positions=starts, **inputs) == 2


@pytest.mark.parametrize(
    ("row", "rule", "expected"),
    [
        ({"labels": [-100, -100]}, None, False),
        ({"labels": [-100, 3]}, None, True),
        ({"labels": [3, -100]}, TargetRule.NEXT_TOKEN, False),
        ({"labels": [3, -100]}, TargetRule.SAME_TOKEN, True),
        ({"labels": torch.tensor([-100, 3])}, None, True),
        ({"labels": torch.tensor(-100)}, None, False),
        ({"labels": 0}, None, True),
        ({"labels": []}, None, False),
        ({"input_ids": [1]}, None, True),
        ("text that a collator will tokenize", None, True),
    ],
    ids=str,
)
def test_a_row_is_left_out_only_if_its_own_labels_rule_it_out(row, rule, expected):
    assert can_have_target(row, rule=rule) is expected
