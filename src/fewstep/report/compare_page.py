"""The page of a comparison: which model to use and why, in one HTML file that opens from disk and fetches nothing."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.core.state import write_text
from fewstep.measure.evaluate import BLOCKED, SINGLE
from fewstep.report.compare import FORMAT, Entry
from fewstep.report.compare_plots import looks_of, nfe_figure, pareto_figure
from fewstep.report.pictures import grid_image
from fewstep.report.svg import inline_svg
from fewstep.report.table import MEANINGS, show
from fewstep.report.verdict import Verdict, chance, duration, half_width, own_error

PAGE, NUMBERS = "compare.html", "compare.json"
# Side in pixels beyond which pictures are shrunk for the page.
SIDE = 128
COLUMNS = 10
MINUS = "\N{MINUS SIGN}"


@dataclass
class Comparison:
    """Everything on the page.

    Attributes:
        entries: the rows, in order.
        verdict: what follows from them.
        reference: name and size of the real pictures.
        n: pictures of each row.
        command: the shell command that measures it all again.
        conditions: what stands above the columns of the grid, such as the classes; empty where there is nothing.
        facts: how it was measured.
        notes: what was asked for and could not be measured, and why.
    """

    entries: list[Entry]
    verdict: Verdict
    reference: str
    n: int
    command: str
    conditions: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """All numbers as JSON values; the differences are to the best row."""
        v = self.verdict
        rows = [
            {**e.body(), "difference": asdict(d), "standing": v.standing(i), "front": i in v.front}
            for i, (e, d) in enumerate(zip(self.entries, v.differences, strict=True))
        ]
        return {
            "format": FORMAT,
            "verdict": {"use": v.ship, "best": v.best, "headline": v.headline, "reasons": v.reasons},
            "reference": self.reference,
            "n": self.n,
            "command": self.command,
            "facts": self.facts,
            "notes": self.notes,
            "rows": rows,
        }


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Writes ``compare.json`` and ``compare.html``, each whole or not at all, and returns the path of the page.

    Raises:
        InputError: the place cannot be written.
    """
    write_text(folder / NUMBERS, json.dumps(_finite(comparison.body()), indent=2) + "\n")
    write_text(folder / PAGE, render(comparison).encode("utf-8", "replace").decode())
    return folder / PAGE


def _finite(value: Any) -> Any:
    """JSON has no NaN: None stands in its place."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(comparison: Comparison) -> str:
    """The page as text."""
    text = resources.files("fewstep.report").joinpath("compare.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    entries, verdict = comparison.entries, comparison.verdict
    words = "; ".join(f"{e.label}: {show(e.fd)} at {duration(e.seconds)}" for e in entries)
    columns = _columns(entries)
    return environment.from_string(text).render(
        c=comparison,
        verdict=verdict,
        looks=looks_of(entries),
        pareto=inline_svg(pareto_figure(entries, verdict), "pareto", f"Fréchet distance by seconds. {words}"),
        by_nfe=inline_svg(nfe_figure(entries, verdict), "nfe", f"Fréchet distance by evaluations. {words}"),
        grid=_grid(comparison),
        columns=columns,
        rows=[_row(i, comparison, columns) for i in _order(entries)],
        tables=_commands(comparison),
    )


def _order(entries: Sequence[Entry]) -> list[int]:
    """Rows by time, the fastest first."""
    return sorted(range(len(entries)), key=lambda i: (entries[i].seconds, entries[i].nfe))


def _columns(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The further metrics that some row has."""
    found = []
    for key in dict.fromkeys(key for e in entries for key in e.scores):
        name, _, count = key.partition("@")
        better, meaning = MEANINGS.get(name, (0, ""))
        arrow = {-1: "↓", 0: "", 1: "↑"}[better]
        found.append({"key": key, "name": name, "count": count, "arrow": arrow, "meaning": meaning})
    return found


def _row(i: int, comparison: Comparison, columns: Sequence[dict[str, str]]) -> dict[str, Any]:
    entry, difference = comparison.entries[i], comparison.verdict.differences[i]
    cells = []
    for column in columns:
        key = column["key"]
        value, error = entry.scores.get(key), entry.errors.get(key)
        half = None if error is None else BLOCKED.get(column["name"], SINGLE) * error
        cells.append((show(value), show(half) if half else ""))
    best = i == comparison.verdict.best
    return {
        "entry": entry,
        "standing": comparison.verdict.standing(i),
        "front": i in comparison.verdict.front,
        "best": best,
        "time": duration(entry.seconds),
        "fd": show(entry.fd),
        "half": show(half_width(own_error(entry), len(entry.blocks))),
        "difference": "" if best else _signed(difference.value),
        "range": "" if best else f"{_signed(difference.low)} to {_signed(difference.high)}, {chance(difference.p)}",
        "cells": cells,
        "size": "" if entry.parameters is None else count_of(entry.parameters),
        "memory": "" if entry.memory is None else f"{entry.memory / 2**20:,.0f} MiB",
    }


def _signed(value: float) -> str:
    return f"{MINUS if value < 0 else '+'}{show(abs(value)) or '0'}"


def count_of(number: int) -> str:
    """A count in thousands, millions or billions."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{show(number / factor)} {unit}"
    return str(number)


def _grid(comparison: Comparison) -> dict[str, Any] | None:
    """Strips of pictures: a row's pictures beside each other, the same noise and condition below each other."""
    entries = comparison.entries
    count = min([COLUMNS, *(len(e.pictures) for e in entries)])
    if count < 1:
        return None
    strips = []
    for i in _order(entries):
        entry = entries[i]
        strips.append(
            {
                "entry": entry,
                "png": _strip(entry.pictures[:count]),
                "standing": comparison.verdict.standing(i),
                "time": duration(entry.seconds),
                "fd": show(entry.fd),
            }
        )
    shape = entries[0].pictures.shape
    return {
        "strips": strips,
        "count": count,
        "heads": comparison.conditions[:count],
        "pixelated": max(shape[2:]) < SIDE // 2,
        "shrunk": max(shape[2:]) > SIDE,
    }


def _strip(pictures: Tensor) -> str:
    pictures = pictures.detach().float().cpu().nan_to_num(-1.0)
    side = max(pictures.shape[2:])
    if side > SIDE:
        pictures = interpolate(pictures, scale_factor=SIDE / side, mode="area")
    held = io.BytesIO()
    # Grey paper, because white frames glare on a dark page.
    sheet = grid_image(pictures, len(pictures), side=min(side, SIDE), gap=max(1, side // 32), paper=128)
    sheet.save(held, "PNG", optimize=True)
    return base64.b64encode(held.getvalue()).decode()


def _commands(comparison: Comparison) -> list[tuple[str, str]]:
    """How each row was made, once per generator and kind of sampler."""
    found: dict[tuple[str, str], list[str]] = {}
    for e in comparison.entries:
        found.setdefault((e.model, e.how), []).append(f"{e.sampler} ({e.nfe})")
    return [(model, f"{how}: {', '.join(names)}") for (model, how), names in found.items()]
