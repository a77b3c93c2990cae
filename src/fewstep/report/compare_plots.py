"""Figures of a comparison: Frechet distance over seconds and over evaluations, with the rows that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fewstep.report.compare import Entry
from fewstep.report.plots import INK, MARKERS, PALETTE, Style, inked, plain
from fewstep.report.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.8, 4.0


def looks_of(entries: Sequence[Entry]) -> dict[str, Style]:
    """Colour and marker of each generator, in order of appearance."""
    names = dict.fromkeys(entry.model for entry in entries)
    return {name: Style(PALETTE[k % len(PALETTE)], *MARKERS[k % len(MARKERS)]) for k, name in enumerate(names)}


def pareto_figure(entries: Sequence[Entry], verdict: Verdict) -> Figure:
    """Frechet distance over seconds per picture; the line joins the rows that nothing beats in both."""
    figure, axis = _scatter(entries, verdict, lambda e: e.seconds * 1e3)
    front = [entries[i] for i in verdict.front]
    with inked():
        axis.step(
            [e.seconds * 1e3 for e in front],
            [e.fd for e in front],
            where="post",
            color=INK,
            linewidth=1.0,
            linestyle=(0, (4, 2)),
            zorder=1,
            label="not beaten in both",
        )
        axis.set_xlabel("milliseconds per picture")
        _axes_of(axis, [e.seconds * 1e3 for e in entries], [e.fd for e in entries])
        _legend(figure, axis)
    return figure


def nfe_figure(entries: Sequence[Entry], verdict: Verdict) -> Figure:
    """Frechet distance over evaluations per picture; a line for each generator under one kind of sampler."""
    figure, axis = _scatter(entries, verdict, lambda e: float(e.nfe))
    looks = looks_of(entries)
    with inked():
        for model, how in dict.fromkeys((e.model, e.how) for e in entries):
            own = sorted((e.nfe, e.fd) for e in entries if (e.model, e.how) == (model, how))
            axis.plot(*zip(*own, strict=True), color=looks[model].colour, linewidth=1.2, zorder=1)
        axis.set_xlabel("evaluations per picture (NFE)")
        _axes_of(axis, [float(e.nfe) for e in entries], [e.fd for e in entries])
        counts = sorted({e.nfe for e in entries})
        axis.set_xticks(_apart(counts), [str(c) for c in _apart(counts)])
        axis.set_xticks([], minor=True)
        _legend(figure, axis)
    return figure


def _apart(counts: Sequence[int]) -> list[int]:
    """Those counts whose labels do not touch on a logarithmic axis; the first and the last are always among them."""
    if len(counts) < 3:
        return list(counts)
    least = 0.07 * math.log(counts[-1] / counts[0])
    kept = [counts[0]]
    for count in counts[1:-1]:
        if math.log(count / kept[-1]) > least and math.log(counts[-1] / count) > least:
            kept.append(count)
    return [*kept, counts[-1]]


def _scatter(entries: Sequence[Entry], verdict: Verdict, x: Callable[[Entry], float]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    looks = looks_of(entries)
    with inked():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axis = figure.subplots()
        axis.grid(color=INK, alpha=0.15, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(which="both", colors=INK, length=3)
        named = set()
        best = entries[verdict.best]
        axis.axhline(best.fd, color=INK, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1, label="best score")
        for entry, d in zip(entries, verdict.differences, strict=True):
            look = looks[entry.model]
            axis.errorbar(
                [x(entry)],
                [entry.fd],
                yerr=[[d.value - d.low], [d.high - d.value]],
                color=look.colour,
                marker=look.marker,
                ms=6,
                elinewidth=1.1,
                capsize=2.5,
                linestyle="none",
                zorder=3,
                label=None if entry.model in named else plain(entry.model),
            )
            named.add(entry.model)
        chosen = entries[verdict.ship]
        axis.plot(
            [x(chosen)], [chosen.fd], "o", mfc="none", mec=INK, mew=1.6, ms=15, zorder=4, linestyle="none", label="use"
        )
    return figure, axis


def _axes_of(axis: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for values, scale, ticks in ((xs, axis.set_xscale, axis.xaxis), (ys, axis.set_yscale, axis.yaxis)):
        if min(values) <= 0:
            continue
        scale("log")
        ratio = max(values) / min(values)
        subs: tuple[float, ...] = (1.0,) if ratio > 1000 else (1.0, 3.0) if ratio > 100 else (1.0, 2.0, 5.0)
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if ratio < 5 else subs
        ticks.set_major_locator(LogLocator(subs=subs))
        ticks.set_minor_locator(NullLocator())
        ticks.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.margins(x=0.09)
    # The rows decide what is seen: a bar may leave the figure, which an interval down to 0 does on this axis.
    room = max((max(ys) / min(ys)) ** 0.15, 1.25) if min(ys) > 0 else 1.0
    if min(ys) > 0:
        axis.set_ylim(min(ys) / room, max(ys) * room)
    axis.set_ylabel("Fréchet distance")


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        fontsize=9,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.2,
    )
