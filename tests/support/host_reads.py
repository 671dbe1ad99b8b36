"""Count what makes the host wait for a device, on a machine that has none."""

from __future__ import annotations

import collections
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["WAITS", "Waits"]

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}
"""Operations that need a value on the host."""


class Waits(TorchDispatchMode):
    """Count the operations that need a value on the host, by who asked."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS and not self.paused:
            self.counts[name] += 1
        return func(*args, **kwargs or {})
