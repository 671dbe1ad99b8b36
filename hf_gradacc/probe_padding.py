"""Ask whether padding changes the loss of a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hf_gradacc.batching import trim_padding
from hf_gradacc.probe_facts import differ

__all__ = ["measure_padding"]


def measure_padding(
    rows: list[dict[str, Any]],
    mean_of: Callable[[Mapping[str, Any]], float],
    *,
    widen: Callable[[Mapping[str, Any], int], Mapping[str, Any]],
    max_width: int | None,
    enough: float,
) -> float:
    """Measure by how much padding changes the loss of a row; stop once it is `enough`.

    Several rows at several widths: pooling models (Funnel, CANINE) let padding in between some
    widths and not between others. One that cannot take a row as narrow as this one counts as
    changed, which costs speed and never exactness.
    """
    worst = 0.0
    for row in rows:
        main = row.get("input_ids")
        if not isinstance(main, Tensor) or not isinstance(row.get("attention_mask"), Tensor):
            return 0.0
        bare = trim_padding(row)
        width = bare["input_ids"].shape[-1]
        # A column beyond the learned positions breaks a GPU's whole process, so there is a margin:
        # RoBERTa's positions begin at 2.
        room = math.inf if max_width is None else max_width - 8
        padded = [widen(bare, width + extra) for extra in (1, 3) if width + extra <= room]
        if main.shape[-1] > width:
            padded.insert(0, row)
        try:
            natural = mean_of(bare) if padded else 0.0
            for part in padded:
                worst = max(worst, differ(mean_of(part), natural))
                if not worst <= enough:
                    return worst
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return math.inf
    return worst
