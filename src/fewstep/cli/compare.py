"""``fewstep compare``: several generators at several numbers of evaluations, and a page that says which to use."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep import __version__
from fewstep.cli.base import SourceFlags, next_folder, recipe_of
from fewstep.cli.calibrate import calibrate_generator
from fewstep.cli.candidates import (
    Candidate,
    Request,
    check_shapes,
    counts_of,
    fingerprint_of,
    is_fixed,
    labels_for,
    reference,
)
from fewstep.core.cond import Classes, Cond
from fewstep.core.generator import Generator, check_device
from fewstep.core.sample import Sampler
from fewstep.core.state import Run
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.measure import Statistics
from fewstep.measure.reference import RealData
from fewstep.report.compare import Entry, Measure, measured
from fewstep.report.compare_page import NUMBERS, Comparison, write_comparison
from fewstep.report.table import show
from fewstep.report.verdict import duration, verdict_of
from fewstep.serve.request import names_of


@dataclass(frozen=True)
class Compare:
    """Measures generators at the same seeds against the same pictures, and writes a page with a verdict.

    A generator that was distilled to a fixed number of steps keeps it, or those of its folder of samplers. Others get
    one row for each number of --nfe, and one with their own sampler.

    Attributes:
        generators: two or more folders of fewstep or diffusers, Hub ids, or checkpoints; one, if it gives several rows.
        nfe: evaluations per picture for generators without fixed steps, separated by commas.
        sampler: their solver, or "calibrated" to fit a table to each for each number.
        grid: noise levels of a solver: karras, logsnr, polyexponential, cosine, beta, vp_time, flow_shift or discrete.
        table: a tableau's .json or the folder of a sampler, for whichever generators it fits; may be repeated.
        own: also measures generators without fixed steps with their own sampler.
        data: real pictures (digits, stacked-digits, a folder, Parquet files, an array), or an .npz of statistics.
        resize: side that encoded real pictures are resized to, in pixels.
        n: pictures of each row.
        seed: of the pictures.
        batch: pictures at a time; the time per picture is that of the fastest batch.
        metrics: names separated by commas; all that apply without. fd is always among them.
        extractor: features to compare in, see docs/measures.md; that of digits or CIFAR-10 without one.
        plain: Frechet distances as they are published, not scaled to 100.
        tolerance: share of the best score that may be lost for speed, such as 0.05.
        guidance: scale of classifier-free guidance for generators without fixed steps; 1 is none.
        out: run folder; runs/compare-<number> without one.
        device: cpu, cuda, cuda:1 or mps.
        resume: goes on with an earlier run of the same flags; whole rows are not measured again.
        overwrite: deletes an earlier run in out.
        source: how to open the generators.
    """

    generators: Annotated[tuple[str, ...], tyro.conf.Positional]
    nfe: str = "1,2,4,8"
    sampler: str = "dpmpp2m"
    grid: str = "karras"
    table: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    own: bool = True
    data: str = "digits"
    resize: int | None = None
    n: int = 2000
    seed: int = 1
    batch: int = 250
    metrics: str = "default"
    extractor: str | None = None
    plain: bool = False
    tolerance: float = 0.0
    guidance: float = 1.0
    out: Path | None = None
    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)

    def run(self) -> None:
        """Runs the command."""
        counts = counts_of(self.nfe)
        if not self.generators:
            raise InputError("there is nothing to compare: name two generators or more (fewstep compare --help)")
        request = Request(counts, self.sampler, self.grid, self.table, self.own)
        if not self.tolerance >= 0:
            raise InputError(f"--tolerance {self.tolerance}: expected a share of the best score, 0 or above")
        if self.resume and self.out is None:
            raise InputError("--resume needs --out: the folder of the run to go on with")
        check_device(self.device)
        real = reference(self.data, self.resize)
        measure = Measure.of(
            real,
            extractor=self.extractor,
            metrics="default" if self.metrics == "default" else [m.strip() for m in self.metrics.split(",")],
            n=self.n,
            seed=self.seed,
            batch=self.batch,
            normalise=not self.plain,
        )
        made = self._opened()
        check_shapes(made, real)
        labels = labels_for(made, self.n, self.seed)
        candidates, notes = request.plan(made, self.generators)
        recipe = recipe_of("compare", self)
        run = Run.open(self.out or next_folder("compare"), recipe, resume=self.resume, overwrite=self.overwrite)
        entries = self._measure(run, candidates, measure, labels)
        self._tell(run, entries, measure, made, labels, notes)

    def _opened(self) -> dict[str, Generator]:
        """The generators by short name, those without fixed steps under guidance."""
        paths = [str(Path(s).expanduser().resolve()) if Path(s).expanduser().exists() else s for s in self.generators]
        for i, path in enumerate(paths):
            if path in paths[:i]:
                raise InputError(f"{self.generators[i]} is given twice: give each generator once")
        made = {}
        for name, source in zip(names_of(self.generators), self.generators, strict=True):
            found = self.source.open(source)
            made[name] = found if is_fixed(found) else guided(found, self.guidance)
        return made

    def _measure(self, run: Run, candidates: Sequence[Candidate], measure: Measure, labels: Cond | None) -> list[Entry]:
        console, entries = Console(stderr=True), []
        prints: dict[str, str | None] = {}
        for i, c in enumerate(candidates):
            generator = c.generator.to(self.device)
            if c.model not in prints:
                prints[c.model] = fingerprint_of(generator)
            sampler = c.sampler or self._calibrated(run, c)
            entry = measured(
                run.folder / "rows" / slug(f"{i:02d}-{c.model}-{c.name}-{c.nfe}"),
                generator,
                sampler,
                measure,
                model=c.model,
                name=c.name,
                how=c.how,
                cond=labels if isinstance(generator.conds, Classes) else None,
                fingerprint=prints[c.model],
            )
            generator.to("cpu")
            entries.append(entry)
            said = f"{i + 1} of {len(candidates)}: {entry.label}: FD {show(entry.fd)}, {duration(entry.seconds)}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
        return entries

    def _calibrated(self, run: Run, c: Candidate) -> Sampler:
        """The table of a row, fitted once and kept in the run."""
        place = run.folder / "samplers" / f"{slug(c.model)}-{c.nfe}.json"
        if place.is_file():
            return load_sampler(place)
        table: Tableau = calibrate_generator(c.generator, nfe=c.nfe, seed=self.seed, batch=self.batch)
        save_sampler(table, place)
        return table

    def _tell(
        self,
        run: Run,
        entries: list[Entry],
        measure: Measure,
        made: dict[str, Generator],
        labels: Cond | None,
        notes: list[str],
    ) -> None:
        verdict = verdict_of(entries, n=self.n, tolerance=self.tolerance)
        classes = next((g.conds for g in made.values() if isinstance(g.conds, Classes)), None)
        heads = [] if labels is None or classes is None else _heads(labels["label"][:20].tolist(), classes.names)
        page = Comparison(
            entries=entries,
            verdict=verdict,
            reference=_named(measure.real, self.data),
            n=self.n,
            command=self.command(),
            conditions=heads,
            facts=self._facts(measure, entries),
            notes=notes,
        )
        place = write_comparison(page, run.folder)
        table = Table("generator", "sampler", "NFE", "time", "FD", "95 % to the best", "")
        for entry, d, i in zip(entries, verdict.differences, range(len(entries)), strict=True):
            span = "" if i == verdict.best else f"{show(d.low) or '0'} to {show(d.high) or '0'}"
            cells = (entry.model, entry.sampler, str(entry.nfe), duration(entry.seconds), show(entry.fd), span)
            table.add_row(*cells, verdict.standing(i))
        Console().print(table)
        for sentence in (verdict.headline, *verdict.reasons, f"{place} (numbers: {NUMBERS})"):
            Console().print(sentence, highlight=False, markup=False, soft_wrap=True)

    def _facts(self, measure: Measure, entries: Sequence[Entry]) -> dict[str, str]:
        device = torch.device(self.device)
        machine = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"{self.device}, {platform.machine()}"
        )
        use, real = measure.extractor, measure.real
        prints = {e.model: e.fingerprint or "not known" for e in entries}
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        return {
            "Pictures": f"{self.n} of each row, seed {self.seed}; picture i has the same noise in every row",
            "Time": f"sampling alone, the fastest batch of {min(self.batch, self.n)}, on {machine}{threads}",
            "Extractor": f"{use.name} (fingerprint {use.fingerprint[:16]})",
            "Reference": f"{_named(real, self.data)} ({_hash(real)})",
            "Frechet distance": "as published"
            if self.plain
            else "scaled: 100 is the total variance of the real features",
            "Tolerance": f"{self.tolerance:.0%} of the best score",
            "Generators": "; ".join(f"{model}: {found}" for model, found in prints.items()),
            "Guidance": f"{self.guidance:g} for generators without fixed steps",
            "fewstep": f"{__version__}, torch {torch.__version__}",
        }

    def command(self) -> str:
        """The shell command that measures everything again."""
        words = ["fewstep", "compare", *self.generators]
        for f in fields(self):
            value: Any = getattr(self, f.name)
            if f.name in ("generators", "source", "out", "resume", "overwrite") or value == f.default:
                continue
            flag = f"--{f.name}"
            for one in value if isinstance(value, tuple) else (value,):
                words += [flag if one else f"--no-{f.name}"] if isinstance(one, bool) else [flag, str(one)]
        if self.source.kind is not None:
            words += ["--kind", self.source.kind]
        for one in self.source.open_with:
            words += ["--open", one]
        return shlex.join(words)


def _heads(labels: Sequence[int], names: Sequence[str]) -> list[str]:
    return [names[label] if label < len(names) else str(label) for label in labels]


def _named(real: RealData | Statistics, place: str) -> str:
    if isinstance(real, Statistics):
        return f"statistics {place}" + ("" if real.n is None else f" of {real.n:,} pictures")
    return f"{len(real):,} real pictures of {real.name}"


def _hash(real: RealData | Statistics) -> str:
    return "a file" if isinstance(real, Statistics) else f"fingerprint {real.fingerprint[:16]}"


def slug(text: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
