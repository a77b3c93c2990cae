"""Every calibration method beside the fixed solver that it starts from, at equal evaluations, on fresh starts.

    python benchmarks/calibrations.py                                   # the exact digits problem
    python benchmarks/calibrations.py --teacher runs/bench-quality/digits    # and a trained teacher

Mean RMSE to the exact solution, or to the teacher's converged end points at the same noise; on a trained teacher also
the Frechet distance. Writes benchmarks/results/calibrations-<exact|teacher>.json.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep import CountingDenoiser, Noise, calibrate, load
from fewstep.cli.calibrate import calibrate_generator
from fewstep.core.state import write_text
from fewstep.data import load_data
from fewstep.errors import InputError
from fewstep.report.rows import converged, measure_sampler
from fewstep.solve.calibrate import CALIBRATIONS

sys.path.insert(0, str(Path(__file__).parent))
from exact import digits_mixture


@dataclass(frozen=True)
class Calibrations:
    """What to run.

    Attributes:
        teacher: a generator's folder; the exact digits problem without one.
        methods: which; all without.
        nfes: evaluations.
        seeds: of calibration.
        samples: fresh pictures of a trained teacher.
        data: real pictures for its Frechet distance.
        results: where the numbers go.
    """

    teacher: Path | None = None
    methods: tuple[str, ...] = tuple(CALIBRATIONS)
    nfes: tuple[int, ...] = (4, 5, 6, 8)
    seeds: tuple[int, ...] = (0, 1)
    samples: int = 2000
    data: str = "digits"
    results: Path = Path("benchmarks/results")


def on_exact(flags: Calibrations) -> Iterator[dict[str, Any]]:
    """Rows of the problem with a known solution; starts that no calibration has seen."""
    problem = digits_mixture()
    x = 80 * torch.randn(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = problem.flow(x, 80.0, 0.002, steps=1000)
    ends = {True: problem(truth, 0.002), False: truth}
    for method in flags.methods:
        for nfe in flags.nfes:
            for seed in flags.seeds:
                clock = time.perf_counter()
                try:
                    sampler = calibrate(problem, nfe=nfe, method=method, seed=seed)
                except InputError as error:
                    Console().print(f"{method} at {nfe}: {error}")
                    continue
                seconds = time.perf_counter() - clock
                counted = CountingDenoiser(problem)
                found = sampler(counted, x, noise=Noise.of(1, len(x)))
                rmse = float((found - ends[sampler.end == 0]).square().mean(1).sqrt().mean())
                yield {**facts(sampler, method, nfe, seed, seconds), "nfe": counted.nfe, "rmse": rmse}


def on_teacher(flags: Calibrations) -> Iterator[dict[str, Any]]:
    """Rows of a trained generator."""
    assert flags.teacher is not None
    teacher, data = load(flags.teacher), load_data(flags.data)
    ends = converged(teacher, flags.samples, seed=21)
    for method in flags.methods:
        for nfe in flags.nfes:
            clock = time.perf_counter()
            try:
                sampler = calibrate_generator(teacher, nfe=nfe, method=method)
            except InputError as error:
                Console().print(f"{method} at {nfe}: {error}")
                continue
            seconds = time.perf_counter() - clock
            row = measure_sampler(
                teacher,
                sampler,
                data,
                name=method,
                group="solver",
                command="",
                n=flags.samples,
                seed=21,
                metrics=("fd",),
                ends=ends,
            )
            fd = row.metrics[f"fd@{flags.samples}"]
            yield {**facts(sampler, method, nfe, 0, seconds), "nfe": row.nfe, "rmse": row.rmse, "fd": fd}


def facts(sampler: Any, method: str, asked: int, seed: int, seconds: float) -> dict[str, Any]:
    """What the front door says of a sampler."""
    report = sampler.meta["calibration"]
    kept = ("started_from", "check_rmse_start", "check_rmse_fitted", "kept")
    return {
        "method": method,
        "asked": asked,
        "seed": seed,
        "seconds": round(seconds, 1),
        **{k: report[k] for k in kept},
    }


def main(flags: Calibrations) -> None:
    """Runs everything and writes the results."""
    rows = []
    for row in on_exact(flags) if flags.teacher is None else on_teacher(flags):
        rows.append(row)
        print(json.dumps(row), flush=True)
    where = "exact" if flags.teacher is None else "teacher"
    body = {
        "benchmark": "calibrations",
        "where": where,
        "settings": {k: v for k, v in vars(flags).items() if not isinstance(v, Path)},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": rows,
    }
    path = flags.results / f"calibrations-{where}.json"
    write_text(path, json.dumps(body, indent=1) + "\n")
    table = Table("method", "NFE", "started from", "start", "fitted", "fresh RMSE", "seconds")
    for r in rows:
        numbers = (f"{r[k]:.4f}" for k in ("check_rmse_start", "check_rmse_fitted", "rmse"))
        table.add_row(r["method"], str(r["nfe"]), r["started_from"], *numbers, f"{r['seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Calibrations))
