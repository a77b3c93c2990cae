"""Every deterministic solver on every grid, on a problem whose solution is known, beside published code on the same.

    python benchmarks/solvers.py      # about six minutes on one core

The problem is that of benchmarks/exact.py: one Gaussian per class of scikit-learn's digits, 256 starts at 80, mean
RMSE to the exact solution of the ODE at level 0.002 (at 0 for samplers that end there). NFE counts calls of the
denoiser, so that a method of several calls a step gets a shorter grid; where no grid of its gives the wanted number,
it has no row. ``benchmarks/data/peers_digits_gmm10.csv.gz`` holds what diff-sampler, k-diffusion, diffusers, edm and
smalldiffusion score there: the best of each at each NFE, and the cells that correspond to ours, which must agree.

Samplers that add noise do not follow the ODE and have no place here: see ``left_out`` in the result. Searched grids
(GITS, on trajectories of another seed) compete with the peers' searched grids.
The best grid of a method is chosen on the starts that score it, here and for the peers, and the peers ran on three
kinds of fixed grid only: a rank is of these cells on this problem, not a forecast for another one.

Writes benchmarks/results/solvers.json.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from exact import digits_mixture, rmse
from fewstep import Mixture, Tableau, trajectory
from fewstep.core.path import FLOW, TRIG
from fewstep.core.state import write_text
from fewstep.errors import InputError, unknown
from fewstep.grid import gits, grid
from fewstep.solve import SOLVERS, build, fast_orders

PEERS = Path(__file__).parent / "data" / "peers_digits_gmm10.csv.gz"
LOW, HIGH, STARTS = 0.002, 80.0, 256

Levels = Callable[[int, bool], Tensor]


@dataclass(frozen=True)
class Case:
    """A solver with its options, and how many evaluations a step takes; ``fast`` chooses an order for each step."""

    solver: str
    options: dict[str, Any]
    stages: int = 1
    fast: bool = False

    def table(self, levels: Levels, nfe: int, to_zero: bool) -> Tableau | None:
        """The table of exactly ``nfe`` evaluations on the grid ``levels(steps, to_zero)``, or None without one."""
        if self.fast:
            orders = fast_orders(nfe)
            return None if to_zero else build(self.solver, levels(len(orders), False), orders=orders)
        # The step that ends at 0 takes one evaluation, whatever the method.
        whole, rest = divmod(nfe - to_zero, self.stages)
        steps = whole + to_zero
        return None if rest or steps < 1 else build(self.solver, levels(steps, to_zero), **self.options)


def cases() -> dict[str, Case]:
    """Every deterministic method by name; two names never mean the same table on all grids."""
    found = {
        "euler": Case("euler", {}),
        "heun": Case("heun", {}, 2),
        "heun-flow": Case("heun", {"frame": FLOW}, 2),
        "heun-trig": Case("heun", {"frame": TRIG(0.5)}, 2),
        "dpm2": Case("dpm2", {}, 2),
        "dpm2-taylor": Case("dpm2", {"taylor": True}, 2),
        "dpm3": Case("dpm3", {}, 3),
        "dpm-fast": Case("dpm_single", {}, fast=True),
        "dpmpp2s": Case("dpmpp2s", {}, 2),
        "dpmpp3s": Case("dpmpp3s", {}, 3),
        "res2": Case("res", {"order": 2}, 2),
        "res3": Case("res", {"order": 3}, 3),
        "res4m": Case("res_multistep", {"order": 4}),
        "dpmpp3m-exact": Case("dpmpp3m_exact", {}),
        "dpmpp2m-exact": Case("dpmpp", {"order": 2, "exact": True}),
    }
    for order in (2, 3):
        found[f"dpmpp{order}m"] = Case(f"dpmpp{order}m", {})
        found[f"dpmpp{order}m-falling"] = Case(f"dpmpp{order}m", {"lower_order_final": True})
        for exact in (False, True):
            name = f"dpm{order}m{'-exact' if exact else ''}"
            options: dict[str, Any] = {"order": order, "exact": exact}
            found[name] = Case("dpm_multistep", options)
            found[f"{name}-falling"] = Case("dpm_multistep", {**options, "lower_order_final": True})
    found["dpmpp2m-exact-falling"] = Case("dpmpp", {"order": 2, "exact": True, "lower_order_final": True})
    for order in (2, 3, 4):
        found[f"ipndm{order}"] = Case(f"ipndm{order}", {})
        found[f"lms{order}"] = Case("lms", {"order": order})
        found[f"deis{order}-t"] = Case("deis", {"order": order, "basis": "t"})
        if order > 2:
            found[f"ipndm_v{order}-published"] = Case("ipndm_v", {"order": order, "compat": "diff-sampler"})
    found["deis4-lambda"] = Case("deis", {"order": 4, "basis": "lambda"})
    for order in (1, 2, 3):
        for variant in ("bh1", "bh2"):
            for predict in ("x0", "noise"):
                name = f"unipc{order}-{variant}{'-noise' if predict == 'noise' else ''}"
                options = {"order": order, "variant": variant, "predict": predict}
                found[name] = Case("unipc", options)
                if order > 1:
                    found[f"{name}-falling"] = Case("unipc", {**options, "lower_order_final": True})
    return found


SAME = "the same table as "
LEFT_OUT = {
    "amed_table": "without learned numbers the same table as dpm2",
    "epd_table": "a form for learned numbers, see benchmarks/calibrations.py",
    "dpm1": SAME + "euler",
    "dpmpp1": SAME + "euler",
    "ipndm1": SAME + "euler",
    "ipndm": SAME + "ipndm1 to ipndm4",
    "ddim": SAME + "euler without its noise",
    "euler_ancestral": "adds noise; without it the same table as euler",
    "dpm2_ancestral": "adds noise; without it the same table as dpm2",
    "dpmpp2s_ancestral": "adds noise; without it the same table as dpmpp2s",
    "dpmpp_sde": "adds noise; without it the same table as dpmpp2s",
    "dpmpp2m_sde": "adds noise; without it the same table as dpmpp2m",
    "dpmpp3m_sde": "adds noise; without it the same table as dpmpp3m but for its second step",
    "edm_stochastic": "adds noise; without it the same table as heun",
    "consistency": "adds noise, and is for consistency models",
    "tcd": "adds noise, and is for consistency trajectory models; without noise the same table as euler",
}
GRID_OPTIONS: dict[str, dict[str, Any]] = {
    "karras": {},
    "logsnr": {},
    "cosine": {"scale": 0.5},
    "beta": {},
    "vp_time": {},
    "flow_shift": {},
    "ays": {"rescale": True},
}
SEARCHED = {"gits-0.9": 0.9, "gits-1": 1.0, "gits-1.15": 1.15}


@dataclass(frozen=True)
class Solvers:
    """What to run.

    Attributes:
        nfes: numbers of evaluations.
        cases: names of the methods; all without any.
        starts: how many points are scored; the peers' scores are for 256.
        truth_steps: of the Runge-Kutta solution that all is compared with.
        shown: methods per NFE on the terminal.
        results: where the numbers go.
    """

    nfes: tuple[int, ...] = (3, 4, 5, 6, 8, 10, 16, 32)
    cases: tuple[str, ...] = ()
    starts: int = STARTS
    truth_steps: int = 1000
    shown: int = 6
    results: Path = Path("benchmarks/results")


def grids(problem: Mixture) -> dict[str, Levels]:
    """Functions ``(steps, to_zero) -> levels`` from 80 to 0.002 or 0, by name: fixed ones and searched ones."""
    made: dict[str, Levels] = {
        kind: partial(_fixed, kind=kind, options=options) for kind, options in GRID_OPTIONS.items()
    }
    generator = torch.Generator().manual_seed(1)
    x = HIGH * torch.randn(STARTS, *problem.shape, generator=generator, dtype=torch.float64)
    levels = grid("karras", 60, LOW, HIGH, to_zero=False)
    steps = list(trajectory(problem, x, build("euler", levels)))
    points = torch.stack([s.point for s in steps])
    outputs = torch.stack([problem(s.point, s.level) for s in steps])
    for name, coefficient in SEARCHED.items():
        made[name] = partial(
            _searched, points=points, outputs=outputs, levels=levels, coefficient=coefficient, cache={}
        )
    return made


def _fixed(steps: int, to_zero: bool, *, kind: str, options: dict[str, Any]) -> Tensor:
    return grid(kind, steps, LOW, HIGH, to_zero=to_zero, **options)


def _searched(
    steps: int,
    to_zero: bool,
    *,
    points: Tensor,
    outputs: Tensor,
    levels: Tensor,
    coefficient: float,
    cache: dict[tuple[int, bool], Tensor],
) -> Tensor:
    if (steps, to_zero) not in cache:
        found = gits(points, outputs, levels, steps, coefficient=coefficient, to_zero=to_zero)
        cache[steps, to_zero] = found
    return cache[steps, to_zero]


def peers() -> list[dict[str, Any]]:
    """Rows of the peers' scores: peer, solver, schedule, nfe, ends_at, rmse, group ("fixed", "searched", "learned")."""
    with gzip.open(PEERS, "rt", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    return [{**row, "nfe": int(row["nfe"]), "rmse": float(row["rmse"])} for row in rows]


GRID_OF = {
    "polynomial": "karras",
    "karras7": "karras",
    "edm rho7": "karras",
    "exponential": "logsnr",
    "logsnr": "logsnr",
    "logsnr(own)": "logsnr",
    "time_uniform": "vp_time",
}
CASE_OF = {
    ("diff-sampler", "dpm_2"): "dpm2",
    ("diff-sampler", "dpmpp_2m_nothresh"): "dpmpp2m-falling",
    ("diff-sampler", "dpmpp_2m_nolof_nothresh"): "dpmpp2m",
    ("diff-sampler", "dpmpp_3m_nothresh"): "dpmpp3m-falling",
    ("diff-sampler", "dpmpp_3m_nolof_nothresh"): "dpmpp3m",
    ("diff-sampler", "dpmpp_2m_eps"): "dpm2m-falling",
    ("diff-sampler", "dpmpp_3m_eps"): "dpm3m-falling",
    ("diff-sampler", "ipndm_v2"): "lms2",
    ("diffusers", "EulerDiscrete"): "euler",
    ("diffusers", "EDMEuler"): "euler",
    ("diffusers", "HeunDiscrete"): "heun",
    ("diffusers", "KDPM2Discrete"): "dpm2",
    ("diffusers", "LMSDiscrete o4"): "lms4",
    ("diffusers", "DEIS logrho o2 lower_order_final=False"): "dpm2m-exact",
    ("diffusers", "DEIS logrho o3 lower_order_final=False"): "dpm3m-exact",
    ("diffusers", "DPMSolverMultistep dpmsolver o3 lower_order_final=False"): "dpm3m",
    ("edm", "ablation_sampler euler"): "euler",
    ("edm", "edm_sampler(heun)"): "heun",
    ("k-diffusion", "sample_euler"): "euler",
    ("k-diffusion", "sample_heun"): "heun",
    ("k-diffusion", "sample_dpm_2"): "dpm2",
    ("k-diffusion", "sample_dpm_2_ancestral_eta0"): "dpm2",
    ("k-diffusion", "sample_dpm_fast"): "dpm-fast",
    ("k-diffusion", "sample_dpmpp_2m"): "dpmpp2m",
    ("k-diffusion", "sample_dpmpp_2m_sde_eta0_midpoint"): "dpmpp2m",
    ("k-diffusion", "sample_dpmpp_2m_sde_eta0_heun"): "dpmpp2m-exact",
    ("k-diffusion", "sample_dpmpp_2s_ancestral_eta0"): "dpmpp2s",
    ("k-diffusion", "sample_dpmpp_sde_eta0"): "dpmpp2s",
    ("smalldiffusion", "samples gam=1.0"): "euler",
}
# diffusers lowers the order of these over the last steps, as it does by default, when there are fewer than 15 steps.
SHORT_FALLING = {
    "DEIS logrho o2": "dpm2m-exact",
    "DEIS logrho o3": "dpm3m-exact",
    "DPMSolverMultistep dpmsolver o2 heun": "dpm2m-exact",
    "DPMSolverMultistep dpmsolver o2 midpoint": "dpm2m",
    "DPMSolverMultistep dpmsolver o3 midpoint": "dpm3m",
    "DPMSolverMultistep dpmsolver++ o2 heun": "dpmpp2m-exact",
    "DPMSolverMultistep dpmsolver++ o2 midpoint": "dpmpp2m",
    "DPMSolverMultistep dpmsolver++ o3 midpoint": "dpmpp3m",
    "EDMDPMSolverMultistep o2": "dpmpp2m",
    "EDMDPMSolverMultistep o3": "dpmpp3m",
}


def ours_of(row: dict[str, Any]) -> tuple[str, str, bool] | None:
    """The (case, grid, whether it ends at 0) of ours that a peer's cell corresponds to, if one does."""
    peer, solver, kind = row["peer"], row["solver"], GRID_OF.get(row["schedule"])
    if kind is None or row["group"] != "fixed":
        return None
    name = CASE_OF.get((peer, solver))
    if peer == "diffusers" and solver in SHORT_FALLING:
        name = SHORT_FALLING[solver] + ("-falling" if row["nfe"] < 15 else "")
    elif peer == "diff-sampler" and solver in ("euler", "heun", "ipndm2", "ipndm3", "ipndm4"):
        name = solver
    elif peer == "diff-sampler" and solver in ("ipndm_v3", "ipndm_v4"):
        name = f"{solver}-published"
    elif peer == "diff-sampler" and solver in ("deis_tab2", "deis_tab3", "deis_tab4"):
        name = f"deis{solver[-1]}-t"
    elif solver in ("deis_rhoab2", "deis_rhoab3", "deis_rhoab4", "sample_lms2", "sample_lms3", "sample_lms4"):
        name = f"lms{solver[-1]}"
    elif solver.startswith("unipc") and not solver.endswith("as_shipped"):
        order, variant = solver[5], solver[7:10]
        kept = "_nolof" in solver or order == "1"
        name = f"unipc{order}-{variant}{'-noise' if '_eps' in solver else ''}{'' if kept else '-falling'}"
    elif solver.startswith("UniPC"):
        _, variant, order, option = solver.split()
        name = f"unipc{order[1]}-{variant}{'-noise' if option == 'predict_x0=False' else ''}"
        name += "" if option == "lower_order_final=False" else "-falling"
    return None if name is None else (name, kind, row["ends_at"] == "zero")


def score_all(flags: Solvers, chosen: dict[str, Case]) -> tuple[list[dict[str, Any]], float]:
    """A row per method, grid, end and NFE, and an estimate of the error of what they are compared with."""
    torch.set_default_dtype(torch.float32)
    problem = digits_mixture()
    generator = torch.Generator().manual_seed(0)
    x = HIGH * torch.randn(STARTS, 64, generator=generator, dtype=torch.float64)[: flags.starts]
    truth = problem.flow(x, HIGH, LOW, steps=flags.truth_steps)
    rough = problem.flow(x, HIGH, LOW, steps=flags.truth_steps // 2)
    drift = float((truth - rough).square().mean(1).sqrt().mean())
    rows = []
    for kind, levels in grids(problem).items():
        for nfe in flags.nfes:
            for to_zero in (False, True):
                for name, case in chosen.items():
                    table = case.table(levels, nfe, to_zero)
                    if table is None:
                        continue
                    if table.nfe != nfe or table.start != HIGH or table.end != (0 if to_zero else LOW):
                        raise InputError(f"{name} on {kind} is not the sampler of {nfe} evaluations it should be")
                    found = rmse(problem, x, truth, table)
                    where = {"grid": kind, "ends_at": "zero" if to_zero else "sigma_min"}
                    rows.append({"name": name, "nfe": nfe, **where, "rmse": float(f"{found:.6g}")})
    return rows, drift


def agreement(rows: list[dict[str, Any]], known: list[dict[str, Any]]) -> dict[str, Any]:
    """How far our cells are from the peers' of the same method, grid, end and NFE, as |log ratio|."""
    ours = {(r["name"], r["grid"], r["ends_at"], r["nfe"]): r["rmse"] for r in rows}
    pairs = []
    for row in known:
        match = ours_of(row)
        key = match and (match[0], match[1], row["ends_at"], row["nfe"])
        # Divergence amplifies rounding: a score of many times the data says nothing.
        if key in ours and row["rmse"] < 10:
            pairs.append((abs(math.log(ours[key] / row["rmse"])), row, key[0], ours[key]))
    far = [
        {**{k: row[k] for k in ("peer", "solver", "schedule", "nfe", "ends_at", "rmse")}, "name": name, "ours": value}
        for gap, row, name, value in pairs
        if gap > 1e-3
    ]
    return {"cells": len(pairs), "within_0.1_percent": len(pairs) - len(far), "others": far}


def summary(rows: list[dict[str, Any]], known: list[dict[str, Any]]) -> dict[str, Any]:
    """Best fixed and searched grid of every method and NFE, and the best of the peers beside them."""

    def best(of: list[dict[str, Any]]) -> dict[str, Any]:
        return min(of, key=lambda r: r["rmse"])

    def own(searched: bool) -> list[dict[str, Any]]:
        part = [r for r in rows if (r["grid"] in SEARCHED) == searched]
        return [best([r for r in part if (r["nfe"], r["name"]) == key]) for key in _keys(part)]

    peers_best = {
        str(n): {group: best([r for r in known if r["nfe"] == n and r["group"] in groups])
                 for group, groups in (("fixed", ("fixed",)), ("any", ("fixed", "searched", "learned")))}
        for n in sorted({r["nfe"] for r in rows})
    }  # fmt: skip
    return {"best_peer": peers_best, "best_fixed": own(False), "best_searched": own(True)}


def _keys(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return list(dict.fromkeys((r["nfe"], r["name"]) for r in rows))


def main(flags: Solvers) -> None:
    """Runs everything and writes the results."""
    every = cases()
    for name in flags.cases:
        if name not in every:
            raise unknown("case", name, every)
    chosen = {name: case for name, case in every.items() if not flags.cases or name in flags.cases}
    known = peers()
    rows, drift = score_all(flags, chosen)
    body = {
        "benchmark": "solvers",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "starts": flags.starts,
        "truth_error_estimate": drift,
        "scored": len(rows),
        "left_out": {name: why for name, why in LEFT_OUT.items() if name in SOLVERS},
        **({"agreement_with_peers": agreement(rows, known)} if flags.starts == STARTS else {}),
        **summary(rows, known),
    }
    text = json.dumps(body, indent=0, separators=(",", ":"))
    write_text(
        flags.results / "solvers.json", text.replace(',\n"', ', "').replace("{\n", "{").replace("\n}", "}") + "\n"
    )
    show(body, flags.shown)


def show(body: dict[str, Any], count: int) -> None:
    """The ranking per NFE: our best methods with their best grid, between the best of the peers."""
    for title, key, group in (("fixed grids", "best_fixed", "fixed"), ("searched grids", "best_searched", "any")):
        table = Table("NFE", f"best peer, {group}", *(str(i + 1) for i in range(count)), title=title)
        for nfe, peer in body["best_peer"].items():
            mine = sorted((r for r in body[key] if str(r["nfe"]) == nfe), key=lambda r: r["rmse"])[:count]
            cells = [f"{r['name']}\n{r['grid']}{' 0' if r['ends_at'] == 'zero' else ''}\n{r['rmse']:.5f}" for r in mine]
            told = f"{peer[group]['solver']}\n{peer[group]['schedule']}\n{peer[group]['rmse']:.5f}"
            table.add_row(nfe, told, *cells)
        Console(width=200).print(table)


if __name__ == "__main__":
    main(tyro.cli(Solvers))
