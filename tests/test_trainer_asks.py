"""How the trainer asks the model: in the precision it computes in, and about its own loss."""

import pytest
import torch
from support.tiny import make_trainer, ragged_rows, tiny_llama

from hf_gradacc.targets import TargetRule

ROWS = ragged_rows(12, seed=61)


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        (torch.float32, {}, torch.float32),
        (torch.float32, {"bf16": True}, torch.bfloat16),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.float64, {}, torch.float64),
    ],
    ids=str,
)
def test_rounding_is_expected_of_the_dtype_a_forward_runs_in(tmp_path, weights, options, expected):
    model = tiny_llama(dtype=weights)
    trainer = make_trainer(tmp_path, ROWS, model=model, effective_batch_size=6, **options)
    assert trainer._dtype_computed_in(model) == expected
    trainer.train()
    facts = trainer._facts
    assert facts.rule is TargetRule.NEXT_TOKEN
    assert not facts.pads_alike
    assert not facts.warnings


def test_one_coarse_weight_is_enough_to_expect_coarse_rounding(tmp_path):
    model = tiny_llama(dtype=torch.float32)
    model.lm_head.to(torch.bfloat16)
    assert make_trainer(tmp_path, ROWS)._dtype_computed_in(model) == torch.bfloat16


def test_label_smoothing_does_not_disturb_the_answer(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, effective_batch_size=6, label_smoothing_factor=0.3)
    trainer.train()
    assert trainer._facts.rule is TargetRule.NEXT_TOKEN
    assert not trainer._facts.warnings
