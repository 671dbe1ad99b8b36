"""Ranks of which one is told to stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from .tiny import make_trainer, ragged_rows, tiny_llama


class _Tell(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train_and_be_told_to_stop(out: str, told_rank: int, step: int) -> dict[str, Any]:
    """Train four updates; one rank gets SIGTERM during one of them."""
    told = int(os.environ["RANK"]) == told_rank
    trainer = make_trainer(
        out,
        ragged_rows(24, seed=5),
        model=tiny_llama(),
        callbacks=[_Tell(step)] if told else [],
        effective_batch_size=6,
        per_device_train_batch_size=2,
    )
    code: Any = None
    try:
        trainer.train()
    except SystemExit as exit_:
        code = exit_.code
    dist.barrier()
    saved = sorted(path.name for path in Path(out).glob("checkpoint-*"))
    return {"code": code, "steps": trainer.state.global_step, "saved": saved}
