"""The schedule of the learning rate, where its name alone does not say it all.

Stock makes ``warmup_stable_decay`` only if ``lr_scheduler_kwargs`` counts the updates of its decay,
which nobody knows before the data are loaded.
"""

from __future__ import annotations

import math
from typing import Any

from hf_gradacc.errors import ConfigError

__all__ = ["complete_schedule"]

_DECAY_SHARE = 0.2


def complete_schedule(args: Any, num_updates: int) -> dict[str, Any] | None:
    """Return ``lr_scheduler_kwargs`` with the updates of the decay.

    The last fifth of a run (Hägele et al. 2024, https://arxiv.org/abs/2405.18392), if neither
    ``lr_decay_steps`` (below 1 a share of the run, as ``warmup_steps`` is) nor, in
    ``lr_scheduler_kwargs``, ``num_decay_steps`` or ``num_stable_steps`` says otherwise.

    Args:
        args: The training arguments.
        num_updates: Updates of the run.

    Raises:
        ConfigError: If warmup and decay take more updates than there are.
    """
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    options: dict[str, Any] = dict(args.lr_scheduler_kwargs or {})
    if kind != "warmup_stable_decay" or "num_decay_steps" in options:
        return args.lr_scheduler_kwargs
    warmup, asked = args.get_warmup_steps(num_updates), args.lr_decay_steps
    left = num_updates - warmup - options.get("num_stable_steps", 0)
    if asked is None and "num_stable_steps" in options:
        decay = left
    elif asked is None:
        decay = min(left, math.ceil(num_updates * _DECAY_SHARE))
    else:
        decay = int(asked) if asked >= 1 else math.ceil(num_updates * asked)
    if decay > left or decay < 0:
        stable = options.get("num_stable_steps", 0)
        plateau = f" and num_stable_steps of {stable:,}" if stable else ""
        raise ConfigError(
            f"lr_scheduler_type = 'warmup_stable_decay': a warmup of {warmup:,} updates{plateau} "
            f"and lr_decay_steps = {asked} do not fit into a run of {num_updates:,}: take less of "
            f"warmup_steps or lr_decay_steps, or train longer."
        )
    return options | {"num_decay_steps": decay}
