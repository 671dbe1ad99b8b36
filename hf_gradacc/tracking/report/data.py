"""Read a run's own files into what a report draws: tables, events, tiles, described settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_gradacc.errors import DataError
from hf_gradacc.safety.run_state import VERDICT
from hf_gradacc.text import count_updates, duration, quantity
from hf_gradacc.tracking.phases import PHASE_KEYS
from hf_gradacc.tracking.report.words import describe_settings, describe_time
from hf_gradacc.tracking.run_files import kind_of, read_run

__all__ = ["MOST_PLACES", "ReportRun", "Table", "load_runs", "make_table"]

TOKENS, UPDATES = "targets seen", "updates"
MOST_PLACES, FEWEST_PLACES = 600, 60
"""Drawn of a run: more would not be told apart, and the page would grow with the run."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one kind as a report draws them; for a long run, means over neighbouring rows.

    Attributes:
        first: ``[places]``, the update of each place, or the first of those it averages.
        last: ``[places]``, the last of them.
        x: ``[places]``, along the report's axis.
        columns: ``[places]`` for each key; NaN if no row has a finite value there.
    """

    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    x: Floats
    columns: dict[str, Floats]

    def column(self, key: str) -> Floats:
        """Return a key's values; NaN everywhere if it was never logged."""
        return self.columns.get(key, np.full(len(self.x), np.nan))

    def points(self, key: str) -> tuple[Floats, Floats]:
        """Return the places that have a value of a key, and the values."""
        values = self.column(key)
        known = ~np.isnan(values)
        return self.x[known], values[known]

    def band(self, low: str, high: str) -> Floats | None:
        """Return a band's x, lower and upper end, ``[3, places]``; None if it was not logged.

        An upper end that was not logged is infinite.
        """
        lower, upper = self.column(low), self.column(high)
        known = ~np.isnan(lower)
        upper = np.where(np.isnan(upper), np.inf, upper)
        return np.stack([self.x, lower, upper])[:, known] if known.any() else None

    def stack(self, keys: Sequence[str]) -> tuple[Floats, Floats]:
        """Stack the parts of a whole, at the places where all parts are known.

        Returns:
            The places, and ``[keys + 1, places]``: the edges between the parts from the ground up.
        """
        parts = np.array([self.column(key) for key in keys]).reshape(len(keys), len(self.x))
        known = ~np.isnan(parts).any(axis=0)
        x, parts = self.x[known], parts[:, known]
        if len(x) == 1:  # it stands for all updates before it, and a single place has no area
            x, parts = np.array([0.0, x[0]]), np.repeat(parts, 2, axis=1)
        return x, np.concatenate([np.zeros((1, len(x))), np.cumsum(parts, axis=0)])


def make_table(rows: Sequence[Mapping[str, Any]], x: Sequence[float], *, most: int) -> Table:
    """Turn log rows into columns; average neighbours until at most `most` places are left.

    A place of a single row holds that row's values unchanged.

    Args:
        rows: Log rows of one kind.
        x: Their places on the report's axis.
        most: Most places.
    """
    size = max(1, math.ceil(len(rows) / most))
    begins = np.arange(0, len(rows), size)
    ends = np.minimum(begins + size, len(rows)) - 1
    steps = np.array([row["step"] for row in rows], dtype=np.int64)
    keys = {key for row in rows for key, value in row.items() if isinstance(value, (int, float))}

    def average(values: Sequence[float]) -> Floats:
        padded = np.full(len(begins) * size, np.nan)
        padded[: len(rows)] = values
        groups = np.ma.masked_invalid(padded.reshape(len(begins), size))
        return np.asarray(groups.mean(axis=1).filled(np.nan), dtype=np.float64)

    return Table(
        first=steps[begins],
        last=steps[ends],
        x=average(x),
        columns={key: average([_to_float(row.get(key)) for row in rows]) for key in keys},
    )


def _to_float(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


@dataclass
class ReportRun:
    """One run as a report sees it."""

    name: str
    directory: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    axis: str = TOKENS
    most_places: int = MOST_PLACES
    _tokens_at: dict[int, float] = field(default_factory=dict)
    _by_kind: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _tables: dict[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            self._by_kind.setdefault(row["kind"], []).append(row)
            if "target_tokens_seen" in row:
                self._tokens_at[int(row["step"])] = float(row["target_tokens_seen"])
        known = np.array(sorted({0: 0.0, **self._tokens_at}.items()))
        self._tokens_by_step = np.ascontiguousarray(known.T)

    @property
    def knows_tokens(self) -> bool:
        """Whether the run logged target tokens; the stock Trainer does not."""
        return bool(self._tokens_at)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the rows of one kind: "train", "eval", "event" or "end"."""
        return self._by_kind.get(kind, [])

    def x_of(self, step: int) -> float:
        """Place an update on the report's axis; interpolate linearly between logged rows."""
        if self.axis == UPDATES:
            return float(step)
        return float(np.interp(step, *self._tokens_by_step))

    def table(self, kind: str) -> Table:
        """Return the rows of one kind as they are drawn, at most `most_places` of them."""
        if kind not in self._tables:
            rows = self.of_kind(kind)
            if kind == "eval":
                # One after training is of the model kept, which may be an earlier one: it would
                # end the curve with a jump that training never made. `last` still tells of it.
                rows = list({int(row["step"]): row for row in reversed(rows)}.values())[::-1]
            x = [self.x_of(int(row["step"])) for row in rows]
            self._tables[kind] = make_table(rows, x, most=self.most_places)
        return self._tables[kind]

    def points(self, key: str, *, kind: str = "train") -> list[tuple[float, float]]:
        """Return a key's finite values along the axis."""
        return [
            (self.x_of(int(row["step"])), float(row[key]))
            for row in self.of_kind(kind)
            if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
        ]

    def samples(self) -> list[tuple[int, dict[str, str]]]:
        """Return answers with the update they came after: the first look, and the last three."""
        looks = self.of_kind("samples")
        shown = looks if len(looks) <= 4 else [looks[0], *looks[-3:]]
        return [(look["step"], sample) for look in shown for sample in look["samples"]]

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """Return events and resumes, each with its place on the axis."""
        rows = [row for row in self.of_kind("event") if row.get("event") != VERDICT]
        for step in self.settings.get("resumed_at", []):
            text = f"the run was resumed from the checkpoint of update {step:,}"
            rows.append({"event": "resumed", "step": step, "text": text})
        rows.sort(key=lambda row: int(row["step"]))
        return [(self.x_of(int(row["step"])), row) for row in rows]

    def verdict(self) -> tuple[str, str] | None:
        """Return the noise scale's verdict on the batch, its word and its text, if there is one."""
        verdicts = [row for row in self.of_kind("event") if row.get("event") == VERDICT]
        return (str(verdicts[-1].get("word", "")), str(verdicts[-1]["text"])) if verdicts else None

    def phases(self) -> dict[str, float]:
        """Return the mean seconds per update of each phase; {} if they were not logged."""
        means = {phase: self.mean(key) for phase, key in PHASE_KEYS.items()}
        return {phase: mean for phase, mean in means.items() if mean is not None}

    def last(self, key: str, *, kind: str = "train") -> float | None:
        """Return a key's last value; None if it was never logged."""
        values = [row[key] for row in self.of_kind(kind) if row.get(key) is not None]
        return values[-1] if values else None

    def mean(self, key: str) -> float | None:
        """Average a key over the training rows; None if it was never logged."""
        logged = [row[key] for row in self.of_kind("train") if row.get(key) is not None]
        values = [value for value in logged if math.isfinite(value)]
        return math.fsum(values) / len(values) if values else None

    def tiles(self) -> list[tuple[str, str, str]]:
        """Return the numbers to read first: name, value, and the note below it."""
        losses = [value for _, value in self.points("loss")]
        perplexity = self.last("eval_perplexity", kind="eval")
        tokens_seen = self.last("target_tokens_seen", kind="end")
        if tokens_seen is None:  # it has not ended
            tokens_seen = self.last("target_tokens_seen")
        runtime = self.last("train_runtime", kind="end")
        found: list[tuple[str, float | None, str]] = [
            (
                "loss",
                losses[-1] if losses else None,
                f"from {quantity(losses[0])}" if losses else "",
            ),
            (
                "held-out loss",
                self.last("eval_loss", kind="eval"),
                f"perplexity {quantity(perplexity)}" if perplexity is not None else "",
            ),
            ("effective batch size", self.mean("effective_batch_size"), "sequences per update"),
            ("tokens per update", self.mean("tokens_per_update"), "targets, mean"),
            ("targets seen", tokens_seen, count_updates(self.updates)),
            ("throughput", self.mean("target_tokens_per_second"), "targets per second"),
            ("noise scale", self.last("gradient_noise_scale"), "targets"),
        ]
        tiles = [(name, quantity(value), note) for name, value, note in found if value is not None]
        padding = self.mean("padding_fraction")
        if padding is not None:
            tiles.append(("padding", f"{padding:.1%}", "of computed tokens"))
        shared = self.mean("shared_fraction")
        if shared:
            tiles.append(("shared prefixes", f"{shared:.1%}", "of input tokens, not computed"))
        phases = self.phases()
        if total := math.fsum(phases.values()):
            waiting = f"{phases.get('data', 0.0) / total:.1%}"
            tiles.append(("waiting for data", waiting, "of an update's time"))
        if runtime is not None:
            tiles.append(("training time", duration(runtime), "since the last start"))
        return tiles

    @property
    def updates(self) -> int:
        """Updates done, by the last row of the file."""
        return max((int(row["step"]) for row in self.rows if row["kind"] != "event"), default=0)

    def describe_run(self) -> list[str]:
        """Describe in sentences what was trained, how, and on what."""
        return list(
            describe_settings(self.settings, micro_batches=self.mean("micro_batches_per_update"))
        )

    def describe_time(self) -> list[str]:
        """Describe where the time of an update went; [] if it was not logged."""
        return list(describe_time(self.phases()))


def load_runs(directories: Sequence[Path]) -> list[ReportRun]:
    """Read runs, give them distinct names, and put them on one axis.

    The axis is target tokens seen, or updates as soon as one run did not log tokens.

    Raises:
        DataError: If a directory holds no run.
    """
    runs: list[ReportRun] = []
    for directory in directories:
        settings, rows = read_run(directory)
        if not any(kind_of(row) in ("train", "eval") for row in rows):
            raise DataError(f"{directory} has no row of training or evaluation yet.")
        name = str(settings.get("run_name") or directory.resolve().name)
        runs.append(ReportRun(name, directory, settings, rows))
    for rename in (lambda run: run.directory.resolve().name, lambda run: str(run.directory)):
        if len({run.name for run in runs}) < len(runs):
            for run in runs:
                run.name = rename(run)
    knows_tokens = all(run.knows_tokens for run in runs)
    for run in runs:
        run.axis = TOKENS if knows_tokens else UPDATES
        # A page with many runs must still open in a browser.
        run.most_places = max(FEWEST_PLACES, min(MOST_PLACES, 2 * MOST_PLACES // len(runs)))
    return runs
