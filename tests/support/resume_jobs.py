"""Runs that are interrupted, and what they end with."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback

from hf_gradacc.safety import checkpoints

from .rank_jobs import Stream, whole
from .tiny import make_trainer, pad, ragged_rows, timeless_log_rows, tiny_llama

ADAM = {"optim": "adamw_torch", "learning_rate": 0.01}
NUM_ROWS = 22


class StopAfter(TrainerCallback):
    """Ends a run early, as a time limit would; then it is resumed."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


class CountingCollator:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: list[Any]) -> Any:
        self.calls += 1
        return pad(rows)


def dataset_of(form: str) -> Any:
    rows = ragged_rows(NUM_ROWS, seed=3)
    table = datasets.Dataset.from_list(rows)
    return {
        "list": lambda: rows,
        "dataset": lambda: table,
        "stream": lambda: Stream(rows),
        "shards": lambda: table.to_iterable_dataset(num_shards=3),
        "mapped shards": lambda: table.to_iterable_dataset(num_shards=3).map(lambda row: row),
        "shuffle buffer": lambda: table.to_iterable_dataset(num_shards=3).shuffle(
            seed=5, buffer_size=6
        ),
    }[form]()


def train_and_report(
    out: str,
    *,
    form: str = "list",
    stop: int | None = None,
    resume: Any = None,
    dropout: float = 0.0,
    callbacks: Any = (),
    prepare: Callable[[Any], None] | None = None,
    rows: Any = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Any]:
    """Train, perhaps from a checkpoint, perhaps only so far."""
    collator = CountingCollator()
    trainer = make_trainer(
        out,
        dataset_of(form) if rows is None else rows,
        model=tiny_llama(attention_dropout=dropout, dtype=dtype),
        callbacks=[StopAfter(stop), *callbacks],
        data_collator=collator,
        **{
            "effective_batch_size": 4,
            "num_train_epochs": 3,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 3,
            **ADAM,
            **options,
        },
    )
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": {n: whole(p.detach()).clone() for n, p in trainer.model.named_parameters()},
        "logs": timeless_log_rows(trainer),
        "step": trainer.state.global_step,
        "collated": collator.calls,
    }


# ---- runs that die ---------------------------------------------------------------------------


def train_until_killed(
    out: str,
    result: str,
    started: str,
    pause: float = 0.0,
    begins_after: int = 0,
    **options: Any,
) -> None:
    """Train from the newest checkpoint there is, and write the result if nobody kills us.

    Args:
        out: Folder of the checkpoints.
        result: File for the pickled report.
        started: File made when training begins, or when it has come as far as `begins_after`.
        pause: Seconds to wait after each update, so that a fast machine is not done too soon.
        begins_after: Updates of this process before `started` is made.
        **options: Of the training.
    """

    class Started(TrainerCallback):
        updates = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if not begins_after:
                Path(started).touch()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.updates += 1
            if self.updates == begins_after:
                Path(started).touch()
            time.sleep(pause)

    report = train_and_report(out, resume="auto", callbacks=[Started()], dropout=0.2, **options)
    aside = Path(result + ".part")
    aside.write_bytes(pickle.dumps(report))
    aside.rename(result)


def die_while_saving(out: str, moment: str) -> None:
    """Kill ourselves with SIGKILL at a chosen moment of the save of step 4."""

    def die_at_step_4(do: Callable[..., Any], *, half: bool = False) -> Callable[..., Any]:
        def dying(*args: Any, **kwargs: Any) -> Any:
            folder = next((str(a) for a in args if "checkpoint-4" in str(a)), None)
            if folder is None:
                return do(*args, **kwargs)
            if half:
                do(*args, **kwargs)
                os.truncate(folder, Path(folder).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return dying

    if moment == "in the middle of the optimizer's file":
        torch.save = die_at_step_4(torch.save, half=True)  # type: ignore[assignment]
    elif moment == "before the manifest":
        import hf_gradacc.trainer.checkpoints.saving as module

        module.write_manifest = die_at_step_4(checkpoints.write_manifest)
    elif moment == "before the rename":
        import hf_gradacc.trainer.checkpoints.saving as module

        module.publish = die_at_step_4(checkpoints.publish)
    elif moment == "while an old one is deleted":
        import shutil

        shutil.rmtree = _die_deleting(shutil.rmtree)  # type: ignore[assignment]
    train_and_report(out, dropout=0.2, save_total_limit=1)


def _die_deleting(rmtree: Callable[..., None]) -> Callable[..., None]:
    def dying(path: Any, *args: Any, **kwargs: Any) -> None:
        if "old-checkpoint-2" in str(path) and Path(path).exists():
            next(Path(path).glob("*.safetensors")).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(path, *args, **kwargs)

    return dying


class FullDisk(TrainerCallback):
    """From one step to another, the system lets no file of this process grow past a size."""

    def __init__(self, *, first: int, last: int, most_bytes: int, ranks: tuple[int, ...] = (0,)):
        self.first, self.last, self.most_bytes, self.ranks = first, last, most_bytes, ranks

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        full = self.first <= state.global_step + 1 <= self.last
        limit = self.most_bytes if full and args.process_index in self.ranks else -1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))


def train_on_a_full_disk(
    out: str, *, ranks: tuple[int, ...], most_bytes: int = 20_000, **options: Any
) -> dict[str, Any]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Python does so itself; say so
    full = FullDisk(first=4, last=4, most_bytes=most_bytes, ranks=ranks)
    report = train_and_report(out, callbacks=[full], num_train_epochs=1, **options)
    report["found"] = sorted(p.name for p in Path(out).iterdir() if p.is_dir())
    return report


__all__ = ["die_while_saving", "train_and_report", "train_on_a_full_disk", "train_until_killed"]
