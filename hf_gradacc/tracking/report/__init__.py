"""A report on one run or several, from their own files and without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_gradacc.errors import ConfigError
from hf_gradacc.safety.output_files import check_drawing, check_output
from hf_gradacc.tracking.report.data import ReportRun, load_runs

__all__ = ["build_report"]


def build_report(runs: Sequence[Path], *, html: Path, png: Path | None = None) -> list[ReportRun]:
    """Write a self-contained HTML page about runs, and if asked for a picture of its plots.

    Args:
        runs: Output directories. Those of the stock Trainer are understood too; then the plots
            go over updates, since it does not count target tokens.
        html: File to write the page to; its directory is made.
        png: File to write the picture to; its ending decides the type.

    Returns:
        The runs that were read, in the order given.

    Raises:
        ConfigError: If no run is given, or a file cannot be written or drawn.
        DataError: If a directory holds no run, or a run has no row yet.
    """
    # matplotlib takes long to import, and training without a report does not need it.
    from hf_gradacc.tracking.report.page import marks_of, render_page
    from hf_gradacc.tracking.report.plots import draw_picture

    if not runs:
        raise ConfigError("runs is empty: give at least one output directory.")
    check_output(html, option="--html")
    if png is not None:
        check_drawing(png, option="--png")
    loaded = load_runs([Path(run) for run in runs])
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(render_page(loaded), "utf-8")
    if png is not None:
        png.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(loaded, png, marks=marks_of(loaded))
    return loaded
