"""``fewstep sample``: pictures from a generator."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console

from fewstep.cli.base import SamplerFlags, next_folder, recipe_of
from fewstep.core.noise import Noise
from fewstep.core.state import Run, write_bytes
from fewstep.errors import InputError
from fewstep.measure.files import write_npz
from fewstep.report.pictures import save_grid
from fewstep.sources import load


@dataclass(frozen=True)
class Sample:
    """Makes pictures: one contact sheet, single PNGs on request, and an array.

    Attributes:
        generator: its folder.
        n: how many.
        seed: picture i is a function of (seed, i) alone.
        label: the class of every picture; drawn at the data's frequencies without one.
        batch: pictures at a time; does not change them.
        out: run folder; runs/sample-<number> without one.
        png: also writes each picture as a PNG.
        device: cpu, cuda, cuda:1 or mps.
        overwrite: deletes an earlier run in out.
        flags: how to sample.
    """

    generator: Annotated[Path, tyro.conf.Positional]
    n: int = 64
    seed: int = 0
    label: int | None = None
    batch: int = 256
    out: Path | None = None
    png: bool = False
    device: str = "cpu"
    overwrite: bool = False
    flags: Annotated[SamplerFlags, tyro.conf.arg(name="")] = field(default_factory=SamplerFlags)

    def run(self) -> None:
        """Runs the command."""
        made = self.flags.guided(load(self.generator, device=self.device))
        name, sampler = self.flags.resolve(made)
        if self.n < 1:
            raise InputError(f"--n must be at least 1, got {self.n}")
        if self.batch < 1:
            raise InputError(f"--batch must be at least 1, got {self.batch}")
        cond = None if self.label is None else {"label": torch.full((self.n,), self.label)}
        made.conditions(cond, Noise.of(self.seed, 1))
        out = self.out or next_folder("sample")
        run = Run.open(out, recipe_of("sample", self), overwrite=self.overwrite)
        clock = time.perf_counter()
        pictures = made.sample(self.n, cond, seed=self.seed, sampler=sampler, batch=self.batch)
        seconds = time.perf_counter() - clock
        save_grid(pictures[:256], run.folder / "samples.png")
        write_npz(run.folder / "samples.npz", {"arr_0": np.asarray(pictures)})
        if self.png:
            for i, picture in enumerate(pictures):
                write_bytes(run.folder / "png" / f"{i:06d}.png", encoded(picture))
        run.log({"step": 0, "sampler": name, "nfe": sampler.nfe, "seconds": seconds, "images": self.n})
        told = f"{run.folder}/samples.png: {self.n} pictures, {name}, {sampler.nfe} evaluations each, {seconds:.2f} s"
        Console(stderr=True).print(told, highlight=False)


def encoded(picture: torch.Tensor) -> bytes:
    """One (C, H, W) picture in [-1, 1] as a PNG of its own size, grey or in colour."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    held = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(held, "PNG")
    return held.getvalue()
