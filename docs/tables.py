"""What the scripts of docs/ share: where things are, and tables of results in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
# Methods whose card is named after another file than their own.
CARDS = {"vsd": "dmd2", "f-distill": "dmd2"}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(r)} |" for r in rows]) + "\n"


def spread(values: list[float] | None) -> str:
    """Mean and half range of the seeds."""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f}" + (f" +- {half:.3f}" if len(values) > 1 else "")


def number(value: float | None, digits: int = 4) -> str:
    """A number with few digits; nothing for none."""
    return "" if value is None else f"{value:.{digits}g}"


def unique(values: Iterable[str]) -> list[str]:
    """The values without repetitions, in their order."""
    return list(dict.fromkeys(values))
