"""Quality against evaluations on trained teachers: every solver on several grids, and calibrated samplers, one run.

    python benchmarks/quality.py --task digits                        # about 15 minutes on two cores
    python benchmarks/quality.py --task stacked-digits
    python benchmarks/quality.py --task cifar10-8 --data cifar10/train.parquet
    python benchmarks/quality.py --task cifar10-32 --data cifar10/train.parquet --device cuda

For each guidance scale: the paired RMSE to the teacher's own converged end points at the same noise, and the Frechet
distance (in pixels where there is no feature network), of the teacher, of every solver x grid, and of the table that
``fewstep calibrate`` fits. Writes benchmarks/results/quality-<task>.json.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep import Generator, Tableau
from fewstep.cli.calibrate import calibrate_generator
from fewstep.core.role import Ema, Optim
from fewstep.core.state import write_text
from fewstep.data import Data, load_data
from fewstep.errors import InputError, unknown
from fewstep.grid import grid
from fewstep.guide import CFG
from fewstep.report.rows import converged, measure_sampler
from fewstep.solve import build
from fewstep.train import EDMTraining, train, untrained

SOLVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("euler", {}),
    ("dpmpp2m", {}),
    ("dpmpp3m", {}),
    ("ipndm", {"order": 3}),
    ("ipndm", {"order": 4}),
    ("unipc", {"order": 2}),
    ("unipc", {"order": 3}),
    ("deis", {"order": 3}),
)
# Of iPNDM on the grid that GITS chooses.
GITS_ORDERS = (2, 3, 4)


@dataclass(frozen=True)
class Teacher:
    """How a task's teacher is made: the network, its size, and its training."""

    data: str
    network: str
    size: dict[str, Any]
    steps: int
    batch: int
    lr: float
    resize: int | None = None
    metric: str = "fd"


TASKS = {
    "digits": Teacher("digits", "resmlp", {"width": 256, "embedding": 64}, 2500, 256, 2e-3),
    "stacked-digits": Teacher("stacked-digits", "resmlp", {"width": 512, "embedding": 64}, 3000, 256, 1.5e-3),
    "cifar10-8": Teacher("", "resmlp", {"width": 512, "embedding": 96}, 4000, 256, 1.5e-3, 8, "pixel_fd"),
    "cifar10-32": Teacher("", "unet", {}, 60000, 256, 1e-3, None, "pixel_fd"),
}


@dataclass(frozen=True)
class Quality:
    """What to run.

    Attributes:
        task: digits, stacked-digits, cifar10-8 or cifar10-32.
        data: the pictures of a cifar10 task: Parquet with encoded images, as on the Hub.
        guidances: scales of classifier-free guidance; 1 is none.
        nfes: evaluations at which samplers are compared.
        rhos: of the Karras grids; the log-SNR and GITS grids are always there.
        samples: pictures per row and seed.
        seeds: of the pictures; the second and later ones for the teacher, the calibrated and the best others.
        trajectories: that calibration fits to.
        teacher_only: trains the teacher and stops.
        device: cpu or cuda.
        out: folder of the teachers; a finished one is used again.
        results: where the numbers go.
    """

    task: str = "digits"
    data: str = ""
    guidances: tuple[float, ...] = (1.0, 2.0)
    nfes: tuple[int, ...] = (3, 4, 5, 6)
    rhos: tuple[float, ...] = (7.0, 5.0)
    samples: int = 4000
    seeds: tuple[int, ...] = (11, 12)
    trajectories: int = 256
    teacher_only: bool = False
    device: str = "cpu"
    out: Path = Path("runs/bench-quality")
    results: Path = Path("benchmarks/results")


def main(flags: Quality) -> None:
    """Runs everything and writes the results."""
    if flags.task not in TASKS:
        raise unknown("task", flags.task, TASKS)
    how = TASKS[flags.task]
    if not (how.data or flags.data):
        raise InputError(f"task {flags.task} needs --data: the Parquet file of its pictures")
    data = load_data(how.data or flags.data, resize=how.resize)
    clock = time.perf_counter()
    teacher = make_teacher(flags, how, data)
    trained = time.perf_counter() - clock
    if flags.teacher_only:
        return
    rows: list[dict[str, Any]] = []
    # Guidance needs classes to leave out; stacked digits have none.
    for guidance in flags.guidances if teacher.conds is not None else (1.0,):
        guided = replace(teacher, denoiser=CFG(teacher.denoiser, guidance)) if guidance != 1 else teacher
        ends = {seed: converged(guided, flags.samples, seed=seed) for seed in flags.seeds}
        for row in compare(flags, how, data, guided, ends):
            rows.append({"guidance": guidance, **row})
            say(rows[-1])
    body = {
        "benchmark": "quality",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items() if k != "data"},
        "metric": how.metric,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "teacher": {**{k: v for k, v in vars(how).items() if k != "data"}, "training_seconds": round(trained, 1)},
        "seconds": round(time.perf_counter() - clock, 1),
        "summary": summary(rows),
        "rows": rows,
    }
    path = flags.results / f"quality-{flags.task}.json"
    write_text(path, json.dumps(body, indent=1) + "\n")
    show(body["summary"])
    Console().print(f"{path}")


def make_teacher(flags: Quality, how: Teacher, data: Data) -> Generator:
    """Trained, or the finished one of an earlier call."""
    method = EDMTraining(optim=Optim(lr=how.lr, warmup=100, decay="cosine", clip=1.0), ema=Ema(power=0.08))
    out = flags.out / flags.task
    resume = (out / "recipe.json").is_file()
    start = untrained(data, how.network, **how.size)
    return train(start, method, data, out=out, budget=how.steps, batch=how.batch, resume=resume, device=flags.device)


def compare(
    flags: Quality, how: Teacher, data: Data, teacher: Generator, ends: dict[int, Tensor]
) -> Iterator[dict[str, Any]]:
    """The teacher's row, then for every number of evaluations all solvers, GITS and the calibrated table."""
    first = flags.seeds[0]

    def measure(sampler: Any, name: str, group: str, seed: int, **facts: Any) -> dict[str, Any]:
        row = measure_sampler(
            teacher,
            sampler,
            data,
            name=name,
            group="solver",
            command="",
            n=flags.samples,
            seed=seed,
            metrics=(how.metric,),
            extractor="pixel" if how.metric == "pixel_fd" else None,
            ends=ends[seed],
        )
        found = {"name": name, "group": group, "nfe": row.nfe, "seed": seed, "rmse": row.rmse}
        return {**found, how.metric: row.metrics[f"{how.metric}@{flags.samples}"], **facts}

    D = teacher.denoiser
    exact = build("dpmpp3m_exact", grid("karras", 96, D.sigma_min, D.sigma_max))
    for seed in flags.seeds:
        yield measure(teacher.sampler, "teacher", "teacher", seed)
        yield measure(exact, "converged", "converged", seed)
    for nfe in flags.nfes:
        made: dict[str, Tableau] = dict(peers(teacher, nfe, flags.rhos))
        for order in GITS_ORDERS:
            made[f"ipndm-{order}, gits"] = calibrate_generator(teacher, nfe=nfe, method="gits", order=order)
        rows = [measure(table, name, "peer", first) for name, table in made.items()]
        yield from rows
        again = {min(rows, key=lambda r: r[key])["name"] for key in ("rmse", how.metric)}
        for seed in flags.seeds[1:]:
            yield from (measure(made[name], name, "peer", seed) for name in sorted(again))
        clock = time.perf_counter()
        table = calibrate_generator(teacher, nfe=nfe, trajectories=flags.trajectories)
        seconds = round(time.perf_counter() - clock, 1)
        for seed in flags.seeds:
            yield measure(table, "calibrated", "calibrated", seed, calibration_seconds=seconds)


def peers(teacher: Generator, nfe: int, rhos: tuple[float, ...]) -> Iterator[tuple[str, Tableau]]:
    """Every fixed solver on every grid."""
    D = teacher.denoiser
    grids: list[tuple[str, dict[str, float]]] = [*(("karras", {"rho": rho}) for rho in rhos), ("logsnr", {})]
    for solver, options in SOLVERS:
        for kind, settings in grids:
            levels = grid(kind, nfe, D.sigma_min, D.sigma_max, **settings)
            table = build(solver, levels, **options)
            yield f"{table.name}, {kind}{''.join(f' {v:g}' for v in settings.values())}", table


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per guidance and evaluations: the calibrated table beside the best of the others, and the teacher."""
    metric = next(k for k in rows[0] if k.endswith("fd"))
    found = []
    for guidance in dict.fromkeys(r["guidance"] for r in rows):
        own = [r for r in rows if r["guidance"] == guidance]
        teacher, converged = ([r[metric] for r in own if r["group"] == g] for g in ("teacher", "converged"))
        for nfe in dict.fromkeys(r["nfe"] for r in own if r["group"] == "calibrated"):
            fitted = [r for r in own if r["group"] == "calibrated" and r["nfe"] == nfe]
            others = [r for r in own if r["group"] == "peer" and r["nfe"] == nfe]
            best, closest = min(others, key=lambda r: r[metric]), min(others, key=lambda r: r["rmse"])
            rmse = sum(r["rmse"] for r in fitted) / len(fitted)
            found.append(
                {
                    "guidance": guidance,
                    "nfe": nfe,
                    "calibrated_rmse": rmse,
                    "best_peer_rmse": closest["rmse"],
                    "closest_peer": closest["name"],
                    "rmse_ratio": rmse / closest["rmse"],
                    f"calibrated_{metric}": sum(r[metric] for r in fitted) / len(fitted),
                    f"best_peer_{metric}": best[metric],
                    "best_peer": best["name"],
                    f"teacher_{metric}": sum(teacher) / len(teacher),
                    f"converged_{metric}": sum(converged) / len(converged),
                    "calibration_seconds": fitted[0]["calibration_seconds"],
                }
            )
    return found


def say(row: dict[str, Any]) -> None:
    """One line as a row is done."""
    numbers = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
    print(f"{row['name']}  nfe {row['nfe']}  seed {row['seed']}  {numbers}", flush=True)


def show(found: list[dict[str, Any]]) -> None:
    """The summary as a table."""
    table = Table(*(k.replace("_", " ") for k in found[0]))
    for row in found:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=200).print(table)


if __name__ == "__main__":
    main(tyro.cli(Quality))
