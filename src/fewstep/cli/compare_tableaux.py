"""``fewstep compare-tableaux``: whether two tableaux are the same sampler, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.tracing import compare


@dataclass(frozen=True)
class CompareTableaux:
    """Prints, call by call, how far the dense weights of two tableaux are apart; exits with 0 either way.

    Attributes:
        a: a tableau's .json.
        b: another.
        tolerance: what counts as the same: on weights, and on levels relative to the larger of 1 and the level. 1e-6
            is what float32 schedulers can keep.
    """

    a: Annotated[Path, tyro.conf.Positional]
    b: Annotated[Path, tyro.conf.Positional]
    tolerance: float = 1e-6

    def run(self) -> None:
        """Runs the command."""
        if not self.tolerance >= 0:
            raise InputError(f"--tolerance must be 0 or more, got {self.tolerance}")
        first, second = _read(self.a), _read(self.b)
        found = compare(first, second)
        shown = Table("point", "sigma of a", "sigma of b", "weights differ by", "same", title=f"{self.a} and {self.b}")
        for row in found:
            levels = ["none" if level is None else f"{level:.6g}" for level in (row.level_a, row.level_b)]
            shown.add_row(row.where, *levels, f"{row.weight:.2g}", "yes" if row.within(self.tolerance) else "no")
        console = Console()
        console.print(shown)
        apart = [row for row in found if not row.within(self.tolerance)]
        if not apart:
            told = f"the same sampler to {self.tolerance:g}: {first.name} and {second.name}"
        else:
            worst = max(row.weight for row in found)
            told = f"different samplers: {first.name} and {second.name} part at {apart[0].where}"
            told += f", and differ by up to {worst:.2g}"
        console.print(told, highlight=False, soft_wrap=True)


def _read(path: Path) -> Tableau:
    if not path.is_file():
        raise InputError(f"{path} does not exist: compare-tableaux takes the .json files of two tableaux")
    try:
        return Tableau.from_json(path.read_text())
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a tableau: it is not text") from None
