"""``fewstep show``: a look at a tableau, a generator or a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fewstep.core.generator import CONFIG, Generator
from fewstep.core.state import RECIPE, Run, read_json
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError


@dataclass(frozen=True)
class Show:
    """Prints what a file or folder holds; a tableau is also drawn when --out is given.

    Attributes:
        path: a tableau's .json, a generator's folder, or a run folder.
        out: writes the tableau's picture here (.png, .svg or .pdf).
    """

    path: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None

    def run(self) -> None:
        """Runs the command."""
        console = Console()
        if self.path.is_file():
            try:
                table = Tableau.from_json(self.path.read_text())
            except UnicodeDecodeError:
                raise InputError(f"{self.path} is not a tableau: it is not text") from None
            self._tableau(console, table)
        elif (self.path / CONFIG).is_file():
            self._generator(console, Generator.load(self.path))
        elif (self.path / "tableau.json").is_file():
            self._tableau(console, Tableau.from_json((self.path / "tableau.json").read_text()))
        elif (self.path / RECIPE).is_file():
            self._run(console)
        else:
            raise InputError(f"{self.path} is no tableau, generator or run: expected a .json or a folder with {RECIPE}")

    def _tableau(self, console: Console, table: Tableau) -> None:
        shown = Table("row", "from", "to", "P", "W", "Z", title=f"{table.name}: {table.nfe} evaluations")
        for k in range(table.rows):
            cells = [" ".join(f"{w:.4g}" for w in getattr(table, key)[k].tolist()) for key in ("P", "W", "Z")]
            called = "" if table.sigmas[k].isnan() else " *"
            shown.add_row(str(k), f"{table.levels[k]:.4g}{called}", f"{table.levels[k + 1]:.4g}", *cells)
        console.print(shown)
        console.print(f"{table.live} tensors held at once, {table.flops} multiply-adds per element beside the denoiser")
        if table.meta:
            console.print_json(json.dumps(dict(table.meta)))
        if self.out is not None:
            if self.out.suffix not in (".png", ".svg", ".pdf"):
                raise InputError(f"--out must end in .png, .svg or .pdf, got {self.out}")
            self.out.parent.mkdir(parents=True, exist_ok=True)
            table.plot().savefig(self.out, dpi=150)

    def _generator(self, console: Console, made: Generator) -> None:
        D = made.denoiser
        count = sum(p.numel() for p in made.network.parameters())
        console.print(f"{self.path}: {tuple(D.shape)} pictures, {count:,} parameters, fingerprint {made.fingerprint()}")
        console.print(
            f"noise levels {D.sigma_min:g} to {D.sigma_max:g}, classes {made.conds or 'none'}", highlight=False
        )
        if isinstance(made.sampler, Tableau):
            self._tableau(console, made.sampler)
        console.print_json(json.dumps(made.card))

    def _run(self, console: Console) -> None:
        console.print_json(json.dumps(read_json(self.path / RECIPE)))
        entries = Run(self.path).read_log()
        if entries:
            console.print_json(json.dumps(entries[-1]))
