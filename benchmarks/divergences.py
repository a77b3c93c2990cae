"""Which modes one-step students keep: divergences of their laws from an exact teacher's, by quadrature in the plane.

    python benchmarks/divergences.py                                    # about ten minutes of a free core
    python benchmarks/divergences.py --problems ring --seeds 0
    python benchmarks/divergences.py --seeds                            # trains none, draws what is there

The teacher answers with the exact posterior mean of a Gaussian mixture: a ring of eight modes, a grid of 25, and
a ring that is wrong in two of its modes, where the methods that learn from data see the right one. Students start as
a small network that learned to denoise the teacher's law. What was measured with the same settings is not trained
again. Writes benchmarks/results/divergences.json, docs/img/divergences.png and the tables of docs/divergences.md.
"""

from __future__ import annotations

import io
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep import Generator, Mixture
from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser, Wrapper
from fewstep.core.noise import Noise
from fewstep.core.role import Ema, Optim
from fewstep.core.state import read_json, write_bytes, write_text
from fewstep.data import Images
from fewstep.distill import METHODS
from fewstep.distill.front import distill
from fewstep.errors import unknown
from fewstep.loss.draw import KarrasUniform
from fewstep.measure.divergence import divergences, mode_shares
from fewstep.train import EDMTraining, train, untrained
from tasks import MODES, RADIUS, grid25, ring

# Both laws are smoothed by this; the modes' own deviation is .05.
BANDWIDTH = 0.02
# Of the wrong ring: a mode that the teacher has too far inside, by three deviations, and one that it has not.
SHIFTED, MISSING, INWARD = 0, MODES // 2, 0.15
RING, GRID = ring(), grid25()
# The tables of the page stand between two of these.
MARK = "<!-- written by benchmarks/divergences.py -->\n"


def wrong_ring() -> Mixture:
    """:func:`ring` with one mode moved inwards and the mode across from it left out."""
    means = RING.means.clone()
    means[SHIFTED] *= (RADIUS - INWARD) / RADIUS
    kept = [k for k in range(MODES) if k != MISSING]
    return Mixture(means[kept], RING.variances[kept])


@dataclass(frozen=True)
class Problem:
    """What the teacher knows, what the data are drawn from, and which cases are measured on it."""

    teacher: Mixture
    truth: Mixture
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A method with some of its settings changed; ``cost`` is an iteration's, in those of VSD."""

    method: str
    changed: Mapping[str, Any]
    cost: float = 1.0


MATCHED = ("vsd", "emd", "f-distill, reverse-kl", "f-distill, jensen-shannon", "f-distill, forward-kl", "sid")
CASES: dict[str, Case] = {
    "vsd": Case("vsd", {}),
    "emd": Case("emd", {"chain": 8, "noise_step": 0.15}, cost=4.0),
    "f-distill, reverse-kl": Case("f-distill", {"divergence": "reverse-kl"}),
    "f-distill, jensen-shannon": Case("f-distill", {"divergence": "jensen-shannon"}),
    "f-distill, forward-kl": Case("f-distill", {"divergence": "forward-kl"}),
    "sid": Case("sid", {}),
    "dmd2, gan 0": Case("dmd2", {"gan": 0.0}),
    "dmd2, gan 0.003": Case("dmd2", {"gan": 3e-3}),
    "dmd2, gan 0.3": Case("dmd2", {"gan": 0.3}),
}
PROBLEMS: dict[str, Problem] = {
    "grid25": Problem(GRID, GRID, MATCHED),
    "ring": Problem(RING, RING, MATCHED),
    "wrong-ring": Problem(
        wrong_ring(), RING, ("dmd2, gan 0", "dmd2, gan 0.003", "dmd2, gan 0.3", "f-distill, jensen-shannon", "sid")
    ),
}
# What is compared, in what number, on which problems: the first should have the smaller one.
CLAIMS = (
    ("f-distill, jensen-shannon", "f-distill, reverse-kl", "forward_kl", ("ring", "grid25")),
    ("f-distill, forward-kl", "f-distill, reverse-kl", "forward_kl", ("ring", "grid25")),
    ("emd", "vsd", "forward_kl", ("ring", "grid25")),
    ("vsd", "emd", "between", ("ring", "grid25")),
    ("sid", "vsd", "jensen_shannon", ("ring", "grid25")),
    ("dmd2, gan 0.003", "dmd2, gan 0", "jensen_shannon", ("wrong-ring",)),
    ("dmd2, gan 0.3", "dmd2, gan 0", "jensen_shannon", ("wrong-ring",)),
    ("dmd2, gan 0.3", "f-distill, jensen-shannon", "jensen_shannon", ("wrong-ring",)),
)


class ExactTeacher(Wrapper):
    """A network that students are copied from, answered for by the exact denoiser of a known law."""

    def __init__(self, denoiser: Denoiser, law: Mixture) -> None:
        super().__init__(denoiser)
        self.law = law

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """The posterior mean, (B, 1, 1, 2)."""
        return self.law(x, sigma)

    def describe(self) -> dict[str, Any]:
        """With the law, so that a run knows which teacher it had."""
        law = {"means": self.law.means.flatten().tolist(), "log_weights": self.law.log_weights.tolist()}
        return {**super().describe(), "law": law}


@dataclass(frozen=True)
class Flags:
    """What to run.

    Attributes:
        problems: ring, grid25 or wrong-ring; all without any.
        cases: by their names in the table; all of each problem without any.
        seeds: of the trainings.
        iterations: of a training; a method whose iterations cost more makes fewer.
        batch: points per iteration.
        lr: of every student; fake scores and discriminators learn at twice this rate.
        sigma_init: the level that all students start from.
        width: of the network's two blocks.
        start_steps: of the starting network's training.
        samples: points that a student's law is estimated from.
        out: folder of the students.
        results: where the numbers go.
        page: where the table goes; the picture lies in ``img`` beside it.
    """

    problems: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1)
    iterations: int = 1500
    batch: int = 256
    lr: float = 1e-3
    sigma_init: float = 2.5
    width: int = 64
    start_steps: int = 600
    samples: int = 200_000
    out: Path = Path("runs/bench-divergences")
    results: Path = Path("benchmarks/results")
    page: Path = Path("docs/divergences.md")


def main(flags: Flags) -> None:
    """Trains what is not there yet, measures, and writes."""
    torch.set_num_threads(1)
    for name in flags.problems:
        if name not in PROBLEMS:
            raise unknown("problem", name, PROBLEMS)
    for name in flags.cases:
        if name not in CASES:
            raise unknown("case", name, CASES)
    path = flags.results / "divergences.json"
    settings = {k: getattr(flags, k) for k in ("iterations", "batch", "lr", "sigma_init", "width", "start_steps")}
    body = read_json(path) if path.is_file() else {}
    rows: list[dict[str, Any]] = body.get("rows", []) if body.get("settings") == settings else []
    for seed in flags.seeds:
        for name in flags.problems or tuple(PROBLEMS):
            wanted = [c for c in PROBLEMS[name].cases if c in flags.cases or not flags.cases]
            start = started(flags, name) if wanted else None
            for case in wanted:
                if start is None or any((r["problem"], r["name"], r["seed"]) == (name, case, seed) for r in rows):
                    continue
                rows.append(measured(flags, name, case, seed, start))
                write(path, settings, rows)
    show(rows)
    text = flags.page.read_text() if flags.page.is_file() else ""
    before, _, rest = text.partition(MARK)
    write_text(flags.page, f"{before}{MARK}{tables(settings, rows)}{MARK}{rest.partition(MARK)[2]}")
    draw(flags, rows, flags.page.parent / "img" / "divergences.png")


def started(flags: Flags, name: str) -> Generator:
    """The exact teacher around a network that learned to denoise its law."""
    law, out = PROBLEMS[name].teacher, flags.out / f"start-{name}-{flags.width}-{flags.start_steps}"
    if (out / "fewstep.json").is_file():
        made = Generator.load(out)
    else:
        data = drawn(law, name)
        method = EDMTraining(optim=Optim(lr=2e-3, warmup=50, decay="cosine", clip=1.0), ema=Ema(power=0.08))
        fresh = untrained(data, "resmlp", width=flags.width, embedding=32, blocks=2)
        again = (out / "recipe.json").is_file()
        made = train(fresh, method, data, out=out, budget=flags.start_steps, batch=256, resume=again, progress=False)
    return replace(made, denoiser=ExactTeacher(made.denoiser, law))


def drawn(law: Mixture, name: str) -> Images:
    """Pictures of one row and two pixels."""
    return Images(name, law.draw(20_000, seed=5).float())


def method_of(flags: Flags, case: Case) -> Any:
    """The method with what all cases share: rates, averages, levels, one update of the fake score for each."""
    made = METHODS[case.method]()
    student = Optim(lr=flags.lr, betas=(0.0, 0.99), decay="cosine", clip=10.0)
    shared: dict[str, Any] = {
        "student": student,
        "fake": replace(student, lr=2 * flags.lr),
        "ema": Ema(power=0.1),
        "sigma_init": flags.sigma_init,
        "draw": KarrasUniform(top=0.8),
        "fake_draw": KarrasUniform(top=0.8),
        "ratio": 1,
    }
    return replace(made, **{k: v for k, v in shared.items() if hasattr(made, k)}, **case.changed)


def measured(flags: Flags, name: str, key: str, seed: int, start: Generator) -> dict[str, Any]:
    """Trains one student and measures it against the law of the data and against the teacher's."""
    case, problem = CASES[key], PROBLEMS[name]
    method = method_of(flags, case)
    data = drawn(problem.truth, f"{name}-truth") if method.needs_data else None
    steps, clock = max(1, round(flags.iterations / case.cost)), time.process_time()
    out = folder(flags, name, key, seed)
    options: dict[str, Any] = {"batch": flags.batch, "seed": seed, "save_every": 0, "progress": False}
    student = distill(start, method, data, out=out, budget=steps, overwrite=True, **options)
    seconds = time.process_time() - clock
    points = points_of(student, flags.samples)
    row = {"problem": name, "name": key, "seed": seed, "iterations": steps, "cpu_seconds": round(seconds, 1)}
    for of, law in (("", problem.truth), ("teacher_", problem.teacher)):
        if of and problem.teacher is problem.truth:
            continue
        found, modes = divergences(points, law, bandwidth=BANDWIDTH), mode_shares(points, law)
        row |= {f"{of}{k}": round(v, 4) for k, v in found._asdict().items()}
        row |= {f"{of}modes": modes.modes, f"{of}between": round(modes.between, 4)}
        row[f"{of}shares"] = [round(s, 4) for s in modes.shares]
    print(*(f"{k} {v}" for k, v in row.items() if "shares" not in k), flush=True)
    return row


def folder(flags: Flags, problem: str, case: str, seed: int) -> Path:
    """Where a student lies."""
    return flags.out / f"{problem}-{case.replace(', ', '-').replace(' ', '')}-{seed}"


@torch.no_grad()
def points_of(student: Generator, n: int) -> Tensor:
    """``n`` points, not cut off at the borders of pictures as those of :meth:`Generator.sample` are."""
    noise = Noise.of(1234, n)
    x = student.start_std() * noise.normal(student.denoiser.shape, "start")
    return torch.cat([student.sampler(student.denoiser, part, {}) for part in x.split(20_000)])


def claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was measured of each claim, one entry for each problem with both sides at hand."""
    found = []
    for better, worse, number, problems in CLAIMS:
        for problem in problems:
            sides = [[r[number] for r in rows if (r["problem"], r["name"]) == (problem, n)] for n in (better, worse)]
            if all(sides):
                held = max(sides[0]) < min(sides[1])
                lost = min(sides[0]) > max(sides[1])
                told = "holds" if held else "fails" if lost else "open"
                found.append(
                    {"problem": problem, "less": better, "than": worse, "in": number, "values": sides, "it": told}
                )
    return found


def write(path: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The numbers."""
    body = {
        "benchmark": "divergences",
        "settings": dict(settings),
        "bandwidth": BANDWIDTH,
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "floor": floor(),
        "claims": claims(rows),
        "rows": list(rows),
    }
    write_text(path, json.dumps(body, indent=1) + "\n")


@cache
def floor() -> dict[str, dict[str, float]]:
    """What draws of the laws themselves measure: no student can be told from its teacher below this."""
    found = {}
    for name in ("ring", "grid25"):
        law = PROBLEMS[name].truth
        points = law.draw(200_000, seed=77)
        told = {**divergences(points, law, bandwidth=BANDWIDTH)._asdict(), "between": mode_shares(points, law).between}
        found[name] = {k: round(v, 5) for k, v in told.items()}
    return found


COLUMNS = ("reverse_kl", "forward_kl", "jensen_shannon", "modes", "between")


def table_of(rows: Sequence[Mapping[str, Any]], problem: str) -> list[list[str]]:
    """Name, iterations, and for each number its mean over the seeds with the values behind it."""
    found = []
    for case in PROBLEMS[problem].cases:
        mine = [r for r in rows if (r["problem"], r["name"]) == (problem, case)]
        if not mine:
            continue
        cells = [case, str(mine[0]["iterations"])]
        for number in COLUMNS:
            values = [r[number] for r in mine]
            every = " / ".join(f"{v:.3g}" for v in values)
            cells.append(f"{statistics.mean(values):.3g} ({every})" if len(values) > 1 else every)
        found.append(cells)
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The tables on the terminal."""
    for problem in PROBLEMS:
        table = Table("student", "iterations", *COLUMNS, title=problem)
        for cells in table_of(rows, problem):
            table.add_row(*cells)
        Console(width=150).print(table)


def tables(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables in Markdown."""
    lines = ["", f"Settings: {', '.join(f'{k} {v}' for k, v in settings.items())}; bandwidth {BANDWIDTH}.", ""]
    for problem in PROBLEMS:
        cells = table_of(rows, problem)
        if cells:
            head = ["student", "iterations", *COLUMNS]
            lines += [f"## {problem}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
            lines += [*(f"| {' | '.join(c)} |" for c in cells), ""]
    lines += ["## Claims", "", "| problem | expected | in | values | |", "|---|---|---|---|---|"]
    for c in claims(rows):
        values = " against ".join(" / ".join(f"{v:.3g}" for v in side) for side in c["values"])
        lines.append(f"| {c['problem']} | {c['less']} < {c['than']} | {c['in']} | {values} | {c['it']} |")
    return "\n".join(lines) + "\n"


def draw(flags: Flags, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Points of the first seed's students, one line of pictures for each problem."""
    from matplotlib.figure import Figure

    shown = [p for p in PROBLEMS if any(r["problem"] == p for r in rows)]
    if not shown:
        return
    most = max(len(PROBLEMS[p].cases) for p in shown) + 1
    figure = Figure(figsize=(2.1 * most, 2.3 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), most, squeeze=False)
    for line, name in zip(axes, shown, strict=True):
        panels = [("teacher", PROBLEMS[name].teacher.draw(2000, seed=3))]
        for case in PROBLEMS[name].cases:
            place = folder(flags, name, case, min(int(r["seed"]) for r in rows))
            if (place / "fewstep.json").is_file():
                panels.append((case, points_of(Generator.load(place), 2000)))
        for ax in line:
            ax.set_axis_off()
        for ax, (title, points) in zip(line, panels, strict=False):
            x, y = points.flatten(1).T.tolist()
            ax.set_axis_on()
            ax.plot(x, y, ",", color="C0" if title != "teacher" else "black", alpha=0.6)
            ax.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")
            ax.set_title(title if title != "teacher" else f"{name}: teacher", fontsize=8)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    write_bytes(path, held.getvalue())


if __name__ == "__main__":
    main(tyro.cli(Flags))
