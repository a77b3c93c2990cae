"""The page of ``fewstep show --geometry``: one HTML file that opens from disk, and asks nothing of any network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor

from fewstep.core.state import write_text
from fewstep.errors import InputError
from fewstep.report import geometry
from fewstep.report.geometry import Geometry
from fewstep.report.plots import INK, PALETTE, inked, plain
from fewstep.report.svg import inline_svg
from fewstep.report.table import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# A table with hundreds of rows is a picture that nobody reads and that is heavier than the page.
ROWS = 64
SHOWN = 6
VARIANCES = torch.logspace(-4, 2, 121, dtype=torch.float64)
# Errors below this are drawn here: rounding, and no help to anyone.
LEAST = 1e-8
# Named, because it looks like the letter o to some readers and tools.
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
BLUE, ORANGE = PALETTE[1], PALETTE[0]


def write_geometry(measured: Geometry, path: Path, *, title: str, facts: Mapping[str, str] | None = None) -> Path:
    """Writes the page, whole or not at all, and returns its path.

    Raises:
        InputError: the path does not end in .html, or the place cannot be written.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise InputError(f"the page of a geometry is HTML: --out must end in .html, got {path}")
    write_text(path, render(measured, title, facts or {}).encode("utf-8", "replace").decode())
    return path


def render(measured: Geometry, title: str, facts: Mapping[str, str]) -> str:
    """The page as text; parts that need a table are replaced by one sentence where the sampler is none."""
    folder = resources.files("fewstep.report")
    # The look is that of the results page, which holds it.
    style = folder.joinpath("page.html.j2").read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    table, heat = measured.table, None
    if table is not None and table.rows <= ROWS:
        with inked():
            figure = replace(table, name=plain(table.name)).plot()
        heat = inline_svg(figure, "table", f"Weights of {measured.name}, one line per step", natural=True)
    return environment.from_string(folder.joinpath("geometry.html.j2").read_text("utf-8")).render(
        title=title,
        style=Markup(style),
        facts=facts,
        measured=measured,
        shape=_shape(measured),
        steps=_steps(measured),
        shares=[_left(float(s)) for s in measured.projection.shares.mean(0)],
        errors=inline_svg(errors_figure(measured), "errors", f"Errors of {measured.name} after each step"),
        stability=None if table is None else _stability(measured),
        heat=heat,
        order=None if table is None else _order(measured),
        summary=summary(measured),
        converged=show(measured.converged),
        samples=measured.total.shape[1],
    )


def summary(measured: Geometry) -> list[str]:
    """What was found, in sentences: numbers are means over the trajectories."""
    curves, turns = measured.curves, geometry.turning(measured.curves)
    away, length = geometry.deviation(curves), geometry.distance(curves)[0]
    mean = away.mean(1)
    bend = float((away.max(0).values / length.clamp_min(torch.finfo(length.dtype).tiny)).mean())
    top, widest = (show(float(curves.levels[k])) for k in (0, int(mean.argmax())))
    said = [
        f"On its way from {SIGMA} {top} to the finished sample a trajectory leaves the straight line between them by "
        f"up to {show(100 * bend)} % of the line's length; the mean distance from it is largest at {SIGMA} {widest}, "
        f"with {show(float(mean.max()))}."
    ]
    total = turns.mean(1)
    if float(total.sum()) > 1e-6:
        passed = total.cumsum(0) / total.sum()
        low, high = (float(curves.between[int((passed < share).sum())]) for share in (0.75, 0.25))
        said.append(
            f"Its direction turns by {math.degrees(float(total.sum())):.0f}° in all, half of it between "
            f"{SIGMA} {show(high)} and {show(low)}."
        )
    end = show(float(measured.total[-1].mean()))
    if measured.noisy:
        said.append(
            f"{measured.name} ({measured.nfe} evaluations) adds noise, and ends {end} (RMSE) from where the "
            "generator's own trajectory does: that is a distance between two samples, not an error."
        )
        return said
    said.append(
        f"{measured.name} ({measured.nfe} evaluations) ends {end} (RMSE) from where the converged trajectory does."
    )
    if measured.local is not None and measured.table is not None:
        worst = max(_outer(measured), key=lambda k: float(measured.local[k].mean()))  # type: ignore[index]
        a, b = _ends(measured, worst)
        said.append(
            f"Its worst single step, even from exact points, is from {SIGMA} {show(a)} to {show(b)}: "
            f"{show(float(measured.local[worst].mean()))}."
        )
    return said


def _outer(measured: Geometry) -> list[int]:
    """Rows that finish a step; the others make stages inside one."""
    return [k for k in range(len(measured.levels)) if not measured.inner or not measured.inner[k + 1]]


def _ends(measured: Geometry, row: int) -> tuple[float, float]:
    """The levels between which the step leads that ``row`` finishes."""
    start = row
    while measured.inner and measured.inner[start]:
        start -= 1
    first = measured.table.start if measured.table is not None else math.nan
    return (float(measured.levels[start - 1]) if start else first), float(measured.levels[row])


def _left(share: float) -> str:
    """A share that is nearly 1, as what it lacks."""
    return "all, to rounding" if 1 - share < 1e-13 else f"all but {show(100 * (1 - share))} %"


def _axes(rows: int = 1, columns: int = 1, width: float = 4.8, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(color=INK, alpha=0.15, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(which="both", colors=INK, length=3)
    return figure, axes


def _bundle(axis: Axes, levels: Tensor, values: Tensor, colour: str = BLUE) -> None:
    """A few curves faint, the middle 80 % as a band, the mean strong; noise falls from left to right."""
    x = levels.tolist()
    low, high = values.quantile(0.1, 1).tolist(), values.quantile(0.9, 1).tolist()
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    for i in range(min(SHOWN, values.shape[1])):
        axis.plot(x, values[:, i].tolist(), color=INK, alpha=0.3, linewidth=0.7)
    axis.plot(x, values.mean(1).tolist(), color=colour, linewidth=2)
    _log_x(axis)
    axis.set_xlim(x[0] * 1.1, x[-1] / 1.1)
    axis.set_xlabel(f"noise level {SIGMA}")


def _log_y(axis: Axes) -> None:
    """A logarithmic axis between whole powers of ten, so that there are at least two of them to read."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))
    _powers(axis.yaxis)


def _log_x(axis: Axes) -> None:
    axis.set_xscale("log")
    _powers(axis.xaxis)


def _powers(axis: Axis) -> None:
    """Powers of ten as plain numbers: formulas take most of a page's time, and minor ticks say nothing more."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def distance_figure(measured: Geometry) -> Figure:
    """Distance to the finished sample by level, beside the level itself."""
    curves = measured.curves
    with inked():
        figure, (axis,) = _axes()
        found = geometry.distance(curves)[:-1].clamp_min(LEAST)
        _bundle(axis, curves.levels[:-1], found)
        x = curves.levels[:-1].tolist()
        axis.plot(x, x, color=INK, linewidth=1.1, linestyle=(0, (1, 2)))
        axis.set_yscale("log")
        _powers(axis.yaxis)
        axis.set_ylabel("distance to the finished sample")
    return figure


def deviation_figure(measured: Geometry) -> Figure:
    """Distance from the straight line between start and end, by level."""
    with inked():
        figure, (axis,) = _axes()
        _bundle(axis, measured.curves.levels[:-1], geometry.deviation(measured.curves)[:-1])
        axis.set_ylim(bottom=0)
        axis.set_ylabel("distance from the straight line")
    return figure


def curvature_figure(measured: Geometry) -> Figure:
    """Curvature by level, logarithmic where there is any."""
    found = geometry.curvature(measured.curves)
    with inked():
        figure, (axis,) = _axes()
        if float(found.max()) > LEAST:
            # One level without a turn must not stretch the axis over all powers of ten.
            positive = found[found > 0]
            found = found.clamp_min(float(positive.quantile(0.001)) if positive.numel() < 1 << 24 else LEAST)
            axis.set_yscale("log")
            _powers(axis.yaxis)
        _bundle(axis, measured.curves.between, found)
        axis.set_ylabel("curvature (1 / distance)")
    return figure


def turning_figure(measured: Geometry) -> Figure:
    """Turn of the direction by level, in degrees for each factor of e in the level."""
    curves = measured.curves
    with inked():
        figure, (axis,) = _axes()
        per = (curves.levels[:-2] / curves.levels[1:-1]).log()[:, None]
        _bundle(axis, curves.between, torch.rad2deg(geometry.turning(curves) / per))
        axis.set_ylim(bottom=0)
        axis.set_ylabel(f"turn in degrees, per factor e in {SIGMA}")
    return figure


def projection_figure(measured: Geometry) -> Figure:
    """The mean trajectory and a few single ones in their own three coordinates, as two views."""
    found = measured.projection.coordinates
    with inked():
        figure, (side, front) = _axes(columns=2)
        for axis, i, j in ((side, 0, 1), (front, 1, 2)):
            for k in range(min(SHOWN, found.shape[1])):
                axis.plot(found[:, k, i].tolist(), found[:, k, j].tolist(), color=INK, alpha=0.3, linewidth=0.7)
            mean = found.mean(1)
            axis.plot(mean[:, i].tolist(), mean[:, j].tolist(), color=BLUE, linewidth=2)
            axis.plot(float(mean[-1, i]), float(mean[-1, j]), "o", color=BLUE, ms=6)
            axis.plot(float(mean[0, i]), float(mean[0, j]), "o", mfc="none", mec=INK, ms=8)
        reach = float(found[..., 0].max())
        # Most of the bend lies where little noise is left: a linear axis would press it into its end.
        side.set_xscale("symlog", linthresh=max(0.01 * reach, LEAST), linscale=0.5)
        _powers(side.xaxis)
        side.set_xlim(1.25 * reach, -0.004 * reach)
        side.set_xlabel("along the straight line from end to start")
        side.set_ylabel("first component of the rest")
        front.set_xlabel("first component of the rest")
        front.set_ylabel("second component")
    return figure


def errors_figure(measured: Geometry) -> Figure:
    """Local and accumulated errors after each step, the mean over trajectories; zeros are not drawn."""
    steps, levels = _outer(measured), measured.levels.tolist()
    with inked():
        figure, (axis,) = _axes(width=6.4, height=3.8)
        lines = [("the whole run so far", measured.total, BLUE, "o")]
        if measured.local is not None:
            lines.append(("this step alone", measured.local, ORANGE, "s"))
        for label, values, colour, marker in lines:
            mean = values.mean(1)
            own = [(i + 1, float(mean[k])) for i, k in enumerate(steps) if float(mean[k]) > LEAST]
            if own:
                axis.plot(*zip(*own, strict=True), color=colour, marker=marker, ms=5, linewidth=1.7, label=label)
        if measured.converged > LEAST:
            label = f"converged to {show(measured.converged)}"
            axis.axhline(measured.converged, color=INK, linestyle=(0, (1, 2)), linewidth=1.1, label=label)
        _log_y(axis)
        every = max(1, math.ceil(len(steps) / 12))
        ticks = [i for i in range(len(steps)) if (len(steps) - 1 - i) % every == 0]
        axis.set_xticks([i + 1 for i in ticks], [f"{i + 1}\n{SIGMA} {levels[steps[i]]:.2g}" for i in ticks], fontsize=9)
        axis.set_xlabel("step, and the noise level it reaches")
        axis.set_ylabel("RMSE to the converged trajectory")
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def stability_figure(ratio: Tensor) -> Figure:
    """``ratio`` (V,) found over exact standard deviation of :data:`VARIANCES`: too much and too little apart."""
    with inked():
        figure, (axis,) = _axes(width=6.4, height=3.6)
        error = ratio - 1
        for sign, label, colour, dashes in ((1, "too much", ORANGE, "-"), (-1, "too little", BLUE, (0, (4, 2)))):
            part = torch.where(error * sign > 0, error.abs().clamp_min(LEAST), math.nan)
            if part.isfinite().any():
                axis.plot(VARIANCES.tolist(), part.tolist(), color=colour, linestyle=dashes, linewidth=2, label=label)
        _log_x(axis)
        _log_y(axis)
        axis.set_xlabel("variance of the Gaussian (data units squared)")
        axis.set_ylabel("relative error of the result's spread")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _shape(measured: Geometry) -> list[dict[str, Any]]:
    """The five figures of the trajectories' shape, each with heading and caption."""
    drawn = (
        (
            "distance",
            distance_figure,
            "Distance to the finished sample",
            "The dotted line is the noise level itself: far from the data a point is as far away as it is noisy.",
        ),
        (
            "deviation",
            deviation_figure,
            "Deviation from the straight line",
            "Between start and end; 0 everywhere would be a trajectory that one step follows.",
        ),
        (
            "curvature",
            curvature_figure,
            "Curvature",
            "How fast the direction turns per length of the way: one over the radius of the bend.",
        ),
        (
            "turning",
            turning_figure,
            "Turning",
            "The angle between the directions at neighbouring levels: where it is large, steps should be short in the "
            "logarithm of the level.",
        ),
    )
    found = []
    for kind, draw, heading, caption in drawn:
        label = f"{heading} by noise level, mean of {measured.total.shape[1]} trajectories"
        found.append({"heading": heading, "caption": caption, "svg": inline_svg(draw(measured), kind, label)})
    label = "Trajectories seen from the side and from the front, in coordinates of their own"
    found.append({"heading": "", "caption": "", "svg": inline_svg(projection_figure(measured), "views", label)})
    return found


def _steps(measured: Geometry) -> list[tuple[str, ...]]:
    """The numbers of the errors' figure, a line per step; none where there are too many."""
    if len(_outer(measured)) > ROWS:
        return []
    rows: list[tuple[str, ...]] = []
    for i, k in enumerate(_outer(measured)):
        a, b = _ends(measured, k)
        local = "" if measured.local is None else show(float(measured.local[k].mean()))
        rows.append((str(i + 1), show(a) or "-", show(b), local, show(float(measured.total[k].mean()))))
    return rows


def _stability(measured: Geometry) -> dict[str, Any]:
    assert measured.table is not None
    ratio = geometry.spread(measured.table, VARIANCES)
    end = ratio[-1].nan_to_num(1.0)
    away = int((end - 1).abs().argmax())
    peak = int(ratio.nan_to_num(0.0).argmax())
    row, column = divmod(peak, ratio.shape[1])
    label = f"Relative error of the spread by variance, at most {show(float((end - 1).abs().max()))}"
    return {
        "svg": inline_svg(stability_figure(end), "stability", label),
        "ratio": show(float(end[away])),
        "variance": show(float(VARIANCES[away])),
        "wider": float(ratio[row, column]) > 1.005,
        "peak": show(float(ratio[row, column])),
        "level": show(float(measured.table.levels[row])),
        "at": show(float(VARIANCES[column])),
    }


def _order(measured: Geometry) -> dict[str, Any]:
    """Measured orders by kind of grid, or the sentence that says why there are none."""
    assert measured.table is not None
    if measured.noisy:
        return {"none": "The sampler adds noise: the order of accuracy is that of a sampler without."}
    if "solver" not in measured.table.meta:
        return {"none": "Fitted: belongs to one grid. No named solver made the table, so that it has no order."}
    found = geometry.orders(measured.table)
    return {"none": "", "rows": [(k, f"{v:.2f}" if math.isfinite(v) else "not measurable") for k, v in found.items()]}
