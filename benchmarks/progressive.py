"""Progressive distillation on scikit-learn's digits: every stage's student beside the teacher and calibrated samplers.

    python benchmarks/progressive.py                 # on the teacher of `python benchmarks/quality.py --teacher-only`

Writes benchmarks/results/progressive.json: every number with seed, sample count, seconds and machine.
"""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep import Generator
from fewstep.cli.calibrate import calibrate_generator
from fewstep.core.role import Optim
from fewstep.core.state import write_text
from fewstep.data import load_data
from fewstep.distill.progressive import STAGES, Progressive
from fewstep.report.rows import converged, measure_sampler
from fewstep.solve.euler import euler

METRICS = ("fd", "pixel_fd", "precision", "recall")


@dataclass(frozen=True)
class Bench:
    """What to run.

    Attributes:
        teacher: folder of a generator trained on the data.
        data: what it was trained on.
        start_steps: DDIM steps of the first teacher.
        steps: of all stages' training together.
        batch: pictures per training step.
        lr: peak learning rate of every stage.
        weight: of the error, see Progressive.
        draw: of the levels, see Progressive.
        nfes: stages to measure, by their steps.
        samples: pictures per row and seed.
        seeds: of the pictures.
        calibrated: evaluations at which a table is fitted too.
        out: folder of the run; a finished one is used again.
        results: the file that the numbers go to.
    """

    teacher: Path = Path("runs/bench-quality/digits")
    data: str = "digits"
    start_steps: int = 32
    steps: int = 1500
    batch: int = 256
    lr: float = 1e-3
    weight: str = "truncated-snr"
    draw: str = "discrete"
    nfes: tuple[int, ...] = (1, 2, 4, 8)
    samples: int = 4000
    seeds: tuple[int, ...] = (11, 12)
    calibrated: tuple[int, ...] = (1, 2, 4)
    out: Path = Path("runs/bench-progressive")
    results: Path = Path("benchmarks/results/progressive.json")


def main(flags: Bench) -> None:
    """Trains, measures and writes the results."""
    data, teacher = load_data(flags.data), Generator.load(flags.teacher)
    method = Progressive(
        steps=min(flags.nfes),
        start_steps=flags.start_steps,
        weight=flags.weight,  # type: ignore[arg-type]
        draw=flags.draw,  # type: ignore[arg-type]
        optim=Optim(lr=flags.lr, decay="linear", clip=1.0),
    )
    resume = (flags.out / "recipe.json").is_file()
    student = method.run(teacher, data, out=flags.out, budget=flags.steps, batch=flags.batch, resume=resume)
    ends = {seed: converged(teacher, flags.samples, seed=seed) for seed in flags.seeds}
    D, rows = teacher.denoiser, []

    def measure(made: Generator, sampler: Any, name: str, **facts: Any) -> None:
        found = [
            measure_sampler(
                made,
                sampler,
                data,
                name=name,
                group="solver",
                command="",
                n=flags.samples,
                seed=seed,
                ends=ends[seed],
                metrics=METRICS,
            )
            for seed in flags.seeds
        ]
        row: dict[str, Any] = {"name": name, "nfe": found[0].nfe, "seeds": list(flags.seeds), **facts}
        row |= {k: [round(r.metrics[k], 4) for r in found] for k in found[0].metrics}
        rows.append(row | {"rmse": [round(float(r.rmse or 0.0), 5) for r in found]})
        print(name, row["nfe"], *(f"{k} {statistics.mean(v):.3f}" for k, v in row.items() if "@" in k), flush=True)

    measure(teacher, teacher.sampler, "teacher")
    measure(teacher, euler(method.levels(D, flags.start_steps)), "teacher, ddim")
    for nfe in flags.nfes:
        stage = Generator.load(flags.out / STAGES / f"{nfe:04d}")
        measure(stage, stage.sampler, "progressive")
        measure(teacher, euler(method.levels(D, nfe)), "teacher, ddim")
        if nfe in flags.calibrated:
            measure(teacher, calibrate_generator(teacher, nfe=nfe), "calibrated")
    body = {
        "benchmark": "progressive",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(flags).items()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "training_seconds": round(sum(stage["seconds"] for stage in student.card["stages"]), 1),
        "stages": student.card["stages"],
        "rows": rows,
    }
    write_text(flags.results, json.dumps(body, indent=1) + "\n")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal: means over the seeds."""
    names = [k for k in rows[0] if isinstance(rows[0][k], list) and k != "seeds"]
    table = Table("sampler", "NFE", *names)
    for row in rows:
        table.add_row(row["name"], str(row["nfe"]), *(f"{statistics.mean(row[k]):.4g}" for k in names))
    Console(width=160).print(table)


if __name__ == "__main__":
    main(tyro.cli(Bench))
