"""Samplers on a problem whose solution is known: one Gaussian per class of scikit-learn's digits, 64 dimensions.

    python benchmarks/exact.py        # about two minutes

Mean RMSE over 256 starts to the exact ODE solution at sigma 0.002 (at 0 for samplers that end there), for every
solver on three grids and for calibrated tables, against the best score that diff-sampler, k-diffusion, diffusers, edm,
smalldiffusion or flow_matching reach on it with any of their solvers, schedules or searches. Trajectories that
calibration sees and those that are scored come from different seeds. Writes benchmarks/results/exact.json.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep import Mixture, Tableau, calibrate, sample
from fewstep.core.state import write_text
from fewstep.data import load_data
from fewstep.grid import grid
from fewstep.solve import build

SOLVERS = ("euler", "heun", "dpmpp2m", "dpmpp3m", "dpmpp3m_exact", "ipndm2", "ipndm3", "ipndm4")
# Best mean RMSE of any setting of the peers' own code at this many evaluations (fixed, searched or learned).
BEST_PEER = {3: 0.114594, 4: 0.0802325, 5: 0.0493142, 6: 0.0348506, 8: 0.0239981, 10: 0.0187235}


@dataclass(frozen=True)
class Exact:
    """What to run.

    Attributes:
        nfes: evaluations.
        trajectories: that calibration fits to.
        seeds: of calibration; the scored starts stay the same.
        results: where the numbers go.
    """

    nfes: tuple[int, ...] = (3, 4, 5, 6, 8, 10)
    trajectories: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    results: Path = Path("benchmarks/results")


def digits_mixture() -> Mixture:
    """One diagonal Gaussian per digit class: class mean, variance + 1e-3, class frequency."""
    data = load_data("digits")
    batch = data.take(torch.arange(len(data)))
    assert batch.x is not None
    x, y = batch.x.double().flatten(1), batch.cond["label"]
    groups = [x[y == c] for c in range(10)]
    means = torch.stack([g.mean(0) for g in groups])
    variances = torch.stack([g.var(0, correction=0) + 1e-3 for g in groups])
    return Mixture(means, variances, [float(len(g)) for g in groups])


def rmse(problem: Mixture, x: Tensor, truth: Tensor, table: Tableau) -> float:
    """Mean over starts; a table that ends at 0 is compared with the denoised truth."""
    goal = problem(truth, problem.sigma_min) if table.levels[-1] == 0 else truth
    return float((sample(problem, x, table) - goal).square().mean(1).sqrt().mean())


def main(flags: Exact) -> None:
    """Runs everything and writes the results."""
    torch.set_default_dtype(torch.float32)
    problem = digits_mixture()
    generator = torch.Generator().manual_seed(0)
    x = 80 * torch.randn(256, 64, generator=generator, dtype=torch.float64)
    truth = problem.flow(x, 80.0, 0.002, steps=2000)
    drift = float((truth - problem.flow(x, 80.0, 0.002, steps=1000)).square().mean(1).sqrt().mean())
    rows: list[dict[str, Any]] = []
    for nfe in flags.nfes:
        for name in SOLVERS:
            if name == "heun" and nfe % 2:
                continue
            for kind in ("karras", "logsnr", "vp_time"):
                levels = grid(kind, nfe // 2 if name == "heun" else nfe, 0.002, 80.0, to_zero=False)
                rows.append(
                    {"name": name, "grid": kind, "nfe": nfe, "rmse": rmse(problem, x, truth, build(name, levels))}
                )
        for seed in flags.seeds:
            clock = time.perf_counter()
            table = calibrate(problem, nfe=nfe, trajectories=flags.trajectories, seed=seed)
            seconds = time.perf_counter() - clock
            found = rmse(problem, x, truth, table)
            row = {"name": "calibrated", "grid": "chosen", "nfe": nfe, "rmse": found, "seed": seed}
            rows.append({**row, "ratio_to_best_peer": found / BEST_PEER[nfe], "seconds": round(seconds, 1)})
    ratios = {
        n: [r["ratio_to_best_peer"] for r in rows if r["name"] == "calibrated" and r["nfe"] == n] for n in flags.nfes
    }
    means = {n: sum(v) / len(v) for n, v in ratios.items()}
    body = {
        "benchmark": "exact",
        "truth_error_estimate": drift,
        "best_peer": BEST_PEER,
        "mean_ratio_to_best_peer": means,
        "geometric_mean_4_to_10": math.exp(
            sum(math.log(means[n]) for n in means if n >= 4) / sum(n >= 4 for n in means)
        ),
        "rows": rows,
    }
    write_text(flags.results / "exact.json", json.dumps(body, indent=1) + "\n")
    table = Table("NFE", "best solver here", "rmse", "calibrated (mean of seeds)", "best peer", "ratio")
    for n in flags.nfes:
        best = min((r for r in rows if r["nfe"] == n and r["name"] != "calibrated"), key=lambda r: r["rmse"])
        mean = means[n] * BEST_PEER[n]
        name = f"{best['name']}, {best['grid']}"
        table.add_row(str(n), name, f"{best['rmse']:.4f}", f"{mean:.4f}", f"{BEST_PEER[n]:.4f}", f"{means[n]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Exact))
