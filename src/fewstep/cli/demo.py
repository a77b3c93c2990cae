"""``fewstep demo``: the main job on the embedded digits, end to end, and a page that shows it."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fewstep import __version__
from fewstep.cli.base import recipe_of
from fewstep.cli.calibrate import calibrate_generator, save_calibrated
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Ema, Optim
from fewstep.core.sample import trajectory
from fewstep.core.solver import build
from fewstep.core.state import Run
from fewstep.core.tableau import Tableau
from fewstep.data import Data, load_data
from fewstep.distill import SiD, distill
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.measure import evaluate
from fewstep.report.page import write_page
from fewstep.report.pictures import save_strips
from fewstep.report.plots import terminal_table
from fewstep.report.results import Group, Results, Row, Trajectories
from fewstep.report.rows import converged, measure_sampler
from fewstep.train import EDMTraining, train, untrained

SOLVERS_SHOWN = ("euler", "dpmpp2m", "ipndm3")
PATHS_SHOWN = 12


@dataclass(frozen=True)
class Demo:
    """Trains a teacher on digits, samples it fast without training, distils it to one step, and measures all.

    Attributes:
        out: run folder; the page is out/index.html.
        steps: of the teacher's training.
        student_steps: of the distillation.
        width: of the teacher's network, a residual MLP.
        batch: pictures per training step.
        n: pictures generated per row.
        seed: of everything.
        nfes: evaluations that the fast samplers are compared at.
        overwrite: deletes an earlier demo in out.
    """

    out: Path = Path("runs/demo")
    steps: int = 2500
    student_steps: int = 300
    width: int = 256
    batch: int = 256
    n: int = 2000
    seed: int = 0
    nfes: tuple[int, ...] = (3, 4, 5, 6)
    overwrite: bool = False

    def run(self) -> None:
        """Runs the command."""
        sizes = (*self.nfes, self.steps, self.student_steps, self.width, self.batch)
        if self.n < 100 or not self.nfes or min(sizes) < 1:
            raise InputError(f"the demo needs n >= 100 and steps, width, batch and evaluations >= 1, got {self}")
        run = Run.open(self.out, recipe_of("demo", self), overwrite=self.overwrite)
        stages = _Stages()
        data = load_data("digits")
        stages.say(f"digits: {data.report}")
        with stages("teacher"):
            teacher = self.teacher(data)
        with stages("converged end points"):
            ends = converged(teacher, self.n, seed=self.seed + 1)
        rows = [self.row(teacher, data, "teacher", ends, ("teacher", "teacher", None))]
        with stages("solvers"):
            rows += self.solvers(teacher, data, ends)
        with stages("calibration"):
            tables = self.calibrated(teacher)
        with stages("calibrated samplers"):
            for table in tables:
                path = f"--sampler {self.out}/calibrated-{table.nfe}/tableau.json"
                rows.append(self.row(teacher, data, "calibrated", ends, ("calibrated", "teacher", path), table))
        with stages("student"):
            student = self.student(teacher)
        rows.append(self.row(student, data, "student", None, ("SiD", "sid", None)))
        results = Results("fewstep demo: scikit-learn's digits", [], f"{len(data)} digits, 8x8", rows)
        results.floor = self.floor(data)
        results.curves = {name: Run(self.out / name).read_log() for name in ("teacher", "sid")}
        results.trajectories = self.paths(teacher, tables)
        conclude(results, self.n)
        results.facts = self.facts(stages)
        page = write_page(results, self.out / "index.html")
        save_strips([(say(r), r.pictures[:20]) for r in best_rows(rows)], self.out / "demo.png")
        for row in rows:
            run.log(
                {"step": 0, "row": row.name, "nfe": row.nfe, "rmse": row.rmse, "seconds": row.seconds, **row.metrics}
            )
        Console().print(terminal_table(results))
        for line in results.summary:
            stages.say(line)
        stages.say(f"the page: {page}   ({stages.total():.0f} s)")

    def teacher(self, data: Data) -> Generator:
        """A residual MLP trained with EDM's objective."""
        start = untrained(data, "resmlp", seed=self.seed, width=self.width, embedding=64)
        method = EDMTraining(optim=Optim(lr=2e-3, warmup=100, decay="cosine", clip=1.0), ema=Ema(power=0.08))
        return train(
            start,
            method,
            data,
            out=self.out / "teacher",
            budget=self.steps,
            seed=self.seed,
            batch=self.batch,
            overwrite=True,
        )

    def student(self, teacher: Generator) -> Generator:
        """One step by SiD, without data."""
        return distill(
            teacher, DEMO_SID, out=self.out / "sid", budget=self.student_steps, seed=self.seed, batch=self.batch
        )

    def row(
        self,
        made: Generator,
        data: Data,
        group: Group,
        ends: Tensor | None,
        names: tuple[str, str, str | None],
        table: Tableau | None = None,
    ) -> Row:
        """One measured row; its command repeats it from the folders that the demo leaves."""
        name, folder, flags = names
        paired = " --paired" if ends is not None else ""
        command = f"fewstep evaluate {self.out}/{folder} --n {self.n} --seed {self.seed + 1}{paired} {flags or ''}"
        return measure_sampler(
            made,
            table or made.sampler,
            data,
            name=name,
            group=group,
            command=command.strip(),
            n=self.n,
            seed=self.seed + 1,
            ends=ends,
        )

    def solvers(self, teacher: Generator, data: Data, ends: Tensor) -> list[Row]:
        """Known solvers on Karras' grid."""
        D, rows = teacher.denoiser, []
        for solver in SOLVERS_SHOWN:
            for nfe in self.nfes:
                table = build(solver, karras(nfe, D.sigma_min, D.sigma_max))
                flags = f"--sampler {solver} --steps {nfe}"
                rows.append(self.row(teacher, data, "solver", ends, (table.name, "teacher", flags), table))
        return rows

    def calibrated(self, teacher: Generator) -> list[Tableau]:
        """A fitted table for each number of evaluations, saved."""
        tables = []
        for nfe in self.nfes:
            table = calibrate_generator(teacher, nfe=nfe, seed=self.seed)
            save_calibrated(table, self.out / f"calibrated-{nfe}")
            tables.append(table)
        return tables

    def floor(self, data: Data) -> dict[str, float]:
        """Real against real: a bootstrap of the data as large as the samples, so that the bias of n is the same."""
        ids = Noise.of(self.seed, self.n).integers(0, len(data), (), "bootstrap")
        batch = data.take(ids)
        assert batch.x is not None
        return evaluate(batch.x, data, labels=batch.cond["label"], seed=self.seed)

    def paths(self, teacher: Generator, tables: list[Tableau]) -> list[Trajectories]:
        """Trajectories of a few samples from the same noise: converged, by known solvers, and calibrated."""
        D, nfe = teacher.denoiser, self.nfes[len(self.nfes) // 2]
        noise = Noise.of(self.seed + 1, PATHS_SHOWN)
        cond = teacher.conditions(None, noise)
        x = D.sigma_max * noise.normal(D.shape, "start")
        shown = [
            ("converged", build("dpmpp", karras(96, D.sigma_min, D.sigma_max), order=3, exact=True)),
            (f"euler, {nfe}", build("euler", karras(nfe, D.sigma_min, D.sigma_max))),
            (f"dpmpp-2m, {nfe}", build("dpmpp2m", karras(nfe, D.sigma_min, D.sigma_max))),
            (f"calibrated, {nfe}", next(t for t in tables if t.nfe == nfe)),
        ]
        made = []
        for name, table in shown:
            steps = list(trajectory(D, x, table, cond))
            made.append(Trajectories(name, [s.level for s in steps], torch.stack([s.point.flatten(1) for s in steps])))
        return made

    def facts(self, stages: _Stages) -> dict[str, str]:
        """Where and how the numbers were made."""
        return {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
            "versions": f"fewstep {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            "seed": f"{self.seed} for training, {self.seed + 1} for pictures",
            "repeat all": f"fewstep demo --recipe {self.out}/recipe.json --out runs/again",
            **{name: f"{seconds:.1f} s" for name, seconds in stages.seconds.items()},
            "all": f"{stages.total():.1f} s",
        }


DEMO_SID = SiD(
    student=Optim(lr=3e-4, betas=(0.0, 0.999), warmup=20), fake=Optim(lr=6e-4, betas=(0.0, 0.999), warmup=20)
)


@dataclass
class _Stages:
    """Times the parts and says which one runs."""

    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        clock = time.perf_counter()
        self.say(f"{name} ...")
        yield
        self.seconds[name] = time.perf_counter() - clock

    def say(self, text: str) -> None:
        """A line for the person who waits."""
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start


def pick(row: Row, metric: str) -> float:
    """A metric of a row, whatever its sample count."""
    return next((v for k, v in row.metrics.items() if k.split("@")[0] == metric), float("nan"))


def say(row: Row) -> str:
    """A row in words."""
    return f"{row.name}: {row.nfe} evaluation{'s' * (row.nfe > 1)}, Frechet distance {pick(row, 'fd'):.2f}"


def best_rows(rows: list[Row]) -> list[Row]:
    """The teacher, the cheapest known solver and calibrated sampler, and the student: the picture of the README."""
    cheapest = {g: [r for r in rows if r.group == g][:1] for g in ("teacher", "solver", "calibrated", "student")}
    return [r for found in cheapest.values() for r in found]


def conclude(results: Results, n: int) -> None:
    """Fills in the targets and the sentences on top, from the measured rows alone."""
    rows = results.rows
    teacher = next(r for r in rows if r.group == "teacher")
    student = next(r for r in rows if r.group == "student")
    fd, top = pick(teacher, "fd"), pick(student, "fd")
    results.targets.append(
        (f"teacher at {teacher.nfe} evaluations: Frechet distance at most 0.6", f"{fd:.3f}", fd <= 0.6)
    )
    for row in (r for r in rows if r.group == "calibrated"):
        errors = [r.rmse for r in rows if r.group == "solver" and r.nfe == row.nfe and r.rmse is not None]
        assert row.rmse is not None
        ratio, distance = row.rmse / min(errors), pick(row, "fd") / fd
        asked = f"calibrated at {row.nfe}: paired error at most 0.6 x the best other solver's"
        results.targets.append((asked, f"{ratio:.2f} x", ratio <= 0.6))
        asked = f"calibrated at {row.nfe}: Frechet distance at most 1.15 x the teacher's"
        results.targets.append((asked, f"{distance:.2f} x ({pick(row, 'fd'):.3f})", distance <= 1.15))
    results.targets.append(("one-step student: Frechet distance at most 0.75", f"{top:.3f}", top <= 0.75))
    recall = pick(student, "recall")
    results.targets.append(("one-step student: recall at least 0.7", f"{recall:.3f}", recall >= 0.7))
    fast = next(r for r in rows if r.group == "calibrated")
    others = [r for r in rows if r.group == "solver" and r.nfe == fast.nfe]
    best = min(others, key=lambda r: pick(r, "fd"))
    results.summary += [
        f"The teacher needs {teacher.nfe} evaluations per picture and reaches a Frechet distance of {fd:.3f} "
        f"(real data against itself: {next(iter(results.floor.values())):.3f}; 100 is the variance of the data).",
        f"Without any training, the calibrated sampler reaches {pick(fast, 'fd'):.3f} in {fast.nfe} evaluations; "
        f"the best other solver there, {best.name}, reaches {pick(best, 'fd'):.3f}.",
        f"Distilled without data to one evaluation, the student reaches {top:.3f} with a recall of {recall:.2f}.",
        f"Every number rests on {n} generated pictures against all {results.data}.",
    ]
