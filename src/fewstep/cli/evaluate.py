"""``fewstep evaluate``: scores of a generator against real pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fewstep.cli.base import SamplerFlags, SourceFlags, next_folder, recipe_of
from fewstep.core.state import Run
from fewstep.data import load_data
from fewstep.errors import InputError, unknown
from fewstep.measure import METRICS
from fewstep.report.pictures import save_grid
from fewstep.report.rows import check_metrics, converged, measure_sampler


@dataclass(frozen=True)
class Evaluate:
    """Samples a generator and scores the pictures; the number of samples is part of every metric's name.

    Attributes:
        generator: a folder of fewstep or diffusers, a Hub id, or a checkpoint.
        data: real pictures: digits, stacked-digits, a folder, Parquet files, or an array.
        resize: side that encoded images are resized to, in pixels.
        n: how many pictures to generate.
        seed: of the pictures.
        metrics: names separated by commas; all that apply without.
        extractor: features to compare in: digits or pixel; digits for the digits data sets without one.
        paired: also the RMSE to the generator's own converged end points at the same noise.
        batch: pictures at a time.
        out: run folder; runs/evaluate-<number> without one.
        device: cpu, cuda, cuda:1 or mps.
        overwrite: deletes an earlier run in out.
        source: how to open the generator.
        flags: how to sample.
    """

    generator: Annotated[str, tyro.conf.Positional]
    data: str = "digits"
    resize: int | None = None
    n: int = 2000
    seed: int = 1
    metrics: str = "default"
    extractor: str | None = None
    paired: bool = False
    batch: int = 1000
    out: Path | None = None
    device: str = "cpu"
    overwrite: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)
    flags: Annotated[SamplerFlags, tyro.conf.arg(name="")] = field(default_factory=SamplerFlags)

    def run(self) -> None:
        """Runs the command."""
        wanted = self.metrics if self.metrics == "default" else tuple(m.strip() for m in self.metrics.split(","))
        for name in () if isinstance(wanted, str) else wanted:
            if name not in METRICS:
                raise unknown("metric", name, METRICS)
        if self.n < 1 or self.batch < 1:
            raise InputError(f"--n and --batch must be at least 1, got {self.n} and {self.batch}")
        made = self.flags.guided(self.source.open(self.generator, self.device))
        label, sampler = self.flags.resolve(made)
        pictures = load_data(self.data, resize=self.resize)
        if made.codec is None and pictures.shape != tuple(made.denoiser.shape):
            raise InputError(f"the generator makes {tuple(made.denoiser.shape)} and {self.data} has {pictures.shape}")
        check_metrics(made, pictures, wanted, self.n, self.extractor)
        run = Run.open(self.out or next_folder("evaluate"), recipe_of("evaluate", self), overwrite=self.overwrite)
        ends = converged(made, self.n, seed=self.seed, batch=self.batch) if self.paired else None
        row = measure_sampler(
            made,
            sampler,
            pictures,
            name=label,
            group="solver",
            command="",
            n=self.n,
            seed=self.seed,
            batch=self.batch,
            metrics=wanted,
            extractor=self.extractor,
            ends=ends,
            progress=True,
        )
        save_grid(row.pictures, run.folder / "samples.png")
        facts = {"step": 0, "sampler": label, "nfe": row.nfe, "seconds": row.seconds, **row.metrics}
        if row.rmse is not None:
            facts["rmse_to_converged"] = row.rmse
        run.log(facts)
        table = Table("metric", "value", title=f"{self.generator}: {label}, {row.nfe} evaluations")
        for key, value in facts.items():
            if isinstance(value, float):
                table.add_row(key, f"{value:.4f}")
        Console().print(table)
