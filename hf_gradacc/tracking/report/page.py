"""The report's page: one HTML file that needs nothing else, light or dark like the screen."""

from __future__ import annotations

import base64
import hashlib
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_gradacc.text import quantity
from hf_gradacc.tracking.report.data import ReportRun, Table
from hf_gradacc.tracking.report.panels import COLOURS, Panel, Series, choose_panels
from hf_gradacc.tracking.report.plots import Mark, Plot, draw_svg
from hf_gradacc.tracking.run_files import LOG_NAME

__all__ = ["MOST_EVENTS", "marks_of", "render_page"]

MOST_EVENTS = 200
"""Listed, and marked in each plot; a page about a run that skipped thousands must still open."""


@dataclass(frozen=True)
class _Key:
    """One entry of a legend; `look` is "", "dashed" or "area"."""

    label: str
    colour: str
    look: str = ""


@dataclass(frozen=True)
class _Card:
    """One panel of the page: its plot, and a legend if it has several lines."""

    panel: Panel
    plot: Plot
    keys: list[_Key]

    @property
    def svg(self) -> Markup:
        """The plot as markup, escaped already."""
        return Markup(self.plot.svg)


def render_page(runs: Sequence[ReportRun]) -> str:
    """Write the page for one run or several."""
    drawn, x_end = choose_panels(runs)
    cards = _draw_cards(drawn, runs, x_end=x_end)
    environment = Environment(
        loader=PackageLoader(__package__ or "", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("page.js").render()
    several = len(runs) > 1
    events = [(run.name, row) for run in runs for _, row in run.events()]
    return environment.get_template("page.html").render(
        title=f"{len(runs)} runs compared" if several else runs[0].name,
        runs=runs,
        several=several,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        unfinished=[run.name for run in runs if run.settings and not run.settings.get("finished")],
        comparison=_compare(runs) if several else {},
        cards=cards,
        names=[_Key(run.name, COLOURS[n % len(COLOURS)]) for n, run in enumerate(runs)],
        events=events[:MOST_EVENTS],
        events_left_out=max(0, len(events) - MOST_EVENTS),
        log_name=LOG_NAME,
        data=_hover_data(drawn, cards, runs),
        script=Markup(script),
        # With this policy the browser blocks the network and any other script.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def marks_of(runs: Sequence[ReportRun]) -> list[Mark]:
    """Return the marks of each plot: the events of the runs."""
    several = len(runs) > 1
    return [
        Mark(x, f"{run.name + ', ' if several else ''}update {row['step']:,}: {row['text']}")
        for run in runs
        for x, row in run.events()
    ][:MOST_EVENTS]


def _draw_cards(
    drawn: Sequence[tuple[Panel, list[Series]]], runs: Sequence[ReportRun], *, x_end: float
) -> list[_Card]:
    several, axis = len(runs) > 1, runs[0].axis
    marks = [
        Mark(mark.x, textwrap.shorten(mark.text, 200, placeholder=" …")) for mark in marks_of(runs)
    ]
    cards = []
    for panel, series in drawn:
        alt = f"{panel.title} over {axis}. {'; '.join(map(_describe_series, series))}."
        plot = draw_svg(panel, series, x_end=x_end, x_label=axis, marks=marks, alt=alt)
        keys = [_Key(s.label, s.colour, _look(s)) for s in series]
        if several:  # the names of runs are shown once, above all panels
            has_dashed = any(s.line.dashed for s in series)
            keys = [
                _Key(line.label, "currentColor", "dashed" if line.dashed else "")
                for line in dict.fromkeys(s.line for s in series)
                if has_dashed
            ]
        named = len(keys) > 1 or (len(panel.lines) > 1 and not several)
        cards.append(_Card(panel, plot, keys if named else []))
    return cards


def _look(series: Series) -> str:
    return "area" if series.floor is not None else "dashed" if series.line.dashed else ""


def _describe_series(series: Series) -> str:
    values = series.y if series.floor is None else series.y - series.floor
    return f"{series.label}: from {quantity(values[0])} to {quantity(values[-1])}"


def _compare(runs: Sequence[ReportRun]) -> dict[str, list[str]]:
    """Return the tiles of all runs as rows of one table."""
    columns = [{name: value for name, value, _ in run.tiles()} for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    table = {name: [column.get(name, "–") for column in columns] for name in names}
    verdicts = [run.verdict() for run in runs]
    if any(verdicts):
        table["the batch was"] = [verdict[0] if verdict else "–" for verdict in verdicts]
    return table


def _hover_data(
    drawn: Sequence[tuple[Panel, list[Series]]], cards: Sequence[_Card], runs: Sequence[ReportRun]
) -> dict[str, Any]:
    """Return the values that the page's script shows: columns of runs, and what panels use."""
    lines = [s for _, series in drawn for s in series]
    tables: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        tables.append({})
        for kind in ("train", "eval"):
            keys = {k for s in lines if (s.run, s.line.kind) == (number, kind) for k in _keys(s)}
            if keys:
                tables[-1][kind] = _to_columns(run.table(kind), sorted(keys))
    panels = [
        {
            **card.plot.frame,
            "lines": [
                {
                    "run": s.run,
                    "kind": s.line.kind,
                    "keys": _keys(s),
                    "label": s.label,
                    "colour": s.colour,
                    "stacked": s.floor is not None,
                }
                for s in series
            ],
        }
        for card, (_, series) in zip(cards, drawn, strict=True)
    ]
    return {"axis": runs[0].axis, "runs": tables, "panels": panels}


def _keys(series: Series) -> list[str]:
    return [series.line.key, *(series.line.band or () if series.band is not None else ())]


def _to_columns(table: Table, keys: Iterable[str]) -> dict[str, list[float | None]]:
    """Write a table for JSON. Rows keep their logged values; means have six digits."""
    is_row = bool((table.first == table.last).all())

    def plain(value: float) -> float | None:
        if not math.isfinite(value):
            return None
        value = value if is_row else float(f"{value:.6g}")
        return int(value) if value.is_integer() else value

    columns = {key: [plain(float(v)) for v in table.column(key)] for key in keys}
    return {
        "first": table.first.tolist(),
        "last": table.last.tolist(),
        "x": [plain(float(v)) for v in table.x],
        **columns,
    }
