"""Figures of a page, as pure functions from results to matplotlib figures; None where there is nothing to draw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fewstep.report.results import Results, Row, Trajectories
from fewstep.report.table import finite, show, terminal_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "curves_figure",
    "health_figures",
    "health_series",
    "inked",
    "quality_figure",
    "rmse_figure",
    "styles",
    "terminal_table",
    "trajectories_figure",
]

# A page replaces this one colour by that of its text, so that a figure reads in light and in dark.
INK = "#1b1e21"
# Okabe and Ito's order, its light colours darkened: each has a contrast of at least 3 to white and to near-black.
PALETTE = ("#d55e00", "#0072b2", "#009e73", "#b97a00", "#c0679a", "#3d8fc4", "#8a6fc9")
# One more marker than colours: the pairs repeat only after 56 samplers.
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("<", "◀"), (">", "▶"), ("h", "⬢"))
WIDTH, HEIGHT = 4.8, 3.9
TICKS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
NOT_LOSSES = ("step", "images", "seconds", "skipped")


class Style(NamedTuple):
    """How a sampler looks everywhere on a page."""

    colour: str
    marker: str
    glyph: str


def styles(results: Results) -> dict[str, Style]:
    """A style for each sampler name, in order of appearance; teachers have the colour of the text and a star."""
    teachers = {row.name for row in results.rows if row.group == "teacher"}
    names = list(dict.fromkeys(row.name for row in results.rows))
    labels = [*(t.name for t in results.trajectories), *results.curves]
    names += [t.name for t in results.trajectories if _owner(t.name, names) is None]
    found: dict[str, Style] = {}
    k = 0
    for name in dict.fromkeys(names):
        if name in teachers or (name not in found and name.lower().startswith(("teacher", "converged"))):
            found[name] = Style(INK, "*", "★")
        else:
            found[name] = Style(PALETTE[k % len(PALETTE)], *MARKERS[k % len(MARKERS)])
            k += 1
    for label in labels:
        if (owner := _owner(label, names)) is not None:
            found.setdefault(label, found[owner])
    return found


def _owner(name: str, names: list[str]) -> str | None:
    """The row that a trajectory or a curve belongs to: "euler" for "euler, 4 evaluations", "SiD" for "sid"."""
    own = name.lower() + " "
    near = [n for n in names if own.startswith(n.lower()) and own[len(n)] in " ,(@:"]
    return max(near, key=len, default=None)


@contextmanager
def inked() -> Iterator[None]:
    """Text, ticks and frames in the colour that a page replaces; for making a figure and for writing it."""
    import matplotlib

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = dict.fromkeys(names, INK)
    settings |= {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**settings, "svg.hashsalt": "fewstep"}):
        yield


def plain(text: str) -> str:
    """Text that a figure shows as it is: no control characters, which no picture format can hold, and no formulas."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text).replace("$", r"\$")


def _axes(width: float = WIDTH, height: float = HEIGHT, rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])
    for axis in axes:
        axis.grid(color=INK, alpha=0.15, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(which="both", colors=INK, length=3)
    return figure, axes


def quality_metric(results: Results) -> str | None:
    """The metric that the first plot shows: the feature Fréchet distance that most rows have, or else any metric."""
    counts = Counter(k for row in results.rows for k, v in row.metrics.items() if finite(v) is not None)
    distances = {k: n for k, n in counts.items() if k.partition("@")[0] == "fd"} or counts
    return max(distances, key=lambda k: distances[k], default=None)


def quality_figure(results: Results) -> Figure | None:
    """The Fréchet distance per NFE of every sampler, with the lines of the real data and of the teacher."""
    key = quality_metric(results)
    if key is None:
        return None
    lines = []
    teachers = [row for row in results.rows if row.group == "teacher" and finite(row.metrics.get(key)) is not None]
    if teachers:
        teacher = max(teachers, key=lambda row: row.nfe)
        lines.append((teacher.metrics[key], f"teacher: {show(teacher.metrics[key])}", (0, (1, 2))))
    if finite(results.floor.get(key)) is not None:
        lines.append((results.floor[key], f"real data: {show(results.floor[key])}", (0, (5, 3))))
    points = [(row, row.metrics[key]) for row in results.rows if finite(row.metrics.get(key)) is not None]
    name, _, count = key.partition("@")
    label = "Fréchet distance" if name == "fd" else plain(name)
    label += f"  ({plain(count)} samples)" if count else ""
    values = [v for _, v in points] + [v for v, _, _ in lines]
    log = min(values) > 0 and max(values) > 6 * min(values)
    return _per_nfe(results, points, label, log=log, lines=lines)


def rmse_figure(results: Results) -> Figure | None:
    """The paired RMSE to the teacher's converged end point per NFE, on a logarithmic axis."""
    points = [(row, v) for row in results.rows if (v := finite(row.rmse)) is not None and v > 0]
    return _per_nfe(results, points, "RMSE to the converged teacher", log=True) if points else None


def _per_nfe(
    results: Results,
    points: list[tuple[Row, float]],
    label: str,
    *,
    log: bool,
    lines: Sequence[tuple[float, str, Any]] = (),
) -> Figure:
    with inked():
        figure, (axis,) = _axes()
        for value, text, dashes in lines:
            axis.axhline(value, color=INK, linestyle=dashes, linewidth=1.2, label=text)
        looks = styles(results)
        for name, look in looks.items():
            own = sorted((row.nfe, value) for row, value in points if row.name == name)
            if own:
                size = 10 if look.marker == "*" else 6
                axis.plot(
                    *zip(*own, strict=True), color=look.colour, marker=look.marker, ms=size, lw=1.6, label=plain(name)
                )
        _log_x(axis, sorted({row.nfe for row, _ in points}))
        if log:
            _log_y(axis, [v for _, v in points] + [v for v, _, _ in lines])
        else:
            axis.set_ylim(bottom=0) if min(v for _, v in points) >= 0 else None
        axis.set_xlabel("evaluations per picture (NFE)")
        axis.set_ylabel(label)
        figure.legend(
            loc="outside lower center", ncols=3, fontsize=9, frameon=False, handlelength=1.6, columnspacing=1.2
        )
    return figure


def _log_x(axis: Axes, counts: list[int]) -> None:
    """Every NFE that occurs is labelled, and round ones between them where there is room."""
    low, high = counts[0] / 1.2, counts[-1] * 1.2
    span = math.log(high / low)
    ticks = list(counts)
    for tick in TICKS:
        if low < tick < high and all(abs(math.log(tick / other)) > 0.07 * span for other in ticks):
            ticks.append(tick)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_xticks(sorted(ticks), [str(t) for t in sorted(ticks)])
    axis.set_xticks([], minor=True)


def _log_y(axis: Axes, values: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    ratio = high / low
    subs = (1.0,) if ratio > 3000 else (1.0, 2.0, 5.0) if ratio > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_yscale("log")
    margin = max(ratio**0.06, 1.1)
    axis.set_ylim(low / margin, high * margin)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def loss_curves(entries: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(step, loss) by key, for the keys "role/loss", or for every number where there is none."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for i, entry in enumerate(entries):
        for key, value in entry.items():
            if key not in NOT_LOSSES and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(str(key), []).append((entry.get("step", i), value))
    curves = {k: v for k, v in curves.items() if len(v) > 1}
    return {k: v for k, v in curves.items() if k.endswith("/loss")} or curves


def smooth(values: Sequence[float], window: float) -> list[float]:
    """An exponential moving average over about ``window`` values, without the bias of its start."""
    keep = 1 - 2 / (window + 1)
    total = mass = 0.0
    out = []
    for value in values:
        total, mass = keep * total + (1 - keep) * value, keep * mass + 1 - keep
        out.append(total / mass)
    return out


def curves_figure(entries: list[dict[str, Any]], colour: str = INK) -> Figure | None:
    """The losses of one training log: raw values faint, their moving average on top, one panel per role."""
    curves = loss_curves(entries)
    if not curves:
        return None
    with inked():
        figure, axes = _axes(height=0.7 + 1.7 * len(curves), rows=len(curves))
        for axis, (key, curve) in zip(axes, curves.items(), strict=True):
            steps, values = zip(*curve, strict=True)
            smoothed = smooth(values, max(3.0, len(values) / 20))
            # Thousands of points make a heavy file and no better picture; the average is taken before thinning.
            thin = slice(None, None, max(1, len(values) // 400))
            axis.plot(steps[thin], values[thin], color=colour, alpha=0.3, linewidth=0.8)
            axis.plot(steps[thin], smoothed[thin], color=colour, linewidth=1.8)
            if min(values) > 0:
                ordered = sorted(values)
                # One spike must not press the rest of a curve flat.
                top = max(ordered[int(0.995 * (len(ordered) - 1))], max(smoothed[thin]))
                _log_y(axis, [ordered[0], max(top, ordered[0] * 1.01)])
            axis.set_title(plain(key), loc="left")
        axes[-1].set_xlabel("step")
    return figure


VARIETY = ("variance", "distance", "nearest", "modes")
Series = dict[str, list[tuple[float, float]]]


class Health(NamedTuple):
    """A health curve: its heading, what it means, its lines, the steps of collapses, and whether its axis is log."""

    title: str
    caption: str
    series: Series
    ends: list[float]
    log: bool


def health_series(entries: Sequence[Mapping[str, Any]], least: int = 2) -> list[Health]:
    """Each health curve that the log holds, as numbers; docs/health.md explains them.

    ``entries`` are those of :func:`fewstep.train.health.history`, with the start at step 0. Lines of fewer than
    ``least`` points are left out.
    """
    directions = dict.fromkeys(k for e in entries for k in e if k.startswith("health/direction@"))
    losses = {k for e in entries for k in e if k.partition("/")[0].split("+")[0] == "fake"}
    denoising = sorted(k for k in losses if k.endswith("/denoising")) or sorted(k for k in losses if k == "fake/loss")
    logits = sorted({k for e in entries for k in e if k.rpartition("/")[2] in ("logit_real", "logit_fake")})
    # Without its floor the loss says no more than the curve of losses does.
    against = [*denoising, "health/fake_floor"] if any("health/fake_floor" in e for e in entries) else []
    asked = (
        (
            "Variety of the samples",
            "In units of the reference's; near 0 is a collapse.",
            [f"health/{k}" for k in VARIETY],
        ),
        ("Fake score's loss and its floor", "The floor is an estimate: the teacher's own loss.", against),
        ("Direction by noise level", "Mean |D_fake - D_teacher| of samples noised to sigma.", list(directions)),
        ("Logits", "Means of the discriminator over data (real) and samples (fake).", logits),
    )
    ends = [float(e["step"]) for e in entries if "collapsed" in e]
    found = []
    for title, caption, keys in asked:
        series = {k: points_of(entries, k) for k in keys}
        series = {k: points for k, points in series.items() if len(points) >= least}
        if set(series) - {"health/fake_floor"}:
            log = title != "Logits" and all(v > 0 for points in series.values() for _, v in points)
            told = f"{caption} Dotted: collapsed." if ends else caption
            found.append(Health(title, told, series, ends, log))
    return found


def health_figures(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Figure]]:
    """Heading, caption and figure of each of :func:`health_series`."""
    return [(h.title, h.caption, _health_figure(h.series, h.ends, log=h.log)) for h in health_series(entries)]


def points_of(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of a key, where it is a finite number."""
    values = ((float(e["step"]), finite(e.get(key))) for e in entries)
    return [(step, value) for step, value in values if value is not None]


def look_of(key: str, k: int) -> tuple[str, str, bool]:
    """Name, colour and whether it is dashed, of line ``k`` of a health curve."""
    floor = key == "health/fake_floor"
    name = "floor" if floor else key.rpartition("/")[2].replace("direction@", "sigma ")
    # Eight levels and seven colours: the lowest is dashed in the first one's.
    return name, INK if floor else PALETTE[k % len(PALETTE)], floor or k >= len(PALETTE)


def _health_figure(series: Series, ends: Sequence[float], *, log: bool) -> Figure:
    with inked():
        figure, (axis,) = _axes(height=3.2)
        for k, (key, points) in enumerate(series.items()):
            name, colour, dashed = look_of(key, k)
            dashes = "--" if dashed else "-"
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=1.5, label=plain(name))
        for step in ends:
            axis.axvline(step, color=INK, linestyle=":", linewidth=1.0)
        if log:
            axis.set_yscale("log")
        axis.set_xlabel("step")
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def principal_plane(paths: list[Trajectories], samples: int = 5) -> tuple[list[Tensor], list[float], float]:
    """Trajectories in the plane of the first two principal components of all their points together.

    Each state is first divided by sqrt(sigma^2 + s^2), where s is the spread of the end points: pure noise and finished
    pictures then have the same size, and the low-noise end is not lost in a dot.

    Returns:
        (T, n, 2) coordinates per sampler, the share of the variance of either component, and s.
    """
    n = min(samples, *(t.points.shape[1] for t in paths))
    ends = torch.cat([t.points[-1, :n].double() for t in paths])
    spread = float((ends - ends.mean(0)).square().mean().sqrt()) or 1.0
    scaled = []
    for t in paths:
        level = torch.tensor(t.levels, dtype=torch.float64)
        scaled.append(t.points[:, :n].double().cpu() / (level**2 + spread**2).sqrt()[:, None, None])
    rows = torch.cat([s.flatten(0, 1) for s in scaled])
    rows = rows - rows.mean(0)
    # The matrix of inner products is as small as the number of points, however many pixels a picture has.
    powers, vectors = torch.linalg.eigh(rows @ rows.T)
    powers, vectors = powers.clamp_min(0).flip(0), vectors.flip(1)
    flat = torch.zeros(len(rows), 2, dtype=torch.float64)
    for j in range(min(2, len(powers))):
        flat[:, j] = vectors[:, j] * powers[j].sqrt()
        flat[:, j] *= flat[flat[:, j].abs().argmax(), j].sign()
    shares = [float(p / powers.sum()) if powers.sum() > 0 else 0.0 for p in powers[:2]]
    parts = flat.split([len(s) * n for s in scaled])
    return [p.reshape(-1, n, 2) for p in parts], [*shares, 0.0][:2], spread


def trajectories_figure(results: Results) -> Figure | None:
    """Paths of a few samples from noise to picture, see :func:`principal_plane`; a colour per sampler."""
    paths = [t for t in results.trajectories if t.points.numel() and t.points.isfinite().all()]
    if not paths:
        return None
    planes, shares, _ = principal_plane(paths)
    looks = styles(results)
    with inked():
        figure, (axis,) = _axes(height=4.9)
        for t, plane in zip(paths, planes, strict=True):
            look = looks[t.name]
            broad = look.colour == INK
            for i in range(plane.shape[1]):
                x, y = plane[:, i, 0].tolist(), plane[:, i, 1].tolist()
                label = plain(t.name) if i == 0 else None
                wide = {"linewidth": 4.5, "alpha": 0.35} if broad else {"linewidth": 1.4}
                axis.plot(x, y, color=look.colour, marker=None if broad else ".", ms=3, zorder=2, **wide)  # type: ignore[arg-type]
                axis.plot(x[-1], y[-1], look.marker, color=look.colour, ms=10 if broad else 6, zorder=4, label=label)
        starts = planes[0][0]
        axis.plot(starts[:, 0], starts[:, 1], "o", mfc="none", mec=INK, ms=8, zorder=3, label="start (pure noise)")
        axis.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
        axis.set_ylabel(f"second component ({shares[1]:.0%})")
        axis.margins(0.08)
        axis.set_aspect("equal", adjustable="datalim")
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False, columnspacing=1.2)
    return figure
