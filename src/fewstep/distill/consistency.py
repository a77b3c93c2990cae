"""Consistency distillation (CD, arXiv 2303.01469): one step lands where the teacher's whole trajectory ends."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import HIGHEST_PICTURED, widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.loss.perceptual import DISTANCES, DistanceName, distance_in, distance_roles
from fewstep.models.consistency import anchored
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.consistency import consistency
from fewstep.solve.step import ode_step, pictures

Target = Literal["self", "ema"]
TARGETS = ("self", "ema")
PUBLISHED = 0.002


@dataclass(frozen=True)
class Consistency:
    """What all consistency methods share: the levels, the student's form, the distance, and the shipped sampler.

    Attributes:
        steps: evaluations of the shipped sampler; training is the same for all.
        middle: its levels between the first and the last, falling, ``steps - 1`` of them. Without any they are evenly
            spaced on Karras' grid, or for two evaluations 22/39 along it, the paper's point for ImageNet-64: 1.38.
        sigma_min: the level at which the student is the identity. None is the published 0.002, or the teacher's
            smallest level where that is higher.
        sigma_max: the highest level that is trained, and that sampling starts from; None is the teacher's. A flow
            model needs one, such as 80.
        rho: of Karras' grid.
        distance: between two estimates: l2, l1, huber (on the whole picture) or lpips.
        features: of lpips: own (the packaged network, for digits), teacher (its taps), or the path of LPIPS weights.
        target: the weights of the target, which never has a gradient: self (the student's own) or ema (their average
            ``target_ema``).
        target_ema: the average that targets are made with, where ``target`` is ema; it does not ship.
        optim: of the student.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = True

    steps: int = 2
    middle: tuple[float, ...] = ()
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    distance: DistanceName = "huber"
    features: str = "own"
    target: Target = "self"
    target_ema: Ema = Ema(rate=0.95)
    optim: Optim = Optim(lr=1e-4, decay="cosine", clip=1.0)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.steps < 1 or not 0 < self.rho < math.inf:
            raise InputError(f"{name} needs steps >= 1 and rho > 0, got steps={self.steps} and rho={self.rho}")
        if self.middle and len(self.middle) != self.steps - 1:
            raise InputError(
                f"{name} with steps={self.steps} has {self.steps - 1} levels in the middle, got {self.middle}: "
                "give as many, or leave middle out"
            )
        for what, value, known in (("distance", self.distance, DISTANCES), ("target", self.target, TARGETS)):
            if value not in known:
                raise unknown(what, value, known)

    def ends(self, teacher: Denoiser) -> tuple[float, float]:
        """The lowest and the highest level.

        Raises:
            InputError: they are outside of the teacher's levels, the highest is pure noise, or ``middle`` does not
                fall between them.
        """
        name, least, most = type(self).__name__, teacher.sigma_min, teacher.sigma_max
        low = max(PUBLISHED, least) if self.sigma_min is None else self.sigma_min
        top = most if self.sigma_max is None else self.sigma_max
        if not least <= low < top <= most:
            raise InputError(
                f"{name} from sigma {top:g} to {low:g} is outside of the teacher's levels, {least:g} to {most:g}: "
                "leave sigma_min and sigma_max out, or keep them within"
            )
        if top > HIGHEST_PICTURED:
            raise InputError(
                f"{name} cannot start at sigma {top:g}, the pure noise of a flow model or of zero terminal SNR: a grid "
                "from there would have hardly a level where pictures form; set sigma_max, such as 80"
            )
        around = [top, *self.middle, low]
        if any(not b < a for a, b in itertools.pairwise(around)):
            raise InputError(f"{name}: the levels {self.middle} in the middle must fall between {top:g} and {low:g}")
        return low, top

    def student(self, teacher: Generator) -> dict[str, Role]:
        """The teacher's weights as a consistency function, copied when training starts, and the distance's network.

        Raises:
            InputError: see :meth:`ends`, :func:`fewstep.models.consistency.anchored` and
                :func:`fewstep.loss.perceptual.distance_of`.
        """
        form = anchored(network_under(teacher.denoiser), self.ends(teacher.denoiser)[0])
        average = self.target_ema if self.target == "ema" else None
        made = Role(lambda: copy.deepcopy(form), self.optim, self.ema, average, ships=True)
        return {"student": made, **distance_roles(self.distance, teacher, self.features)}

    def compare(self, m: Models, x_a: Tensor, a: Tensor, x_b: Tensor, b: Tensor, cond: Cond, weight: Tensor) -> Tensor:
        """``mean of weight d(f(x_a, a), f-(x_b, b))``, a scalar; levels and weight (B,)."""
        return self.agreement(m, x_a, a, x_b, b, cond, weight)[0]

    def agreement(
        self, m: Models, x_a: Tensor, a: Tensor, x_b: Tensor, b: Tensor, cond: Cond, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`compare` gives, and the student's estimate ``f(x_a, a)`` (B, ...).

        The target without a gradient runs first, with the dropout mask that the student then draws.
        """
        with torch.random.fork_rng([x_a.device] if x_a.is_cuda else []), torch.no_grad():
            aim = m.target("student")(x_b, b, cond)
        made = m.student(x_a, a, cond)
        return (weight.to(x_a) * distance_in(m, self.distance)(made, aim)).mean(), made

    def sampler(self, teacher: Generator) -> Tableau:
        """Multistep consistency sampling (arXiv 2303.01469, algorithm 1)."""
        low, top = self.ends(teacher.denoiser)
        # Two evaluations have a published point; a finer grid holds it.
        parts, every = (39, 22) if self.steps == 2 else (self.steps, 1)
        usual = falling_levels(parts, low, top, self.rho)[every:-1:every].tolist()
        levels = torch.tensor([top, *(self.middle or usual), 0.0], dtype=torch.float64)
        return consistency(levels, sigma_min=low)


class Pair(NamedTuple):
    """Two points of one trajectory.

    Attributes:
        x_a: the one with more noise, (B, ...).
        a: its levels, (B,).
        x_b: the one with less, (B, ...).
        b: its levels, (B,).
        weight: of each pair in the loss, (B,).
    """

    x_a: Tensor
    a: Tensor
    x_b: Tensor
    b: Tensor
    weight: Tensor


@dataclass(frozen=True)
class CD(Consistency):
    """Trains the student to agree with itself along the teacher's trajectory. Starts from the teacher; needs data.

    The student is the identity at ``sigma_min``. Noise of a level of the grid is put on a picture, one step of the
    teacher goes to the next lower level, and the two estimates are drawn together.

    Attributes:
        distance: l2, l1, huber, or lpips, the paper's best.
        target_ema: the target's average, 0.95 in the paper.
        optim: of the student; the paper's is RAdam with lr 8e-6 for ImageNet-64.
        ema: the average that ships, longer than the target's.
        levels: N, the levels of the grid: 40 in the paper, 18 for CIFAR-10; it stays the same.
        solver: the teacher's step, of order 2 with two evaluations or 1 with one.
        weighted: weights a pair by the inverse of its gap, as iCT and ECT do, or all alike, as the paper does.
    """

    optim: Optim = Optim(lr=2e-4, decay="cosine", clip=1.0)
    levels: int = 18
    solver: Literal["heun", "euler"] = "heun"
    weighted: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 2:
            raise InputError(f"CD needs a grid of at least 2 levels, got {self.levels}")
        if self.solver not in ("heun", "euler"):
            raise unknown("solver", self.solver, ("heun", "euler"))

    @classmethod
    def original(cls, **fields: object) -> CD:
        """The paper's settings for CIFAR-10, its distance apart: all pairs alike, and an average as the target."""
        own: dict[str, object] = {"weighted": False, "target": "ema", "levels": 18}
        return cls(**(own | fields))  # type: ignore[arg-type]

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the teacher; guidance around the teacher stays there.

        Raises:
            InputError: see :meth:`Consistency.student`.
        """
        made = frozen(teacher.denoiser)
        return {"teacher": Role(lambda: made), **self.student(teacher)}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Algorithm 2: the teacher's step is taken once, outside of the update."""
        pair, cond = self.pair(m, batch, noise), batch.cond
        yield Update("student", lambda: self.compare(m, *pair[:4], cond, pair.weight))

    def pair(self, m: Models, batch: Batch, noise: Noise) -> Pair:
        """Neighbouring levels of the grid, a noised picture at the higher one, and the teacher's step to the lower.

        Raises:
            InputError: a batch without pictures, or with others than the student takes.
        """
        x0, cond = pictures(type(self).__name__, batch, m.student.shape), batch.cond
        grid = falling_levels(self.levels - 1, *self.ends(m.student), self.rho).to(x0.device)
        k = noise.integers(0, self.levels - 1, (), "level")
        a, b = grid[k], grid[k + 1]
        x_a = x0 + widen(a, x0) * noise.normal(x0.shape[1:], "n")
        with torch.no_grad():
            x_b = ode_step(m.teacher, x_a, a, b, cond, order=2 if self.solver == "heun" else 1)
        return Pair(x_a, a, x_b, b, 1 / (a - b) if self.weighted else torch.ones_like(a))


@lru_cache(maxsize=16)
def falling_levels(steps: int, low: float, top: float, rho: float) -> Tensor:
    """Karras' grid (steps + 1,) from ``top`` to ``low``, made once."""
    return karras(steps, low, top, rho=rho, to_zero=False)
