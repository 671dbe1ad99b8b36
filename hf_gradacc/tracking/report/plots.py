"""The plots of a report, by matplotlib: the same panels as SVG for its page and as one PNG.

Nothing here uses `pyplot`, and settings apply only while a plot is drawn, so the caller's own
figures and style stay as they are.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_gradacc.safety.output_files import picture_type
from hf_gradacc.text import quantity
from hf_gradacc.tracking.report.data import ReportRun
from hf_gradacc.tracking.report.panels import COLOURS, Panel, Series, choose_panels

__all__ = ["Mark", "Plot", "choose_ticks", "draw_panel", "draw_picture", "draw_svg"]

WIDTH, HEIGHT = 560, 236
"""Of a panel in points, which are pixels of the page."""
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 12, 42
"""From the edges of a panel on the page to its axes, so that all panels' axes align."""
BAND_REACH = 3.0
"""How far a band may stretch the axis, as a multiple of the line inside it."""
DOTS_PER_INCH = 108

INK, SOFT, RULE, EVENT = "#1d2327", "#626b73", "#e4e5e2", "#b3261e"
_ON_PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", RULE: "var(--line)", EVENT: "var(--event)"}
"""Colours that the page changes with the screen, from light to dark."""

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": SOFT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "font.size": 12,
    "grid.color": RULE,
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0.0,
    "legend.columnspacing": 1.4,
    "legend.frameon": False,
    "legend.handlelength": 2.0,
    "legend.labelcolor": SOFT,
    "lines.dashed_pattern": (3.6, 2.0),
    "lines.linewidth": 1.9,
    "lines.markersize": 5.5,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "text.parse_math": False,  # a $ in a run's name does not begin a formula
    "xtick.bottom": False,
    "xtick.color": SOFT,
    "xtick.major.pad": 6,
    "ytick.color": SOFT,
    "ytick.left": False,
    "ytick.major.pad": 6,
    "svg.fonttype": "none",
}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mark:
    """A place on the horizontal axis where something happened, and what."""

    x: float
    text: str


@dataclass(frozen=True)
class Plot:
    """One panel as the page shows it.

    Attributes:
        svg: An ``<svg>`` element. It needs the page's colours ``--ink``, ``--soft``, ``--line``
            and ``--event``.
        frame: Where values are in it, for a script: the axes' ``box`` (left, top, right, bottom),
            the values at its ends (``x``, ``y``) and whether the vertical axis is logarithmic.
    """

    svg: str
    frame: dict[str, Any]


@contextmanager
def _in_style(*, salt: str = "") -> Iterator[None]:
    """Use the report's style inside the context, and restore the caller's after it.

    Args:
        salt: Goes into the identifiers of an SVG, which are then the same each time it is drawn,
            and differ from those of other plots in one page.
    """
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": salt}]):
        yield


def draw_panel(
    axes: Axes,
    panel: Panel,
    series: Sequence[Series],
    *,
    x_end: float,
    x_label: str,
    marks: Sequence[Mark] = (),
) -> None:
    """Draw one panel's lines, areas, bands, marks and axes; no title and no legend.

    Args:
        axes: Where.
        panel: What the lines are of.
        series: At least one with a point.
        x_end: Where the horizontal axis ends; it begins at 0.
        x_label: What it counts.
        marks: What to mark on it; a mark beyond its end is left out.
    """
    ticks = choose_ticks(*_limits(panel, series), log_scale=panel.log_scale)
    if panel.log_scale:
        axes.set_yscale("log")
    axes.set_yticks(ticks)
    axes.set_yticks([], minor=True)
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_xlim(0, x_end or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: quantity(float(f"{value:.6g}"))))
    axes.set_xlabel(x_label, loc="right")
    for s in series:
        _draw_series(axes, s)
    for number, mark in enumerate(marks):
        if 0 <= mark.x <= x_end:
            axes.add_line(_draw_mark(axes, mark, gid=f"{_MARK}{number}"))


def choose_ticks(low: float, high: float, *, log_scale: bool = False) -> Floats:
    """Choose round values of which the first and the last enclose `low` and `high`.

    >>> choose_ticks(0.3, 2.1).tolist(), choose_ticks(300, 20_000, log_scale=True).tolist()
    ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [100.0, 1000.0, 10000.0, 100000.0])
    """
    if log_scale:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
        leads = (1.0, 2.0, 5.0) if last - first < 4 else (1.0,)
        values = np.outer(10.0 ** np.arange(first, last + 1), leads).ravel()
    else:
        if math.isclose(low, high, rel_tol=1e-9):
            half = (abs(low) or 1.0) / 2
            low, high = low - half, high + half
        values = np.asarray(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high))
    slack = 1e-9 * (high - low)  # a tick may differ from its value by a rounding error
    begin, end = values[values <= low + slack].max(), values[values >= high - slack].min()
    if begin == end:  # there is one value, on a tick of the logarithmic axis
        end = values[values > high].min()
    return values[(begin <= values) & (values <= end)]


def draw_svg(
    panel: Panel,
    series: Sequence[Series],
    *,
    x_end: float,
    x_label: str,
    marks: Sequence[Mark] = (),
    alt: str = "",
) -> Plot:
    """Draw one panel for the page; see `draw_panel`.

    Args:
        panel: What the lines are of.
        series: At least one with a point.
        x_end: Where the horizontal axis ends.
        x_label: What it counts.
        marks: What to mark on it.
        alt: Text for screen readers.
    """
    with _in_style(salt=panel.title):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, frameon=False)
        across, up = (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, across, up), facecolor="none")
        draw_panel(axes, panel, series, x_end=x_end, x_label=x_label, marks=marks)
        text = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=none)
    frame = {
        "box": [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
        "x": [float(end) for end in axes.get_xlim()],
        "y": [float(end) for end in axes.get_ylim()],
        "log": panel.log_scale,
    }
    return Plot(_for_page(text.getvalue(), marks=marks, alt=alt), frame)


def draw_picture(runs: Sequence[ReportRun], path: Path, *, marks: Sequence[Mark] = ()) -> None:
    """Draw all panels that have data into one picture, two beside each other; see `draw_panel`."""
    drawn, x_end = choose_panels(runs)
    columns = min(2, len(drawn)) or 1
    rows = -(-len(drawn) // columns)
    several = len(runs) > 1
    with _in_style():
        figure = Figure(
            figsize=(WIDTH / 72 * columns, (HEIGHT + 42) / 72 * rows + (1.0 if several else 0.5)),
            layout=ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.1, rect=(0.008, 0.004, 0.98, 0.99)),
        )
        for place, (panel, series) in enumerate(drawn):
            axes = figure.add_subplot(rows, columns, place + 1)
            draw_panel(axes, panel, series, x_end=x_end, x_label=runs[0].axis, marks=marks)
            # A single line needs its name where another might have been drawn, as of quality.
            has_legend = max(len(series), len(panel.lines)) > 1 and not several
            title = axes.set_title(panel.title, pad=26 if has_legend else 10)
            axes.annotate(
                panel.unit, (1, 0), (7, 0), title, "offset points", color=SOFT, va="bottom"
            )
            if has_legend:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=len(series))
        if several:
            _name_runs(figure, runs)
        else:
            figure.suptitle(runs[0].name, x=0.012, ha="left", fontsize=18, fontweight="bold")
        figure.savefig(path, format=picture_type(path), dpi=DOTS_PER_INCH)


def _limits(panel: Panel, series: Sequence[Series]) -> tuple[float, float]:
    """Return the lowest and highest value that the vertical axis must show."""
    values = np.concatenate([s.y for s in series])
    low, high = float(values.min()), float(values.max())
    ends = np.concatenate(
        [[low, high], *(s.band[1:].ravel() for s in series if s.band is not None)]
    )
    within = ends[(low / BAND_REACH <= ends) & (ends <= high * BAND_REACH)]
    low, high = min(low, *within), max(high, *within)
    return (0.0, high or 1.0) if panel.from_zero and low >= 0 else (low, high)


def _draw_series(axes: Axes, s: Series) -> None:
    if s.floor is not None:
        axes.fill_between(s.x, s.floor, s.y, color=s.colour, alpha=0.6, lw=0, label=s.label)
        # Only its edge makes a thin area visible.
        axes.plot(s.x, s.y, color=s.colour, linewidth=0.8, clip_on=False)
        return
    axes.plot(
        s.x,
        s.y,
        "--" if s.line.dashed else "-",
        color=s.colour,
        label=s.label,
        marker="o" if s.has_dots else None,
        clip_on=False,
    )
    if s.band is not None:
        x, lower, upper = s.band
        ends = axes.get_ylim()  # infinity cannot be drawn
        axes.fill_between(x, lower.clip(*ends), upper.clip(*ends), color=s.colour, alpha=0.16, lw=0)


def _draw_mark(axes: Axes, mark: Mark, *, gid: str) -> Line2D:
    return Line2D(
        [mark.x, mark.x],
        [0, 1],
        transform=axes.get_xaxis_transform(),
        color=EVENT,
        linestyle=(0, (1.5, 2.5)),
        linewidth=1.0,
        marker="o",
        markersize=7.0,
        markevery=[1],
        clip_on=False,
        gid=gid,
    )


def _name_runs(figure: Figure, runs: Sequence[ReportRun]) -> None:
    """Show the names of the runs once, above all panels."""
    names = [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], label=run.name)
        for number, run in enumerate(runs)
    ]
    names.append(Line2D([], [], color=SOFT, linestyle="--", marker="o", label="held out"))
    legend = figure.legend(
        handles=names,
        title=f"{len(runs)} runs compared",
        title_fontproperties={"size": 18, "weight": "bold"},
        alignment="left",
        borderaxespad=1.2,
        loc="outside upper left",
        ncols=min(len(names), 5),
    )
    legend.get_title().set_color(INK)


_MARK = "mark-"
"""Begins the identifiers of marks in matplotlib's file."""


def _for_page(svg: str, *, marks: Sequence[Mark], alt: str) -> str:
    """Turn matplotlib's SVG file into an element of the page, with its colours and `marks`.

    XML namespaces (HTML needs none), unused identifiers and fonts (the page sets them) are removed.
    Each mark becomes ``<g class="event">`` with its text as ``<title>``.
    """
    root = ElementTree.fromstring(svg)
    referred = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        found = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        name = found.get("id", "")
        if name not in referred:
            found.pop("id", None)
        if element.tag == "text":
            found.pop("transform", None)
            found["style"] = re.sub(r"font-family:[^;]*;", "", found["style"])
        if "d" in found:
            found["d"] = _shorten(found["d"])
        element.attrib = found
        element.text, element.tail = (element.text or "").strip() or None, None
        if name.startswith(_MARK):
            found["class"] = "event"
            text = marks[int(name.removeprefix(_MARK))].text
            ElementTree.SubElement(element, "title").text = text
    for parent in list(root.iter()):
        for child in list(parent):
            is_empty = child.tag in ("defs", "g") and len(child) == 0
            if is_empty or child.tag in ("metadata", "style"):
                parent.remove(child)
    for mark in root.iterfind(".//g[@class='event']"):
        for part in mark.iter():
            part.attrib.pop("style", None)
    root.attrib = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": alt}
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in _ON_PAGE.items():
        text = text.replace(colour, variable)
    return text


def _shorten(path: str) -> str:
    """Write a path in tenths of a pixel and without needless spaces.

    >>> _shorten("M 56.25 212.4 \\nL 61.288889 112.1 \\n")
    'M56.2 212.4L61.3 112.1'
    """
    rounded = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}", path)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", rounded).strip()
