"""The panels of a report, and the lines of each run in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_gradacc.tracking.phases import PHASE_KEYS
from hf_gradacc.tracking.report.data import ReportRun
from hf_gradacc.tracking.report.words import PHASE_LABELS

__all__ = ["COLOURS", "PANELS", "Line", "Panel", "Series", "choose_panels", "choose_series"]

COLOURS = ("#2a6fdb", "#d9622b", "#12877f", "#8a4fc4", "#b5860b", "#c63d6f", "#5b6b7b")
"""Told apart by colour-blind readers, and readable on a light and on a dark ground."""

Floats = npt.NDArray[np.float64]


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
    """One plot. If runs are compared, a panel shows only its first line for each.

    The lines of a stacked panel are parts of a whole; a comparison leaves it out.
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
        "nats per target",
        (Line("loss", "training"), Line("eval_loss", "held out", kind="eval", dashed=True)),
    ),
    Panel(
        "Quality",
        "fraction of held-out rows",
        (
            Line("eval_accuracy", "accuracy", kind="eval"),
            Line("eval_f1", "F1, macro", kind="eval", dashed=True),
            Line("eval_final_number", "final number", kind="eval"),
            Line("eval_exact_match", "exact match", kind="eval", dashed=True),
            Line("eval_rougeL", "ROUGE-L", kind="eval"),
            Line("eval_rewards/accuracies", "pairs ranked rightly", kind="eval"),
        ),
        from_zero=True,
    ),
    Panel("Learning rate", "", (Line("learning_rate", "learning rate"),), from_zero=True),
    Panel(
        "Tokens per update",
        "tokens, all ranks",
        (
            Line("tokens_per_update", "targets"),
            Line("input_tokens_per_update", "input tokens", dashed=True),
        ),
        from_zero=True,
    ),
    Panel(
        "Padding",
        "fraction of computed tokens",
        (
            Line("padding_fraction", "padding"),
            Line("shared_fraction", "shared, of input tokens", dashed=True),
        ),
        from_zero=True,
    ),
    Panel(
        "Throughput",
        "targets per second",
        (Line("target_tokens_per_second", "throughput"),),
        from_zero=True,
    ),
    Panel(
        "Where time goes",
        "seconds per update",
        tuple(Line(PHASE_KEYS[phase], label) for phase, label in PHASE_LABELS.items()),
        from_zero=True,
        stacked=True,
    ),
    Panel("Gradient norm", "", (Line("grad_norm", "gradient norm"),), from_zero=True),
    Panel(
        "Gradient noise scale",
        "targets",
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


@dataclass(frozen=True, eq=False)
class Series:
    """A line of a panel with the values of one run.

    Attributes:
        line: What it shows.
        run: The number of its run in the report.
        label: Its name in a legend.
        colour: ``#rrggbb``.
        x: ``[places]``, along the report's axis.
        y: ``[places]``; of an area its upper edge.
        floor: ``[places]``, the lower edge of an area; None makes it a line.
        band: ``[3, places]``: x, lower and upper end of a band around it; None without one.
    """

    line: Line
    run: int
    label: str
    colour: str
    x: Floats
    y: Floats
    floor: Floats | None = None
    band: Floats | None = None

    @property
    def has_dots(self) -> bool:
        """Whether each point is marked: evaluations are few, and one point makes no line."""
        return self.floor is None and (self.line.kind == "eval" or len(self.x) == 1)


def choose_panels(runs: Sequence[ReportRun]) -> tuple[list[tuple[Panel, list[Series]]], float]:
    """Return the panels that have data, each with its lines, and the end of their common axis."""
    drawn = [(panel, series) for panel in PANELS if (series := choose_series(panel, runs))]
    return drawn, max((float(s.x[-1]) for _, series in drawn for s in series), default=0.0)


def choose_series(panel: Panel, runs: Sequence[ReportRun]) -> list[Series]:
    """Return a panel's lines: all for one run, the first and evaluations for several.

    A panel is left out if no run logged its first line: the other lines only add to that.
    """
    if panel.stacked:
        return _stack(panel, runs[0]) if len(runs) == 1 else []
    several, has_subject = len(runs) > 1, False
    series = []
    for number, run in enumerate(runs):
        for place, line in enumerate(panel.lines):
            if several and place > 0 and line.kind == "train":
                continue
            x, y = run.table(line.kind).points(line.key)
            if panel.log_scale:
                x, y = x[y > 0], y[y > 0]
            if not len(x):
                continue
            has_subject = has_subject or place == 0 or line.kind == "eval"
            label = run.name if several else line.label
            if several and line.kind == "eval":
                label += f", {line.label}"
            band = run.table(line.kind).band(*line.band) if line.band and not several else None
            colour = COLOURS[(number if several else place) % len(COLOURS)]
            series.append(Series(line, number, label, colour, x, y, band=band))
    return series if has_subject else []


def _stack(panel: Panel, run: ReportRun) -> list[Series]:
    """Stack areas; those that are empty everywhere are left out."""
    table = run.table("train")
    lines = [line for line in panel.lines if np.any(table.points(line.key)[1])]
    x, edges = table.stack([line.key for line in lines])
    if not len(x):
        return []
    return [
        Series(line, 0, line.label, COLOURS[number], x, edges[number + 1], floor=edges[number])
        for number, line in enumerate(lines)
    ]
