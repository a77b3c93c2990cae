"""Adaptive collaboration on digits: quality against average evaluations, beside student and teacher alone.

    python benchmarks/digits.py            # the teacher and its students
    python benchmarks/collaboration.py     # about a minute on one core, nothing is trained

For each share of the student's pictures that the teacher gets: Frechet distances, precision and label accuracy at each
seed, with the average number of evaluations. A student's picture beats the teacher's, from the same noise and label,
where the oracle says so. The oracle and the Frechet distance read the same digits network: pixel FD does not.
Writes benchmarks/results/collaboration.json.
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

from fewstep import Generator, Noise
from fewstep.core.state import write_text
from fewstep.data import load_data
from fewstep.measure import evaluate
from fewstep.solve.collaboration import Collaboration, oracle_of

METRICS = ("fd", "pixel_fd", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Flags:
    """What to run.

    Attributes:
        teacher: a generator of digits.
        students: its students.
        shares: of the pictures that the teacher gets.
        rollbacks: of refinement; 0 stands for regeneration.
        oracle: label or confidence.
        samples: pictures per row and seed.
        seeds: of the pictures.
        threads: of torch.
        results: where the numbers go.
    """

    teacher: Path = Path("runs/bench-digits/teacher")
    students: tuple[Path, ...] = (Path("runs/bench-digits/sfd-2-resmlp"),)
    shares: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0)
    rollbacks: tuple[float, ...] = (0.5, 0.0)
    oracle: str = "label"
    samples: int = 4000
    seeds: tuple[int, ...] = (11, 12)
    threads: int = 1
    results: Path = Path("benchmarks/results/collaboration.json")


def main(flags: Flags) -> None:
    """Measures everything and writes the results."""
    torch.set_num_threads(flags.threads)
    data, teacher = load_data("digits"), Generator.load(flags.teacher)
    oracle, n = oracle_of(flags.oracle, data.shape), flags.samples
    labels = {seed: teacher.conditions(None, Noise.of(seed, n)) for seed in flags.seeds}
    made = {seed: teacher.sample(n, labels[seed], seed=seed, progress=False) for seed in flags.seeds}
    theirs = {seed: oracle(made[seed], labels[seed]) for seed in flags.seeds}
    rows = [{"student": "", "mode": "teacher", "share": 1.0, "nfe": teacher.sampler.nfe, "seeds": list(flags.seeds)}]
    found = [evaluate(made[s], data, metrics=METRICS, labels=labels[s]["label"], seed=s) for s in flags.seeds]
    rows[0] |= {metric: [round(f[f"{metric}@{n}"], 4) for f in found] for metric in METRICS}
    for place in flags.students:
        student = Generator.load(place)
        for rollback in flags.rollbacks:
            mode = "refine" if rollback else "regenerate"
            for share in flags.shares:
                if share == 0 and rollback != flags.rollbacks[0]:
                    continue
                both = Collaboration.calibrated(
                    student, teacher, oracle, share=share, mode=mode, rollback=rollback or 0.5
                )
                runs = {s: both.sample(n, labels[s], seed=s) for s in flags.seeds}
                found = [
                    evaluate(r.pictures, data, metrics=METRICS, labels=labels[s]["label"], seed=s)
                    for s, r in runs.items()
                ]
                row: dict[str, Any] = {"student": place.name, "mode": mode if share else "student"}
                row |= {"asked": share, "share": round(statistics.mean(r.share for r in runs.values()), 4)}
                row |= {"rollback": rollback, "nfe": round(statistics.mean(r.nfe for r in runs.values()), 3)}
                row |= {metric: [round(f[f"{metric}@{n}"], 4) for f in found] for metric in METRICS}
                beats = [float((r.scores > theirs[s].cpu()).double().mean()) for s, r in runs.items()]
                rows.append({**row, "student_beats_teacher": [round(b, 4) for b in beats], "seeds": list(flags.seeds)})
                print(rows[-1], flush=True)
    body = {
        "benchmark": "collaboration",
        "settings": json.loads(json.dumps(asdict(flags), default=str)),
        "machine": f"{platform.machine()}, {flags.threads} threads, torch {torch.__version__}",
        "rows": rows,
    }
    write_text(flags.results, json.dumps(body, indent=1) + "\n")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """The means over the seeds."""
    table = Table("student", "mode", "share", "NFE", *METRICS, "beats teacher")
    for row in rows:
        beats = row.get("student_beats_teacher")
        table.add_row(
            row["student"],
            row["mode"],
            f"{row['share']:.2f}",
            f"{row['nfe']:.2f}",
            *(f"{statistics.mean(row[m]):.3f}" for m in METRICS),
            f"{statistics.mean(beats):.2f}" if beats else "",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Flags))
