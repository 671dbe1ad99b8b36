"""The run's own files: `gradacc_log.jsonl`, one line per log row or event, and `gradacc_run.json`.

They need no service and no network. Reports are made from them, and they are what is left when a
tracker was unreachable. A run that was killed and resumed leaves the file of a run that was not:
on resume, lines after the checkpoint's update are cut away.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_gradacc.errors import DataError

__all__ = [
    "LOG_NAME",
    "RUN_NAME",
    "RunFile",
    "is_training_row",
    "kind_of",
    "read_log",
    "read_run",
    "read_settings",
    "to_json",
]

logger = logging.get_logger(__name__)


LOG_NAME = "gradacc_log.jsonl"
RUN_NAME = "gradacc_run.json"


class RunFile:
    """Write the two files of a run in its output directory.

    Args:
        directory: The run's `output_dir`; made if it is not there.

    >>> import tempfile
    >>> run_file = RunFile(Path(tempfile.mkdtemp()))
    >>> run_file.start(step=0)
    >>> run_file.append({"kind": "train", "step": 1, "loss": 2.5})
    >>> read_log(run_file.log_path)
    [{'kind': 'train', 'step': 1, 'loss': 2.5}]
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log_path = directory / LOG_NAME
        self.run_path = directory / RUN_NAME

    def start(self, *, step: int, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """Begin a run, or continue one after update `step`.

        Args:
            step: Updates already done: 0 for a fresh run, whose predecessor's file is kept
                beside it as ``gradacc_log.previous.jsonl``.
            history: `TrainerState.log_history` of the checkpoint; the log is rebuilt from it
                where the file is missing, as after a resume in another directory.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if step == 0:
            if self.log_path.exists():
                self.log_path.replace(self.log_path.with_suffix(".previous.jsonl"))
            self.log_path.touch()
            return
        rows = self.read_or_set_aside() or []
        # The closing row of a run that is now going on would not be there without the stop.
        rows = [row for row in rows if row.get("step", 0) <= step and row.get("kind") != "end"]
        past = (row for row in history if row.get("step", 0) <= step)
        rows, num_lost = _with_history(rows, past)
        if num_lost and self.log_path.exists():
            logger.warning(
                f"{num_lost:,} rows were missing from {self.log_path} and come from the "
                f"checkpoint. Events beside them, such as a recovery, may be missing for good."
            )
        self._replace(self.log_path, "".join(_to_line(row) for row in rows))

    def read_or_set_aside(self) -> list[dict[str, Any]] | None:
        """Read the log. A damaged one is only renamed: it is no reason not to train."""
        if not self.log_path.exists():
            return None
        try:
            return read_log(self.log_path)
        except (DataError, OSError) as error:
            aside = self.log_path.with_suffix(".damaged.jsonl")
            self.log_path.replace(aside)
            logger.warning(f"{error} It is kept as {aside.name}; rows come from the checkpoint.")
            return None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line and hand it to the operating system, so that a kill loses nothing.

        Raises:
            OSError: If it cannot be written; the file then ends where it did before.
        """
        line = _to_line(row).encode()
        with self.log_path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                written = file.write(line)
                if written < len(line):  # the disk took a part; the rest tells what is wrong
                    file.write(line[written:])
            except OSError:
                file.truncate(before)
                raise

    def flush(self) -> None:
        """Wait until the rows are on the disk, so that a power cut loses none of them."""
        with contextlib.suppress(OSError), self.log_path.open("ab") as file:
            os.fsync(file.fileno())

    def update_run(self, facts: Mapping[str, Any]) -> None:
        """Merge `facts` into `gradacc_run.json`."""
        merged = {**read_settings(self.directory), **to_json(facts)}
        self._replace(self.run_path, json.dumps(merged, indent=2, default=str) + "\n")

    def _replace(self, path: Path, text: str) -> None:
        # A rename is atomic, so a kill leaves the old file or the new one, never half of each.
        partial = path.with_suffix(path.suffix + ".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read_log(path: Path, *, skips_damage: bool = False) -> list[dict[str, Any]]:
    """Read a log file; a last line cut short by a kill is left out.

    Args:
        path: The file.
        skips_damage: Leave out other lines that are no rows, too, with a warning.

    Raises:
        DataError: If any other line is not JSON.
    """
    rows = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append({key: _from_json(value) for key, value in json.loads(line).items()})
        except (ValueError, AttributeError, RecursionError) as error:
            if number == len(lines):
                break
            what = f"{path}, line {number} is not a JSON object ({error})"
            if not skips_damage:
                raise DataError(f"{what}: delete that line.") from None
            logger.warning(f"{what}, and is left out.")
    return rows


def read_settings(directory: Path) -> dict[str, Any]:
    """Read `gradacc_run.json`; {} if there is none, or a warning if it is damaged."""
    path = directory / RUN_NAME
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        found = error
    if isinstance(found, dict):
        return found
    why = found if isinstance(found, Exception) else "no JSON object"
    logger.warning(f"{path} is damaged ({why}) and is left out.")
    return {}


def read_run(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read what a run left: its settings and its log rows.

    Of a log that is damaged, the lines that can be read are taken, with a warning. A directory of
    the stock Trainer has neither file; its newest `trainer_state.json` then gives the rows, so that
    both can be compared in one report.

    Raises:
        DataError: If there is neither.
    """
    log_path = directory / LOG_NAME
    settings = read_settings(directory)
    rows = read_log(log_path, skips_damage=True) if log_path.is_file() else []
    if rows:
        return settings, rows
    paths = [*directory.glob("trainer_state.json"), *directory.glob("*/trainer_state.json")]
    states = [state for path in paths if (state := _read_state(path)) is not None]
    if not states and log_path.is_file():
        return settings, []
    if not states:
        raise DataError(
            f"{directory} holds no {LOG_NAME} and no trainer_state.json that can be read: give the "
            f"output_dir of a training run."
        )
    newest = max(states, key=_global_step)
    return settings, [{"kind": kind_of(row), **row} for row in newest["log_history"]]


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    rows = state.get("log_history") if isinstance(state, dict) else None
    is_state = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return state if is_state else None


def _with_history(
    rows: list[dict[str, Any]], history: Iterable[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    """Add the rows that a checkpoint's history has and the file lacks; return how many."""
    present = {(row.get("kind"), row.get("step", 0)) for row in rows}
    known = [{"kind": kind_of(row), **row} for row in history]
    lost = [
        row
        for row in known
        if row["kind"] != "end" and (row["kind"], row.get("step", 0)) not in present
    ]
    return sorted([*rows, *lost], key=lambda row: row.get("step", 0)), len(lost)


def kind_of(logs: Mapping[str, Any]) -> str:
    """Return what a log row is about: "train", "eval", "end" (the run's totals) or "other".

    >>> kind_of({"loss": 2.5, "learning_rate": 1e-3}), kind_of({"eval_loss": 2.5, "epoch": 1.0})
    ('train', 'eval')
    """
    if any(key.startswith("eval_") for key in logs):
        return "eval"
    if "train_runtime" in logs:
        return "end"
    return "train" if is_training_row(logs) else "other"


def is_training_row(logs: Mapping[str, Any]) -> bool:
    """Return whether the training loop itself wrote a log row, about its last updates.

    The loop always logs the learning rate beside the loss. Somebody's own ``log({"loss": ...})``
    has none, and belongs to no updates.

    >>> is_training_row({"loss": 2.5, "learning_rate": 1e-3}), is_training_row({"loss": 2.5})
    (True, False)
    """
    return "loss" in logs and "learning_rate" in logs


def _global_step(state: Mapping[str, Any]) -> int:
    step = state.get("global_step", 0)
    return int(step) if isinstance(step, int) else 0


def _to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(to_json(row), default=str, allow_nan=False) + "\n"


def to_json(value: Any) -> Any:
    """JSON knows no NaN, and other tools choke on Python's; it becomes the string "nan"."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()  # a scalar of numpy or torch
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
