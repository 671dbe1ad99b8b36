"""The run's own files: `gradacc_log.jsonl`, one line per log row or event, and `gradacc_run.json`.

They need no service and no network. Reports are made from them, and they are what is left when a
tracker was unreachable. A run that was killed and resumed leaves the file of a run that was not:
on resume, lines after the checkpoint's update are cut away.
"""

from __future__ import annotations

import json
import math
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
        rows = self.read_or_set_aside()
        if rows is None:
            rows = [{"kind": kind_of(row), **row} for row in history]
        # The closing row of a run that is now going on would not be there without the stop.
        rows = [row for row in rows if row.get("step", 0) <= step and row.get("kind") != "end"]
        self._replace(self.log_path, "".join(_to_line(row) for row in rows))

    def read_or_set_aside(self) -> list[dict[str, Any]] | None:
        """Read the log. A damaged one is only renamed: it is no reason not to train."""
        if not self.log_path.exists():
            return None
        try:
            return read_log(self.log_path)
        except DataError as error:
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

    def update_run(self, facts: Mapping[str, Any]) -> None:
        """Merge `facts` into `gradacc_run.json`."""
        merged = {**_read_settings(self.run_path), **to_json(facts)}
        self._replace(self.run_path, json.dumps(merged, indent=2, default=str) + "\n")

    def _replace(self, path: Path, text: str) -> None:
        # A rename is atomic, so a kill leaves the old file or the new one, never half of each.
        partial = path.with_suffix(path.suffix + ".partial")
        try:
            partial.write_text(text, "utf-8")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a log file; a last line cut short by a kill is left out.

    Raises:
        DataError: If any other line is not JSON.
    """
    rows = []
    lines = path.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append({key: _from_json(value) for key, value in json.loads(line).items()})
        except (ValueError, AttributeError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number} is not a JSON object ({error}): delete that line."
            ) from None
    return rows


def read_run(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read what a run left: its settings and its log rows.

    A directory of the stock Trainer has neither file; its newest `trainer_state.json` then gives
    the rows, so that both can be compared in one report.

    Raises:
        DataError: If there is neither.
    """
    log_path, run_path = directory / LOG_NAME, directory / RUN_NAME
    settings = _read_settings(run_path)
    if log_path.exists():
        return settings, read_log(log_path)
    states = [*directory.glob("trainer_state.json"), *directory.glob("*/trainer_state.json")]
    if not states:
        raise DataError(
            f"{directory} holds no {LOG_NAME} and no trainer_state.json: give the output_dir of "
            f"a training run."
        )
    newest = max((_read_settings(path) for path in states), key=_global_step)
    history = newest.get("log_history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    return settings, [{"kind": kind_of(row), **row} for row in rows]


def _read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object; one that is damaged is left out: it is no reason not to go on."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        logger.warning(f"{path} cannot be read ({type(error).__name__}), and is left out.")
        return {}
    return found if isinstance(found, dict) else {}


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
