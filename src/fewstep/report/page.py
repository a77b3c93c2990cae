"""One HTML file with everything that was measured: it opens from disk, and asks nothing of any network."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.core.state import write_text
from fewstep.report import plots
from fewstep.report.pictures import grid_image
from fewstep.report.results import Results, Row
from fewstep.report.svg import inline_svg
from fewstep.report.table import best, columns, finite, grouped, show

SIDE = 64
COUNTS = (16, 9, 4, 1)
# About what compresses to a megabyte.
PIXELS = 450_000
NARROW, WIDE = 160, 225


def write_page(results: Results, path: Path) -> Path:
    """Writes the page, whole or not at all, and returns its path.

    Raises:
        InputError: the place cannot be written.
    """
    # A name read from a broken file name may hold half a character, which no encoding can write.
    write_text(Path(path), render(results).encode("utf-8", "replace").decode())
    return Path(path)


def render(results: Results) -> str:
    """The page as text; parts that the results lack are left out."""
    text = resources.files("fewstep.report").joinpath("page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(
        results=results,
        met=sum(1 for _, _, met in results.targets if met),
        looks=plots.styles(results),
        ink=plots.INK,
        figures=_figures(results),
        sheets=_sheets(results),
        table=_table(results),
        curves=_curves(results),
        paths=_paths(results),
        tableaux=_tableaux(results),
        commands=_commands(results.rows),
    )


def _figures(results: Results) -> list[dict[str, Any]]:
    """The plots over NFE: markup, kind and heading."""
    key = plots.quality_metric(results)
    lines = ["teacher"] * any(row.group == "teacher" and key in row.metrics for row in results.rows)
    lines += ["floor"] * (key in results.floor)
    found = []
    for kind, figure, heading in (
        ("quality", plots.quality_figure(results), "Quality for each number of evaluations"),
        ("rmse", plots.rmse_figure(results), "Closeness to the teacher, picture by picture"),
    ):
        if figure is not None:
            values = [(r, r.metrics.get(key or "") if kind == "quality" else r.rmse) for r in results.rows]
            said = "; ".join(f"{r.name} at {r.nfe}: {show(v)}" for r, v in values if finite(v) is not None)
            label = f"{heading}. {key if kind == 'quality' else 'RMSE'} by evaluations per picture: {said}"
            found.append({"kind": kind, "heading": heading, "lines": lines, "svg": inline_svg(figure, kind, label)})
    return found


def _sheets(results: Results) -> dict[str, Any] | None:
    """Contact sheets of the same seeds for all rows, grouped by NFE."""
    rows = [row for row in results.rows if row.pictures.ndim == 4 and len(row.pictures)]
    if not rows:
        return None
    height, width = (min(SIDE, max(row.pictures.shape[i] for row in rows)) for i in (2, 3))
    count = min(len(row.pictures) for row in rows)
    # The largest square sheet that all rows fill, within what one page can carry.
    fitting = [n for n in COUNTS if n <= count and n * height * width * len(rows) <= PIXELS]
    count = fitting[0] if fitting else 1
    key = plots.quality_metric(results) or ""
    groups = []
    for title, members in grouped(rows):
        cards = [{"row": row, "score": show(row.metrics.get(key)), **_sheet(row.pictures[:count])} for row in members]
        groups.append({"title": "Teacher" if title == "teacher" else title, "cards": cards})
    shrunk = any(max(row.pictures.shape[2:]) > SIDE for row in rows)
    return {"groups": groups, "count": count, "metric": key, "shrunk": shrunk, "side": SIDE}


def _sheet(pictures: Tensor) -> dict[str, Any]:
    pictures = pictures.detach().float().cpu().nan_to_num(-1.0)
    side = max(pictures.shape[2:])
    if side > SIDE:
        pictures = interpolate(pictures, scale_factor=SIDE / side, mode="area")
    image = grid_image(pictures, round(len(pictures) ** 0.5), side=max(pictures.shape[2:]))
    held = io.BytesIO()
    image.save(held, "PNG", optimize=True)
    return {
        "png": base64.b64encode(held.getvalue()).decode(),
        "width": image.width,
        "height": image.height,
        "narrow": max(1, NARROW // image.width),
        "wide": max(1, WIDE // image.width),
    }


def _table(results: Results) -> dict[str, Any]:
    shown = columns(results)
    groups = []
    for title, members in grouped(results.rows):
        winners = {c.key: best(members, c) for c in shown}
        rows = []
        for row in members:
            values = [c.value(row) for c in shown]
            cells = [
                (show(v), finite(v) is not None and v == winners[c.key]) for c, v in zip(shown, values, strict=True)
            ]
            rows.append({"row": row, "cells": cells})
        groups.append({"title": title, "rows": rows})
    floor = [show(results.floor.get(c.key)) for c in shown]
    return {"columns": shown, "groups": groups, "floor": floor if any(floor) else None}


def _curves(results: Results) -> list[dict[str, Any]]:
    found, looks = [], plots.styles(results)
    for i, (name, entries) in enumerate(results.curves.items()):
        figure = plots.curves_figure(entries, looks[name].colour if name in looks else plots.INK)
        if figure is not None:
            ends = [f"{k} ends at {show(c[-1][1])}" for k, c in plots.loss_curves(entries).items()]
            label = f"Training losses of {name} by step: {', '.join(ends)}"
            caption = f"Loss of each role of {name} by training step."
            found.append({"name": name, "svg": inline_svg(figure, f"curves{i}", label), "caption": caption})
        for k, (title, caption, health) in enumerate(plots.health_figures(entries)):
            label = f"{title} of {name} by step. {caption}"
            svg = inline_svg(health, f"health{i}-{k}", label)
            found.append({"name": f"{name}: {title}", "svg": svg, "caption": caption})
    return found


def _paths(results: Results) -> Markup | None:
    figure = plots.trajectories_figure(results)
    names = ", ".join(t.name for t in results.trajectories)
    label = f"Paths from noise to picture in the plane of two principal components, for {names}"
    return None if figure is None else inline_svg(figure, "paths", label)


def _tableaux(results: Results) -> list[dict[str, Any]]:
    found = []
    for i, row in enumerate(results.rows):
        # A table with hundreds of rows is a picture that nobody reads and that is heavier than the page.
        if row.tableau is None or row.tableau.rows > 64:
            continue
        with plots.inked():
            figure = replace(row.tableau, name=plots.plain(row.tableau.name)).plot()
        label = f"Weights of {row.name} with {row.nfe} evaluations, one line per step"
        found.append({"row": row, "svg": inline_svg(figure, f"tableau{i}", label, natural=True)})
    return found


def _commands(rows: list[Row]) -> list[dict[str, Any]]:
    """Every command once, with the rows whose numbers it gives; under one heading for the same samplers."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.command.strip():
            found.setdefault(row.command, []).append(row)
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for command, members in found.items():
        names = {row.name: row for row in members}
        group = groups.setdefault(tuple(names), {"rows": list(names.values()), "commands": []})
        counts = ", ".join(str(nfe) for nfe in sorted({row.nfe for row in members}))
        group["commands"].append((counts, command))
    return list(groups.values())
