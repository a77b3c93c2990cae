"""Consistency students of the digits teacher beside the teacher and calibrated samplers, at the same evaluations.

    python benchmarks/quality.py --task digits --teacher-only     # the teacher
    python benchmarks/consistency.py                              # about 5 minutes on one core

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
from torch.nn.functional import avg_pool2d, interpolate

from fewstep import Generator
from fewstep.cli.calibrate import calibrate_generator
from fewstep.core.role import Optim
from fewstep.core.state import read_json, write_text
from fewstep.data import Data, load_data
from fewstep.distill import distill
from fewstep.distill.consistency import CD, Consistency
from fewstep.distill.consistency_training import CT, ECT
from fewstep.edit import inpaint, super_resolve
from fewstep.measure import digits_extractor
from fewstep.report.pictures import save_strips
from fewstep.report.rows import measure_sampler

METRICS = ("fd", "pixel_fd", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Flags:
    """What to run.

    Attributes:
        teacher: a generator of digits.
        methods: cd, ct, ect, cd-original (the paper's weight and target) and cd-lpips.
        iterations: training steps of each.
        batch: pictures per step.
        lr: peak learning rate.
        edit: also edits pictures with each student, and writes a grid of them into its folder.
        nfes: evaluations.
        samples: pictures per row and seed.
        seeds: of the pictures.
        threads: of torch.
        out: folder of the runs.
        results: where the numbers go.
    """

    teacher: Path = Path("runs/bench-quality/digits")
    methods: tuple[str, ...] = ("cd", "ct", "ect")
    iterations: int = 1200
    batch: int = 256
    lr: float = 1e-3
    edit: bool = False
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
        "cd-original": CD.original(optim=optim),
        "cd-lpips": CD.original(optim=optim, distance="lpips"),
        "ct": CT(optim=optim),
        "ect": ECT(optim=optim),
    }


def main(flags: Flags) -> None:
    """Runs everything; a method that was measured before keeps its rows until it is measured again."""
    torch.set_num_threads(flags.threads)
    data, teacher, path = load_data("digits"), Generator.load(flags.teacher), flags.results / "consistency.json"
    old = read_json(path) if path.exists() else {}
    rows: list[dict[str, Any]] = old.get("rows", [])
    edits: dict[str, Any] = old.get("editing", {})
    if not any(row["name"] == "teacher" for row in rows):
        rows = [measure(flags, data, teacher, teacher.sampler, "teacher")]
        for nfe in flags.nfes:
            rows.append(measure(flags, data, teacher, calibrate_generator(teacher, nfe=nfe), "calibrated"))
    for name in flags.methods:
        made = students(flags, data, teacher, name)
        rows = [row for row in rows if row["name"] != name] + made
        edits |= {name: editing(Generator.load(flags.out / name), data, flags.out / name)} if flags.edit else {}
        body = {
            "benchmark": "consistency",
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()},
            "machine": f"{platform.machine()}, {flags.threads} threads, torch {torch.__version__}",
            "rows": rows,
            "editing": edits,
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


def editing(student: Generator, data: Data, out: Path, n: int = 600) -> dict[str, Any]:
    """PSNR of what was unknown, of one picture and of the mean of four, and label accuracy; grids of pictures."""
    every, mask = data.take(torch.arange(len(data))), torch.ones(8, 8)
    mask[:, 4:] = 0
    y, label, found = every.x[:n], every.cond["label"][:n], dict[str, Any]()
    small, classify, means = avg_pool2d(y, 2), digits_extractor().classify, every.x.mean(0, keepdim=True)

    def score(name: str, made: list[torch.Tensor], unknown: torch.Tensor) -> None:
        right = float((classify(made[0]).argmax(1) == label).float().mean())
        values = [psnr(x, y, unknown) for x in (made[0], torch.stack(made).mean(0))]
        found[name] = {"psnr": round(values[0], 2), "psnr_of_mean": round(values[1], 2), "accuracy": round(right, 4)}

    near, cubic = small.repeat_interleave(2, 2).repeat_interleave(2, 3), interpolate(small, (8, 8), mode="bicubic")
    score("filled with the mean picture", [y * mask + means * (1 - mask)], 1 - mask)
    score("nearest", [near], torch.ones(8, 8))
    score("bicubic", [cubic.clamp(-1, 1)], torch.ones(8, 8))
    for steps in (1, 4, 16, 32):
        for told, cond in (("label", label), ("no label", torch.full_like(label, -1))):
            options: dict[str, Any] = {"cond": {"label": cond}, "steps": steps}
            made = [inpaint(student, y, mask, seed=seed, **options) for seed in range(4)]
            score(f"inpainted, {told}, {steps}", made, 1 - mask)
            made = [super_resolve(student, small, seed=seed, **options) for seed in range(4)]
            score(f"enlarged, {told}, {steps}", made, torch.ones(8, 8))
            if (told, steps) == ("label", 16):
                filled = inpaint(student, y, mask, **options)
                strips = [("original", y), ("known", y * mask - (1 - mask)), ("inpainted", filled)]
                strips += [("means of blocks", near), ("enlarged", made[0])]
                save_strips([(text, x[:16]) for text, x in strips], out / "edited.png")
    return found


def psnr(x: torch.Tensor, y: torch.Tensor, where: torch.Tensor) -> float:
    """The mean over pictures of the peak signal-to-noise ratio of the pixels ``where``, of a range of 2."""
    error = ((x - y).square() * where).flatten(1).sum(1) / where.expand_as(y).flatten(1).sum(1)
    return float((10 * torch.log10(4 / error.clamp(min=1e-4))).mean())


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
