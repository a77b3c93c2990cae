"""``fewstep show``: a look at a tableau, a generator or a run."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fewstep.cli.base import SamplerFlags, SourceFlags
from fewstep.core.denoiser import module_of
from fewstep.core.generator import CONFIG, Generator
from fewstep.core.noise import Noise
from fewstep.core.pipeline import TextConditions
from fewstep.core.state import RECIPE, Run, read_json
from fewstep.core.stored import FILE as SAMPLER_FILE
from fewstep.core.stored import load_sampler
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.sources import CHECKPOINTS
from fewstep.sources.diffusers_files import is_hub_id


@dataclass(frozen=True)
class Show:
    """Prints what a file or folder holds; draws a tableau, or a page about a run or a generator's trajectories.

    Attributes:
        path: a tableau's .json, a run folder, or a generator: a folder of fewstep or diffusers, a Hub id, a checkpoint.
        out: writes the tableau's picture here (.png, .svg or .pdf); with --page or --geometry the page (.html;
            run.html in the run's folder, or geometry.html, without it).
        page: writes a page of a run: how far it is, whether it is healthy, its samples over time, its curves.
        follow: keeps that page up to date while it is open, until the run has ended or Ctrl-C.
        geometry: measures a generator's trajectories (shape, errors of each step, stability) and writes a page.
        samples: trajectories that --geometry follows, at least 8.
        seed: of these; they are the pictures that `fewstep sample` makes with it.
        device: cpu or cuda, for --geometry.
        source: how to open a generator.
        flags: the sampler that --geometry compares with the converged trajectories.
    """

    path: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    page: Annotated[bool, tyro.conf.arg(aliases=("--health",))] = False
    follow: bool = False
    geometry: bool = False
    samples: int = 64
    seed: int = 0
    device: str = "cpu"
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)
    flags: Annotated[SamplerFlags, tyro.conf.arg(name="")] = field(default_factory=SamplerFlags)

    def run(self) -> None:
        """Runs the command."""
        if self.page:
            self._page()
            return
        if self.follow:
            raise InputError("--follow keeps the page of a run up to date: pass --page with it")
        if self.geometry:
            self._geometry()
            return
        changed = self._changed()
        changed += [n for n, value in (("samples", 64), ("seed", 0), ("device", "cpu")) if getattr(self, n) != value]
        if changed:
            raise InputError(f"--{changed[0].replace('_', '-')} says how to measure: pass --geometry with it")
        console = Console()
        if self.path.is_file() and self.path.suffix not in CHECKPOINTS:
            try:
                table = Tableau.from_json(self.path.read_text())
            except UnicodeDecodeError:
                raise InputError(f"{self.path} is not a tableau: it is not text") from None
            self._tableau(console, table)
        elif self._is_generator():
            self._generator(console, self.source.open(self.path))
        elif (self.path / "tableau.json").is_file():
            self._tableau(console, Tableau.from_json((self.path / "tableau.json").read_text()))
        elif (self.path / SAMPLER_FILE).is_file():
            self._sampler(console)
        elif (self.path / RECIPE).is_file():
            self._run(console)
        else:
            raise InputError(f"{self.path} is no tableau, generator or run: expected a .json or a folder with {RECIPE}")

    def _is_generator(self) -> bool:
        """Whether there is one, or the path may be that of one on the Hub."""
        if self.path.is_dir():
            return any((self.path / name).is_file() for name in (CONFIG, "model_index.json"))
        return self.path.is_file() or (not self.path.exists() and is_hub_id(self.path))

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

    def _sampler(self, console: Console) -> None:
        found = load_sampler(self.path)
        told = f"{getattr(found, 'name', 'sampler')}: {found.nfe} evaluations, sigma {found.start:g} to {found.end:g}"
        console.print(told, highlight=False)
        console.print_json(json.dumps(dict(getattr(found, "meta", {}))))

    def _generator(self, console: Console, made: Generator) -> None:
        D = made.denoiser
        module = module_of(D)
        count = 0 if module is None else sum(p.numel() for p in module.parameters())
        console.print(f"{self.path}: {tuple(D.shape)} pictures, {count:,} parameters, fingerprint {made.fingerprint()}")
        takes = {True: "prompts", False: str(made.conds or "none")}[isinstance(made.conds, TextConditions)]
        console.print(f"noise levels {D.sigma_min:g} to {D.sigma_max:g}, conditions {takes[:200]}", highlight=False)
        if isinstance(made.sampler, Tableau):
            self._tableau(console, made.sampler)
        console.print_json(json.dumps(made.card))
        self._variety(console)

    def _geometry(self) -> None:
        from fewstep.report.geometry import LEAST, measure_geometry
        from fewstep.report.geometry_page import write_geometry

        if not self._is_generator():
            raise InputError(f"--geometry needs the folder of a generator: {self.path} has no {CONFIG}")
        if self.samples < LEAST:
            raise InputError(f"--samples must be at least {LEAST}, got {self.samples}")
        out = self.out or Path("geometry.html")
        if out.suffix != ".html":
            raise InputError(f"--out must end in .html with --geometry, got {out}")
        made = self.source.open(self.path, self.device)
        name, sampler = self.flags.resolve(made)
        noise = Noise.of(self.seed, self.samples, made.device)
        D, err = made.denoiser, Console(stderr=True)
        with err.status("geometry") as status:
            measured = measure_geometry(
                D, sampler, noise, made.conditions(None, noise), name=name, say=lambda text: status.update(text)
            )
        facts = {
            "Generator": f"{self.path}, fingerprint {made.fingerprint()}",
            "Samples": f"{tuple(D.shape)}, conditions {made.conds or 'none'}",
            "Noise levels": f"sigma {D.sigma_min:g} to {D.sigma_max:g}",
            "Sampler": f"{name}, {sampler.nfe} evaluations, sigma {sampler.start:g} to {sampler.end:g}",
            "Seed": str(self.seed),
            "Command": self._command(out),
        }
        write_geometry(measured, out, title=f"Geometry of {self.path.name or self.path}", facts=facts)
        told = f"{out}: {self.samples} trajectories, {name}, {sampler.nfe} evaluations"
        err.print(told, highlight=False, soft_wrap=True)

    def _changed(self) -> list[str]:
        """Names of the sampler's flags that are not at their defaults."""
        return [f.name for f in fields(self.flags) if getattr(self.flags, f.name) != f.default]

    def _command(self, out: Path) -> str:
        """The command line that writes the same page again."""
        words = ["fewstep", "show", str(self.path), "--geometry"]
        for name in self._changed():
            value = getattr(self.flags, name)
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
        return shlex.join([*words, "--samples", str(self.samples), "--seed", str(self.seed), "--out", str(out)])

    def _run(self, console: Console) -> None:
        console.print_json(json.dumps(read_json(self.path / RECIPE)))
        entries = Run(self.path).read_log()
        if entries:
            console.print_json(json.dumps(entries[-1]))
        self._variety(console)

    def _variety(self, console: Console) -> None:
        """The looks at the samples of a run, the last ten of them; nothing where nobody looked."""
        from fewstep.train.health import SPREADS, history, measures_in

        entries = [e for e in history(Run(self.path)) if measures_in(e) is not None] if self.path.is_dir() else []
        if not entries:
            return
        shown = Table("step", *SPREADS, "", title="variety of the samples, in units of the reference's")
        for entry in (entries[0], *entries[1:][-10:]):
            values = [entry.get(f"health/{key}") for key in SPREADS]
            cells = ["" if v is None else f"{v:.3g}" for v in values]
            shown.add_row(str(entry["step"]), *cells, str(entry.get("collapsed", "")))
        console.print(shown)

    def _page(self) -> None:
        from fewstep.report.run_page import PAGE, follow, write_run_page

        if self.geometry:
            raise InputError("--page is about a run and --geometry about a generator: pass one of them")
        if not (self.path / RECIPE).is_file():
            raise InputError(f"--page needs the folder of a run: {self.path} has no {RECIPE}")
        out, err = self.out or self.path / PAGE, Console(stderr=True)
        if out.suffix != ".html":
            raise InputError(f"--out must end in .html with --page, got {out}")
        if self.follow:
            told = "follows the run while it is open; Ctrl-C ends it"
            follow(self.path, out, say=lambda place: err.print(f"{place}: {told}", highlight=False, soft_wrap=True))
        else:
            write_run_page(self.path, out)
        err.print(f"{out}: written", highlight=False, soft_wrap=True)
