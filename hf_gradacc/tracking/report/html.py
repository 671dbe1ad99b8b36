"""The report's page: one HTML file that needs nothing else, light or dark like the screen."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import UTC, datetime

from hf_gradacc.tracking.report.data import PANELS, Panel, ReportRun
from hf_gradacc.tracking.report.plots import Series, draw_chart
from hf_gradacc.tracking.run_files import LOG_NAME

__all__ = ["COLOURS", "panel_series", "render_page"]

COLOURS = ("#2a6fdb", "#d9622b", "#12877f", "#8a4fc4", "#b5860b", "#c63d6f", "#5b6b7b")
"""Told apart by colour-blind readers, and readable on both grounds."""


MOST_EVENTS = 200
"""Listed, and marked in each plot; a page about a run that skipped thousands must still open."""


STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --ink: #1d2327;
  --soft: #626b73; --line: #e4e5e2; --event: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181b; --card: #1d2125; --ink: #e9ecee;
  --soft: #9aa4ad; --line: #30363c; --event: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p, li { max-width: 76ch; } .soft { color: var(--soft); } small { color: var(--soft); }
.tiles, .panels { display: grid; gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); margin: 18px 0; }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 415px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.tile span, .tile small { display: block; font-size: 13px; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft);
  margin: 2px 0 4px; }
.legend i { display: inline-block; width: 18px; height: 0; border-top: 2.5px solid;
  margin: 0 6px 4px 0; vertical-align: middle; }
.legend i.dashed { border-top-style: dashed; }
.legend i.area { border-top-width: 10px; opacity: 0.6; margin-bottom: 2px; }
.verdict { border-left: 4px solid #2a6fdb; }
svg { width: 100%; max-width: 760px; height: auto; display: block; overflow: visible; }
svg .grid { stroke: var(--line); fill: none; } svg .axis { stroke: var(--soft); fill: none; }
svg .tick { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .band { opacity: 0.16; } svg .area { opacity: 0.6; }
svg .edge { fill: none; stroke-width: 1; }
svg .hover { fill: transparent; } svg .hover:hover { fill: var(--soft);
  fill-opacity: 0.35; }
svg .event path { stroke: var(--event); stroke-dasharray: 2 3; }
svg .event circle { fill: var(--event); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { font-variant-numeric: tabular-nums; } th { font-weight: 600; color: var(--soft); }
.events td:not(:last-child), .names th:first-child { white-space: nowrap; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); }
pre { white-space: pre-wrap; font-size: 12.5px; overflow-wrap: anywhere; }
"""


def render_page(runs: Sequence[ReportRun]) -> str:
    """Write the page for one run or several."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [_head(runs, title)]
    if len(runs) == 1:
        sections += [_tiles(runs[0]), _verdict(runs[0])]
    else:
        sections.append(_comparison(runs))
    sections += [
        _panels(runs),
        _events(runs),
        *(_settings(run, alone=len(runs) == 1) for run in runs),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} · hf_gradacc</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def panel_series(panel: Panel, runs: Sequence[ReportRun]) -> list[Series]:
    """Give a panel's lines: all of them for one run, the first (and evaluations) for several."""
    if panel.stacked:
        return _stack(panel, runs[0]) if len(runs) == 1 else []
    series, has_subject = [], False
    for number, run in enumerate(runs):
        for place, line in enumerate(panel.lines):
            if len(runs) > 1 and place > 0 and line.kind == "train":
                continue
            points = run.points(line.key, kind=line.kind)
            if not points:
                continue
            # A second line is context; without the first it has nothing to be the context of.
            has_subject = has_subject or place == 0 or line.kind == "eval"
            colour = COLOURS[(place if len(runs) == 1 else number) % len(COLOURS)]
            label = line.label if len(runs) == 1 else run.name
            if len(runs) > 1 and line.kind == "eval":
                label += f", {line.label}"
            band = run.band(line.band) if line.band and len(runs) == 1 else ()
            dots = line.kind == "eval" or len(points) == 1
            series.append(Series(label, colour, points, line.dashed, dots, band))
    return series if has_subject else []


def _stack(panel: Panel, run: ReportRun) -> list[Series]:
    """One area above the other; those that are empty everywhere are left out."""
    lines = [line for line in panel.lines if any(y for _, y in run.points(line.key))]
    floor, *edges = run.stack([line.key for line in lines])
    series = []
    for number, (line, edge) in enumerate(zip(lines, edges, strict=True)):
        if edge:
            series.append(Series(line.label, COLOURS[number], edge, floor=floor))
        floor = edge
    return series


def _head(runs: Sequence[ReportRun], title: str) -> str:
    when = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    open_ends = [run.name for run in runs if run.settings and not run.settings.get("finished")]
    state = " · not finished" if open_ends else ""
    if open_ends and len(runs) > 1:
        state += f": {html.escape(', '.join(open_ends))}"
    places = ", ".join(html.escape(str(run.directory)) for run in runs)
    return f'<h1>{html.escape(title)}</h1><div class="soft">{places} · written {when}{state}</div>'


def _tiles(run: ReportRun) -> str:
    tiles = "".join(
        f'<div class="card tile"><span>{name}</span><b>{value}</b><small>{note}</small></div>'
        for name, value, note in run.tiles()
    )
    return f'<div class="tiles">{tiles}</div>{_words(run)}'


def _words(run: ReportRun) -> str:
    paragraphs = [run.in_words(), run.time_in_words()]
    return "".join(f"<p>{' '.join(map(html.escape, said))}</p>" for said in paragraphs if said)


def _verdict(run: ReportRun) -> str:
    verdict = run.verdict()
    if verdict is None:
        return ""
    word, text = map(html.escape, verdict)
    title = "The batch size, judged" if word == "unclear" else f"The batch was {word}"
    return f'<div class="card verdict"><h3>{title}</h3><p>{text}</p></div>'


def _comparison(runs: Sequence[ReportRun]) -> str:
    columns = [{name: value for name, value, _ in run.tiles()} for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = ""
    for name in names:
        cells = "".join(f"<td>{column.get(name, '–')}</td>" for column in columns)
        body += f"<tr><th>{name}</th>{cells}</tr>"
    verdicts = [run.verdict() for run in runs]
    if any(verdicts):
        cells = "".join(f"<td>{html.escape(v[0]) if v else '–'}</td>" for v in verdicts)
        body += f"<tr><th>the batch was</th>{cells}</tr>"
    return (
        f'<div class="card scroll" style="margin-top:18px"><table class="names">'
        f"<tr><th></th>{head}</tr>{body}"
        "</table></div>"
    )


def _panels(runs: Sequence[ReportRun]) -> str:
    events = [
        (x, f"{run.name}, update {row['step']}: {row['text']}")
        for run in runs
        for x, row in run.events()
    ]
    cards = []
    for panel in PANELS:
        series = panel_series(panel, runs)
        if not series:
            continue
        chart = draw_chart(
            series,
            x_label=runs[0].axis,
            log_scale=panel.log_scale,
            from_zero=panel.from_zero,
            events=events[:MOST_EVENTS],
            alt=f"{panel.title} over {runs[0].axis}",
        )
        if len(runs) > 1:  # who is who stands once, above all panels
            dashed = [Series(line.label, "currentColor", (), line.dashed) for line in panel.lines]
            series = dashed if any(s.dashed for s in series) else []
        legend = _legend(series) if len(series) > 1 else ""
        unit = f" <small>{panel.unit}</small>" if panel.unit else ""
        cards.append(f'<div class="card"><h3>{panel.title}{unit}</h3>{legend}{chart}</div>')
    names = [
        Series(run.name, COLOURS[number % len(COLOURS)], ()) for number, run in enumerate(runs)
    ]
    return (
        f"<h2>Over {runs[0].axis}</h2>{_legend(names) if len(runs) > 1 else ''}"
        f'<div class="panels">{"".join(cards)}</div>'
    )


def _legend(series: Sequence[Series]) -> str:
    keys = "".join(
        f'<span><i class="{_look(s)}" style="border-color:{s.colour}"></i>'
        f"{html.escape(s.label)}</span>"
        for s in series
    )
    return f'<div class="legend">{keys}</div>'


def _look(series: Series) -> str:
    return "area" if series.floor else "dashed" if series.dashed else ""


def _events(runs: Sequence[ReportRun]) -> str:
    rows = [(run.name, row) for run in runs for _, row in run.events()]
    if not rows:
        return ""
    several = len(runs) > 1
    body = "".join(
        f"<tr>{f'<td>{html.escape(name)}</td>' if several else ''}<td>{int(row['step']):,}</td>"
        f"<td>{html.escape(str(row['event']).replace('_', ' '))}</td>"
        f"<td>{html.escape(str(row['text']))}</td></tr>"
        for name, row in rows[:MOST_EVENTS]
    )
    left_out = len(rows) - MOST_EVENTS
    more = f"<p>{left_out:,} more stand in {LOG_NAME}.</p>" if left_out > 0 else ""
    return (
        f'<h2>Events</h2><div class="card scroll"><table class="events"><tr>'
        f"{'<th>run</th>' if several else ''}<th>update</th><th>what</th><th></th></tr>"
        f"{body}</table>{more}</div>"
    )


def _settings(run: ReportRun, *, alone: bool) -> str:
    args = run.settings.get("training_arguments", {})
    if not args and alone:
        return ""
    words = ""
    if not alone:
        words = f"{_verdict(run)}{_words(run)}"
    listed = "\n".join(f"{key} = {value}" for key, value in sorted(args.items()))
    heading = "Settings" if alone else html.escape(run.name)
    return (
        f"<h2>{heading}</h2>{words}<details><summary>All training arguments</summary>"
        f"<pre>{html.escape(listed)}</pre></details>"
    )
