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
    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, f"on_{event}", self._tell)

    def _tell(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.SIGTERM)


def train_and_be_told_to_stop(out: str, told_rank: int, events: dict[str, int]) -> dict[str, Any]:
    """Train four updates, once per event; one rank gets SIGTERM at that event of that step."""
    told = int(os.environ["RANK"]) == told_rank
    results = {}
    for event, step in events.items():
        rows = ragged_rows(24, seed=5)
        trainer = make_trainer(
            Path(out) / event,
            rows,
            model=tiny_llama(),
            callbacks=[_Tell(event, step)] if told else [],
            effective_batch_size=6,
            per_device_train_batch_size=2,
            eval_dataset=rows,
            per_device_eval_batch_size=2,
            eval_strategy="steps",
            eval_steps=3,
        )
        code: Any = None
        try:
            trainer.train()
        except SystemExit as exit_:
            code = exit_.code
        dist.barrier()
        results[event] = {
            "code": code,
            "steps": trainer.state.global_step,
            "saved": sorted(path.name for path in (Path(out) / event).glob("checkpoint-*")),
            "evaluated": any("eval_loss" in row for row in trainer.state.log_history),
        }
    return results
