"""Charts of a run's page as SVG text, written within milliseconds.

A run that is training draws its own page: matplotlib takes half a second for a figure, which is more than the page may
cost, so these few lines of SVG stand in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

from fewstep.report.table import show

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 26
# Points that a curve keeps: more than there are pixels beside each other help nobody.
MOST = 300
# Positive values that span more than this factor are drawn on a logarithmic axis.
SPAN = 8.0
# This share of the values at either end may lie outside: one spike must not press the rest of a curve flat.
OUTLIERS = 0.005


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (step, value), by step.
        colour: any CSS colour.
        raw: values that ``points`` are the average of, drawn faintly behind them.
        dashed: whether the line is.
    """

    name: str
    points: Points
    colour: str
    raw: Points = ()
    dashed: bool = False


class Mark(NamedTuple):
    """A vertical line at a step; ``ill`` ones have the colour of bad news."""

    step: float
    said: str
    ill: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over steps.

    Attributes:
        title: heading.
        curves: at least one of them with points.
        caption: what healthy ones look like.
        marks: vertical lines.
        log: whether the axis is logarithmic; None decides by the values.
        zero: whether a linear axis begins at 0.
        unit: of the values, for the legend.
    """

    title: str
    curves: Sequence[Curve]
    caption: str = ""
    marks: Sequence[Mark] = ()
    log: bool | None = None
    zero: bool = False
    unit: str = ""

    def svg(self) -> Markup:
        """The chart as one ``<svg>`` element, in the colour of the text around it and without ids."""
        return draw(self)

    def legend(self) -> list[tuple[Curve, str]]:
        """The curves and their newest values."""
        return [(c, f"{show(c.points[-1][1]) if c.points[-1][1] else 0}{self.unit}") for c in self.curves if c.points]


def thin(points: Points, most: int = MOST) -> list[tuple[float, float]]:
    """At most about ``most`` points: the lowest and the highest of each run of neighbours, so that spikes stay."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def limits(curves: Sequence[Curve], *, log: bool | None, zero: bool) -> tuple[float, float, bool]:
    """Lowest and highest value of the axis, and whether it is logarithmic.

    Averages are inside as a whole; of the raw values the share :data:`OUTLIERS` at either end may be outside.
    """
    raw = sorted(v for c in curves for _, v in c.raw)
    own = [v for c in curves for _, v in c.points]
    cut = int(OUTLIERS * len(raw))
    values = own + raw[cut : len(raw) - cut]
    low, high = min(values), max(values)
    asked = low > 0 and high > SPAN * low if log is None else log
    if asked and low > 0:
        ratio = max(high / low, 1.2)
        return low / ratio**0.06, high * ratio**0.06, True
    low = min(low, 0.0) if zero else low
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low if zero and low == 0 else low - room, high + room, False


def steps_of(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round values in the range, of which it has at least two."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.75)
    first = math.ceil(low / size - 1e-9)
    return [k * size for k in range(first, math.floor(high / size + 1e-9) + 1)]


def log_steps(low: float, high: float) -> list[float]:
    """Round values for a logarithmic axis: powers of ten, and numbers between them where there are few of those."""
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        # Read from text, because 6 times 0.1 is a little more than 0.6.
        found = [v for p in powers for d in digits if low <= (v := float(f"{d}e{p}")) <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return steps_of(low, high, 4)


def short(value: float) -> str:
    """A number for an axis: 20000 is 20k, 0.00025 is 2.5e-4, and rounding leaves no tail of digits."""
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * factor or (abs(value) >= factor and unit != "k"):
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def draw(chart: Chart) -> Markup:
    """See :meth:`Chart.svg`."""
    curves = [c for c in chart.curves if c.points or c.raw]
    low, high, log = limits(curves, log=chart.log, zero=chart.zero)
    steps = [s for c in curves for s, _ in (*c.points, *c.raw)]
    # All charts of a run that was not cut begin at 0, so that what lies above each other belongs together.
    first, last = (0.0 if min(steps) <= max(steps) / 4 else min(steps)), max(max(steps), min(steps) + 1)
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return (step - first) / (last - first) * across

    def y(value: float) -> float:
        # Far outside is as good as outside: what is clipped needs no exact place.
        share = math.log(max(value, low / 1e3) / low) / math.log(high / low) if log else (value - low) / (high - low)
        return (1 - min(max(share, -1.0), 2.0)) * down

    out = []
    for value in log_steps(low, high) if log else steps_of(low, high):
        at = TOP + y(value)
        out.append(f'<path d="M{LEFT} {at:.1f}h{across}" class="rule"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at + 4.2:.1f}" text-anchor="end">{short(value)}</text>')
    for step in steps_of(first, last):
        at = LEFT + x(step)
        side = "end" if at > WIDTH - RIGHT - 12 else "middle"
        out.append(f'<path d="M{at:.1f} {HEIGHT - BOTTOM}v4" class="tick"/>')
        out.append(f'<text x="{at:.1f}" y="{HEIGHT - 7}" text-anchor="{side}">{short(step)}</text>')
    # An inner picture clips what lies outside the axes.
    out.append(f'<svg x="{LEFT}" y="{TOP}" width="{across}" height="{down}" overflow="hidden">')
    for mark in chart.marks:
        if first <= mark.step <= last:
            kind = "mark ill" if mark.ill else "mark"
            out.append(
                f'<path d="M{x(mark.step):.1f} 0v{down}" class="{kind}"><title>{escape(mark.said)}</title></path>'
            )
    for curve in curves:
        if curve.raw:
            out.append(_line(thin(curve.raw), x, y, f'class="raw" stroke="{escape(curve.colour)}"'))
    for curve in curves:
        kind = ("curve dashed" if curve.dashed else "curve") + " dot" * (len(curve.points) == 1)
        out.append(_line(thin(curve.points), x, y, f'class="{kind}" stroke="{escape(curve.colour)}"'))
    out.append("</svg>")
    ends = ", ".join(f"{c.name} ends at {show(c.points[-1][1])}" for c in curves if c.points)
    label = escape(f"{chart.title} by step, {short(first)} to {short(last)}. {ends}")
    body = "".join(out)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart" role="img" aria-label="{label}">{body}</svg>')


def _line(points: Points, x: Callable[[float], float], y: Callable[[float], float], attributes: str) -> str:
    """A line, or a dot where there is one point."""
    places = [f"{x(s):.1f} {y(v):.1f}" for s, v in points]
    if len(places) == 1:
        places = [places[0], places[0]]
    return f'<path d="M{"L".join(places)}" fill="none" {attributes}/>' if places else ""
