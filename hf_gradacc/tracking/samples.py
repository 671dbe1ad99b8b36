"""A model's answers while it learns: on the terminal, in the run's file, and in W&B if allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm

from hf_gradacc.text import printable
from hf_gradacc.tracking.install import TrackingCallback
from hf_gradacc.tracking.wandb import GradAccWandbCallback

__all__ = ["Sample", "record_samples"]

_LONGEST_SHOWN = 300


@dataclass(frozen=True)
class Sample:
    """One prompt and what comes after it.

    Attributes:
        prompt: As the model reads it, special tokens included.
        answer: What the model writes.
        expected: What the row holds.
    """

    prompt: str
    answer: str
    expected: str


def record_samples(trainer: Any, samples: Sequence[Sample]) -> None:
    """Report answers after an update. Call it on rank 0.

    W&B gets them only under `wandb_upload_text`.

    Args:
        trainer: The trainer, in training.
        samples: The answers.
    """
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrackingCallback):
            rows = [asdict(sample) for sample in samples]
            callback.append({"kind": "samples", "step": step, "samples": rows})
        elif isinstance(callback, GradAccWandbCallback) and trainer.args.wandb_upload_text:
            table = [[step, *asdict(sample).values()] for sample in samples]
            callback.log_table(
                "samples", columns=["update", "prompt", "answer", "expected"], rows=table, step=step
            )
    if trainer.args.log_level not in ("error", "critical"):
        tqdm.write("\n".join(_describe(samples, step)))


def _describe(samples: Sequence[Sample], step: int) -> Iterator[str]:
    yield f"samples after update {step:,}"
    for sample in samples:
        for name, text in asdict(sample).items():
            shown = printable(text).replace("\n", "⏎")
            if len(shown) > _LONGEST_SHOWN:  # the end of a prompt is what is answered
                cut = _LONGEST_SHOWN - 1
                shown = f"…{shown[-cut:]}" if name == "prompt" else f"{shown[:cut]}…"
            yield f"  {name:<8}  {shown}"
