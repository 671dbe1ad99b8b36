"""What a run says on the terminal: its plan before, one line per log row, and what came of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_gradacc.report_words import quantity
from hf_gradacc.tracking_facts import describe_run
from hf_gradacc.tracking_file import kind_of
from hf_gradacc.tracking_terminal_words import (
    describe_evaluation,
    describe_row,
    fold,
    next_steps,
    number,
    plan_rows,
    result_line,
    table,
    terminal_width,
)

__all__ = ["RowPrinter", "ShowPlan", "ShowSummary", "UpdateProgress"]


def _if_it_can_be_written(method: Callable[..., None]) -> Callable[..., None]:
    """Leave words unsaid that cannot be written: output may go to a file on a full disk."""

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except OSError:
            return

    return guarded


class ShowPlan(TrainerCallback):
    """Print the plan when training begins. Rank 0 only; it stands before the progress bar.

    Plain text, aligned by spaces: it reads the same in a terminal, a log file and a notebook.
    `log_level="error"` in the training arguments silences it, and `ShowSummary` too.
    """

    @_if_it_can_be_written
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the plan."""
        if state.is_world_process_zero and _may_speak(args):
            facts = describe_run(
                args,
                state=state,
                model=kwargs.get("model"),
                train_dataloader=kwargs.get("train_dataloader"),
            )
            name = args.run_name or Path(args.output_dir).name
            rows = plan_rows(args, state, facts, kwargs.get("train_dataloader"))
            print(table(f"Plan of {name}", rows))


class ShowSummary(TrainerCallback):
    """Print what was trained, where it lies, and what to run next. Rank 0 only, after the bar."""

    def __init__(self) -> None:
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        self._started, self._first_step = time.monotonic(), state.global_step

    @_if_it_can_be_written
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the summary."""
        if state.is_world_process_zero and _may_speak(args):
            seconds = time.monotonic() - self._started
            head = result_line(state, seconds=seconds, first_step=self._first_step)
            print(table(head, next_steps(args, state)))


class RowPrinter(PrinterCallback):
    """The stock printer of rows, for output without a progress bar."""

    on_log = _if_it_can_be_written(PrinterCallback.on_log)


class UpdateProgress(ProgressCallback):
    """The stock progress bar, with loss and speed in it, and log rows a person can read."""

    on_prediction_step = _if_it_can_be_written(ProgressCallback.on_prediction_step)
    on_evaluate = _if_it_can_be_written(ProgressCallback.on_evaluate)
    on_predict = _if_it_can_be_written(ProgressCallback.on_predict)

    @_if_it_can_be_written
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, where there is one."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    @_if_it_can_be_written
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar, where there is one."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    @_if_it_can_be_written
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count updates, and after a resume only those to come for the time left."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit=" update",
                dynamic_ncols=True,
            )

    @_if_it_can_be_written
    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write training and evaluation rows as one line each; the summary tells the totals."""
        kind = kind_of(logs) if logs else "other"
        if not state.is_world_process_zero or self.training_bar is None or kind == "end":
            return
        if logs is None or kind == "other":
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif kind == "eval":
            self._write(describe_evaluation(logs, step=state.global_step))
        else:
            speed = logs.get("target_tokens_per_second")
            text = f"loss {number(logs['loss'])}"
            text += f", {quantity(speed)} tokens/s" if speed else ""
            self.training_bar.set_postfix_str(text, refresh=False)
            self._write(describe_row(logs, step=state.global_step))

    def _write(self, row: str) -> None:
        self.training_bar.write(fold(row, width=terminal_width(), indent=2))


def _may_speak(args: Any) -> bool:
    return args.log_level not in ("error", "critical")
