"""Which rows a comparison has: a sampler of each generator for each number of evaluations, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.cli.base import check_fits
from fewstep.core.cond import Classes, Cond
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.sample import Sampler
from fewstep.core.solver import SOLVERS, build
from fewstep.core.stored import load_sampler
from fewstep.core.tableau import Tableau
from fewstep.data import load_data
from fewstep.distill import METHODS
from fewstep.distill.several import SAMPLERS
from fewstep.errors import InputError, unknown
from fewstep.grid import GRIDS, grid
from fewstep.measure import Statistics
from fewstep.measure.evaluate import real_side
from fewstep.measure.reference import RealData
from fewstep.solve.calibrate import report_of

CALIBRATED = "calibrated"
# A generator whose own sampler needs no more than this was made for few steps, whatever its card says.
FEW = 4


@dataclass(frozen=True)
class Candidate:
    """A row that will be measured; without a sampler, one is calibrated first."""

    model: str
    generator: Generator
    nfe: int
    how: str
    sampler: Sampler | None

    @property
    def name(self) -> str:
        """The sampler's name, as the row carries it."""
        return CALIBRATED if self.sampler is None else str(getattr(self.sampler, "name", "sampler"))


@dataclass(frozen=True)
class Request:
    """What is asked for of generators without fixed steps.

    Attributes:
        counts: evaluations per picture.
        sampler: a solver's name, or "calibrated".
        grid: of the solver.
        tables: paths of samplers, for whichever generators they fit.
        own: whether their own sampler is a row too.

    Raises:
        InputError: an unknown solver or grid.
    """

    counts: Sequence[int]
    sampler: str = "dpmpp2m"
    grid: str = "karras"
    tables: Sequence[str] = ()
    own: bool = True

    def __post_init__(self) -> None:
        if self.sampler != CALIBRATED and self.sampler not in SOLVERS:
            raise unknown("sampler", self.sampler, [*SOLVERS, CALIBRATED])
        if self.grid not in GRIDS:
            raise unknown("grid", self.grid, GRIDS)

    def plan(self, made: dict[str, Generator], sources: Sequence[str]) -> tuple[list[Candidate], list[str]]:
        """The rows, and what is left out and why; ``sources`` are the paths or ids of the generators.

        Raises:
            InputError: a generator without any row, a table that fits none of them, or fewer than two rows in all.
        """
        rows: list[Candidate] = []
        notes: list[str] = []
        tables = [(place, load_sampler(place)) for place in self.tables]
        used: set[str] = set()
        for (name, generator), source in zip(made.items(), sources, strict=True):
            before = len(rows)
            if is_fixed(generator):
                rows += fixed_rows(name, generator, Path(source).expanduser(), self.counts)
            else:
                found, missing = self._solved(name, generator)
                rows, notes = rows + found, notes + missing
                if self.own:
                    rows.append(Candidate(name, generator, generator.sampler.nfe, "its own sampler", generator.sampler))
            for place, table in tables:
                if fits(table, generator, place):
                    used.add(place)
                    rows.append(Candidate(name, generator, table.nfe, f"the table {place}", table))
            if len(rows) == before:
                raise InputError(
                    f"{name} has no row: {'; '.join(notes)}: give other numbers in --nfe, or drop --no-own"
                )
        for place, _ in tables:
            if place not in used:
                raise InputError(f"--table {place} fits none of the generators: give the one that it was fitted to")
        if len(rows) < 2:
            raise InputError(
                f"only one row to measure ({rows[0].model}, {rows[0].nfe} evaluations): a comparison needs two, so "
                f"give another generator or more numbers in --nfe"
            )
        return rows, notes

    def _solved(self, name: str, generator: Generator) -> tuple[list[Candidate], list[str]]:
        if self.sampler == CALIBRATED:
            how = "a table calibrated to it for each number of evaluations"
            return [Candidate(name, generator, nfe, how, None) for nfe in self.counts], []
        rows, notes = [], []
        for nfe in self.counts:
            table = table_of(self.sampler, self.grid, nfe, generator)
            if table is None:
                notes.append(f"{name} at {nfe} evaluations, because {self.sampler} has no table of that many")
            else:
                rows.append(Candidate(name, generator, nfe, f"{self.sampler} on the {self.grid} grid", table))
        return rows, notes


def counts_of(text: str) -> list[int]:
    """``"1,2,4"`` as numbers, each once, in order.

    Raises:
        InputError: something that is no whole number of at least 1.
    """
    try:
        counts = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise InputError(f"--nfe {text!r}: expected whole numbers separated by commas, such as 1,2,4,8") from None
    if counts[0] < 1:
        raise InputError(f"--nfe {text!r} has {counts[0]}: a picture takes at least 1 evaluation")
    return counts


def reference(place: str, resize: int | None) -> RealData | Statistics:
    """Real pictures, or statistics of them, by name or path.

    Raises:
        InputError: neither.
    """
    path = Path(place).expanduser()
    if path.suffix == ".npz" and path.is_file() and resize is None:
        return real_side(path)
    return load_data(place if not path.exists() else str(path), resize=resize)


def is_fixed(generator: Generator) -> bool:
    """Whether a generator was distilled to its own number of steps, by its card or by how few its sampler takes."""
    distilled = {method.__name__ for method in METHODS.values()}
    return generator.card.get("method") in distilled or generator.sampler.nfe <= FEW


def fixed_rows(name: str, generator: Generator, folder: Path, counts: Sequence[int]) -> list[Candidate]:
    """The rows of a student: those of its folder of samplers that were asked for, or its own number of steps."""
    places = sorted((folder / SAMPLERS).iterdir()) if (folder / SAMPLERS).is_dir() else []
    own = [load_sampler(place) for place in places if place.suffix in ("", ".json")]
    asked = sorted((s for s in own if s.nfe in counts), key=lambda s: s.nfe)
    how = "distilled to this number of steps"
    return [Candidate(name, generator, s.nfe, how, s) for s in asked or [generator.sampler]]


def table_of(solver: str, levels: str, nfe: int, generator: Generator) -> Tableau | None:
    """The solver's table of exactly ``nfe`` evaluations, or None where it has none."""
    D = generator.denoiser
    for steps in range(nfe, 0, -1):
        try:
            table = build(solver, grid(levels, steps, D.sigma_min, D.sigma_max))
        except InputError:
            continue
        if table.nfe == nfe:
            return table
        if table.nfe < nfe:
            return None
    return None


def fits(table: Sampler, generator: Generator, place: str) -> bool:
    """Whether a table may run a generator: fitted to it, or fitted to none and within its noise levels."""
    known = report_of(table).get("fingerprint")
    if known is None and is_fixed(generator):
        return False
    try:
        check_fits(table, generator, place)
    except InputError:
        return False
    return True


def fingerprint_of(generator: Generator) -> str | None:
    """That of the generator, None where it has none."""
    try:
        return generator.fingerprint()
    except InputError:
        return None


@torch.no_grad()
def check_shapes(made: dict[str, Generator], real: RealData | Statistics) -> None:
    """Refuses generators whose pictures differ in shape from each other or from the real ones.

    Raises:
        InputError: naming both.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, generator in made.items():
        shape = tuple(generator.denoiser.shape)
        if generator.codec is not None:
            shape = tuple(generator.decode(torch.zeros(1, *shape, device=generator.device)).shape[1:])
        shapes[name] = shape
    first = next(iter(shapes))
    expected = shapes[first] if isinstance(real, Statistics) else tuple(real.shape)
    against = first if isinstance(real, Statistics) else f"the data {real.name}"
    for name, shape in shapes.items():
        if shape != expected:
            raise InputError(
                f"{name} makes pictures of {shape} and {against} has {expected}: compare generators of the same "
                f"pictures, against such data"
            )


def labels_for(made: dict[str, Generator], n: int, seed: int) -> Cond | None:
    """The classes that all generators with classes are asked for: those that the first of them draws.

    Raises:
        InputError: a generator that lacks one of these classes.
    """
    found: dict[str, Classes] = {k: g.conds for k, g in made.items() if isinstance(g.conds, Classes)}
    if not found:
        return None
    first, *others = found
    labels = found[first].draw(Noise.of(seed, n))
    for name in others:
        try:
            found[name].check(labels)
        except InputError as error:
            raise InputError(f"{name} cannot be asked for the classes of {first}: {error}") from None
    return labels
