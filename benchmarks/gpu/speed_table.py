"""Seconds per update on the device: the stock Trainer's samplers, TRL, and ours, on the same rows.

Each variant trains the same rows for a few epochs through the whole Trainer, and the last one is
timed: by then kernels are chosen and compiled, and the allocator has what it needs. One update of
the epoch before is profiled. Weights are float32 and products bfloat16, as in the recipe
`gsm8k/qwen3_0.6b_full.yaml`; the weights are random, which changes no time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import shutil
import warnings
from typing import Any

import speed
import torch
import torch._dynamo.utils
from transformers import TrainerCallback
from workloads import Row, dense_rows, make_model, make_rows

from benchmarks.gpu.checks import Setting
from hf_gradacc.tracking.mfu import ModelFlops, find_peak_flops

NUM_UPDATES, BUDGET, MASKED_BUDGET = 6, 16_384, 4_096
"""Updates of 64 rows in an epoch; tokens in a micro-batch, and where packed rows are masked."""

TUNING_EPOCHS = 5
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def measure(setting: Setting, *, variant: str, rows: str) -> dict[str, Any]:
    """Time one variant on one kind of rows."""
    model = _model(setting.device)
    data = _rows(setting, rows, model.config.vocab_size)
    if variant == "dense-bound":
        data = dense_rows(data)
    num_updates = len(data) // speed.BATCH
    num_tokens = sum(len(row["input_ids"]) for row in data)
    epochs = TUNING_EPOCHS if variant == "ours-auto" and not setting.is_rehearsal else 2
    attention = best_attention(setting)
    maker = _maker(
        variant,
        attention=attention,
        epochs=epochs,
        tokens_per_update=num_tokens // num_updates,
    )
    profile = _Profile(setting.device, at=num_updates * (epochs - 1) - 1)
    if not setting.is_rehearsal:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.utils.counters.clear()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            watch, counts = speed.run_once(maker, model, data, callbacks=[profile])
    finally:
        profile.close()
    assert watch.seconds > 0
    tokens_per_second = num_tokens / watch.seconds
    packs = "pack" in variant or "padding-free" in variant
    figures: dict[str, Any] = {
        "s/update": watch.seconds / num_updates,
        "tokens/s": round(tokens_per_second),
        "padding": 0.0 if packs else 1 - counts.used / max(counts.computed, 1),
        "micro-batches": counts.batches / num_updates,
        **profile.figures,
    }
    if variant == "ours-packed-sdpa":
        attention = "sdpa"
    if packs or variant == "ours-auto":
        figures["attention"] = attention
    if graphs := torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        figures["graphs"] = graphs
    # Past dynamo's limit of recompilations flex falls back on whole matrices, with this word alone.
    if any("flex_attention called without torch.compile" in str(w.message) for w in told):
        figures["attention"] = f"{attention}, in part not compiled"
    if not setting.is_rehearsal:
        figures["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        mfu = ModelFlops(model).utilization(
            input_tokens_per_second=tokens_per_second,
            mean_length=num_tokens / len(data),
            peak_flops=find_peak_flops(torch.cuda.get_device_name(0), dtype=torch.bfloat16),
        )
        if mfu is not None:
            figures["mfu"] = mfu
    return figures


def best_attention(setting: Setting) -> str:
    """Return the attention that packs for free here: flash, else flex, else none that does."""
    if setting.is_rehearsal:
        return "sdpa"
    flash = {"flash_attn_interface": "flash_attention_3", "flash_attn": "flash_attention_2"}
    for package, attention in flash.items():
        if importlib.util.find_spec(package) is not None:
            return attention
    has_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    if has_compiler and importlib.util.find_spec("triton") is not None:
        return "flex_attention"
    return "sdpa"


def _maker(variant: str, *, attention: str, epochs: int, tokens_per_update: int) -> speed.Maker:
    options: dict[str, Any] = {"num_train_epochs": epochs}
    family, _, rest = variant.partition("-")
    name, _, number = rest.rpartition("-") if rest[-1:].isdigit() else (rest, "", "")
    packed_budget = MASKED_BUDGET if attention == "sdpa" else BUDGET
    if family == "stock" and name == "random":
        return speed.stock("random", 8, **options)
    if family == "stock":
        return speed.stock("batch_rebalance", int(number), **options)
    if variant == "trl-padding-free":
        return speed.trl(8, attention=attention, padding_free=True, **options)
    if variant == "trl-packing":
        # As many rows in an update as the others have.
        steps = max(1, round(tokens_per_update / MASKED_BUDGET))
        options |= {"packing": True, "max_length": MASKED_BUDGET}
        return speed.trl(1, attention=attention, gradient_accumulation_steps=steps, **options)
    if variant == "ours-packed-sdpa":
        return speed.ours(MASKED_BUDGET, layout="packed", **options)
    if variant == "ours-packed":
        return speed.ours(packed_budget, attention=attention, layout="packed", **options)
    if variant == "ours-auto":
        return speed.ours("auto", attention=attention, **options)
    if variant == "ours-compiled":
        return speed.ours(BUDGET, torch_compile=True, **options)
    return speed.ours(int(number or BUDGET), layout="padded", **options)


@functools.cache
def _model(device: str) -> Any:
    shape = "rehearsal" if device == "cpu" else "qwen3-0.6b"
    with torch.device(device):
        return make_model(shape)


def _rows(setting: Setting, kind: str, vocab_size: int) -> list[Row]:
    if not setting.is_rehearsal:
        return make_rows(kind, speed.BATCH * NUM_UPDATES, vocab_size=vocab_size)
    rows = make_rows(kind, speed.BATCH * 2, vocab_size=vocab_size)
    # The last tokens: there are the targets.
    return [{key: values[-max(4, len(values) // 12) :] for key, values in r.items()} for r in rows]


class _Profile(TrainerCallback):
    """Counts the kernels and waits of one update, where the profiler works."""

    def __init__(self, device: str, *, at: int) -> None:
        self.figures: dict[str, Any] = {}
        self._device = device
        self._at = at
        self._profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, before the update of which it is told."""
        if state.global_step != self._at:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        try:
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
        except Exception as error:  # it may not be allowed to look at the device
            self._profiler, self.figures = None, {"profiler": f"{type(error).__name__}: {error}"}

    def close(self) -> None:
        """Stop a profile that the run did not come to the end of."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            with contextlib.suppress(Exception):
                profiler.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after it, and count."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        try:
            if self._device == "cuda":
                torch.cuda.synchronize()
            profiler.stop()
            names = [event.name() for event in profiler.profiler.kineto_results.events()]
        except Exception as error:
            self.figures = {"profiler": f"{type(error).__name__}: {error}"}
            return
        if self._device == "cuda":
            self.figures = {
                "kernels": sum(name in LAUNCHES for name in names),
                "waits": max(0, sum(name in WAITS for name in names) - 1),  # the one above
            }
        else:
            self.figures = {"operations": sum(name.startswith("aten::") for name in names)}
