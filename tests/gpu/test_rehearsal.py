"""The suite for GPUs runs here on tiny sizes, so that it cannot rot between two GPUs."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.pretend_cuda import pretend_cuda

from benchmarks.gpu import worker
from benchmarks.gpu.checks import Setting, all_checks

ROOT = Path(__file__).resolve().parents[2]

# The rest takes several processes, and is rehearsed elsewhere: recipes and ranks have tests.
AREAS = ("exactness", "out-of-memory", "waits", "modes", "speed")
OF_A_DEVICE = {
    "exactness/packed-flash_attention_2/llama",
    "exactness/packed-flash_attention_2/qwen3",
    "exactness/packed-flash_attention_3/llama",
    "exactness/packed-flash_attention_3/qwen3",
    "exactness/packed-flex_attention/llama",
    "exactness/packed-flex_attention/qwen3",
    "exactness/trees-flex_attention/llama",
    "exactness/trees-flex_attention/qwen3",
    "out-of-memory/pressure",
    "waits/packed-flash",
    "modes/fp16",
    "modes/qlora",
    "modes/liger",
}
"""What only a CUDA device can show, or a package that runs nowhere else."""


@pytest.mark.slow
def test_every_check_that_can_run_on_a_cpu_passes_there(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--seconds", "900"),
            *("--results", str(tmp_path), "--only", *AREAS, "--leave-out", "modes/quickstart"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    found = {line["check"]: line for line in map(json.loads, lines)}
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = {name for name, line in found.items() if line["status"] == "skipped"}
    assert skipped == OF_A_DEVICE
    assert len(found) - len(skipped) >= 35
    assert "ours-packed" in (tmp_path / "results.md").read_text()


ON_A_PRETENDED_DEVICE = (
    "machine",
    "exactness/llama-causal/autocast",
    "out-of-memory/forward",
    "out-of-memory/optimizer",
    "waits/auto",
    "modes/log-row",
    "modes/tuned-budget",
    "speed/gsm8k-lengths/stock-rebalance-32",
    "speed/gsm8k-lengths/ours-packed",
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # autocast is asked for "cuda", which is not there
def test_what_the_checks_do_on_a_device_alone_runs_too(tmp_path, monkeypatch):
    """Their lines for CUDA, with tensors on the host: a misspelled name would cost the device."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speed
    import workloads

    from benchmarks.gpu import speed_table

    small = {"num_key_value_heads": 1, "head_dim": 16}
    checks = {check.name: check for check in all_checks("cuda")}
    autocast, common = torch.autocast.__init__, speed.common

    def on_the_host(self, device_type, *args, **kwargs):
        autocast(self, "cpu", *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(pretend_cuda())
        for name, answer in {
            "mem_get_info": (2**55, 2**56),
            "set_per_process_memory_fraction": None,
            "set_sync_debug_mode": None,
        }.items():
            stand_in = getattr(torch.cuda, name)
            if not hasattr(stand_in, "mock"):  # pretended already
                stand_in = mock.create_autospec(stand_in)
            monkeypatch.setattr(torch.cuda, name, stand_in)
            stand_in.side_effect, stand_in.return_value = None, answer
        monkeypatch.setattr(torch.autocast, "__init__", on_the_host)
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        # It looks for a device by itself, and ends Python with a segmentation fault without one.
        monkeypatch.setattr(torch.profiler, "profile", mock.Mock(side_effect=RuntimeError("none")))
        monkeypatch.setattr(speed, "BATCH", 32)
        monkeypatch.setattr(
            speed, "common", lambda **kw: common(**kw) | {"use_cpu": False, "bf16": True}
        )
        monkeypatch.setattr(speed_table, "NUM_UPDATES", 1)
        monkeypatch.setattr(speed_table, "best_attention", lambda setting: "sdpa")
        monkeypatch.setitem(workloads.SHAPES, "qwen3-0.6b", (32, 64, 1, 2, 512, True))
        monkeypatch.setitem(workloads.QWEN3, "qwen3-0.6b", small)
        found = {
            name: worker.run(checks[name], Setting("cuda", tmp_path))
            for name in ON_A_PRETENDED_DEVICE
        }
        worker._clean_up("cuda")
    assert {name: detail for name, (status, detail, _) in found.items() if status != "passed"} == {}
    figures = {name: found[name][2] for name in found}
    assert figures["machine"]["device"] == "NVIDIA H200"
    assert 0 < figures["modes/log-row"]["mfu"] < 1
    packed = figures["speed/gsm8k-lengths/ours-packed"]
    assert {"s/update", "tokens/s", "mfu", "peak GiB"} <= packed.keys()
    assert packed["profiler"] == "RuntimeError: none"
