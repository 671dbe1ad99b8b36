"""The FLOPs formula against a count by torch itself, and the table of peaks."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import log_rows, make_trainer, ragged_rows
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SegformerConfig,
    SegformerForImageClassification,
)

from hf_gradacc import GradAccTrainer
from hf_gradacc.tracking.mfu import (
    PEAK_FLOPS,
    CostMeter,
    ModelFlops,
    begin_peak_memory,
    find_peak_flops,
    names,
    peak_flops_of_this_device,
)
from hf_gradacc.trainer import mixin

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}, attn_implementation="eager"))


def counted(model, *, rows=2, length=32):
    """What torch counts in one forward and backward, per token. It counts attention in full."""
    ids = torch.randint(0, 200, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops() / (rows * length)


@pytest.mark.parametrize("tied", [False, True])
def test_the_formula_counts_what_torch_counts(tied):
    model = llama(tie_word_embeddings=tied)
    flops = ModelFlops(model)
    # torch multiplies out the half of the attention that the mask throws away.
    expected = flops.per_token(mean_length=32) + flops.attention * 32
    assert counted(model) == pytest.approx(expected, rel=0.03)


def test_frozen_weights_cost_no_weight_gradient():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    flops = ModelFlops(model)
    assert flops.trained < 0.1 * flops.used
    expected = flops.per_token(mean_length=32) + flops.attention * 32
    assert counted(model) == pytest.approx(expected, rel=0.05)
    everything_trained = 6 * flops.used + 2 * flops.attention * 32
    assert counted(model) < 0.8 * everything_trained


def test_of_experts_only_those_a_token_visits_count():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2))
    flops = ModelFlops(model)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    rest = sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n)
    assert experts > rest
    assert flops.used == pytest.approx(rest - 200 * 64 + experts / 4)


def test_the_utilization_of_many_devices_is_shared_by_them():
    flops = ModelFlops(llama())
    options = {"input_tokens_per_second": 1000.0, "mean_length": 10.0, "peak_flops": 1e12}
    alone = flops.utilization(**options)
    assert flops.utilization(**options, num_devices=4) == pytest.approx(alone / 4)
    assert alone == pytest.approx(flops.per_token(mean_length=10) * 1000 / 1e12)


def test_an_unknown_device_has_no_utilization():
    model = llama()
    args = SimpleNamespace(device=torch.device("cpu"), bf16=True)
    assert peak_flops_of_this_device(args, model) is None
    options = {"input_tokens_per_second": 1.0, "mean_length": 1.0}
    assert ModelFlops(model).utilization(**options, peak_flops=None) is None


TF32 = {
    "pass": 19.5e12,
    "torch.set_float32_matmul_precision('high')": 156e12,
    "torch.backends.cuda.matmul.allow_tf32 = True": 156e12,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": 156e12,
    "torch.backends.fp32_precision = 'tf32'": 156e12,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": 19.5e12,
}


def peak_after(statement):
    exec(statement, {"torch": torch})
    return peak_flops_of_this_device(SimpleNamespace(device=torch.device("cuda")), llama())


@pytest.mark.parametrize("statement", TF32)
def test_tf32_is_seen_however_it_was_switched_on(monkeypatch, statement):
    """In a process of its own: torch lets nobody return from the newer way to the older."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(peak_after, (statement,)) == TF32[statement]


def test_peak_memory_is_that_of_the_updates_not_of_what_was_tried_before(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    begin_peak_memory(torch.device("cpu"))
    assert not calls
    begin_peak_memory(torch.device("cuda", 1))
    assert calls == [torch.device("cuda", 1)]
    order = []
    monkeypatch.setattr(mixin, "begin_peak_memory", lambda device: order.append("begin"))
    asked = GradAccTrainer._ask
    monkeypatch.setattr(
        GradAccTrainer, "_ask", lambda *a, **k: (order.append("ask"), asked(*a, **k))[1]
    )
    trainer = make_trainer(tmp_path, ragged_rows(4, seed=1), max_steps=1)
    trainer.train()
    trainer.train()
    assert order == ["ask", "begin"] * 2


def test_a_log_row_holds_only_what_the_device_tells(monkeypatch):
    model, args = llama(), SimpleNamespace(device=torch.device("cpu"), world_size=2)
    window = {"num_input_tokens": 4000, "num_sequences": 100, "seconds": 2.0}
    assert CostMeter(args, model).metrics(**window) == {}
    monkeypatch.setattr("hf_gradacc.tracking.mfu.peak_flops_of_this_device", lambda *_: 1e12)
    row = CostMeter(args, model).metrics(**window)
    per_token = ModelFlops(model).per_token(mean_length=40)
    assert row == {"mfu": pytest.approx(per_token * 2000 / 2e12)}
    assert CostMeter(args, model).metrics(**{**window, "seconds": 0.0}) == {}


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, False, 989.4e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, False, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, True, 156e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5e12),
        ("NVIDIA L40S", torch.bfloat16, False, 362e12),
        ("NVIDIA A10G", torch.bfloat16, False, 70e12),
        ("NVIDIA B200", torch.bfloat16, False, 2250e12),
        ("NVIDIA GB200", torch.bfloat16, False, 2500e12),
        ("NVIDIA B300 SXM6 AC", torch.bfloat16, False, 2250e12),
        ("NVIDIA GH200 480GB", torch.bfloat16, False, 989.4e12),
        ("NVIDIA H20-3e", torch.bfloat16, False, 148e12),
        ("NVIDIA H200 NVL", torch.bfloat16, False, 835e12),
        ("NVIDIA GeForce RTX 5090", torch.bfloat16, False, 209.5e12),
        ("NVIDIA GeForce RTX 5070 Ti", torch.bfloat16, False, 87.9e12),
        ("NVIDIA RTX 6000 Ada Generation", torch.bfloat16, False, 364.2e12),
        ("AMD Instinct MI300X", torch.bfloat16, False, 1307.4e12),
        ("AMD Instinct MI325X", torch.bfloat16, False, 1307.4e12),
        # Each holds the name of a faster one.
        ("NVIDIA RTX A1000", torch.bfloat16, False, None),
        ("NVIDIA RTX A1000 6GB Laptop GPU", torch.bfloat16, False, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, False, None),
        ("NVIDIA A16", torch.bfloat16, False, None),
        ("NVIDIA T400 4GB", torch.float16, False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, False, None),
        ("NVIDIA GeForce RTX 4090 D", torch.bfloat16, False, None),
        ("Quadro RTX 3000", torch.float16, False, None),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, False, None),
        ("Tesla T4", torch.float16, False, 65e12),
        ("NVIDIA H200", torch.float64, False, None),
        ("Some Other Accelerator", torch.bfloat16, False, None),
    ],
)
def test_peaks_are_found_by_the_name_torch_gives(name, dtype, tf32, expected):
    assert find_peak_flops(name, dtype=dtype, tf32=tf32) == expected


def test_no_name_in_the_table_hides_a_longer_one():
    table = list(PEAK_FLOPS)
    for place, name in enumerate(table):
        assert not any(names(name, earlier) for earlier in table[:place])


def test_a_model_whose_config_lists_heads_by_stage_is_counted_without_attention():
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        num_labels=3,
    )
    flops = ModelFlops(SegformerForImageClassification(config))
    assert flops.attention == 0.0
    assert flops.per_token(mean_length=10) == 4 * flops.used + 2 * flops.trained


def test_what_cannot_be_measured_is_left_out_and_ends_no_run(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise TypeError("unsupported operand type(s)")

    monkeypatch.setattr("hf_gradacc.tracking.mfu.ModelFlops.__init__", refuse)
    trainer = make_trainer(tmp_path, ragged_rows(6), effective_batch_size=3)
    trainer.train()
    rows = log_rows(trainer)
    assert len(rows) == 2
    assert all("mfu" not in row and row["effective_batch_size"] == 3 for row in rows)
