"""Simple and fast distillation (SFD, arXiv 2409.19681): each big Euler step lands on the teacher's trajectory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.denoiser import Denoiser, start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.sample import trajectory
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.solve.dpmpp import dpmpp
from fewstep.solve.euler import euler

# Above every level that a model with pictures in its noise is used from (iDDPM: 2e4), below those of pure noise.
PURE_NOISE = 1e5
PUBLISHED = 0.006


@dataclass(frozen=True)
class SFD:
    """Fine-tunes the teacher so that Euler on few levels follows the teacher's trajectory on many. Data-free.

    Attributes:
        steps: the student's evaluations, 1 to 4 in the paper.
        between: teacher levels put between two of the student's (the paper's M = 3).
        sigma_min: the level that the student arrives at, and that counts as 0. None is the paper's 0.006, or the
            teacher's own smallest level where that is higher, such as 0.03 of Stable Diffusion.
        rho: of the Karras grid.
        optim: the paper's lr is 5e-5 for 50 M parameters; it falls to a tenth at half of the budget.
        ema: the average that ships; the paper keeps none.
    """

    needs_data: ClassVar[bool] = False

    steps: int = 2
    between: int = 3
    sigma_min: float | None = None
    rho: float = 7.0
    optim: Optim = Optim(lr=2e-4, decay="drop")
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.between < 0 or not (self.sigma_min is None or self.sigma_min > 0):
            raise InputError(f"SFD needs steps >= 1, between >= 0 and sigma_min > 0, got {self}")

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the teacher.

        Raises:
            InputError: see :meth:`ends`.
        """
        self.ends(teacher.denoiser)
        made = teacher.network
        return {
            "teacher": Role(lambda: made),
            "student": Role(lambda: copy.deepcopy(made), self.optim, self.ema, ships=True),
        }

    def ends(self, teacher: Denoiser) -> tuple[float, float]:
        """The lowest and the highest level.

        Raises:
            InputError: ``sigma_min`` is outside of the teacher's levels, or the teacher starts at pure noise.
        """
        top, known = teacher.sigma_max, teacher.sigma_min
        low = max(PUBLISHED, known) if self.sigma_min is None else self.sigma_min
        if not known <= low < top:
            raise InputError(
                f"SFD(sigma_min={low:g}) is outside of the teacher's levels, {known:g} to {top:g}: leave sigma_min out"
            )
        if top > PURE_NOISE:
            last = float(self.levels(low, top)[1][-2])
            raise InputError(
                f"SFD cannot start at sigma {top:g}, the pure noise of a flow model or of zero terminal SNR: Karras' "
                f"grid from there would make its last step from {last:.3g} to {low:g}; fit a sampler with calibrate "
                "instead"
            )
        return low, top

    def levels(self, sigma_min: float, sigma_max: float) -> tuple[Tensor, Tensor]:
        """The student's levels (steps + 1,) and the teacher's, refined so that they share points."""
        fine = karras(self.steps * (self.between + 1), sigma_min, sigma_max, rho=self.rho, to_zero=False)
        return fine[:: self.between + 1], fine

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """One optimizer step per student step, each from the student's own, detached, previous point."""
        moves, table = _tables(self, *self.ends(m.teacher))
        x = start_std(m.teacher, table.start) * noise.normal(m.teacher.shape, "start")
        # The generator is consumed here, inside no_grad, so that no grad mode reaches over a yield of ours.
        targets = [s.point for s in trajectory(m.teacher, x, table, batch.cond)][:: self.between + 1]
        for k in range(self.steps):
            here, target, move = x, targets[k + 1], moves[k]

            def loss(here: Tensor = here, target: Tensor = target, move: Tableau = move) -> Tensor:
                # L1 over pixels; the mean instead of the sum leaves Adam unchanged and lr free of the size.
                return (move(m.student, here, batch.cond, grad=True) - target).abs().mean()

            yield Update("student", loss)
            if k + 1 < self.steps:
                with torch.no_grad():
                    x = move(m.student, here, batch.cond)

    def sampler(self, teacher: Generator) -> Tableau:
        """Euler on the student's levels."""
        return euler(self.levels(*self.ends(teacher.denoiser))[0])


@lru_cache(maxsize=8)
def _tables(method: SFD, low: float, top: float) -> tuple[list[Tableau], Tableau]:
    """The student's single steps and the teacher's whole run, made once."""
    coarse, fine = method.levels(low, top)
    stride = euler(coarse)
    return [stride[k : k + 1] for k in range(method.steps)], dpmpp(fine, 3, lower_order_final=True)
