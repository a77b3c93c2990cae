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

from fewstep.cli.base import SamplerFlags, SourceFlags, next_folder, recipe_of
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.state import Run, write_bytes
from fewstep.errors import InputError
from fewstep.measure.files import write_npz
from fewstep.report.pictures import save_grid


@dataclass(frozen=True)
class Sample:
    """Makes pictures: one contact sheet, single PNGs on request, and an array.

    Attributes:
        generator: a folder of fewstep or diffusers, a Hub id, or a checkpoint.
        n: how many.
        seed: picture i is a function of (seed, i) alone.
        label: the class of every picture; drawn at the data's frequencies without one.
        prompt: for text pipelines; one for all pictures, or repeated once for each.
        batch: pictures at a time; does not change them.
        out: run folder; runs/sample-<number> without one.
        png: also writes each picture as a PNG.
        device: cpu, cuda, cuda:1 or mps.
        overwrite: deletes an earlier run in out.
        source: how to open the generator.
        flags: how to sample.
    """

    generator: Annotated[str, tyro.conf.Positional]
    n: int = 64
    seed: int = 0
    label: int | None = None
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    batch: int = 256
    out: Path | None = None
    png: bool = False
    device: str = "cpu"
    overwrite: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)
    flags: Annotated[SamplerFlags, tyro.conf.arg(name="")] = field(default_factory=SamplerFlags)

    def run(self) -> None:
        """Runs the command."""
        made = self.flags.guided(self.source.open(self.generator, self.device))
        name, sampler = self.flags.resolve(made)
        if self.n < 1:
            raise InputError(f"--n must be at least 1, got {self.n}")
        if self.batch < 1:
            raise InputError(f"--batch must be at least 1, got {self.batch}")
        cond = self._conditions(made)
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

    def _conditions(self, made: Generator) -> dict[str, torch.Tensor]:
        """Those of the flags, checked, before anything is written."""
        noise = Noise.of(self.seed, self.n, made.device)
        if self.label is not None and self.prompt:
            raise InputError("--label and --prompt do not go together: a generator takes one of them")
        if len(self.prompt) not in (0, 1, self.n):
            raise InputError(f"{len(self.prompt)} prompts for --n {self.n} pictures: give one, or one for each")
        if self.prompt:
            return made.conditions(self.prompt[0] if len(self.prompt) == 1 else self.prompt, noise)
        return made.conditions(None if self.label is None else {"label": torch.full((self.n,), self.label)}, noise)


def encoded(picture: torch.Tensor) -> bytes:
    """One (C, H, W) picture in [-1, 1] as a PNG of its own size, grey or in colour."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    held = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(held, "PNG")
    return held.getvalue()
