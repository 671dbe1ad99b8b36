"""What the checks run on: device, memory, versions, and what else is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import torch

from benchmarks.gpu.checks import Setting

PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "bitsandbytes", "flash_attn")
PACKAGES += ("liger_kernel", "triton", "datasets")


def describe(setting: Setting) -> dict[str, Any]:
    """Name the machine; fail if it cannot compute on its device."""
    facts: dict[str, Any] = {"Python": platform.python_version(), "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "-"
    facts["C compiler"] = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "-")
    if not setting.is_rehearsal:
        device = torch.cuda.get_device_properties(0)
        facts["device"] = device.name
        facts["GiB"] = round(device.total_memory / 2**30, 1)
        facts["capability"] = f"{device.major}.{device.minor}"
        facts["CUDA"] = torch.version.cuda
    x = torch.ones(64, 64, device=setting.device, dtype=torch.bfloat16)
    assert float((x @ x).sum()) == 64.0**3
    return facts
