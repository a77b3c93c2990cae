"""What a one-step student keeps of a class that it is to forget: score forgetting distillation on digits.

    python benchmarks/forgetting.py --teacher FOLDER        # about five minutes on one core

The teacher is a folder that ``fewstep train --data digits`` wrote. All students have the same iterations: SiD, which
forgets nothing, and score forgetting with the terms on forgotten classes left out and at several weights. Every class
is asked for alike often. Writes benchmarks/results/forgetting.json after every row.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep import Generator
from fewstep.core.state import write_text
from fewstep.data import load_data
from fewstep.data.of_classes import OfClasses, labels_of
from fewstep.distill import ScoreForgetting, SiD, distill
from fewstep.errors import InputError
from fewstep.measure import digits_extractor, evaluate

COLUMNS = ("forgotten", "overridden", "kept_accuracy", "kept_fd", "kept_recall")


@dataclass(frozen=True)
class Flags:
    """What to run.

    Attributes:
        teacher: a generator of digits with classes.
        forget: the classes to be forgotten.
        override: the class in their place.
        weights: of the forgotten classes, in the student's loss and in the fake score's; 0.01 in the paper.
        iterations: of each training.
        batch: pictures per step.
        lr: of student and fake score, as benchmarks/digits.py has it for SiD.
        each: pictures per class.
        seed: of the pictures.
        threads: of torch.
        results: where the numbers go.
    """

    teacher: Path
    forget: tuple[int, ...] = (0,)
    override: int = 8
    weights: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0)
    iterations: int = 600
    batch: int = 64
    lr: float = 3e-4
    each: int = 400
    seed: int = 11
    threads: int = 1
    results: Path = Path("benchmarks/results")


def measure(flags: Flags, made: Generator, data: Any, name: str) -> dict[str, Any]:
    """One row: what the labels that are to be forgotten give, and how good the other classes are."""
    labels = torch.arange(data.classes).repeat_interleave(flags.each)
    pictures = made.sample(len(labels), {"label": labels}, seed=flags.seed, batch=len(labels), progress=False)
    seen = digits_extractor().classify(pictures).argmax(1)
    gone = torch.isin(labels, torch.tensor(flags.forget))
    staying = [k for k in range(data.classes) if k not in flags.forget]
    kept = evaluate(
        pictures[~gone], OfClasses(data, labels_of(data), staying), labels=labels[~gone],
        metrics=("fd", "recall", "accuracy"),
    )  # fmt: skip
    found = {key.partition("@")[0]: value for key, value in kept.items()}
    return {
        "name": name,
        "nfe": made.sampler.nfe,
        "forgotten": round(float((seen[gone] == labels[gone]).double().mean()), 4),
        "overridden": round(float((seen[gone] == flags.override).double().mean()), 4),
        "kept_accuracy": round(found["accuracy"], 4),
        "kept_fd": round(found["fd"], 4),
        "kept_recall": round(found["recall"], 4),
    }


def students(flags: Flags) -> dict[str, SiD]:
    """The methods by the names of their rows; they differ in their terms alone."""
    usual = SiD()
    plain = replace(usual, student=replace(usual.student, lr=flags.lr), fake=replace(usual.fake, lr=flags.lr))
    rates: dict[str, Any] = {"student": plain.student, "fake": plain.fake, "alpha": plain.alpha}

    def forgetting(weight: float) -> ScoreForgetting:
        return ScoreForgetting(
            forget=flags.forget, override=flags.override, forgetting=weight, fake_forgetting=weight, **rates
        )

    return {"sid": plain} | {f"score-forgetting, weight {weight:g}": forgetting(weight) for weight in flags.weights}


def main(flags: Flags) -> None:
    """Trains and measures everything.

    Raises:
        InputError: a teacher without the classes of digits.
    """
    torch.set_num_threads(flags.threads)
    teacher, data = Generator.load(flags.teacher), load_data("digits")
    if teacher.conds is None:
        raise InputError(f"{flags.teacher} has no classes to forget: train it on digits with labels")
    rows = [measure(flags, teacher, data, "teacher")]
    for name, method in students(flags).items():
        clock = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            made = distill(
                teacher, method, out=Path(folder) / "run", budget=flags.iterations, batch=flags.batch, save_every=0,
                progress=False,
            )  # fmt: skip
        spent = round(time.process_time() - clock, 1)
        rows.append({**measure(flags, made, data, name), "cpu_seconds": spent})
        print(rows[-1], flush=True)
        save(flags, teacher, rows)
    show(rows)


def save(flags: Flags, teacher: Generator, rows: list[dict[str, Any]]) -> None:
    """What has been measured so far."""
    body = {
        "benchmark": "forgetting",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items() if k != "results"},
        "machine": f"{platform.machine()}, {flags.threads} threads, torch {torch.__version__}",
        "teacher": teacher.fingerprint(),
        "rows": rows,
    }
    flags.results.mkdir(parents=True, exist_ok=True)
    write_text(flags.results / "forgetting.json", json.dumps(body, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = Table("student", "NFE", *COLUMNS)
    for row in rows:
        table.add_row(row["name"], str(row["nfe"]), *(f"{row[c]:.3f}" for c in COLUMNS))
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Flags))
