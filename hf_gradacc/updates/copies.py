"""Copy small tensors from the host to a device without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

__all__ = ["start_copy"]

logger = logging.get_logger(__name__)


def start_copy(value: Any, device: torch.device) -> Any:
    """Queue the copy of a tensor to the device; the host does not wait for it."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        # From pageable memory the host would wait until the copy has been staged.
        value = value if value.is_pinned() else _pinned(value)
    return value.to(device, non_blocking=True)


def _pinned(value: Tensor) -> Tensor:
    """Return a copy in pinned memory; where the host has none left, the tensor itself.

    CUDA calls that "out of memory" too, but no finer cut gives the host more of it. Any other error
    comes again with the copy.
    """
    try:
        return value.pin_memory()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        message = str(error).strip().partition("\n")[0]
        logger.warning_once(
            f"the host has no pinned memory left ({message}): copies to the device are waited for. "
            f"`ulimit -l` limits it; dataloader_pin_memory = False needs less."
        )
        return value
