"""``fewstep collaborate``: pictures of a student, the worst of them refined by its teacher."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor

from fewstep.cli.base import SourceFlags, next_folder, recipe_of
from fewstep.core.cond import Cond
from fewstep.core.generator import Generator
from fewstep.core.state import Run
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.measure.files import write_npz
from fewstep.report.pictures import save_grid
from fewstep.solve.collaboration import ORACLES, Collaboration, Oracle, oracle_of


@dataclass(frozen=True)
class Collaborate:
    """Samples a student, scores its pictures, and lets the teacher refine those that score too low.

    Attributes:
        student: a generator of few steps.
        teacher: the generator that it was made from.
        share: of the student's pictures that the teacher gets; a calibration set finds the score below which they lie.
        cutoff: that score itself, in place of a calibration.
        oracle: label or confidence (the packaged classifier of digits), or MODULE:FUNCTION, a function of your own that
            maps pictures (B, C, H, W) in [-1, 1] and their conditions to scores (B,), higher for better. Its module is
            imported.
        mode: refine (noise the student's picture and let the teacher go on from there), or regenerate from pure noise.
        rollback: of refinement, the share of the teacher's steps that are run again.
        guidance: scale of classifier-free guidance of the teacher; 1 is none.
        calibration: pictures of the calibration set.
        n: how many pictures.
        seed: picture i is a function of (seed, i) alone.
        label: the class of every picture; drawn at the data's frequencies without one.
        batch: pictures at a time; does not change them.
        out: run folder; runs/collaborate-<number> without one.
        device: cpu, cuda, cuda:1 or mps.
        overwrite: deletes an earlier run in out.
        source: how to open both generators.
    """

    student: Annotated[str, tyro.conf.Positional]
    teacher: Annotated[str, tyro.conf.Positional]
    share: float = 0.3
    cutoff: float | None = None
    oracle: str = "label"
    mode: Literal["refine", "regenerate"] = "refine"
    rollback: float = 0.5
    guidance: float = 1.0
    calibration: int = 1000
    n: int = 64
    seed: int = 0
    label: int | None = None
    batch: int = 256
    out: Path | None = None
    device: str = "cpu"
    overwrite: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)

    def run(self) -> None:
        """Runs the command."""
        if self.n < 1 or self.batch < 1:
            raise InputError(f"--n and --batch must be at least 1, got {self.n} and {self.batch}")
        student = self.source.open(self.student, self.device)
        teacher = guided(self.source.open(self.teacher, self.device), self.guidance)
        cond = None if self.label is None else {"label": torch.full((self.n,), self.label)}
        made = self.collaboration(student, teacher)
        run = Run.open(self.out or next_folder("collaborate"), recipe_of("collaborate", self), overwrite=self.overwrite)
        clock = time.perf_counter()
        found = made.sample(self.n, cond, seed=self.seed, batch=self.batch)
        seconds = time.perf_counter() - clock
        save_grid(found.pictures[:256], run.folder / "samples.png")
        arrays = {"arr_0": found.pictures, "scores": found.scores, "refined": found.refined}
        write_npz(run.folder / "samples.npz", {name: np.asarray(value) for name, value in arrays.items()})
        cutoff = {"cutoff": made.cutoff} if np.isfinite(made.cutoff) else {}
        run.log({"step": 0, "seconds": seconds, **cutoff, **found.facts()})
        told = (
            f"{run.folder}/samples.png: {self.n} pictures, {found.share:.0%} by the teacher ({self.mode}), "
            f"{found.nfe:.2f} evaluations each ({found.student_nfe:g} and {found.teacher_nfe:g}), {seconds:.2f} s"
        )
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)

    def collaboration(self, student: Generator, teacher: Generator) -> Collaboration:
        """What the flags ask for, calibrated where they give no cut-off."""
        options: dict[str, Any] = {"mode": self.mode, "rollback": self.rollback}
        oracle = self._oracle(student)
        if self.cutoff is not None:
            return Collaboration(student, teacher, oracle, self.cutoff, **options)
        labels = None if self.label is None else {"label": torch.full((max(1, self.calibration),), self.label)}
        return Collaboration.calibrated(
            student,
            teacher,
            oracle,
            share=self.share,
            n=self.calibration,
            cond=labels,
            seed=self.seed,
            batch=self.batch,
            **options,
        )

    def _oracle(self, student: Generator) -> Oracle:
        """The packaged one, or the function that the flag names."""
        if ":" not in self.oracle:
            if student.codec is not None and self.oracle in ORACLES:
                raise InputError(
                    f"--oracle {self.oracle} reads digits alone: pass MODULE:FUNCTION for decoded pictures"
                )
            return oracle_of(self.oracle, tuple(student.denoiser.shape))
        module, _, name = self.oracle.partition(":")
        try:
            found: Oracle = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"--oracle {self.oracle} was not found: {error}") from None
        return partial(_asked, found, self.oracle)


def _asked(oracle: Oracle, name: str, pictures: Tensor, cond: Cond) -> Tensor:
    """What a user's function says, with its errors as ours: it may be any function at all."""
    try:
        return oracle(pictures, cond)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"--oracle {name} failed on {len(pictures)} pictures: {type(error).__name__}: {error}; expected a function "
            "(pictures, cond) -> scores (B,)"
        ) from error
