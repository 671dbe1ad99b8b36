"""What differs between engines: sharded weights, adapters, low precision, refusals."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.rank_jobs import (
    FSDP2,
    allow_sharding_on_cpu,
    ask_for_model_parallelism,
    train_scenarios,
)
from support.ranks import run_ranks
from support.reduction_jobs import say_what_has_no_effect, train_sharded
from support.reference import relative_error
from support.resume_jobs import train_and_report
from support.tiny import make_trainer, ragged_rows

from hf_gradacc import ConfigError
from hf_gradacc.ranks import engine as engines
from hf_gradacc.ranks.engine import FullySharded, OneProcess, end_group_at_exit, make_engine
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.recut import even_out
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.update import Update

pytestmark = pytest.mark.slow

SHARDED = ("LoRA", "checkpointed")
UNEVEN = {"effective_batch_size": 4, "per_device_train_batch_size": 1}
SCENARIOS: dict[str, dict[str, Any]] = {
    "LoRA": {"num_rows": 9, "lora": True, "options": UNEVEN},
    # Over three ranks the last update has two rows: two sum in float32, the third has none.
    "bf16": {"num_rows": 5, "dtype": "bfloat16", "options": {**UNEVEN, "effective_batch_size": 3}},
    # Recomputed in float32, since nothing of the tests' float64 reaches there; alike on both.
    "checkpointed": {
        "num_rows": 6,
        "options": {
            **UNEVEN,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    },
    "hybrid": {"num_rows": 9, "options": UNEVEN, "hybrid": True},
    # On several ranks alone: what is compiled is held against what is not.
    "compiled": {
        "num_rows": 5,
        "options": {"effective_batch_size": 4},
        "on_many": {"torch_compile": True, "torch_compile_backend": "eager"},
    },
}


@functools.cache
def runs(world_size: int, *, sharded: bool = False) -> list[dict[str, Any]]:
    chosen = {name: s for name, s in SCENARIOS.items() if name in SHARDED or not sharded}
    if world_size > 1:
        chosen = {
            name: {**s, "options": {**s["options"], **s.get("on_many", {})}}
            for name, s in chosen.items()
        }
    return run_ranks(train_scenarios, world_size, scenarios=chosen, sharded=sharded)


@pytest.mark.parametrize(
    ("name", "sharded"),
    [
        ("LoRA", False),
        ("LoRA", True),
        ("checkpointed", False),
        ("checkpointed", True),
        ("compiled", False),
    ],
)
def test_engines_give_the_gradients_of_one_process(name, sharded):
    one = runs(1)[0][name]
    for rank in runs(2, sharded=sharded):
        assert len(rank[name]["gradients"]) == len(one["gradients"]) > 1
        for actual, expected in zip(rank[name]["gradients"], one["gradients"], strict=True):
            assert relative_error(actual, expected) < 1e-10


def test_sharding_over_pairs_of_ranks_that_are_replicated_is_exact_too():
    one = runs(1)[0]["hybrid"]
    for rank in run_ranks(
        train_scenarios, 4, scenarios={"hybrid": SCENARIOS["hybrid"]}, sharded=True
    ):
        assert rank["hybrid"]["sharded"]
        for actual, expected in zip(rank["hybrid"]["gradients"], one["gradients"], strict=True):
            assert relative_error(actual, expected) < 1e-10


def test_sharded_gradients_may_be_reduced_in_each_micro_batch_and_no_rank_holds_them_whole():
    """accelerate's ``sync_each_batch``. Everything is float64, so bytes compare."""
    once, each = (run_ranks(train_sharded, 2, each=each) for each in (False, True))
    for at_the_end, always in zip(once, each, strict=True):
        assert len(always["gradients"]) == len(at_the_end["gradients"]) == 2
        for actual, expected in zip(always["gradients"], at_the_end["gradients"], strict=True):
            assert relative_error(actual, expected) < 1e-14
        size = at_the_end["size"]
        assert set(at_the_end["whole"]) == {size}
        assert set(at_the_end["shards"]) == {0}
        assert set(always["whole"]) == {0}
        assert set(always["shards"]) == {size // 2}


def test_a_reduction_in_each_micro_batch_has_no_effect_under_ddp_and_one_line_says_so():
    for lines in run_ranks(say_what_has_no_effect, 2):
        (line,) = lines
        assert line.startswith("gradient_accumulation_kwargs: sync_each_batch = True has no effect")


@pytest.mark.parametrize(
    ("kind", "reason", "way_out"),
    [
        ("tp", "tp_size = 2: this engine gives every rank whole layers", "DistributedConfig"),
        ("sp", "sp_size = 2: sequence parallelism is a part of DeepSpeed", "ZeRO"),
        ("cp", "cp_size = 2: torch's ring attention has no kernel for CPUs", "Train on GPUs"),
    ],
)
def test_ranks_that_share_a_row_are_refused_with_the_reason(kind, reason, way_out):
    for rank in model_parallelism():
        assert rank[kind].startswith(f"ConfigError: {reason}")
        assert way_out in rank[kind]


def test_a_row_is_split_by_the_engine_that_can(tmp_path):
    trainer = make_trainer(tmp_path, ragged_rows(3))
    layout = RankLayout(0, 2, cp_size=2)
    kind = {"is_fsdp": False, "is_deepspeed": False, "is_sharded_by_loading": True}
    with pytest.raises(ConfigError, match="cp_size = 2: context parallelism is a part of FSDP2"):
        make_engine(trainer.accelerator, trainer.args, layout=layout, **kind)


@functools.cache
def model_parallelism() -> list[dict[str, str]]:
    return run_ranks(ask_for_model_parallelism, 2)


def test_engines_nobody_has_compared_are_refused_with_the_way_out(tmp_path):
    """Fully set up they want a GPU; an engine goes by the accelerator and the arguments."""
    trainer = make_trainer(tmp_path, ragged_rows(3))
    kind = {"is_deepspeed": False, "is_sharded_by_loading": False}
    engine = make_engine(trainer.accelerator, trainer.args, is_fsdp=False, **kind)
    assert type(engine) is OneProcess
    assert not list(engine.find_problems())
    with pytest.raises(ConfigError, match="FSDP1 is deprecated"):
        make_engine(trainer.accelerator, trainer.args, is_fsdp=True, **kind)
    trainer.args.torch_compile = True
    old, compiled = FullySharded(trainer.accelerator, trainer.args).find_problems()
    assert old.startswith("FSDP1 is deprecated")
    assert old.endswith('set fsdp_config = {"version": 2}.')
    assert compiled.startswith("torch_compile = True with FSDP")


def test_a_rank_without_rows_sums_bf16_gradients_in_float32_too():
    one = runs(1)[0]["bf16"]
    for rank in run_ranks(train_scenarios, 3, scenarios={"bf16": SCENARIOS["bf16"]}):
        for actual, expected in zip(rank["bf16"]["gradients"], one["gradients"], strict=True):
            assert relative_error(actual, expected) < 2**-8


def test_sharded_runs_resume_to_the_same_bits(tmp_path):
    job = {"num_train_epochs": 1}
    straight = run_ranks(_train_sharded, 2, out=str(tmp_path / "straight"), **job)
    run_ranks(_train_sharded, 2, out=str(tmp_path / "out"), stop=4, **job)
    resumed = run_ranks(_train_sharded, 2, out=str(tmp_path / "out"), resume=True, **job)
    for name, weight in straight[0]["weights"].items():
        assert torch.equal(resumed[0]["weights"][name], weight)


def _train_sharded(**job: Any) -> dict[str, Any]:
    allow_sharding_on_cpu()
    # Whole state dicts cannot be gathered on a CPU (torch frees what it has "offloaded").
    config = {**FSDP2["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    return train_and_report(**job, fsdp=True, fsdp_config=config)


def test_a_share_is_brought_to_the_number_of_passes_of_the_others():
    ids = torch.arange(12).view(4, 3)
    update = Update([make_micro_batch({"input_ids": ids, "labels": ids})])

    def halve(micro_batch: Any) -> Any:
        half = micro_batch.num_sequences // 2
        return [
            make_micro_batch({key: value[rows] for key, value in micro_batch.inputs.items()})
            for rows in (slice(None, half), slice(half, None))
        ]

    options: dict[str, Any] = {"halve": halve, "rule": TargetRule.NEXT_TOKEN, "spare": None}
    three = even_out(update, 3, **options)
    assert sorted(mb.num_sequences for mb in three) == [1, 1, 2]
    six = even_out(update, 6, **options)
    assert [mb.weightless for mb in six] == [True, True, False, False, False, False]
    assert (
        sorted(row for mb in six if not mb.weightless for row in mb.inputs["input_ids"].tolist())
        == ids.tolist()
    )


def test_a_share_without_rows_runs_a_spare_row_that_has_a_target():
    labels = torch.tensor([[-100, -100], [5, 6]])
    spare = {"input_ids": labels.abs(), "labels": labels}
    update = even_out(Update([]), 2, halve=list, rule=TargetRule.NEXT_TOKEN, spare=spare)
    assert [mb.weightless for mb in update] == [True, True]
    assert update.micro_batches[0].inputs["labels"].tolist() == [[5, 6]]


def test_a_group_is_ended_at_exit_and_its_threads_have_time_to_rest(monkeypatch, tmp_path):
    """What is at stake is a race of one in twenty on a loaded machine; this is its order."""
    done: list[Any] = []
    registered: list[tuple[Any, ...]] = []
    monkeypatch.setattr(engines.atexit, "register", lambda *call: registered.append(call))
    monkeypatch.setattr(
        engines.time, "sleep", lambda seconds: done.append((dist.is_initialized(), seconds))
    )
    end_group_at_exit()
    assert not registered, "there is no group"
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        end_group_at_exit()
        ((end, process),) = registered
        end(process + 1)
        assert not done, "a forked child has no such threads"
        assert dist.is_initialized()
        end(process)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert done == [(False, 0.1)]
