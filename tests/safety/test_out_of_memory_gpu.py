"""Out of memory on a real CUDA device: the allocator is given a fraction of the memory.

Skipped without a device. The suite hides devices, so to run it on one:

    CUDA_VISIBLE_DEVICES=0 python -m pytest tests/safety/test_out_of_memory_gpu.py
"""

import contextlib

import pytest
import torch
from support.failing import train
from support.tiny import ragged_rows

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device to be seen; the top of this file says how to show one",
)

OPTIONS = {
    # Of one length: the planner would part long from short, and never need that much.
    "rows": [{k: (v * 512)[:512] for k, v in row.items()} for row in ragged_rows(32, seed=5)],
    "effective_batch_size": 16,
    # 60 MB of float32 logits a row, and as much again for their gradient and the loss.
    "model": {
        "vocab_size": 30_000,
        "attention_dropout": 0.1,
        "max_position_embeddings": 512,
        "dtype": torch.float32,
    },
    "target_only_logits": False,
    "use_cpu": False,
}


@needs_cuda
def test_a_cuda_allocator_that_gives_up_is_recovered_from(tmp_path, monkeypatch):
    monkeypatch.setattr("support.failing.float64_everywhere", contextlib.nullcontext)
    torch.cuda.reset_peak_memory_stats()
    train(tmp_path / "calm", max_tokens_per_micro_batch=512, **OPTIONS)
    needed = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3 * needed / total)
    try:
        tight = train(tmp_path / "tight", max_tokens_per_micro_batch=8192, **OPTIONS)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tight["cap"] is not None
    assert tight["cap"] < 8192
    calm = train(tmp_path / "same", max_tokens_per_micro_batch=tight["cap"], **OPTIONS)
    assert [row["effective_batch_size"] for row in tight["logs"]] == [16, 16]
    for name, weight in calm["weights"].items():  # the same cut and masks: kernels' order is left
        torch.testing.assert_close(tight["weights"][name], weight, rtol=1e-4, atol=1e-6)
