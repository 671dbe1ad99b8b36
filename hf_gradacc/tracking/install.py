"""Where a run's numbers go: W&B through its own callback, and the run's own files.

`install_tracking(trainer)` sets both up; `record_event(trainer, ...)` reports what happened
beside the numbers (a recovery, a skipped update). Only rank 0 writes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import WandbCallback
from transformers.utils import logging

from hf_gradacc.safety.checkpoints import list_checkpoints
from hf_gradacc.safety.run_state import VERDICT, keep, kept
from hf_gradacc.safety.withheld import shown_without_secrets
from hf_gradacc.tracking.report import build_report
from hf_gradacc.tracking.run_facts import describe_run
from hf_gradacc.tracking.run_files import RunFile, kind_of, read_log, to_json
from hf_gradacc.tracking.terminal import RowPrinter, ShowPlan, ShowSummary, UpdateProgress
from hf_gradacc.tracking.wandb import GradAccWandbCallback
from hf_gradacc.tracking.wandb_ranks import RankRuns, find_rank_runs

__all__ = [
    "ReportAtTheEnd",
    "TrackingCallback",
    "attach_report",
    "flush_log",
    "install_tracking",
    "listen_to_rows",
    "record_event",
]

logger = logging.get_logger(__name__)


class TrackingCallback(TrainerCallback):
    """Write `gradacc_log.jsonl` and `gradacc_run.json` into the output directory.

    Each log row goes there as reporters see it, with "kind", "step" (updates done) and "time"
    (seconds since 1970); each event as a row of kind "event".
    """

    def __init__(self) -> None:
        self._file: RunFile | None = None
        self._run: str | None = None
        self._events: Counter[str] = Counter()
        self._written: set[tuple[str, int]] = set()
        self._unwritten: list[dict[str, Any]] = []
        self._has_warned = False
        self._listeners: list[Callable[[dict[str, Any]], None]] = []

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Hand every row to a function, too, as it is written."""
        self._listeners.append(listener)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the files, or cut them back to the checkpoint that training goes on from."""
        saved = kept(state)
        self._file = None
        if not state.is_world_process_zero or saved.get("folder_is_shared"):
            return
        identity = saved.get("run") or {}
        self._run = identity.get("id")
        self._events = Counter(saved.get("events", {}))
        self._unwritten, self._has_warned = [], False
        self._file = RunFile(Path(args.output_dir))
        self._written = set()
        finished = 0 < state.max_steps <= state.global_step
        if finished and (rows := self._file.read_or_set_aside()) is not None:
            # Started again, it has nothing to do: its files tell of the start that did the work.
            self._written = {(row["kind"], row.get("step", 0)) for row in rows}
            return
        if state.global_step == 0 and (others := list_checkpoints(args.output_dir)):
            logger.warning(
                f"{args.output_dir} holds {others[0].name} of an earlier run. This run begins anew "
                f"and neither resumes from that run's checkpoints nor deletes them."
            )
        self._file.start(step=state.global_step, history=state.log_history)
        if state.global_step:
            # An evaluation that is made up for is due once more after a kill before the next save.
            rows = read_log(self._file.log_path)
            self._written = {(row["kind"], row.get("step", 0)) for row in rows}
        resumed_at = saved.get("resumed_at", [])
        if state.global_step:
            resumed_at = [*resumed_at, state.global_step]
        keep(state, resumed_at=resumed_at)
        facts = describe_run(
            args,
            state=state,
            model=kwargs.get("model"),
            train_dataloader=kwargs.get("train_dataloader"),
        )
        with shown_without_secrets(args):
            options = args.to_dict()
        self._file.update_run(
            {
                "run_name": args.run_name or Path(args.output_dir).name,
                "run": identity,
                "digest": saved.get("digest"),
                **facts,
                "training_arguments": options,
                "wandb_run_id": kept(state).get("wandb_run_id"),
                "resumed_at": resumed_at,
                "finished": False,
            }
        )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the row just logged."""
        # Not `logs`: PrinterCallback, which came before, took total_flos out of it.
        if self._file is not None and state.is_world_process_zero and state.log_history:
            row = state.log_history[-1]
            kind = kind_of(row)
            if (kind, row.get("step", 0)) not in self._written:
                self._append({"kind": kind, **row})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the run reached its end."""
        if self._file is not None and state.is_world_process_zero:
            done = state.global_step >= state.max_steps
            self._write()
            try:
                self._file.update_run({"finished": done, "updates_done": state.global_step})
            except OSError as error:  # the run is over and its model not yet saved
                logger.warning(f"{self._file.run_path} cannot be written ({error}).")
            if self._unwritten:
                logger.warning(
                    f"{len(self._unwritten)} rows never got into {self._file.log_path}; the next "
                    f"checkpoint's trainer_state.json holds them, if there is one."
                )

    def event(self, state: Any, *, name: str, text: str, data: dict[str, Any]) -> int:
        """Append an event and give how many of its name this run has had."""
        self._events[name] += 1
        keep(state, events=dict(self._events))
        if name == VERDICT:
            keep(state, verdict=text)
        # It belongs to the update in progress: a resume from before that update cuts it away.
        step = state.global_step + 1
        self._append({"kind": "event", "event": name, "step": step, "text": text, **data})
        return self._events[name]

    def append(self, row: dict[str, Any]) -> None:
        """Append a row of some kind of its own, with its "kind" and "step"."""
        self._append(row)

    def flush(self) -> None:
        """Wait until all rows so far are on the disk."""
        if self._file is not None:
            self._file.flush()

    def _append(self, row: dict[str, Any]) -> None:
        whose = {} if self._run is None else {"run": self._run}
        row = {**row, "time": round(time.time(), 3), **whose}
        for listener in self._listeners:
            listener(to_json(row))
        self._unwritten.append(row)
        self._write()

    def _write(self) -> None:
        """Write what is due. A full disk keeps rows waiting, and training does not wait for it."""
        if self._file is None:
            return
        try:
            while self._unwritten:
                self._file.append(self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    f"{self._file.log_path} cannot be written ({error}). Training goes on, and "
                    f"rows are kept until it can."
                )
            self._has_warned = True


def install_tracking(trainer: Any) -> None:
    """Put our W&B callback and progress bar in the stock ones' places, and add the rest.

    The rest is the writer of the run's files, and the plan and summary on the terminal. Call it
    once, after `Trainer.__init__`; a second call does nothing. Without wandb in `report_to` it is
    left alone.
    """
    callbacks = trainer.callback_handler.callbacks
    for position, callback in enumerate(callbacks):
        if type(callback) is WandbCallback:  # a user's subclass stays what it is
            callbacks[position] = GradAccWandbCallback()
        elif type(callback) is ProgressCallback:
            callbacks[position] = UpdateProgress(callback.max_str_len)
        elif type(callback) is PrinterCallback:
            callbacks[position] = RowPrinter()
    if not any(isinstance(callback, ShowPlan) for callback in callbacks):
        trainer.add_callback(ShowPlan())
        bars = [i for i, c in enumerate(callbacks) if isinstance(c, ProgressCallback)]
        if bars:  # a bar that is there already would be torn apart by the plan
            callbacks.insert(bars[0], callbacks.pop())
    if getattr(trainer.args, "wandb_per_rank", False) and find_rank_runs(trainer) is None:
        if any(isinstance(callback, WandbCallback) for callback in callbacks):
            trainer.add_callback(RankRuns())  # after W&B's own, whose run it looks up
        else:
            logger.warning("wandb_per_rank = True does nothing: report_to leaves wandb out.")
    rest: list[TrackingCallback | ReportAtTheEnd | ShowSummary] = [TrackingCallback()]
    if getattr(trainer.args, "wandb_report", False):
        rest.append(ReportAtTheEnd(trainer))
    for added in [*rest, ShowSummary()]:  # the summary has the last word
        if not any(isinstance(callback, type(added)) for callback in callbacks):
            trainer.add_callback(added)


class ReportAtTheEnd(TrainerCallback):
    """Call `attach_report` when training ends, on request (`wandb_report`)."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write and upload; a report that cannot be written does not fail a run that is done."""
        try:
            attach_report(self.trainer)
        except Exception as error:  # whatever is wrong with a page, the run is done
            logger.warning(f"wandb_report: no report was written ({error}).")


def listen_to_rows(trainer: Any, listener: Callable[[dict[str, Any]], None]) -> None:
    """Hand each row of `gradacc_log.jsonl` to a function as well, on rank 0 and as JSON takes it.

    Args:
        trainer: The trainer, before it trains.
        listener: Called with the row.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrackingCallback):
            callback.listen(listener)


def flush_log(trainer: Any) -> None:
    """Make the log as durable as the checkpoint that is being saved."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrackingCallback):
            callback.flush()


def record_event(
    trainer: Any, name: str, *, text: str, title: str | None = None, alert: bool = True, **data: Any
) -> None:
    """Report something that happened: to the run's file and, as an alert, to W&B.

    Call it on every rank; rank 0 writes. A failing tracker does not make it raise.

    Args:
        trainer: The trainer.
        name: What kind of event, a short identifier: "out_of_memory", "skipped_update".
        text: One sentence for people.
        title: The alert's title; W&B sends at most one a minute under the same title.
        alert: False writes the line without sending an alert.
        **data: Figures, kept in the file beside the text.
    """
    if not trainer.state.is_world_process_zero:
        return
    callbacks = trainer.callback_handler.callbacks
    count = 0
    for callback in callbacks:
        if isinstance(callback, TrackingCallback):
            count = callback.event(trainer.state, name=name, text=text, data=data)
    if not alert:
        return
    for callback in callbacks:
        if isinstance(callback, GradAccWandbCallback):
            callback.alert(
                title=title or name.replace("_", " ").capitalize(),
                text=f"Update {trainer.state.global_step + 1}: {text}",
                level="WARN",
                count_key=f"events/{name}",
                count=max(count, 1),
            )


def attach_report(trainer: Any) -> Path | None:
    """Write the run's report into its output directory, and upload it to W&B as an artifact.

    Call it after `train()`, on every rank; rank 0 writes. A picture of the plots comes along.

    Args:
        trainer: The trainer.

    Returns:
        The page's path; None on other ranks.

    Raises:
        DataError: If nothing was logged yet.
    """
    if not trainer.state.is_world_process_zero:
        return None
    folder = Path(trainer.args.output_dir)
    page, picture = folder / "report.html", folder / "report.png"
    build_report([folder], html=page, png=picture)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, GradAccWandbCallback):
            callback.log_files([page, picture])
    return page
