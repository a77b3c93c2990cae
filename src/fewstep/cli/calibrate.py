"""``fewstep calibrate``: a sampler of few evaluations fitted to a generator, without training."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from fewstep.cli.base import next_folder, recipe_of
from fewstep.core.generator import Generator, load
from fewstep.core.noise import Noise
from fewstep.core.state import Run, write_bytes, write_text
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid import GRIDS, grid
from fewstep.solve.calibrate import calibrate, check_request


@dataclass(frozen=True)
class Calibrate:
    """Fits a tableau in closed form to a handful of the generator's own trajectories.

    Attributes:
        generator: its folder.
        nfe: evaluations per picture.
        grid: karras, logsnr, vp_time or flow_shift; "chosen" also fits the noise levels.
        trajectories: how many are followed; a quarter of them chooses levels and ridge.
        ridge: strength that pulls towards the solver it starts from; chosen without one.
        seed: of the trajectories.
        searches: trials of moved levels, for the chosen grid.
        batch: pictures at a time.
        out: run folder; runs/calibrate-<number> without one.
        device: cpu, cuda, cuda:1 or mps.
        overwrite: deletes an earlier run in out.
    """

    generator: Annotated[Path, tyro.conf.Positional]
    nfe: int = 5
    grid: str = "chosen"
    trajectories: int = 256
    ridge: float | Literal["auto"] = "auto"
    seed: int = 0
    searches: int = 60
    batch: int = 1024
    out: Path | None = None
    device: str = "cpu"
    overwrite: bool = False

    def run(self) -> None:
        """Runs the command."""
        made = load(self.generator, device=self.device)
        D = made.denoiser
        if self.grid != "chosen" and self.grid not in GRIDS:
            raise unknown("grid", self.grid, ("chosen", *GRIDS))
        if self.batch < 1 or self.searches < 0:
            raise InputError(f"--batch must be at least 1 and --searches 0, got {self.batch} and {self.searches}")
        where: dict[str, Any] = (
            {"nfe": self.nfe}
            if self.grid == "chosen"
            else {"sigmas": grid(self.grid, self.nfe, D.sigma_min, D.sigma_max)}
        )
        check_request(where.get("nfe"), where.get("sigmas"), self.trajectories, self.ridge)
        out = self.out or next_folder("calibrate")
        run = Run.open(out, recipe_of("calibrate", self), overwrite=self.overwrite)
        table = calibrate_generator(
            made,
            trajectories=self.trajectories,
            ridge=self.ridge,
            seed=self.seed,
            searches=self.searches,
            batch=self.batch,
            progress=True,
            **where,
        )
        save_tableau(table, run.folder)
        facts = table.meta["calibration"]
        run.log({"step": 0, **facts})
        told = (
            f"{run.folder}/tableau.json: {facts['nfe']} evaluations; RMSE to the teacher's own end points on "
            f"{facts['check_trajectories']} fresh trajectories: {facts['check_rmse_fitted']:.4f}, "
            f"{facts['started_from']} on the same levels: {facts['check_rmse_start']:.4f}; kept the {facts['kept']}"
        )
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)


def calibrate_generator(made: Generator, **options: Any) -> Tableau:
    """:func:`calibrate` with a generator's own conditions; the result remembers which generator it was fitted to."""
    cond = None if made.conds is None else made.conds.draw(Noise.of(0, 1024).fold("calibrate"))
    table = calibrate(made.denoiser, cond=cond, **options)
    facts = {**table.meta["calibration"], "fingerprint": made.fingerprint()}
    return replace(table, meta={**table.meta, "calibration": json.loads(json.dumps(facts))})


def save_tableau(table: Tableau, folder: Path) -> None:
    """Writes ``tableau.json`` and its picture."""
    write_text(folder / "tableau.json", table.to_json() + "\n")
    held = io.BytesIO()
    table.plot().savefig(held, format="png", dpi=150)
    write_bytes(folder / "tableau.png", held.getvalue())
