"""From a run's own files to what a report draws: series, events, tiles, and settings in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_gradacc.errors import DataError
from hf_gradacc.safety.run_state import VERDICT
from hf_gradacc.text import count_updates, duration, quantity
from hf_gradacc.tracking.phases import PHASE_KEYS
from hf_gradacc.tracking.report.words import PHASE_WORDS, describe_settings, describe_time
from hf_gradacc.tracking.run_files import kind_of, read_run

__all__ = ["PANELS", "Line", "Panel", "ReportRun", "load_runs"]

TOKENS, UPDATES = "target tokens seen", "updates"


@dataclass(frozen=True)
class Line:
    """One line of a panel: a key of the log, of rows of one kind."""

    key: str
    label: str
    kind: str = "train"
    dashed: bool = False
    band: tuple[str, str] | None = None


@dataclass(frozen=True)
class Panel:
    """One plot. The first line of a panel is the one that compared runs show.

    The lines of a stacked one are parts of a whole; compared runs do not show it.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    log_scale: bool = False
    from_zero: bool = False
    stacked: bool = False


PANELS = (
    Panel(
        "Loss",
        "nats per target token",
        (Line("loss", "training"), Line("eval_loss", "held out", kind="eval", dashed=True)),
    ),
    Panel("Learning rate", "", (Line("learning_rate", "learning rate"),), from_zero=True),
    Panel(
        "Tokens per update",
        "tokens, all ranks",
        (
            Line("tokens_per_update", "target tokens"),
            Line("input_tokens_per_update", "input tokens", dashed=True),
        ),
        from_zero=True,
    ),
    Panel(
        "Padding",
        "fraction of computed tokens",
        (Line("padding_fraction", "padding"),),
        from_zero=True,
    ),
    Panel(
        "Throughput",
        "target tokens per second",
        (Line("target_tokens_per_second", "throughput"),),
        from_zero=True,
    ),
    Panel(
        "Where time goes",
        "seconds per update",
        tuple(Line(PHASE_KEYS[phase], words) for phase, words in PHASE_WORDS.items()),
        from_zero=True,
        stacked=True,
    ),
    Panel("Gradient norm", "", (Line("grad_norm", "gradient norm"),), from_zero=True),
    Panel(
        "Gradient noise scale",
        "target tokens",
        (
            Line(
                "gradient_noise_scale",
                "noise scale, 90 % band",
                band=("gradient_noise_scale_low", "gradient_noise_scale_high"),
            ),
            Line("tokens_per_update", "tokens per update", dashed=True),
        ),
        log_scale=True,
    ),
    Panel("Model FLOPs utilization", "fraction of peak", (Line("mfu", "MFU"),), from_zero=True),
    Panel(
        "Peak memory",
        "bytes",
        (Line("peak_memory_bytes", "peak memory"),),
        from_zero=True,
    ),
)


@dataclass
class ReportRun:
    """One run as a report sees it."""

    name: str
    directory: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    axis: str = TOKENS
    _tokens_at: dict[int, float] = field(default_factory=dict)
    _by_kind: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            self._by_kind.setdefault(row["kind"], []).append(row)
            if "target_tokens_seen" in row:
                self._tokens_at[int(row["step"])] = float(row["target_tokens_seen"])

    @property
    def knows_tokens(self) -> bool:
        """Whether the run logged target tokens; the stock Trainer does not."""
        return bool(self._tokens_at)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Rows of one kind: "train", "eval", "event", "end"."""
        return self._by_kind.get(kind, [])

    def x_of(self, step: int) -> float:
        """Place an update on the report's axis, between logged rows by straight line."""
        if self.axis == UPDATES:
            return float(step)
        if step in self._tokens_at:
            return self._tokens_at[step]
        known = [(0, 0.0), *sorted(self._tokens_at.items())]
        before = max((pair for pair in known if pair[0] <= step), default=known[0])
        after = min((pair for pair in known if pair[0] >= step), default=None)
        if after is None or after[0] == before[0]:
            return before[1]
        share = (step - before[0]) / (after[0] - before[0])
        return before[1] + share * (after[1] - before[1])

    def points(self, key: str, *, kind: str = "train") -> list[tuple[float, float]]:
        """Give a key's finite values along the axis."""
        return [
            (self.x_of(int(row["step"])), float(row[key]))
            for row in self.of_kind(kind)
            if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
        ]

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """Give what happened beside the numbers, resumes too, each with its place on the axis."""
        rows = [row for row in self.of_kind("event") if row.get("event") != VERDICT]
        for step in self.settings.get("resumed_at", []):
            text = f"the run was resumed from the checkpoint of update {step:,}"
            rows.append({"event": "resumed", "step": step, "text": text})
        rows.sort(key=lambda row: int(row["step"]))
        return [(self.x_of(int(row["step"])), row) for row in rows]

    def verdict(self) -> tuple[str, str] | None:
        """Give the noise scale's verdict on the batch, its word and its text, if there is one."""
        said = [row for row in self.of_kind("event") if row.get("event") == VERDICT]
        return (str(said[-1].get("word", "")), str(said[-1]["text"])) if said else None

    def stack(self, keys: Sequence[str]) -> list[list[tuple[float, float]]]:
        """Give the edges between the parts of a whole, from the ground to the top."""
        rows = [
            row for row in self.of_kind("train") if all(row.get(key) is not None for key in keys)
        ]
        edges = [[(self.x_of(int(row["step"])), 0.0) for row in rows]]
        if len(rows) == 1:  # it tells of all updates before it, and a single place has no area
            rows, edges = [*rows, *rows], [[(0.0, 0.0), *edges[0]]]
        for key in keys:
            edges.append(
                [(x, y + float(row[key])) for (x, y), row in zip(edges[-1], rows, strict=True)]
            )
        return edges

    def phases(self) -> dict[str, float]:
        """Give the mean seconds per update of each phase, {} where they were not logged."""
        means = {phase: self.mean(key) for phase, key in PHASE_KEYS.items()}
        return {phase: mean for phase, mean in means.items() if mean is not None}

    def band(self, keys: tuple[str, str]) -> list[tuple[float, float, float]]:
        """Give a band's ends along the axis; an end not logged is infinite or zero."""
        low, high = keys
        return [
            (self.x_of(int(row["step"])), float(row[low]), float(row.get(high, math.inf)))
            for row in self.of_kind("train")
            if row.get(low) is not None
        ]

    def last(self, key: str, *, kind: str = "train") -> float | None:
        """Give a key's last value, None if it was never logged."""
        values = [row[key] for row in self.of_kind(kind) if row.get(key) is not None]
        return values[-1] if values else None

    def mean(self, key: str) -> float | None:
        """Average a key over the training rows, None if it was never logged."""
        logged = [row[key] for row in self.of_kind("train") if row.get(key) is not None]
        values = [value for value in logged if math.isfinite(value)]
        return math.fsum(values) / len(values) if values else None

    def tiles(self) -> list[tuple[str, str, str]]:
        """Give the numbers to read first: name, value, and what stands under it."""
        losses = [value for _, value in self.points("loss")]
        perplexity = self.last("eval_perplexity", kind="eval")
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
            ("tokens per update", self.mean("tokens_per_update"), "target tokens, mean"),
            ("target tokens seen", self.last("target_tokens_seen"), count_updates(self.updates)),
            ("throughput", self.mean("target_tokens_per_second"), "target tokens per second"),
            ("noise scale", self.last("gradient_noise_scale"), "target tokens"),
        ]
        tiles = [(name, quantity(value), note) for name, value, note in found if value is not None]
        padding = self.mean("padding_fraction")
        if padding is not None:
            tiles.append(("padding", f"{padding:.1%}", "of computed tokens"))
        phases = self.phases()
        if total := math.fsum(phases.values()):
            waiting = f"{phases.get('data', 0.0) / total:.1%}"
            tiles.append(("waiting for data", waiting, "of an update's time"))
        if runtime is not None:
            tiles.append(("training time", duration(runtime), "since the last start"))
        return tiles

    @property
    def updates(self) -> int:
        """Updates done, as far as the file tells."""
        return max((int(row["step"]) for row in self.rows if row["kind"] != "event"), default=0)

    def in_words(self) -> list[str]:
        """Say in sentences what was trained, how, and on what."""
        return list(
            describe_settings(self.settings, micro_batches=self.mean("micro_batches_per_update"))
        )

    def time_in_words(self) -> list[str]:
        """Say where the time of an update went, nothing if it was not logged."""
        return list(describe_time(self.phases()))


def load_runs(directories: Sequence[Path]) -> list[ReportRun]:
    """Read runs, name them apart, and put them on one axis.

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
    if not all(run.knows_tokens for run in runs):
        for run in runs:
            run.axis = UPDATES
    return runs
