"""Quality on scikit-learn's digits: solvers, calibrated samplers, SFD and SiD, one teacher, several seeds of pictures.

    python benchmarks/digits.py                      # about 12 minutes on two cores
    python benchmarks/digits.py --network unet --steps 3000 --nfes 3 4 5 6

Writes benchmarks/results/digits-<network>.json: every number with seed, sample count, seconds and machine.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep import Generator, Tableau
from fewstep.cli.calibrate import calibrate_generator
from fewstep.cli.demo import DEMO_SID, Demo
from fewstep.core.role import Ema, Optim
from fewstep.core.state import write_text
from fewstep.data import Data, load_data
from fewstep.distill import SFD, distill
from fewstep.grid import karras
from fewstep.report.rows import converged, measure_sampler
from fewstep.solve import build
from fewstep.train import EDMTraining, train, untrained

SOLVERS = ("euler", "dpmpp2m", "ipndm3", "ipndm4")
SFD_OPTIM = Optim(lr=1e-3, decay="drop", clip=1.0)


@dataclass(frozen=True)
class Digits:
    """What to run.

    Attributes:
        network: of the teacher, resmlp or unet.
        steps: of the teacher's training.
        batch: pictures per training step.
        samples: pictures per row and seed.
        seeds: of the pictures.
        nfes: evaluations at which samplers are compared.
        sid_steps: of SiD's training; 0 leaves it out.
        sfd_steps: of SFD's training; 0 leaves it out.
        sfd_nfes: steps of the SFD students.
        out: folder of the runs.
        results: where the numbers go.
    """

    network: str = "resmlp"
    steps: int = 2500
    batch: int = 256
    samples: int = 4000
    seeds: tuple[int, ...] = (11, 12)
    nfes: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    sid_steps: int = 300
    sfd_steps: int = 300
    sfd_nfes: tuple[int, ...] = (1, 2, 3)
    out: Path = Path("runs/bench-digits")
    results: Path = Path("benchmarks/results")


def main(flags: Digits) -> None:
    """Runs everything and writes the results."""
    data, clock, rows = load_data("digits"), time.perf_counter(), []
    seconds: dict[str, float] = {}

    def timed(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = now - clock, now

    teacher = make_teacher(flags, data)
    timed("teacher training")
    ends = {seed: converged(teacher, flags.samples, seed=seed) for seed in flags.seeds}
    timed("converged end points")
    rows.append(measure(flags, data, teacher, teacher.sampler, "teacher", ends))
    D = teacher.denoiser
    for nfe in flags.nfes:
        for solver in SOLVERS:
            for rho in (5.0, 7.0):
                table = build(solver, karras(nfe, D.sigma_min, D.sigma_max, rho=rho))
                rows.append(measure(flags, data, teacher, table, f"{table.name} rho {rho:g}", ends))
        timed(f"solvers {nfe}")
        table = calibrate_generator(teacher, nfe=nfe)
        timed(f"calibrate {nfe}")
        rows.append(measure(flags, data, teacher, table, "calibrated", ends))
    for made, name in students(flags, teacher, timed):
        rows.append(measure(flags, data, made, made.sampler, name, None))
    body = {
        "benchmark": "digits",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "rows": rows,
    }
    path = flags.results / f"digits-{flags.network}.json"
    write_text(path, json.dumps(body, indent=1) + "\n")
    show(rows)
    Console().print(f"{path}")


def make_teacher(flags: Digits, data: Data) -> Generator:
    """The demo's teacher, or a U-Net."""
    if flags.network == "resmlp":
        return Demo(out=flags.out, steps=flags.steps, batch=flags.batch).teacher(data)
    method = EDMTraining(optim=Optim(lr=3e-3, warmup=100, decay="cosine", clip=1.0), ema=Ema(power=0.08))
    out = flags.out / f"teacher-{flags.network}"
    return train(
        untrained(data, flags.network),
        method,
        data,
        out=out,
        budget=flags.steps,
        batch=flags.batch,
        overwrite=out.exists(),
    )


def students(flags: Digits, teacher: Generator, timed: Any) -> Any:
    """The distilled generators, one after the other."""
    if flags.sid_steps:
        out = flags.out / f"sid-{flags.network}"
        made = distill(teacher, DEMO_SID, out=out, budget=flags.sid_steps, batch=flags.batch, overwrite=out.exists())
        timed("SiD training")
        yield made, "SiD"
    for steps in flags.sfd_nfes if flags.sfd_steps else ():
        out = flags.out / f"sfd-{steps}-{flags.network}"
        made = distill(
            teacher,
            SFD(steps=steps, optim=SFD_OPTIM),
            out=out,
            budget=flags.sfd_steps,
            batch=flags.batch,
            overwrite=out.exists(),
        )
        timed(f"SFD {steps} training")
        yield made, "SFD"


def measure(
    flags: Digits, data: Data, made: Generator, sampler: Any, name: str, ends: dict[int, torch.Tensor] | None
) -> dict[str, Any]:
    """One row: every metric at every seed."""
    found = [
        measure_sampler(
            made, sampler, data, name=name, group="solver", command="", n=flags.samples, seed=seed,
            ends=None if ends is None else ends[seed],
        )
        for seed in flags.seeds
    ]  # fmt: skip
    row: dict[str, Any] = {"name": name, "nfe": found[0].nfe, "seeds": list(flags.seeds)}
    row |= {k: [round(r.metrics[k], 4) for r in found] for k in found[0].metrics}
    if ends is not None:
        row["rmse"] = [round(float(r.rmse or 0.0), 5) for r in found]
    row["images_per_second"] = round(statistics.mean(r.images / r.seconds for r in found), 1)
    if isinstance(sampler, Tableau) and "calibration" in sampler.meta:
        row["levels"] = [round(v, 4) for v in sampler.levels.tolist()]
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal: means over the seeds."""
    names = [k for k in rows[0] if isinstance(rows[0][k], list) and k != "seeds"]
    table = Table("sampler", "NFE", *names)
    for row in rows:
        cells = [f"{statistics.mean(row[k]):.4g}" if k in row else "" for k in names]
        table.add_row(row["name"], str(row["nfe"]), *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main(tyro.cli(Digits))
