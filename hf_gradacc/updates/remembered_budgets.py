"""Token budgets that tuned themselves, remembered per model, device and range of lengths.

One JSON file of readable lines in the Hugging Face cache folder, shared by all runs of a machine.
Delete a line, or the file, to have its budget tuned anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn
from transformers.utils import logging

__all__ = ["budget_file", "describe_setting", "load_budget", "store_budget"]

logger = logging.get_logger(__name__)


def budget_file() -> Path:
    """Return the file: ``hf_gradacc/token_budgets.json`` under ``HF_HOME``."""
    return Path(constants.HF_HOME) / "hf_gradacc" / "token_budgets.json"


def describe_setting(
    model: nn.Module, *, device: torch.device, longest: int, world_size: int, extra: str
) -> str:
    """Describe what the fastest budget depends on, in one line: the key it is remembered by.

    Args:
        model: What is trained; its class, size, trained share and types count.
        device: Where it is trained.
        longest: Tokens of the longest sequence of an update; counts by its next power of two.
        world_size: Ranks.
        extra: What else the speed depends on, such as the shortcuts that are taken.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        name += f", {torch.get_num_threads()} threads"
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    up_to = 1 << max(0, longest - 1).bit_length()
    return (
        f"{type(model).__name__}, {total:,} parameters, {trained:,} trained, {'/'.join(dtypes)}; "
        f"{world_size} x {name}, torch {torch.__version__}; rows up to {up_to} tokens; {extra}"
    )


def load_budget(setting: str) -> int | None:
    """Return the budget stored for a setting, None if there is none."""
    budget = _read().get(setting)
    return budget if isinstance(budget, int) and budget > 0 else None


def store_budget(setting: str, budget: int) -> None:
    """Store the budget of a setting; warn if its folder cannot be written."""
    path = budget_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, encoding="utf-8", delete=False
        ) as file:
            json.dump(_read() | {setting: budget}, file, indent=1, sort_keys=True)
        os.replace(file.name, path)  # noqa: PTH105  (whole or not there, also for other runs)
    except OSError as error:
        logger.warning(f"the tuned budget {budget} was not remembered in {path}: {error}")
        with contextlib.suppress(OSError, UnboundLocalError):
            Path(file.name).unlink()


def _read() -> dict[str, Any]:
    path = budget_file()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning(f"{path} cannot be read and is left out: {error}")
        return {}
    return found if isinstance(found, dict) else {}
