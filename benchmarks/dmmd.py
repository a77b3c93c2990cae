"""Particles that move downhill in MMD: features that know the noise level (DMMD) beside fixed kernels on pixels.

    python benchmarks/dmmd.py        # about 5 minutes on one core

Trains the features on digits without labels and lets populations move, each particle among the others or towards mean
features alone. Fixed kernels move as many particles as often from noise of the data's own spread, with each width and
rate of a small grid. Writes benchmarks/results/dmmd.json after every row.
"""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Optim
from fewstep.core.state import write_text
from fewstep.data.digits import digits
from fewstep.grid.own import own_levels
from fewstep.measure import evaluate
from fewstep.solve.particle_flow import Kernel, ParticleFlow
from fewstep.train.dmmd import DMMD, train_dmmd

COLUMNS = ("fd", "pixel_fd", "precision", "recall", "seconds")


@dataclass(frozen=True)
class Flags:
    """What to run.

    Attributes:
        net: of the features, resmlp or unet.
        start: a trained diffusion model to begin the features with; without one a fresh ``net``.
        iterations: of training.
        batch: pictures per iteration.
        lr: peak learning rate.
        penalty: see DMMD.
        shrink: see DMMD.
        group: see DMMD.
        features: numbers for each place of the tap.
        taps: see fewstep.train.dmmd.featured.
        nfes: passes through the network in sampling.
        levels: noise levels that they are shared among.
        rates: lengths of moves, see ParticleFlow.
        kernels: fixed ones; none leaves the comparison out.
        widths: of the fixed kernels; the data's median distance is about 6.
        n: particles.
        seed: of particles.
        threads: of torch.
        out: folder of the run.
        results: where the numbers go.
    """

    net: str = "resmlp"
    start: Path | None = None
    iterations: int = 1500
    batch: int = 128
    lr: float = 1e-3
    penalty: float = 10.0
    shrink: float = 0.1
    group: int = 32
    features: int = 64
    taps: tuple[str, ...] = ()
    nfes: tuple[int, ...] = (100,)
    levels: int = 10
    rates: tuple[float, ...] = (1.0,)
    kernels: tuple[Kernel, ...] = ("gaussian", "quadratic", "distance")
    widths: tuple[float, ...] = (1.0, 3.0)
    n: int = 1000
    seed: int = 11
    threads: int = 1
    out: Path = Path("runs/bench-dmmd")
    results: Path = Path("benchmarks/results")


def trained(flags: Flags) -> Generator:
    """The features, trained once."""
    method = DMMD(
        group=flags.group,
        penalty=flags.penalty,
        shrink=flags.shrink,
        optim=Optim(lr=flags.lr, warmup=20, decay="cosine", clip=1.0),
    )
    return train_dmmd(
        digits(), out=flags.out, budget=flags.iterations, method=method, net=flags.net, features=flags.features,
        taps=flags.taps, start=None if flags.start is None else Generator.load(flags.start), batch=flags.batch,
        resume=(flags.out / "recipe.json").is_file(), save_every=0,
    )  # fmt: skip


def row(flags: Flags, name: str, made: Generator, flow: ParticleFlow) -> dict[str, Any]:
    """One sampler's scores; all particles are one population."""
    clock = time.perf_counter()
    pictures = made.sample(flags.n, seed=flags.seed, sampler=flow, batch=flags.n, progress=False)
    seconds = time.perf_counter() - clock
    found = evaluate(pictures, digits(), metrics=("fd", "pixel_fd", "precision", "recall"))
    scores = {k.split("@")[0]: round(v, 4) for k, v in found.items()}
    return {"name": name, "nfe": flow.nfe, "rate": flow.rate, **scores, "seconds": round(seconds, 2)}


def learned(flags: Flags, made: Generator) -> Iterator[dict[str, Any]]:
    """DMMD at every number of passes and rate, with particles that feel each other and without."""
    D, shown = made.denoiser, digits()
    pictures = shown.take(torch.arange(len(shown))).x
    places = own_levels(D, torch.linspace(1, 0, flags.levels + 1, dtype=torch.float64)[:-1]).tolist()
    means = ParticleFlow(places).embedded(D, pictures)
    for nfe in flags.nfes:
        for rate in flags.rates:
            for population in (True, False):
                fields = means.settings() | {"moves": nfe // flags.levels, "rate": rate, "population": population}
                flow = ParticleFlow(**fields, clean=means.clean, noised=means.noised)
                yield row(flags, "DMMD" if population else "DMMD, approximate", made, flow)


def fixed(flags: Flags, made: Generator) -> Iterator[dict[str, Any]]:
    """MMD flow with each fixed kernel on pixels, as many moves and as long as DMMD's at most."""
    shown = digits()
    pictures = shown.take(torch.arange(len(shown))).x
    for kernel in flags.kernels:
        for width in flags.widths if kernel != "distance" else (1.0,):
            for rate in (1.0, 2.0):
                flow = ParticleFlow(
                    [shown.std], moves=max(flags.nfes), rate=rate, learned=False, kernel=kernel, widths=(width,),
                    data=pictures,
                )  # fmt: skip
                yield row(flags, f"fixed {kernel}, width {width:g}", made, flow)


def floor(flags: Flags) -> dict[str, Any]:
    """What particles that do not move score: noise of the data's spread."""
    shown = digits()
    pictures = shown.std * Noise.of(flags.seed, flags.n).normal(shown.shape, "start")
    found = evaluate(pictures.clamp(-1, 1), shown, metrics=("fd", "pixel_fd"))
    return {"name": "noise", "nfe": 0, **{k.split("@")[0]: round(v, 4) for k, v in found.items()}}


def main(flags: Flags) -> None:
    """Trains what is not there yet, and measures everything."""
    torch.set_num_threads(flags.threads)
    made = trained(flags)
    rows = [floor(flags)]
    for found in itertools.chain(learned(flags, made), fixed(flags, made)):
        rows.append(found)
        save(flags, made, rows)
    table = Table("sampler", "NFE", "rate", *COLUMNS)
    for found in rows:
        shown = (f"{found[c]:.3f}" if c in found else "" for c in COLUMNS)
        table.add_row(found["name"], str(found["nfe"]), f"{found.get('rate', 0):g}", *shown)
    Console(width=120).print(table)


def save(flags: Flags, made: Generator, rows: list[dict[str, Any]]) -> None:
    """What has been measured so far."""
    body = {
        "benchmark": "dmmd",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()},
        "machine": f"{platform.machine()}, {flags.threads} threads, torch {torch.__version__}",
        "training_seconds": float(made.card["trained"]["seconds"]),
        "rows": rows,
    }
    flags.results.mkdir(parents=True, exist_ok=True)
    write_text(flags.results / "dmmd.json", json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Flags))
