"""Training a denoiser from data as EDM does (arXiv 2206.00364)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.cond import Batch, drop
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.grid.karras import karras
from fewstep.loss.draw import LogNormal
from fewstep.loss.dsm import dsm
from fewstep.solve.heun import heun


@dataclass(frozen=True)
class EDMTraining:
    """Denoising with EDM's noise levels and weight.

    Attributes:
        draw: the training noise levels.
        class_dropout: share of examples trained without their class, so that guidance is possible.
        optim: of the network.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = True

    draw: LogNormal = LogNormal()
    class_dropout: float = 0.1
    optim: Optim = Optim(lr=1e-3, warmup=100, decay="cosine", clip=1.0)
    ema: Ema = Ema(power=0.08)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """One role: the student starts as a copy of the network that it is given."""
        made = teacher.network
        return {"student": Role(lambda: copy.deepcopy(made), self.optim, self.ema, ships=True)}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Eq. 2 of the paper, weighted so that the error of the network's own output counts 1 at every level."""
        x0 = batch.x
        assert x0 is not None
        sigma, weight = self.draw(noise, m.student.sigma_data)
        cond = drop(batch.cond, noise.uniform((), "drop") < self.class_dropout) if self.class_dropout else batch.cond
        n = noise.normal(x0.shape[1:], "n")
        yield Update("student", lambda: dsm(m.student, x0, n, sigma, weight, cond))

    def sampler(self, teacher: Generator) -> Tableau:
        """Heun with 18 steps, 35 evaluations: the paper's choice for small pictures."""
        return heun(karras(18, teacher.denoiser.sigma_min, teacher.denoiser.sigma_max))
