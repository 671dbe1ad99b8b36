"""What a run prints on the terminal: its plan, one line per log row, and a summary.

The words of a run's plan, rows and summary, as text that fits a terminal.
"""

from __future__ import annotations

import functools
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, has_length

from hf_gradacc.safety.run_state import VERDICT, kept
from hf_gradacc.text import count_updates, duration, quantity, write_line
from hf_gradacc.tracking.parity_file import describe_parity
from hf_gradacc.tracking.progress import ProgressLines, has_terminal
from hf_gradacc.tracking.run_facts import describe_run
from hf_gradacc.tracking.run_files import RUN_NAME, RunFile, kind_of
from hf_gradacc.updates.fingerprint import count_rows_of

__all__ = [
    "RowPrinter",
    "ShowPlan",
    "ShowSummary",
    "UpdateProgress",
    "describe_evaluation",
    "describe_row",
    "fold",
    "next_steps",
    "number",
    "plan_rows",
    "result_line",
    "table",
    "terminal_width",
]


def _if_it_can_be_written(method: Callable[..., None]) -> Callable[..., None]:
    """Drop output that cannot be written: it may go to a file on a full disk."""

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
        if state.is_world_process_zero and _is_verbose(args):
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
    """Print what was trained, where it is saved, and what to run next. Rank 0 only."""

    def __init__(self) -> None:
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self._started, self._first_step = time.monotonic(), state.global_step

    @_if_it_can_be_written
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the summary."""
        if state.is_world_process_zero and _is_verbose(args):
            seconds = time.monotonic() - self._started
            head = result_line(state, seconds=seconds, first_step=self._first_step)
            print(table(head, next_steps(args, state)))


class RowPrinter(PrinterCallback):
    """The stock printer of rows, for output without a progress bar."""

    on_log = _if_it_can_be_written(PrinterCallback.on_log)


class UpdateProgress(ProgressCallback):
    """The stock progress bar, with loss and speed in it, and log rows a person can read.

    Without a terminal there is no bar, whose every move would stay in a log file, but a line of
    progress every half minute.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self._lines: ProgressLines | None = None
        self._is_training = False

    @_if_it_can_be_written
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count updates, and after a resume only those to come for the time left."""
        self.current_step = state.global_step
        self._is_training = bool(state.is_world_process_zero)
        self._lines = None
        if not has_terminal():
            self._lines = ProgressLines(state.max_steps, done=state.global_step)
        elif state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit=" update",
                dynamic_ncols=True,
            )

    @_if_it_can_be_written
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of an update that takes long."""
        if self._lines is not None and self._is_training:
            self._tell(self._lines.at(state.global_step))

    @_if_it_can_be_written
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, where there is one."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)
        elif self._lines is not None and self._is_training:
            self._tell(self._lines.at(state.global_step))

    @_if_it_can_be_written
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar, where there is one."""
        self._is_training = False
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    @_if_it_can_be_written
    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Move the bar of an evaluation, or tell how far it is."""
        if has_terminal():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        elif state.is_world_process_zero:
            self._lines = self._lines or ProgressLines(0, done=0)  # no training was before
            size = len(eval_dataloader) if has_length(eval_dataloader) else None
            self._tell(self._lines.evaluating(size))

    @_if_it_can_be_written
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar of an evaluation."""
        super().on_evaluate(args, state, control, **kwargs)
        if self._lines is not None:
            self._lines.end_evaluation()

    @_if_it_can_be_written
    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar of a prediction."""
        super().on_predict(args, state, control, **kwargs)
        if self._lines is not None:
            self._lines.end_evaluation()

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
        if not logs or not self._is_training or kind == "end":
            return
        if kind == "other":
            if self.training_bar is not None:
                super().on_log(args, state, control, logs=logs, **kwargs)
            else:
                print({key: value for key, value in logs.items() if key != "total_flos"})
        elif kind == "eval":
            self._write(describe_evaluation(logs, step=state.global_step))
        else:
            speed = logs.get("target_tokens_per_second")
            text = f"loss {number(logs['loss'])}"
            unit = "targets" if _counts_rows(logs) else "tokens"
            text += f", {quantity(speed)} {unit}/s" if speed else ""
            if self.training_bar is not None:
                self.training_bar.set_postfix_str(text, refresh=False)
            self._write(describe_row(logs, step=state.global_step))

    def _tell(self, line: str | None) -> None:
        if line is not None:
            self._write(line)

    def _write(self, row: str) -> None:
        text = fold(row, width=terminal_width(), indent=2)
        if self.training_bar is not None:
            self.training_bar.write(text)
        else:
            write_line(text, sys.stdout)


def _is_verbose(args: Any) -> bool:
    return args.log_level not in ("error", "critical")


def describe_evaluation(logs: Mapping[str, Any], *, step: int) -> str:
    """Write an evaluation row as one line, without the stock figures of its speed.

    >>> describe_evaluation({"eval_loss": 2.6528, "eval_perplexity": 14.195, "epoch": 0.5,
    ...     "eval_runtime": 4.8, "eval_steps_per_second": 3.1}, step=15)
    'held out after update 15: loss 2.653, perplexity 14.2'
    """
    fields = [
        f"{key.removeprefix('eval_').replace('_', ' ')} {number(value)}"
        for key, value in logs.items()
        if key.startswith("eval_")
        and isinstance(value, (int, float))
        and not key.endswith(("_runtime", "_per_second", "_preparation_time"))
    ]
    return f"held out after update {step}: {', '.join(fields)}"


def describe_row(logs: Mapping[str, Any], *, step: int) -> str:
    """Write a training row as one line.

    >>> describe_row({"loss": 4.2129, "learning_rate": 1e-3, "tokens_per_update": 2310.5,
    ...     "effective_batch_size": 32.0, "micro_batches_per_update": 3.0,
    ...     "padding_fraction": 0.051, "target_tokens_per_second": 3290.0}, step=20)
    'update 20: loss 4.213 | 2,310 target tokens, 32 sequences, 3 micro-batches, 5.1% padding |
    learning rate 0.001 | 3,290 tokens/s'
    >>> describe_row({"loss": 0.6931, "tokens_per_update": 8.0, "effective_batch_size": 8.0,
    ...     "target_tokens_per_second": 12.5}, step=1)
    'update 1: loss 0.6931 | 8 targets, 8 sequences | 12.5 targets/s'
    >>> describe_row({"loss": 0.5, "padding_fraction": 0.04, "shared_fraction": 0.412}, step=2)
    'update 2: loss 0.5 | 4.0% padding, 41.2% shared'
    """
    many = "targets" if _counts_rows(logs) else "target tokens"
    parts = [f"update {step}: loss {number(logs['loss'])}"]
    batch = [
        f"{quantity(float(logs[key]))} {one if logs[key] == 1 else several}"
        for key, one, several in (
            ("tokens_per_update", many.removesuffix("s"), many),
            ("effective_batch_size", "sequence", "sequences"),
            ("micro_batches_per_update", "micro-batch", "micro-batches"),
        )
        if key in logs
    ]
    if "padding_fraction" in logs:
        batch.append(f"{logs['padding_fraction']:.1%} padding")
    if "shared_fraction" in logs:
        batch.append(f"{logs['shared_fraction']:.1%} shared")
    if batch:
        parts.append(", ".join(batch))
    if "learning_rate" in logs:
        parts.append(f"learning rate {number(logs['learning_rate'])}")
    if "gradient_noise_scale" in logs:
        parts.append(f"noise scale {quantity(logs['gradient_noise_scale'])}")
    if "target_tokens_per_second" in logs:
        unit = many.removeprefix("target ")
        parts.append(f"{quantity(logs['target_tokens_per_second'])} {unit}/s")
    return " | ".join(parts)


def _counts_rows(logs: Mapping[str, Any]) -> bool:
    """Whether each sequence was one target, as a row with a class or a pair of answers is."""
    sizes = [logs.get(key) for key in ("tokens_per_update", "effective_batch_size")]
    return None not in sizes and sizes[0] == sizes[1]


def fold(text: str, *, width: int | None, indent: int) -> str:
    """Break a text between words where a terminal would break it inside of one.

    Args:
        text: One line.
        width: Columns of the terminal; None leaves the line whole, as a file wants it.
        indent: Spaces before each line but the first.

    >>> print(fold("update 20: loss 4.2 | 32 sequences | 3,290 tokens/s", width=34, indent=2))
    update 20: loss 4.2 | 32 sequences
      | 3,290 tokens/s
    """
    if width is None or len(text) <= width:
        return text
    space = " " * indent
    lines = textwrap.wrap(
        text, width, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def terminal_width() -> int | None:
    """Return the columns of the terminal, None if output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def number(value: float) -> str:
    """Write a loss or a rate with four digits."""
    return f"{float(value):.4g}"


def table(head: str, rows: Iterator[tuple[str, str]]) -> str:
    """Write a line and, indented below it, names with their values."""
    listed, columns = list(rows), terminal_width()
    width = max((len(name) for name, _ in listed), default=0)
    lines = [fold(head, width=columns, indent=2)]
    for name, text in listed:
        # A command or a path is there to be copied: the terminal may break it, we may not.
        limit = None if name in _TO_COPY else columns
        lines.append(fold(f"  {name:<{width}}  {text}", width=limit, indent=width + 4))
    return "\n".join(lines)


_TO_COPY = ("files", "checkpoint", "model", "report", "W&B")


def plan_rows(
    args: Any, state: Any, facts: dict[str, Any], train_dataloader: Any
) -> Iterator[tuple[str, str]]:
    """List what is about to be trained, and how, as names and values."""
    model, batch = facts.get("model"), facts["batch"]
    if model:
        total, trained = model["num_parameters"], model["num_trainable_parameters"]
        share = "all trained" if total == trained else f"{quantity(trained)} trained"
        name = model["name_or_path"] or model["class"]
        yield "model", f"{name}, {quantity(total)} parameters, {share}, {'/'.join(model['dtypes'])}"
    dataset: Any = getattr(train_dataloader, "dataset", None)
    if (num_rows := count_rows_of(dataset)) is not None:
        yield "data", f"{num_rows:,} rows"
    ranks = batch["world_size"]
    size = (
        f"at least {batch['tokens_per_update']:,} target tokens"
        if "tokens_per_update" in batch
        else f"{batch['effective_batch_size']:,} sequences"
    )
    yield "update", size if ranks == 1 else f"{size}, over {ranks} ranks"
    if "families" in batch:
        rows = f"{batch['rows_in_families']:,} rows"
        yield "families", f"{batch['families']:,}, of {rows} drawn together that begin alike"
    limits = [
        f"at most {batch[key]:,} {word}"
        for key, word in (
            ("max_tokens_per_micro_batch", "tokens with padding"),
            ("max_sequences_per_micro_batch", "sequences"),
        )
        if isinstance(batch.get(key), int)
    ]
    shares = ["common prefixes computed once"] if batch.get("shares_prefixes") else []
    if limits or shares:
        yield "micro-batch", ", ".join([*filter(None, [" and ".join(limits)]), *shares])
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    yield "learning rate", f"{quantity(args.learning_rate)} at its peak, {schedule} schedule"
    left = state.max_steps - state.global_step
    done = f", {state.global_step:,} done before" if state.global_step else ""
    epochs = f"{state.num_train_epochs:g} epoch{'s' if state.num_train_epochs != 1 else ''}"
    # A stream whose length nobody knows has as many epochs as it takes.
    limit = f" ({epochs} at most)" if state.num_train_epochs < sys.maxsize else ""
    yield "training", f"{count_updates(left)}{limit}{done}"
    hardware = facts["hardware"]
    yield "hardware", f"{ranks} × {hardware.get('device_name', hardware['device'])}"
    if facts["parity"]:
        yield "parity check", describe_parity(facts["parity"])
    yield "files", str(args.output_dir)


def result_line(state: Any, *, seconds: float, first_step: int) -> str:
    """Describe in one line what was trained and with what result."""
    losses = [row["loss"] for row in state.log_history if kind_of(row) == "train"]
    held_out = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
    counted = [row for row in state.log_history if "target_tokens_seen" in row]
    trained = count_updates(state.global_step - first_step)
    text = f"Trained {trained} in {duration(seconds)}"
    if counted:
        trained_on = [row for row in counted if kind_of(row) == "train"]
        what = "targets" if trained_on and all(map(_counts_rows, trained_on)) else "target tokens"
        text += f", {quantity(counted[-1]['target_tokens_seen'])} {what} seen"
    shared = [row.get("shared_fraction", 0.0) for row in counted if kind_of(row) == "train"]
    if any(shared):
        text += f", {sum(shared) / len(shared):.1%} of input tokens shared"
    if losses:
        text += f"; loss {number(losses[0])} -> {number(losses[-1])}"
    if held_out:
        text += f", held out {number(held_out[-1])}"
    if state.global_step < state.max_steps:
        text += f". Stopped before update {state.max_steps:,}"
    return text + "."


def _which_model(args: Any, state: Any) -> str:
    """Name the update whose model is kept, where it is not the last one's."""
    best = state.best_global_step
    if not args.load_best_model_at_end or best in (None, state.global_step):
        return ""
    metric = args.metric_for_best_model.removeprefix("eval_").replace("_", " ")
    return f": that of update {best:,}, the best by {metric} ({number(state.best_metric)})"


def next_steps(args: Any, state: Any) -> Iterator[tuple[str, str]]:
    """List where the files are, and what to run next."""
    known = kept(state)
    if "verdict" in known:
        yield "batch size", known["verdict"]
    for name, count in known.get("events", {}).items():
        if name != VERDICT:
            times = "once" if count == 1 else f"{count} times"
            yield name.replace("_", " "), f"{times}; see the report"
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if checkpoint:
        yield "checkpoint", checkpoint
    if known.get("saves_model"):
        yield "model", f"{args.output_dir}, saved at the end of the run{_which_model(args, state)}"
    elif not checkpoint:
        yield "model", f"in memory; trainer.save_model() writes it to {args.output_dir}"
    if (RunFile(Path(args.output_dir)).directory / RUN_NAME).exists():
        yield "report", f"hf-gradacc report {args.output_dir}"
    if known.get("wandb_sync") and "wandb" in args.report_to:
        yield "W&B", f"wandb sync {' '.join(known['wandb_sync'])}"
