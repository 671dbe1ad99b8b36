"""What DeepSpeed is told, and what it may not be told. Needs no DeepSpeed."""

import copy

import pytest

from hf_gradacc.ranks.deepspeed import complete_config, count_checkpoint_ranks, find_config_problems

PLAIN = {"zero_optimization": {"stage": 2}}


def problems(config, *, sums_in_fp32=None):
    return list(find_config_problems(config, sums_in_fp32=sums_in_fp32))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_let_in(stage):
    config = {
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    assert problems(config, sums_in_fp32=True) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {}},
        {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
        {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        {"gradient_allreduce_op": "sum"},
        {"managed_gradient_accumulation": False},
        {"bf16": {"enabled": True, "check_grad_overflow": False}},
        {"curriculum_learning": {"enabled": True}},
        {"progressive_layer_drop": {"enabled": True}},
        {"optimizer": {"type": "OneBitAdam"}},
    ],
    ids=str,
)
def test_what_would_train_another_gradient_is_refused_by_name(changes):
    (problem,) = problems({**PLAIN, **changes})
    key = next(iter(changes))
    assert problem.startswith("deepspeed: ")
    assert key in problem


def test_two_wishes_for_the_dtype_of_sums_are_a_contradiction():
    config = {**PLAIN, "data_types": {"grad_accum_dtype": "bf16"}}
    assert problems(config) == []
    (problem,) = problems(config, sums_in_fp32=True)
    assert "contradicts" in problem


def test_clipping_and_float32_sums_reach_an_engine_that_was_told_nothing():
    config = {**copy.deepcopy(PLAIN), "bf16": {"enabled": True}}
    complete_config(config, sums_in_fp32=None, max_grad_norm=0.5)
    assert config["gradient_clipping"] == 0.5
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("config", "sums_in_fp32"),
    [
        ({"bf16": {"enabled": True}}, False),
        ({"bf16": {"enabled": False}}, None),
        ({}, True),
    ],
)
def test_sums_stay_as_they_are_where_nothing_is_lost_or_it_was_asked(config, sums_in_fp32):
    complete_config(config, sums_in_fp32=sums_in_fp32, max_grad_norm=None)
    assert config["gradient_clipping"] == 0.0
    assert "data_types" not in config


def test_what_the_user_wrote_is_kept():
    config = {"gradient_clipping": 2.0, "bf16": {"enabled": True}}
    config["data_types"] = {"grad_accum_dtype": "bf16"}
    before = copy.deepcopy(config)
    complete_config(config, sums_in_fp32=None, max_grad_norm=1.0)
    assert config == before


def test_the_ranks_of_a_checkpoint_are_counted_by_their_files(tmp_path):
    assert count_checkpoint_ranks(tmp_path) is None
    (tmp_path / "latest").write_text("global_step4\n")
    (tmp_path / "global_step4").mkdir()
    for prefix in ("", "bf16_"):
        for rank in range(3):
            name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            (tmp_path / "global_step4" / name).touch()
        assert count_checkpoint_ranks(tmp_path) == 3
