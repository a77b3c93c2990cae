"""Consistency distillation (CD, arXiv 2303.01469): one step lands where the teacher's whole trajectory ends."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.loss.huber import pseudo_huber
from fewstep.models.consistency import anchored
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.consistency import consistency
from fewstep.solve.step import ode_step

Distance = Literal["l2", "l1", "huber"]
Target = Literal["self", "ema"]
DISTANCES, TARGETS = ("l2", "l1", "huber"), ("self", "ema")
# Above every level that a model with pictures in its noise is used from (iDDPM: 2e4), below those of pure noise.
PURE_NOISE = 1e5
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
        sigma_max: the highest level that is trained, and that sampling starts from; None is the teacher's.
        rho: of Karras' grid.
        distance: between two estimates: mean square, mean absolute value, or pseudo-Huber on the whole picture.
        target: the weights of the target, which never has a gradient: the student's own, or its average ``ema``.
        optim: of the student.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = True

    steps: int = 2
    middle: tuple[float, ...] = ()
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    distance: Distance = "huber"
    target: Target = "self"
    optim: Optim = Optim(lr=1e-4)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.steps < 1 or not self.rho > 0:
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
        if top > PURE_NOISE:
            raise InputError(
                f"{name} cannot start at sigma {top:g}, the pure noise of a flow model or of zero terminal SNR: a grid "
                "from there would have hardly a level where pictures form; set sigma_max, such as 80"
            )
        around = [top, *self.middle, low]
        if any(not b < a for a, b in itertools.pairwise(around)):
            raise InputError(f"{name}: the levels {self.middle} in the middle must fall between {top:g} and {low:g}")
        return low, top

    def student(self, teacher: Generator) -> Role:
        """The teacher's weights as a consistency function, copied when training starts.

        Raises:
            InputError: see :meth:`ends` and :func:`fewstep.models.consistency.anchored`.
        """
        form = anchored(network_under(teacher.denoiser), self.ends(teacher.denoiser)[0])
        return Role(lambda: copy.deepcopy(form), self.optim, self.ema, ships=True)

    def compare(self, m: Models, x_a: Tensor, a: Tensor, x_b: Tensor, b: Tensor, cond: Cond, weight: Tensor) -> Tensor:
        """``mean of weight d(f(x_a, a), f-(x_b, b))``, a scalar; levels and weight (B,).

        The target without a gradient runs first, with the dropout mask that the student then draws.
        """
        other = m.student if self.target == "self" else m.ema("student")
        with torch.random.fork_rng([x_a.device] if x_a.is_cuda else []), torch.no_grad():
            aim = other(x_b, b, cond)
        return (weight.to(x_a) * distance(self.distance, m.student(x_a, a, cond), aim)).mean()

    def sampler(self, teacher: Generator) -> Tableau:
        """Multistep consistency sampling (arXiv 2303.01469, algorithm 1)."""
        low, top = self.ends(teacher.denoiser)
        # Two evaluations have a published point; a finer grid holds it.
        parts, every = (39, 22) if self.steps == 2 else (self.steps, 1)
        usual = falling_levels(parts, low, top, self.rho)[every:-1:every].tolist()
        levels = torch.tensor([top, *(self.middle or usual), 0.0], dtype=torch.float64)
        return consistency(levels, sigma_min=low)


@dataclass(frozen=True)
class CD(Consistency):
    """Trains the student to agree with itself along the teacher's trajectory. Starts from the teacher; needs data.

    The student is the identity at ``sigma_min``. Noise of a level of the grid is put on a picture, one step of the
    teacher goes to the next lower level, and the two estimates are drawn together.

    Attributes:
        steps: evaluations of the shipped sampler; training is the same for all.
        middle: its levels between the first and the last, falling. Without any they are evenly spaced on Karras' grid,
            or for two evaluations 22/39 along it, the paper's point for ImageNet-64: 1.38.
        sigma_min: the level at which the student is the identity. None is the published 0.002, or the teacher's
            smallest level where that is higher.
        sigma_max: the highest level of the grid; None is the teacher's. A flow model needs one, such as 80.
        rho: of Karras' grid.
        distance: l2, l1 or huber. The paper's best is LPIPS, which needs a feature network and is not here.
        target: the weights of the target: self (the student's own) or ema (the average that ships).
        optim: of the student; the paper's is RAdam with lr 8e-6 for ImageNet-64.
        ema: the average that ships, and with target ema the target's; the paper keeps a longer one to ship.
        levels: N, the levels of the grid: 40 in the paper, 18 for CIFAR-10; it stays the same.
        solver: the teacher's step, of order 2 with two evaluations or 1 with one.
    """

    target: Target = "ema"
    optim: Optim = Optim(lr=2e-4, decay="cosine", clip=1.0)
    ema: Ema = Ema(rate=0.95)
    levels: int = 18
    solver: Literal["heun", "euler"] = "heun"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 2:
            raise InputError(f"CD needs a grid of at least 2 levels, got {self.levels}")
        if self.solver not in ("heun", "euler"):
            raise unknown("solver", self.solver, ("heun", "euler"))

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the teacher; guidance around the teacher stays there.

        Raises:
            InputError: see :meth:`Consistency.student`.
        """
        made = frozen(teacher.denoiser)
        return {"teacher": Role(lambda: made), "student": self.student(teacher)}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Algorithm 2: the teacher's step is taken once, outside of the update."""
        x0, cond = batch.x, batch.cond
        assert x0 is not None
        grid = falling_levels(self.levels - 1, *self.ends(m.student), self.rho).to(x0.device)
        k = noise.integers(0, self.levels - 1, (), "level")
        a, b = grid[k], grid[k + 1]
        x_a = x0 + widen(a, x0) * noise.normal(x0.shape[1:], "n")
        with torch.no_grad():
            x_b = ode_step(m.teacher, x_a, a, b, cond, order=2 if self.solver == "heun" else 1)
        yield Update("student", lambda: self.compare(m, x_a, a, x_b, b, cond, torch.ones_like(a)))


def distance(name: Distance, x: Tensor, y: Tensor) -> Tensor:
    """(B,): the mean square, the mean absolute value, or :func:`fewstep.loss.huber.pseudo_huber`, of ``x - y``."""
    if name == "huber":
        return pseudo_huber(x, y)
    difference = (x - y).flatten(1)
    return difference.square().mean(1) if name == "l2" else difference.abs().mean(1)


@lru_cache(maxsize=16)
def falling_levels(steps: int, low: float, top: float, rho: float) -> Tensor:
    """Karras' grid (steps + 1,) from ``top`` to ``low``, made once."""
    return karras(steps, low, top, rho=rho, to_zero=False)
