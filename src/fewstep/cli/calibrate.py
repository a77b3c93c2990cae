"""``fewstep calibrate``: a sampler of few evaluations for a generator, without training it."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from fewstep.cli.base import SourceFlags, next_folder, pairs, recipe_of
from fewstep.core.denoiser import Wrapper
from fewstep.core.figure import error_figure
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import Budget
from fewstep.core.sample import Sampler
from fewstep.core.state import Run, write_bytes
from fewstep.core.stored import save_sampler
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid import GRIDS, grid
from fewstep.guide import guided
from fewstep.solve.calibrate import calibrate, check_request, options_of


@dataclass(frozen=True)
class Calibrate:
    """Fits, searches or learns a sampler on a handful of the generator's own trajectories.

    Attributes:
        generator: a folder of fewstep or diffusers, a Hub id, or a checkpoint.
        nfe: evaluations per picture.
        method: least-squares, gits, amed, amed-plugin, usf, epd, aligner or gaussian.
        budget: how long it may take, such as 60s or 5m; without one the result depends on the flags alone.
        grid: a grid's name such as karras or logsnr; "chosen" leaves the noise levels to the method.
        guidance: scale of the classifier-free guidance that the sampler is made for; 1 is none.
        negative: prompt that guidance moves away from, for text pipelines.
        trajectories: how many are followed; a quarter of them is for choices.
        ridge: least-squares: strength that pulls towards the solver it starts from; chosen without one.
        searches: least-squares: trials of moved levels.
        option: KEY=VALUE is passed to the method, such as refinements=4 or base=dpmpp2m; may be repeated.
        seed: of the trajectories.
        batch: pictures at a time.
        memory: bytes that stored trajectories may take; of larger pictures a part of the pixels is kept.
        out: run folder; runs/calibrate-<number> without one.
        device: cpu, cuda, cuda:1 or mps.
        overwrite: deletes an earlier run in out.
        source: how to open the generator; text pipelines need --open prompts=FILE.
    """

    generator: Annotated[str, tyro.conf.Positional]
    nfe: int = 5
    method: str = "least-squares"
    budget: str | None = None
    grid: str = "chosen"
    guidance: float = 1.0
    negative: str = ""
    trajectories: int = 256
    ridge: float | Literal["auto"] = "auto"
    searches: int = 60
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    seed: int = 0
    batch: int = 1024
    memory: int = 1 << 30
    out: Path | None = None
    device: str = "cpu"
    overwrite: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)

    def run(self) -> None:
        """Runs the command."""
        made = guided(self.source.open(self.generator, self.device), self.guidance, self.negative)
        D = made.denoiser
        if self.grid != "chosen" and self.grid not in GRIDS:
            raise unknown("grid", self.grid, ("chosen", *GRIDS))
        if self.batch < 1 or self.searches < 0 or self.memory < 1:
            raise InputError(
                f"--batch and --memory must be at least 1 and --searches 0, got {self.batch}, {self.memory} and "
                f"{self.searches}"
            )
        where: dict[str, Any] = {"nfe": self.nfe}
        options = pairs("--option", self.option)
        if self.grid != "chosen" and "grid" in options_of(self.method):
            # Methods with several evaluations a step place their steps themselves.
            options = {"grid": self.grid, **options}
        elif self.grid != "chosen":
            where = {"sigmas": grid(self.grid, self.nfe, D.sigma_min, D.sigma_max)}
        if self.method == "least-squares":
            options = {"ridge": self.ridge, "searches": self.searches, **options}
        elif self.ridge != "auto":
            raise InputError(f"--ridge belongs to --method least-squares, not to {self.method}")
        check_request(where.get("nfe"), where.get("sigmas"), self.trajectories, self.method, options)
        seconds = self.seconds()
        run = Run.open(self.out or next_folder("calibrate"), recipe_of("calibrate", self), overwrite=self.overwrite)
        clock = time.perf_counter()
        sampler = calibrate_generator(
            made,
            method=self.method,
            budget=seconds,
            trajectories=self.trajectories,
            seed=self.seed,
            batch=self.batch,
            memory=self.memory,
            progress=True,
            **where,
            **options,
        )
        place = save_calibrated(sampler, run.folder)
        facts = sampler.meta["calibration"]
        spent = time.perf_counter() - clock
        run.log({"step": 0, "seconds": round(spent, 2), **facts})
        told = (
            f"{place}: {facts['nfe']} evaluations, made in {spent:.1f} s; RMSE to the teacher's own end points on "
            f"{facts['check_trajectories']} fresh trajectories: {facts['check_rmse_fitted']:.4f}, "
            f"{facts['started_from']} that it started from: {facts['check_rmse_start']:.4f}; kept the {facts['kept']}"
        )
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)

    def seconds(self) -> float | None:
        """The budget in seconds."""
        if self.budget is None:
            return None
        found = Budget.parse(self.budget)
        if found.unit != "seconds":
            raise InputError(f"--budget of a calibration is a time such as 60s or 5m, got {self.budget!r}")
        return found.amount


def calibrate_generator(made: Generator, **options: Any) -> Any:
    """:func:`calibrate` with a generator's own conditions; the result remembers which generator it was made for."""
    # As many as are followed, because the embeddings of prompts are large.
    count = min(1024, 2 * int(options.get("trajectories", 256)))
    cond = None if made.conds is None else made.conds.draw(Noise.of(0, count).fold("calibrate"))
    sampler = calibrate(made.denoiser, cond=cond, **options)
    scale = made.denoiser.scale if isinstance(made.denoiser, Wrapper) and hasattr(made.denoiser, "scale") else 1.0
    facts = {**sampler.meta["calibration"], "fingerprint": made.fingerprint(), "guidance": scale}
    return replace(sampler, meta={**sampler.meta, "calibration": json.loads(json.dumps(facts))})


def save_calibrated(sampler: Sampler, folder: Path) -> Path:
    """Writes the sampler (``tableau.json``, or the files of another kind) and its picture; returns what opens it."""
    place = save_sampler(sampler, folder / "tableau.json" if isinstance(sampler, Tableau) else folder / "sampler")
    figure = sampler.plot() if isinstance(sampler, Tableau) else error_figure(sampler)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=150)
    write_bytes(folder / f"{'tableau' if isinstance(sampler, Tableau) else 'sampler'}.png", held.getvalue())
    return place
