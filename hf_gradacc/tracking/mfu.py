"""Model FLOPs utilization: the share of the hardware's peak that training turned into learning.

    MFU = F · input tokens per second / (devices · peak FLOPs per second of one)

``F`` are the floating point operations a forward and backward need per input token (as in PaLM,
arXiv 2204.02311, appendix B, and with frozen weights told apart):

    F = 4 N + 2 N_trained + 12 · layers · heads · head size · s / 2

- ``N``: weights a token is multiplied with. The input embedding is looked up, not multiplied, and
  does not count (a tied one counts, once, as the output head); of experts only those that a token
  visits count. 2 N for the forward, 2 N for the gradient of the activations.
- ``N_trained``: those of them that are trained; 2 each for the gradient of the weight.
- The last term is attention in forward and backward, halved because a causal model attends only
  to what came before. ``s`` is the mean length, so rows of uneven length are counted a little low.

Padding, recomputation under gradient checkpointing and a rolled-back update are work, not
learning: they lower the MFU, as they should.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

__all__ = [
    "CostMeter",
    "ModelFlops",
    "begin_peak_memory",
    "count_elements",
    "count_parameters",
    "find_peak_flops",
    "names",
    "peak_flops_of_this_device",
]

TERA = 1e12


PEAK_FLOPS: dict[str, dict[str, float]] = {
    # Dense peaks from the vendors' data sheets, of what torch shows as one device, in TFLOPS.
    # A name has to stand in torch's as whole words. The first that does wins, so the longer stands
    # before the shorter. An empty entry is a slower device whose name holds that of another.
    "GB300": {"16-bit": 2500, "tf32": 1250, "float32": 80},
    "B300": {"16-bit": 2250, "tf32": 1125, "float32": 75},
    "GB200": {"16-bit": 2500, "tf32": 1250, "float32": 80},
    "B200": {"16-bit": 2250, "tf32": 1125, "float32": 75},
    "GH200": {"16-bit": 989.4, "tf32": 494.7, "float32": 66.9},
    "H200 NVL": {"16-bit": 835, "tf32": 417, "float32": 60},
    "H200": {"16-bit": 989.4, "tf32": 494.7, "float32": 66.9},
    "H100 PCIe": {"16-bit": 756, "tf32": 378, "float32": 51.2},
    "H100 NVL": {"16-bit": 835, "tf32": 417, "float32": 60},
    "H100": {"16-bit": 989.4, "tf32": 494.7, "float32": 66.9},
    "H800 PCIe": {"16-bit": 756, "tf32": 378, "float32": 51.2},
    "H800": {"16-bit": 989.4, "tf32": 494.7, "float32": 66.9},
    "H20": {"16-bit": 148, "tf32": 74, "float32": 44},
    "A100": {"16-bit": 312, "tf32": 156, "float32": 19.5},
    "A800": {"16-bit": 312, "tf32": 156, "float32": 19.5},
    "A40": {"16-bit": 149.7, "tf32": 74.8, "float32": 37.4},
    "A30": {"16-bit": 165, "tf32": 82, "float32": 10.3},
    "A10G": {"16-bit": 70, "tf32": 35, "float32": 35},
    "A10": {"16-bit": 125, "tf32": 62.5, "float32": 31.2},
    "L40S": {"16-bit": 362, "tf32": 183, "float32": 91.6},
    "L40": {"16-bit": 181, "tf32": 90.5, "float32": 90.5},
    "L20": {"16-bit": 119.5, "tf32": 59.8, "float32": 59.8},
    "L4": {"16-bit": 121, "tf32": 60, "float32": 30.3},
    "V100": {"16-bit": 125, "float32": 15.7},
    "T4": {"16-bit": 65, "float32": 8.1},
    "RTX 6000 Ada": {"16-bit": 364.2, "tf32": 182.1, "float32": 91.1},
    "RTX A6000": {"16-bit": 154.8, "tf32": 77.4, "float32": 38.7},
    "RTX 5090 D": {},
    "RTX 5090": {"16-bit": 209.5, "tf32": 104.8, "float32": 104.8},
    "RTX 5080": {"16-bit": 112.6, "tf32": 56.3, "float32": 56.3},
    "RTX 5070 Ti": {"16-bit": 87.9, "tf32": 43.9, "float32": 43.9},
    "RTX 5070": {"16-bit": 61.7, "tf32": 30.9, "float32": 30.9},
    "RTX 4090 D": {},
    "RTX 4090": {"16-bit": 165.2, "tf32": 82.6, "float32": 82.6},
    "RTX 3090 Ti": {"16-bit": 80, "tf32": 40, "float32": 40},
    "RTX 3090": {"16-bit": 71, "tf32": 35.6, "float32": 35.6},
    "MI325X": {"16-bit": 1307.4, "tf32": 653.7, "float32": 163.4},
    "MI300X": {"16-bit": 1307.4, "tf32": 653.7, "float32": 163.4},
    "MI250X": {"16-bit": 191.5, "float32": 47.9},  # half a card: torch shows each die
}

_PARTS_OF_A_DEVICE = ("Laptop", "Max-Q", "MIG")
"""Words in the names of devices that are slower than the one they are called after."""


class ModelFlops:
    """Count a model's operations once, and give the MFU of each log row.

    Args:
        model: The model, wrapped or not; may carry PEFT adapters.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4))
    >>> flops = ModelFlops(model)
    >>> flops.per_token(mean_length=10)  # 6 · 23,840 + 12 · 2 · 32 · 10 / 2
    146880.0
    >>> flops.utilization(input_tokens_per_second=1e6, mean_length=10, peak_flops=1e12)
    0.14688
    """

    def __init__(self, model: nn.Module) -> None:
        while isinstance(inner := getattr(model, "module", None), nn.Module):
            model = inner
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        looked_up = _embeddings_that_are_not_a_head(model)
        visited = _share_of_experts(config)
        self.used = self.trained = 0.0
        for name, parameter in model.named_parameters():
            if id(parameter) in looked_up:
                continue
            weight = count_elements(parameter) * (visited if ".experts." in f".{name}." else 1.0)
            self.used += weight
            self.trained += weight if parameter.requires_grad else 0.0
        layers, heads, width, head_dim = (
            getattr(config, name, None) or 0
            for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "head_dim")
        )
        # Vision models list these by stage (Swin, Segformer, LeViT); what attention costs is then
        # left out, as it is for models that have none.
        by_stage = not all(isinstance(n, int | float) for n in (layers, heads, width, head_dim))
        head_size = 0 if by_stage else head_dim or (width / heads if heads else 0)
        self.attention = 0.0 if by_stage else 12 * layers * heads * head_size / 2

    def per_token(self, *, mean_length: float) -> float:
        """Return ``F``, for sequences of a mean length in input tokens."""
        return 4 * self.used + 2 * self.trained + self.attention * mean_length

    def utilization(
        self,
        *,
        input_tokens_per_second: float,
        mean_length: float,
        peak_flops: float | None,
        num_devices: int = 1,
    ) -> float | None:
        """Return the MFU, None if the device's peak is not known.

        Args:
            input_tokens_per_second: Of all ranks, without padding.
            mean_length: Input tokens per sequence.
            peak_flops: Of one device, per second; see `peak_flops_of_this_device`.
            num_devices: Ranks.
        """
        if not peak_flops:
            return None
        done = self.per_token(mean_length=mean_length) * input_tokens_per_second
        return done / (num_devices * peak_flops)


class CostMeter:
    """Computes how the hardware was used, for a log row: `mfu` and `peak_memory_bytes`.

    Asks the device nothing but its allocator's counter, so it never waits.

    Args:
        args: The `TrainingArguments`.
        model: The model, wrapped or not.
    """

    def __init__(self, args: Any, model: nn.Module) -> None:
        self._device = getattr(args, "device", torch.device("cpu"))
        self._num_devices = getattr(args, "world_size", 1)
        self._flops = ModelFlops(model)
        self._peak_flops = peak_flops_of_this_device(args, model)

    def metrics(
        self,
        *,
        num_input_tokens: int,
        num_sequences: int,
        seconds: float,
        num_shared_tokens: int = 0,
    ) -> dict[str, float]:
        """Return a window's keys, leaving out what this device does not tell.

        Args:
            num_input_tokens: Of the window, all ranks, without padding.
            num_sequences: Likewise.
            seconds: Of the window's updates, data and optimizer included.
            num_shared_tokens: How many of the input tokens were not computed.

        Returns:
            "mfu", a fraction; "peak_memory_bytes", the most this rank has held since its first
            update.
        """
        row: dict[str, float] = {}
        if seconds > 0 and num_sequences > 0:
            mfu = self._flops.utilization(
                input_tokens_per_second=(num_input_tokens - num_shared_tokens) / seconds,
                mean_length=num_input_tokens / num_sequences,
                peak_flops=self._peak_flops,
                num_devices=self._num_devices,
            )
            if mfu is not None:
                row["mfu"] = mfu
        if self._device.type == "cuda":
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self._device)
        return row


def find_peak_flops(device_name: str, *, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Look up a device's dense peak, in operations per second; None if it is not known.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it.
        dtype: Of the matrix products: what autocast uses, or else the weights'.
        tf32: Whether float32 products may run as TF32.

    >>> find_peak_flops("NVIDIA H200", dtype=torch.bfloat16) / 1e12
    989.4
    >>> find_peak_flops("Some Other Accelerator", dtype=torch.bfloat16)
    """
    known: dict[str, float] = {}
    if not any(part in device_name for part in _PARTS_OF_A_DEVICE):
        known = next((peaks for name, peaks in PEAK_FLOPS.items() if names(device_name, name)), {})
    if dtype in (torch.bfloat16, torch.float16):
        # Neither of these has bf16 units: the figure would be for float16.
        if dtype is torch.bfloat16 and any(names(device_name, old) for old in ("V100", "T4")):
            return None
        peak = known.get("16-bit")
    elif dtype is torch.float32:
        peak = known.get("tf32") if tf32 else known.get("float32")
    else:
        peak = None
    return None if peak is None else peak * TERA


def names(device_name: str, name: str) -> bool:
    """Return whether a device's name holds a name as whole words.

    >>> names("NVIDIA A100-SXM4-80GB", "A100"), names("NVIDIA RTX A1000", "A100")
    (True, False)
    """
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", device_name) is not None


def begin_peak_memory(device: torch.device) -> None:
    """Begin to measure `peak_memory_bytes` anew: models were tried out, or another run trained."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_flops_of_this_device(args: Any, model: nn.Module) -> float | None:
    """Look up the peak for a training run: its device, its autocast, its weights' dtype.

    Args:
        args: The `TrainingArguments`.
        model: The model.
    """
    device = getattr(args, "device", None)
    if device is None or device.type != "cuda":
        return None
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if getattr(args, "bf16", False):
        dtype = torch.bfloat16
    elif getattr(args, "fp16", False):
        dtype = torch.float16
    # Not `get_float32_matmul_precision`: it raises once somebody has set TF32 in the newer way.
    tf32 = torch.backends.cuda.matmul.fp32_precision not in ("ieee", "none")
    return find_peak_flops(torch.cuda.get_device_name(device), dtype=dtype, tf32=tf32)


def _embeddings_that_are_not_a_head(model: nn.Module) -> set[int]:
    def weight_of(getter: str) -> Any:
        try:
            return getattr(getattr(model, getter)(), "weight", None)
        except (AttributeError, NotImplementedError):
            return None

    head = weight_of("get_output_embeddings")
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return {id(table) for table in tables if table is not head}


def _share_of_experts(config: Any) -> float:
    visited = getattr(config, "num_experts_per_tok", None)
    total = next(
        (
            getattr(config, name)
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if getattr(config, name, None)
        ),
        None,
    )
    if not (isinstance(visited, int) and isinstance(total, int)):
        return 1.0
    return visited / total if visited and total else 1.0


def count_parameters(model: Any) -> tuple[int, int]:
    """Count a model's parameters, and those of them that are trained."""
    sizes = [(count_elements(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def count_elements(parameter: Any) -> int:
    """Count a parameter's elements on all ranks: ZeRO-3 leaves an empty tensor in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
