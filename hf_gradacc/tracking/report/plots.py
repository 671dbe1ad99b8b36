"""One line plot as inline SVG: no script, no font, no file besides the page it stands in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TypeVar

from hf_gradacc.text import quantity

__all__ = ["Frame", "Series", "draw_chart", "log_ticks", "thin_out", "ticks_of"]

WIDTH, HEIGHT = 560, 250


LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 40


MOST_POINTS = 600


MOST_HOVERS = 60


BAND_REACH = 3.0
"""How far a band may stretch the axis, as a multiple of the line inside it."""


Points = Sequence[tuple[float, float]]


Point = TypeVar("Point", bound=tuple[float, ...])


@dataclass(frozen=True)
class Series:
    """One line: its points, and optionally a band ``(x, low, high)`` around it.

    With a `floor`, as many points long, it is the upper edge of an area, and its value is the
    height above the floor.
    """

    label: str
    colour: str
    points: Points
    dashed: bool = False
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = field(default_factory=tuple)
    floor: Points = ()


@dataclass(frozen=True)
class Frame:
    """Where values lie on the page."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log_scale: bool

    def x(self, value: float) -> float:
        """Place a value on the horizontal axis."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        """Place a value on the vertical axis; what lies outside ends at the edge."""
        value = min(max(value, self.y_low), self.y_high)
        if self.log_scale:
            share = math.log(value / self.y_low) / math.log(self.y_high / self.y_low)
        else:
            share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def draw_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    log_scale: bool = False,
    from_zero: bool = False,
    events: Sequence[tuple[float, str]] = (),
    alt: str = "",
) -> str:
    """Draw lines over one axis.

    Args:
        series: At least one with a point.
        x_label: What the horizontal axis counts.
        log_scale: Logarithmic vertical axis; values that are not positive are left out.
        from_zero: The vertical axis begins at 0.
        events: Places on the horizontal axis to mark, each with its text.
        alt: What a screen reader says.
    """
    shown = [
        replace(
            s,
            points=thin_out(_usable(s.points, log_scale)),
            floor=thin_out(s.floor),
            band=thin_out(s.band),
        )
        for s in series
    ]
    xs = [x for s in shown for x, _ in s.points]
    ys = [y for s in shown for _, y in s.points]
    low, high = min(ys), max(ys)
    ends = [end for s in shown for _, *both in s.band for end in both]
    low = min([low, *(end for end in ends if low / BAND_REACH <= end < low)])
    high = max([high, *(end for end in ends if high < end <= high * BAND_REACH)])
    if from_zero and low >= 0:
        low, high = 0.0, high or 1.0
    y_ticks = log_ticks(low, high) if log_scale else ticks_of(low, high)
    frame = Frame(0.0, max(*xs, 1e-9), y_ticks[0], y_ticks[-1], log_scale)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">']
    parts += _draw_axes(frame, ticks_of(frame.x_low, frame.x_high, inside=True), y_ticks, x_label)
    parts += [_draw_event(frame, x, text) for x, text in events]
    for s in shown:
        parts += _draw_series(frame, s)
    return "".join([*parts, "</svg>"])


def ticks_of(low: float, high: float, *, count: int = 5, inside: bool = False) -> list[float]:
    """Choose round values that span ``low`` to ``high``, or with `inside` lie between them.

    >>> ticks_of(0.3, 2.1)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    >>> ticks_of(0, 1_900, inside=True)
    [0, 500, 1000, 1500]
    """
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.999)
    # The millionth keeps rounding errors from adding a tick beyond a range that ends on one.
    slack = 1e-6 if inside else -1e-6
    first, last = (math.ceil, math.floor) if inside else (math.floor, math.ceil)
    start, end = first(low / step - slack), last(high / step + slack)
    whole = step >= 1
    return [round(i * step) if whole else round(i * step, 12) for i in range(start, end + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Choose powers of ten, and their halves where there are few, that span ``low`` to ``high``.

    >>> log_ticks(300, 20_000)
    [100, 1000, 10000, 100000]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    if last - first > 2:
        return [10**power if power >= 0 else 10.0**power for power in range(first, last + 1)]
    fine = [lead * 10.0**power for power in range(first, last + 1) for lead in (1, 2, 5)]
    start = max(i for i, value in enumerate(fine) if value <= low)
    end = min(i for i, value in enumerate(fine) if value >= high)
    return fine[start : max(end, start + 1) + 1]


def thin_out(points: Sequence[Point], *, most: int = MOST_POINTS) -> list[Point]:
    """Average neighbours until at most `most` points are left.

    Args:
        points: Tuples of one length: points ``(x, y)``, or places of a band ``(x, low, high)``.
        most: See above.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    # Not by `fsum`, which refuses an end of a band that is infinite.
    return [tuple(sum(column) / len(g) for column in zip(*g, strict=True)) for g in groups]  # type: ignore[misc]


def _usable(points: Points, log_scale: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y > 0 or not log_scale]


def _draw_axes(
    frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str
) -> list[str]:
    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{end}"/>')
        parts.append(_text("tick", LEFT - 8, y + 4, "end", quantity(value)))
    for value in x_ticks:
        parts.append(_text("tick", frame.x(value), base + 17, "middle", quantity(value)))
    parts.append(f'<path class="axis" d="M{LEFT} {base}H{end}"/>')
    parts.append(_text("tick", end, HEIGHT - 5, "end", x_label))
    return parts


def _text(kind: str, x: float, y: float, anchor: str, text: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _draw_event(frame: Frame, x: float, text: str) -> str:
    if not frame.x_low <= x <= frame.x_high:
        return ""
    at = frame.x(x)
    return (
        f'<g class="event"><path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
        f'<circle cx="{at:.1f}" cy="{TOP}" r="4"/><title>{escape(text)}</title></g>'
    )


def _draw_series(frame: Frame, s: Series) -> list[str]:
    parts = []
    if s.band:
        upper = [f"{frame.x(x):.1f} {frame.y(high):.1f}" for x, _, high in s.band]
        lower = [f"{frame.x(x):.1f} {frame.y(low):.1f}" for x, low, _ in reversed(s.band)]
        outline = "L".join([*upper, *lower])
        parts.append(f'<path class="band" fill="{s.colour}" d="M{outline}Z"/>')
    places = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in s.points]
    if s.floor:
        below = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in reversed(s.floor)]
        outline = "L".join([*places, *below])
        parts.append(f'<path class="area" fill="{s.colour}" d="M{outline}Z"/>')
    dash = ' stroke-dasharray="6 4"' if s.dashed else ""
    kind = "edge" if s.floor else "line"
    parts.append(f'<path class="{kind}" stroke="{s.colour}"{dash} d="M{"L".join(places)}"/>')
    step = max(1, len(s.points) // MOST_HOVERS)
    for index in range(len(s.points) - 1, -1, -step):
        x, y = s.points[index]
        look = f'class="dot" r="3.5" fill="{s.colour}"' if s.dots else 'class="hover" r="7"'
        value = y - s.floor[index][1] if s.floor else y
        note = escape(f"{s.label}: {quantity(value)} at {quantity(x)}")
        place = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}"'
        parts.append(f"<circle {look} {place}><title>{note}</title></circle>")
    return parts
