"""Distribution matching distillation (DMD, arXiv 2311.18828): the difference of two scores, and pairs to hold on to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.denoiser import start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.data.pairs import OnlinePairs, Pairs, require_pairs
from fewstep.distill.vsd import VSD
from fewstep.errors import InputError, unknown
from fewstep.loss.draw import KarrasUniform
from fewstep.loss.matching import Normaliser
from fewstep.loss.perceptual import DISTANCES, DistanceName, distance_in, distance_roles
from fewstep.solve.step import pictures


@dataclass(frozen=True)
class DMD(VSD):
    """Distribution matching on fresh noise, and regression on pairs of a noise and the picture the teacher makes of it.

    The matching makes the student's samples look like the teacher's, and the pairs, made beforehand (`fewstep pairs`),
    keep it from leaving modes out. Without the regression it is VSD with DMD's normaliser, and needs no data.

    Attributes:
        regression: weight of the distance to the pairs' pictures (lambda_reg, the paper's 0.25); 0 leaves it out.
        distance: of the regression: lpips (the paper's), l2, l1 or huber.
        features: of lpips: teacher (its taps), own (the packaged network, for digits), or the path of LPIPS weights.
        joined: whether the samples of the pairs' noises are matched too, as the paper does for LAION; the fake score
            learns fresh ones alone.
        steps: 1: the student has one step.
        levels: the level that it is evaluated at, alone in a tuple.
        normaliser: of the difference of scores: sample is the paper's.
        ratio: updates of the fake score for each of the student; the paper's is 1.
    """

    any_steps: ClassVar[bool] = False

    regression: float = 0.25
    distance: DistanceName = "lpips"
    features: str = "teacher"
    joined: bool = False
    normaliser: Normaliser = "sample"
    draw: KarrasUniform = KarrasUniform(top=0.98, bottom=0.02)
    student: Optim = Optim(lr=1e-4, weight_decay=0.01, clip=10.0)
    fake: Optim = Optim(lr=1e-4, weight_decay=0.01, clip=10.0)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != 1:
            raise InputError(f"DMD trains a student of one step, got steps={self.steps}: for more use vsd or dmd2")
        if not 0 <= self.regression < math.inf:
            raise InputError(f"DMD needs regression >= 0 and finite, got {self.regression}")
        if self.distance not in DISTANCES:
            raise unknown("distance", self.distance, DISTANCES)
        if self.joined and not self.regression:
            raise InputError("DMD(joined=True) matches the samples of pairs, and without regression there are none")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Pairs, with the regression alone."""
        return self.regression > 0

    def check(self, teacher: Generator, data: Any) -> Pairs | OnlinePairs | None:
        """The data, if it is pairs that ``teacher`` made; without the regression it needs none.

        Raises:
            InputError: see :func:`fewstep.data.pairs.require_pairs`.
        """
        return require_pairs(data, teacher, "DMD") if self.regression else None

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of VSD, and the network of the distance.

        Raises:
            InputError: see :meth:`VSD.roles` and :func:`fewstep.loss.perceptual.distance_of`.
        """
        found = super().roles(teacher)
        return found | (distance_roles(self.distance, teacher, self.features) if self.regression else {})

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """See :meth:`VSD.step`.

        Raises:
            InputError: a batch without the noise that its pictures were made from, or of another shape.
        """
        if self.regression:
            x0 = pictures("DMD", batch, m.student.shape)
            if batch.noise is None or batch.noise.shape != x0.shape:
                got = None if batch.noise is None else tuple(batch.noise.shape)
                raise InputError(f"DMD learns from pairs, noise and picture of one shape, got noise {got}: make pairs")
        yield from super().step(m, batch, i, noise)

    def student_losses(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Eq. 7 with the weight of eq. 8 on fresh samples ``x``, and eq. 9 on those of the pairs' noises."""
        found = super().student_losses(m, x, batch, noise)
        if not self.regression:
            return found
        n, x0 = batch.noise, batch.x
        assert n is not None and x0 is not None
        (level,) = self.grid(m.student)
        own = m.student(start_std(m.student, level) * n.to(x), level, batch.cond)
        apart = distance_in(m, self.distance)(own, x0.to(own)).mean()
        loss = found["loss"] + self.regression * apart
        if self.joined:
            # One mean over all samples that are matched.
            paired = super().student_losses(m, own, batch, noise.fold("pairs"))
            loss = loss + (paired["loss"] - found["loss"]) / 2
        return {**found, "loss": loss, "regression": apart.detach()}
