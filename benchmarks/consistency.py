"""Consistency students of the digits teacher beside the teacher and calibrated samplers, at the same evaluations.

    python benchmarks/quality.py --task digits --teacher-only     # the teacher
    python benchmarks/consistency.py                              # about 15 minutes on one core

Every method trains once, and a finished run is used again; its student is sampled with 1, 2 and 4 evaluations. Writes
benchmarks/results/consistency.json: Frechet distances, precision, recall and label accuracy at each seed of pictures.
"""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep import Generator
from fewstep.cli.calibrate import calibrate_generator
from fewstep.core.role import Optim
from fewstep.core.state import read_json, write_text
from fewstep.data import Data, load_data
from fewstep.distill import distill
from fewstep.distill.consistency import CD, Consistency
from fewstep.distill.consistency_training import CT, ECT
from fewstep.report.rows import measure_sampler

METRICS = ("fd", "pixel_fd", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Flags:
    """What to run.

    Attributes:
        teacher: a generator of digits.
        methods: cd, ct and ect.
        iterations: training steps of each.
        batch: pictures per step.
        lr: peak learning rate.
        nfes: evaluations.
        samples: pictures per row and seed.
        seeds: of the pictures.
        threads: of torch.
        out: folder of the runs.
        results: where the numbers go.
    """

    teacher: Path = Path("runs/bench-quality/digits")
    methods: tuple[str, ...] = ("cd", "ct", "ect")
    iterations: int = 1800
    batch: int = 256
    lr: float = 1e-3
    nfes: tuple[int, ...] = (1, 2, 4)
    samples: int = 4000
    seeds: tuple[int, ...] = (11, 12)
    threads: int = 1
    out: Path = Path("runs/bench-consistency")
    results: Path = Path("benchmarks/results")


def settings(flags: Flags) -> dict[str, Consistency]:
    """The methods by name; all have the same optimizer."""
    optim = Optim(lr=flags.lr, warmup=20, decay="cosine", clip=1.0)
    return {
        "cd": CD(optim=optim),
        "ct": CT(optim=optim, iterations=flags.iterations),
        "ect": ECT(optim=optim, iterations=flags.iterations),
    }


def main(flags: Flags) -> None:
    """Runs everything; a method that was measured before keeps its rows until it is measured again."""
    torch.set_num_threads(flags.threads)
    data, teacher, path = load_data("digits"), Generator.load(flags.teacher), flags.results / "consistency.json"
    rows: list[dict[str, Any]] = read_json(path)["rows"] if path.exists() else []
    if not any(row["name"] == "teacher" for row in rows):
        rows = [measure(flags, data, teacher, teacher.sampler, "teacher")]
        for nfe in flags.nfes:
            rows.append(measure(flags, data, teacher, calibrate_generator(teacher, nfe=nfe), "calibrated"))
    for name in flags.methods:
        made = students(flags, data, teacher, name)
        rows = [row for row in rows if row["name"] != name] + made
        body = {
            "benchmark": "consistency",
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()},
            "machine": f"{platform.machine()}, {flags.threads} threads, torch {torch.__version__}",
            "rows": rows,
        }
        write_text(path, json.dumps(body, indent=1) + "\n")
    show(rows)


def students(flags: Flags, data: Data, teacher: Generator, name: str) -> list[dict[str, Any]]:
    """One training, one row for every number of evaluations."""
    method, out = settings(flags)[name], flags.out / name
    resume = (out / "recipe.json").is_file()
    made = distill(
        teacher, method, data, out=out, budget=flags.iterations, batch=flags.batch, resume=resume, save_every=0
    )
    facts = {
        "training_seconds": made.card["trained"]["seconds"],
        "iterations": flags.iterations,
        "method": asdict(method),
    }
    tables = [replace(method, steps=nfe).sampler(teacher) for nfe in flags.nfes]
    return [{**measure(flags, data, made, table, name), **facts} for table in tables]


def measure(flags: Flags, data: Data, made: Generator, sampler: Any, name: str) -> dict[str, Any]:
    """One row: every metric at every seed."""
    found = [
        measure_sampler(made, sampler, data, name=name, group="solver", command="", n=flags.samples, seed=seed)
        for seed in flags.seeds
    ]
    row: dict[str, Any] = {"name": name, "nfe": found[0].nfe, "seeds": list(flags.seeds)}
    for metric in METRICS:
        keys = [k for k in found[0].metrics if k.split("@")[0] == metric]
        row |= {metric: [round(r.metrics[keys[0]], 4) for r in found]} if keys else {}
    print(row, flush=True)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """The means over the seeds."""
    table = Table("sampler", "NFE", *METRICS)
    for row in rows:
        table.add_row(
            row["name"], str(row["nfe"]), *(f"{statistics.mean(row[m]):.3f}" if m in row else "" for m in METRICS)
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Flags))
