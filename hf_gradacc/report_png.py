"""The report's plots as one picture, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_gradacc.errors import ConfigError
from hf_gradacc.report_data import PANELS, ReportRun
from hf_gradacc.report_html import panel_series
from hf_gradacc.report_words import quantity

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
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")
    for place, (panel, lines) in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, place + 1)
        for s in lines:
            xs, ys = zip(*s.points, strict=True)
            look: dict[str, Any] = {"color": s.colour, "linewidth": 1.7, "label": s.label}
            if s.floor:
                bottom = [y for _, y in s.floor]
                axes.fill_between(
                    xs, bottom, ys, color=s.colour, alpha=0.6, linewidth=0, label=s.label
                )
                continue
            axes.plot(
                xs, ys, "--" if s.dashed else "-", marker="o" if s.dots else None, ms=4, **look
            )
            if s.band:
                most = 4 * max(ys)  # an end at infinity must not stretch the axis
                x, low, high = zip(*[(x, a, min(b, most)) for x, a, b in s.band], strict=True)
                axes.fill_between(x, low, high, color=s.colour, alpha=0.16, linewidth=0)
        for at in events:
            axes.axvline(at, color=EVENT, linestyle=":", linewidth=1)
        if panel.log_scale:
            axes.set_yscale("log")
        elif panel.from_zero:
            axes.set_ylim(bottom=0)
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
        elif len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=90)
