"""The picture of a plan: lengths, padding of each way, and targets of each update."""

from __future__ import annotations

from pathlib import Path

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe_plan import RecipePlan

__all__ = ["draw_plan"]


def draw_plan(plan: RecipePlan, path: Path) -> None:
    """Draw the plan into a file whose ending decides its type.

    Raises:
        ConfigError: If matplotlib is not installed, or the ending is not one it writes.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")  # no display, no window
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError(
            "--png needs matplotlib: `pip install 'hf_gradacc[plot]'`, or leave --png out."
        ) from None
    figure, (lengths, ways) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    lengths.hist(plan.lengths, bins=40, color="#4477aa")
    lengths.set(title="Tokens in a row", xlabel="input tokens", ylabel="rows")
    if plan.budget is not None:
        lengths.axvline(plan.budget, color="#ee6677", label="token budget")
        lengths.legend()
    names = [way.name for way in plan.ways]
    shares = [100 * way.padding_fraction for way in plan.ways]
    colors = ["#228833" if way.chosen else "#bbbbbb" for way in plan.ways]
    bars = ways.barh(names, shares, color=colors)
    ways.bar_label(bars, fmt="%.1f%%", padding=3)
    ways.invert_yaxis()
    ways.margins(x=0.15)
    ways.set(title="Padding (green: this recipe)", xlabel="% of computed tokens")
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ConfigError(f"--png = {str(path)!r}: {error}") from None
    finally:
        pyplot.close(figure)
