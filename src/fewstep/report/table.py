"""The table of measured rows: what its columns are, how rows are grouped and which values are the best."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fewstep.report.results import Results, Row

if TYPE_CHECKING:
    from rich.table import Table

# Metrics that are not named here are shown, but none of their values is called the best.
MEANINGS: dict[str, tuple[int, str]] = {
    "fd": (-1, "Fréchet distance to the real data in feature space"),
    "pixel_fd": (-1, "Fréchet distance to the real data in pixels"),
    "kid": (-1, "kernel distance to the real data in feature space"),
    "precision": (1, "share of generated pictures that lie among real ones"),
    "recall": (1, "share of real pictures that lie among generated ones"),
    "density": (1, "how closely real pictures surround the generated ones"),
    "coverage": (1, "share of real pictures with a generated one nearby"),
    "accuracy": (1, "share of pictures recognised as the class that was asked for"),
    "modes": (1, "number of modes that occur"),
    "modes_kl": (-1, "how unevenly the modes occur"),
}
RMSE = "mean RMSE to the teacher's converged picture from the same noise"


PAGE_ONLY = ("pixel_fd", "kid", "density", "coverage", "modes_kl", "seconds")


class Column(NamedTuple):
    """One measured quantity: ``better`` is -1 where less is better, 1 where more is, 0 where nobody said."""

    key: str
    label: str
    note: str
    meaning: str
    better: int
    value: Callable[[Row], float | None]


def columns(results: Results) -> list[Column]:
    """The columns after name and NFE, without those that no row has a value for."""
    names = dict.fromkeys(key for row in results.rows for key in row.metrics)
    found = [_metric(key) for key in names]
    found += [
        Column("rmse", "rmse", "to teacher", RMSE, -1, lambda row: row.rmse),
        Column("speed", "images/s", "", "pictures per second of wall time", 1, _speed),
        Column("seconds", "seconds", "", "wall time of the measured pictures", -1, lambda row: row.seconds),
    ]
    return [c for c in found if any(finite(c.value(row)) is not None for row in results.rows)]


def _metric(key: str) -> Column:
    name, _, count = key.partition("@")
    better, meaning = MEANINGS.get(name, (0, ""))
    return Column(key, name, f"n = {count}" if count else "", meaning, better, lambda row: row.metrics.get(key))


def _speed(row: Row) -> float | None:
    return row.images / row.seconds if row.seconds > 0 else None


def finite(value: float | None) -> float | None:
    """The value, or None where there is none or it is nan or infinite."""
    return value if value is not None and math.isfinite(value) else None


def show(value: float | None) -> str:
    """Three significant digits or a whole number; nothing where there is no finite value."""
    if finite(value) is None or value is None:
        return ""
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits}e{int(power)}"
    return f"{value:#.3g}".rstrip(".")


def grouped(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that may be compared with each other: the teacher's, then those of equal NFE, the fewest first."""
    teachers = [row for row in rows if row.group == "teacher"]
    groups = [("teacher", teachers)] if teachers else []
    for nfe in sorted({row.nfe for row in rows if row.group != "teacher"}):
        title = f"{nfe} evaluation{'s' * (nfe != 1)}"
        groups.append((title, [row for row in rows if row.group != "teacher" and row.nfe == nfe]))
    return groups


def best(group: list[Row], column: Column) -> float | None:
    """The best value of a column, where there are several rows to choose from."""
    values = [v for row in group if (v := finite(column.value(row))) is not None]
    if len(values) < 2 or not column.better:
        return None
    return max(values) if column.better > 0 else min(values)


def terminal_table(results: Results) -> Table:
    """The main columns, for a terminal of 80 characters; the best of each among rows of equal NFE is bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = [c for c in columns(results) if c.key.partition("@")[0] not in PAGE_ONLY]
    table = Table(title=Text(results.title), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("sampler", no_wrap=True)
    table.add_column("NFE", justify="right")
    for c in shown:
        heading = c.label + {-1: " ↓", 0: "", 1: " ↑"}[c.better]
        count = c.key.partition("@")[2]
        table.add_column(Text(f"{heading}\n@{count}" if count else heading), justify="right")
    for _, group in grouped(results.rows):
        winners = {c.key: best(group, c) for c in shown}
        for row in group:
            cells = [
                Text(show(v := c.value(row)), style="bold" if v is not None and v == winners[c.key] else "")
                for c in shown
            ]
            # Text, not str: names come from users and may hold what rich reads as markup.
            table.add_row(Text(row.name), str(row.nfe), *cells)
        table.add_section()
    if any(c.key in results.floor for c in shown):
        table.add_row("real data (floor)", "", *(show(results.floor.get(c.key)) for c in shown))
    return table
