"""DeepSpeed ZeRO 1, 2 and 3 over real gloo groups: the updates of one process."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.rank_jobs import SCENARIOS as OF_OTHER_ENGINES
from support.ranks import run_ranks
from support.reference import float64_everywhere, relative_error
from support.stand_ins import put_stand_ins
from support.tiny import pad, ragged_rows, tiny_llama

from hf_gradacc.recipe.load import load_recipe

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'hf_gradacc[deepspeed]'")

from support.zero_jobs import (
    evaluate_first,
    train_a_recipe,
    train_in_fp16,
    train_in_parts,
    train_twice,
    train_zero,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

STAGES = (1, 2, 3)
UNEVEN = {"effective_batch_size": 4, "per_device_train_batch_size": 1}
ADAM = {
    **UNEVEN,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "num_train_epochs": 2,
}
SKIPPING = {**ADAM, "on_non_finite": "skip", "train_sampling_strategy": "sequential"}
AS_STOCK_COUNTS = {
    **ADAM,
    "effective_batch_size": None,
    "gradient_accumulation_steps": 2,
}

SCENARIOS: dict[str, dict[str, Any]] = {
    **{
        name: OF_OTHER_ENGINES[name]
        for name in (
            "an epoch that ends mid-update",
            "updates smaller than the world from the first on",
            "rows, shares and an update without a target",
            "a stream without a length",
            "label smoothing",
        )
    },
    "AdamW, clipped, with a schedule": {"num_rows": 11, "options": ADAM},
    "steps of accumulation, named twice": {
        "num_rows": 11,
        "options": AS_STOCK_COUNTS,
        "deepspeed": {"gradient_accumulation_steps": 2, "gradient_clipping": "auto"},
    },
    "LoRA": {"num_rows": 9, "lora": True, "options": ADAM},
    **{
        f"skipped for its {kind}": {
            "num_rows": 12,
            "kind": kind,
            "poisoned": (5,),
            "options": SKIPPING,
        }
        for kind in ("loss", "infinite loss", "gradient")
    },
}
# DeepSpeed keeps what it offloads in float32, whatever it is told.
OFFLOADED: dict[str, Any] = {
    "num_rows": 11,
    "options": ADAM,
    "deepspeed": {
        "zero": {"offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
}


@functools.cache
def alone() -> dict[str, Any]:
    """The same scenarios in one process without an engine."""
    scenarios = dict(SCENARIOS)
    name = "steps of accumulation, named twice"  # steps are of each rank, and here is one
    options = {**AS_STOCK_COUNTS, "gradient_accumulation_steps": 4}
    scenarios[name] = {**scenarios[name], "options": options}
    return run_ranks(train_zero, 1, scenarios=scenarios)[0]


@functools.cache
def under_zero(stage: int) -> list[dict[str, Any]]:
    """What both ranks report under one stage, all scenarios in one process group."""
    return run_ranks(train_zero, 2, scenarios=SCENARIOS, stage=stage)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_update_has_the_gradient_of_one_process_and_steps_once(stage, name):
    one = alone()[name]
    for rank in under_zero(stage):
        many = rank[name]
        assert len(many["gradients"]) == len(one["gradients"]) > 0
        for actual, expected in zip(many["gradients"], one["gradients"], strict=True):
            error = relative_error(actual, expected)
            assert error < 1e-10 or (math.isnan(error) and "skipped" in name)
        assert relative_error(many["weights"], one["weights"]) < 1e-10
        assert many["engine_steps"] == len(one["gradients"])
        assert many["partitioned"] == (stage == 3)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("stage", STAGES)
def test_logs_are_those_of_one_process(stage, name):
    one, many = alone()[name], under_zero(stage)[0][name]
    assert many["steps"] == one["steps"]
    assert many["num_parameters"] == one["num_parameters"]
    assert many["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-12)
    assert len(many["logs"]) == len(one["logs"])
    free = {"micro_batches_per_update", "computed_tokens_per_update", "padding_fraction"}
    for ours, theirs in zip(many["logs"], one["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        if math.isinf(ours["grad_norm"]):  # DeepSpeed has no other word for NaN
            assert math.isnan(ours["loss"])
            free = free | {"grad_norm"}
        for key in ours.keys() - free:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, nan_ok=True), key


@pytest.mark.parametrize("has_fp16", [False, True])
def test_weights_do_not_hang_on_whether_the_processor_has_fp16(has_fp16):
    """Without, DeepSpeed takes bfloat16 for ZeRO-3's dtype; with, it checks what it is told."""
    name = "AdamW, clipped, with a schedule"
    # In this order: what lets float64 in stays for the life of a process.
    scenarios = {"float32": {**SCENARIOS[name], "dtype": "float32"}, "float64": SCENARIOS[name]}
    one = run_ranks(train_zero, 1, scenarios=scenarios)[0]
    for rank in run_ranks(train_zero, 2, scenarios=scenarios, stage=3, has_fp16=has_fp16):
        for dtype, tolerance in {"float32": 1e-5, "float64": 1e-10}.items():
            assert relative_error(rank[dtype]["weights"], one[dtype]["weights"]) < tolerance


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_takes_the_same_steps(stage):
    expected = alone()["AdamW, clipped, with a schedule"]["weights"]
    for rank in run_ranks(train_zero, 2, scenarios={"": OFFLOADED}, stage=stage):
        assert relative_error(rank[""]["weights"], expected) < 1e-7


@pytest.mark.parametrize(
    ("mistake", "stage"),
    [
        ("accelerate steps in every backward", 2),
        ("every backward is the last", 1),
        ("the engine divides by what it counts", 2),
        ("the average over ranks is forgotten", 3),
    ],
)
def test_mistakes_made_with_this_engine_would_be_seen(mistake, stage):
    name = "steps of accumulation, named twice"
    scenarios = {name: SCENARIOS[name]}
    ranks = run_ranks(train_zero, 2, scenarios=scenarios, stage=stage, mistake=mistake)
    one, many = alone()[name], ranks[0][name]
    if mistake == "accelerate steps in every backward":
        assert many["engine_steps"] > one["engine_steps"] > 0
    else:
        pairs = zip(many["gradients"], one["gradients"], strict=True)
        assert max(relative_error(actual, expected) for actual, expected in pairs) > 0.01


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_run_ends_with_the_same_bits(stage, tmp_path):
    job: dict[str, Any] = {"num_train_epochs": 1, "stage": stage, "dropout": 0.2}
    straight = run_ranks(train_in_parts, 2, out=str(tmp_path / "straight"), **job)
    out = str(tmp_path / "out")
    stopped = run_ranks(train_in_parts, 2, out=out, stop=4, **job)
    assert stopped[0]["found"] == ["checkpoint-2", "checkpoint-4"]
    resumed = run_ranks(train_in_parts, 2, out=out, resume=True, **job)
    assert resumed[0]["step"] == straight[0]["step"] > 4
    for name, weight in straight[0]["weights"].items():
        assert torch.equal(resumed[0]["weights"][name], weight)
    assert resumed[0]["logs"]
    assert resumed[0]["logs"] == straight[0]["logs"][-len(resumed[0]["logs"]) :]
    if stage == 1:
        told = run_ranks(train_in_parts, 3, out=out, resume=True, **job)[0]["error"]
        assert told.startswith("CheckpointError: checkpoint-6 was saved by 2 ranks")
        assert "cannot be loaded by 3" in told


def test_sums_of_bf16_gradients_are_float32_unless_told_otherwise():
    options = {**UNEVEN, "effective_batch_size": 96, "max_steps": 1, "bf16": True}
    scenario = {"num_rows": 96, "dtype": "float32", "options": options}
    expected = run_ranks(train_zero, 1, scenarios={"": scenario})[0][""]["gradients"][0]
    errors = []
    for in_fp32 in (None, False):
        asked = {**scenario, "options": {**options, "accumulate_grads_in_fp32": in_fp32}}
        many = run_ranks(train_zero, 2, scenarios={"": asked}, stage=2)
        errors.append(relative_error(many[0][""]["gradients"][0], expected))
    assert errors[0] < 0.75 * errors[1]


def test_an_overflow_of_scaled_gradients_lowers_the_scale_and_is_no_bad_update(tmp_path):
    ranks = run_ranks(train_in_fp16, 2, out=str(tmp_path), stage=2, scale_power=20)
    for result in ranks:
        assert result["skipped_by_engine"] > 0
        assert result["scale"] < 2**20
        assert sum(row.get("skipped_updates", 0) for row in result["logs"]) > 0


def test_an_untrained_model_is_evaluated_by_all_ranks_in_step(tmp_path):
    rows = ragged_rows(7, seed=5)
    with float64_everywhere():
        expected = tiny_llama()(**pad(rows)).loss.item()
    for loss in run_ranks(evaluate_first, 2, out=str(tmp_path)):
        assert loss == pytest.approx(expected, rel=1e-6)


def test_a_second_run_of_one_trainer_is_refused(tmp_path):
    assert "cannot make a second engine" in run_ranks(train_twice, 2, out=str(tmp_path))[0]


def test_the_zero3_recipe_trains_saves_and_loads(tmp_path):
    recipe = load_recipe(
        ROOT / "recipes/qwen3/8b_full_chat_zero3.yaml", overrides=[f"output.dir={tmp_path / 'run'}"]
    )
    put_stand_ins(recipe, tmp_path)
    quietly = {"use_cpu": True, "max_steps": 2, "report_to": "none", "logging_steps": 1}
    ranks = run_ranks(train_a_recipe, 2, recipe=recipe, **quietly, dataloader_num_workers=0)
    assert ranks[0]["stage"] == 3
    assert len(ranks[0]["losses"]) == 2
    assert math.isfinite(ranks[0]["eval_loss"])
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    for name, weight in saved.named_parameters():
        for rank in ranks:
            assert torch.equal(rank["weights"][name], weight)


def test_merging_on_one_rank_what_all_ranks_hold_is_refused(tmp_path):
    path = ROOT / "recipes/qwen3/8b_full_chat_zero3.yaml"
    merging = ["peft={method: lora, merge_on_save: true}", f"output.dir={tmp_path / 'run'}"]
    recipe = load_recipe(path, overrides=merging)
    put_stand_ins(recipe, tmp_path)
    options = {"use_cpu": True, "max_steps": 1, "report_to": "none", "dataloader_num_workers": 0}
    with pytest.raises(AssertionError, match=r"ConfigError: peft\.merge_on_save = true under FSDP"):
        run_ranks(train_a_recipe, 2, recipe=recipe, **options)
