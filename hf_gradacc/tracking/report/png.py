"""The report's plots as one picture, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_gradacc.errors import ConfigError
from hf_gradacc.text import quantity
from hf_gradacc.tracking.report.data import PANELS, ReportRun
from hf_gradacc.tracking.report.html import COLOURS, panel_series
from hf_gradacc.tracking.report.plots import log_ticks, thin_out

__all__ = ["draw_picture"]

GREY, LINE, EVENT = "#626b73", "#e4e5e2", "#b3261e"


def draw_picture(runs: Sequence[ReportRun], path: Path) -> None:
    """Draw all panels that have data into a PNG.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise ConfigError(
            f"png = {path} needs matplotlib, which is not installed: "
            "pip install 'hf_gradacc[plot]', or leave the picture out."
        ) from None
    drawn = [(panel, lines) for panel in PANELS if (lines := panel_series(panel, runs))]
    events = [x for run in runs for x, _ in run.events()]
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(6.2 * columns, 2.9 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    if len(runs) == 1:
        figure.suptitle(runs[0].name, x=0.01, ha="left", fontsize=15, fontweight="bold")
    for place, (panel, lines) in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, place + 1)
        for s in lines:
            xs, ys = zip(*thin_out(s.points), strict=True)
            look: dict[str, Any] = {"color": s.colour, "linewidth": 1.7, "label": s.label}
            if s.floor:
                bottom = [y for _, y in thin_out(s.floor)]
                axes.fill_between(
                    xs, bottom, ys, color=s.colour, alpha=0.6, linewidth=0, label=s.label
                )
                continue
            axes.plot(
                xs, ys, "--" if s.dashed else "-", marker="o" if s.dots else None, ms=4, **look
            )
            if s.band:
                most = 4 * max(ys)  # an end at infinity must not stretch the axis
                band = [(x, a, min(b, most)) for x, a, b in thin_out(s.band)]
                x, low, high = zip(*band, strict=True)
                axes.fill_between(x, low, high, color=s.colour, alpha=0.16, linewidth=0)
        for at in events:
            axes.axvline(at, color=EVENT, linestyle=":", linewidth=1)
        if panel.log_scale:
            values = [y for s in lines for _, y in s.points if y > 0]
            ticks = log_ticks(min(values), max(values))
            axes.set_yscale("log")
            axes.set_yticks(ticks)
            axes.set_ylim(ticks[0], ticks[-1])
            axes.minorticks_off()
        elif panel.from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        unit = f" ({panel.unit})" if panel.unit else ""
        axes.set_title(panel.title + unit, loc="left", fontsize=11)
        axes.set_xlabel(runs[0].axis, loc="right", fontsize=9, color=GREY)
        axes.xaxis.set_major_formatter(lambda value, _: quantity(value))
        axes.yaxis.set_major_formatter(lambda value, _: quantity(value))
        axes.tick_params(colors=GREY, labelsize=9, length=0)
        axes.grid(axis="y", color=LINE)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(GREY)
        if panel.stacked:  # a legend upon areas could not be read
            axes.set_ylim(top=1.25 * axes.get_ylim()[1])
            axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=len(lines))
        elif len(runs) == 1 and len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
    if len(runs) > 1:  # who is who stands once, above all panels
        names = [
            Line2D([], [], color=COLOURS[number % len(COLOURS)], label=run.name)
            for number, run in enumerate(runs)
        ]
        names.append(Line2D([], [], color=GREY, linestyle="--", marker="o", ms=4, label="held out"))
        figure.legend(
            handles=names,
            title=f"{len(runs)} runs compared",
            title_fontproperties={"size": 15, "weight": "bold"},
            alignment="left",
            loc="outside upper left",
            frameon=False,
            fontsize=9,
        )
    figure.savefig(path, dpi=90)
