"""Imagine Flash (arXiv 2405.05224): the student learns on its own way from noise, and starts with the true noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, Wrapper, start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import TRIG, EDMPath, Path, widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.base import check_falling
from fewstep.loss.gan import ADVERSARIAL, Game
from fewstep.models.discriminator import (
    Discriminator,
    discriminator_config,
    discriminator_loss,
    generator_loss,
)
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.step import ddim, pictures

AGAIN = ("own", "fresh")


@dataclass(frozen=True)
class ImagineFlash:
    """A student for few steps, trained on the points that it reaches itself. Data-free without the adversarial term.

    Levels are given by their place between 0, the teacher's lowest, and 1, its highest, even in the time of its own
    path, or in arctan(sigma / sigma_data) where that time is the noise level itself.

    Attributes:
        steps: the student's evaluations; the paper's are 1 to 3.
        backward: backward distillation: training points are reached by the student from pure noise; off puts noise on
            data instead, which needs some.
        shift: shifted reconstruction: the student's x0 is noised again, to this power of its own place, and the teacher
            goes on from there. The highest place stays, lower ones are lowered. 1 keeps all; None lets the teacher go
            on from the student's point itself.
        again: the noise of that: own is what the student's x0 leaves of its point, fresh is drawn anew, for which a
            mean square error alone asks for the mean of all the pictures that the teacher may then go to.
        teacher_steps: DDIM steps of the teacher from there to the picture.
        noise_correction: the sampler takes the noise it started from for the noise of its first step.
        gan: weight of the adversarial term; above 0 it needs data.
        game: adversarial loss: hinge (the paper's), non-saturating or least-squares.
        r1: weight gamma of the penalty on the discriminator's gradient by the features.
        judged_at: places at which the discriminator sees pictures, drawn alike.
        taps: the features of the teacher that it reads; without any the bottleneck, or a transformer's middle block.
        hidden: width of its heads.
        optim: of the student.
        critic: optimizer of the discriminator.
        ema: the average that ships.
    """

    # Of an instance it says whether that one needs data: see __post_init__.
    needs_data: ClassVar[bool] = False
    any_steps: ClassVar[bool] = False

    steps: int = 3
    backward: bool = True
    shift: float | None = 1.5
    again: Literal["own", "fresh"] = "own"
    teacher_steps: int = 4
    noise_correction: bool = True
    gan: float = 0.0
    game: Game = "hinge"
    r1: float = 0.0
    judged_at: tuple[float, ...] = (0.25, 0.5, 0.75)
    taps: tuple[str, ...] = ()
    hidden: int = 128
    optim: Optim = Optim(lr=1e-4)
    critic: Optim = Optim(lr=1e-4, betas=(0.0, 0.999))
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.teacher_steps < 1 or min(self.gan, self.r1) < 0:
            raise InputError(
                f"ImagineFlash needs steps >= 1, teacher_steps >= 1, gan >= 0 and r1 >= 0, got {self.steps}, "
                f"{self.teacher_steps}, {self.gan} and {self.r1}"
            )
        if self.shift is not None and not 1 <= self.shift < math.inf:
            raise InputError(f"ImagineFlash(shift=...) is a power of at least 1, or None, got {self.shift}")
        if self.again not in AGAIN:
            raise unknown("noise", self.again, AGAIN)
        if not self.judged_at or not all(0 <= place < 1 for place in self.judged_at):
            raise InputError(f"ImagineFlash(judged_at=...) takes places within [0, 1), got {self.judged_at}")
        if self.game not in ADVERSARIAL:
            raise unknown("adversarial loss", self.game, ADVERSARIAL)
        object.__setattr__(self, "needs_data", self.gan > 0 or not self.backward)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the network of the teacher, whose guidance stays with it.

        Raises:
            InputError: a denoiser without a network, or without the features that the adversarial term needs.
        """
        made, student = frozen(teacher.denoiser), network_under(teacher.denoiser)
        self.sampler(teacher)
        roles = {
            "teacher": Role(lambda: made),
            "student": Role(lambda: copy.deepcopy(student), self.optim, self.ema, ships=True),
        }
        if self.gan:
            size = discriminator_config(teacher, self.taps, self.hidden)
            roles["discriminator"] = Role(lambda: Discriminator(size), self.critic)
        return roles

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The student's way to a level of its schedule, the teacher's answer to its x0 there, and one update."""
        cond = batch.cond
        grid = native_levels(m.student, self.steps).to(noise.seeds.device)
        k = noise.integers(0, self.steps, (), "level")
        sigma = grid[k]
        x = self.points(m, batch, grid, k, noise)
        with torch.no_grad():
            x_student = m.student(x, sigma, cond)
            target = self.target(m, x, x_student, sigma, cond, noise)
        if self.gan:
            real, made = self.noised(m, noise, pictures("ImagineFlash", batch, m.student.shape), x_student)
            at = self.judging_levels(m.student, noise)

            def judging() -> dict[str, Tensor]:
                return discriminator_loss(
                    m.teacher, m.discriminator, real, made, at, cond, game=self.game, gamma=self.r1
                )

            yield Update("discriminator", judging)

        def loss() -> dict[str, Tensor]:
            own = m.student(x, sigma, cond)
            total = (own - target).square().mean()
            told = {"reconstruction": total.detach()}
            if self.gan:
                (fake,) = self.noised(m, noise, own)
                at = self.judging_levels(m.student, noise)
                game = generator_loss(m.teacher, m.discriminator, fake, at, cond, game=self.game)
                total, told["adversarial"] = total + self.gan * game, game.detach()
            return {"loss": total, **told}

        yield Update("student", loss)

    def points(self, m: Models, batch: Batch, grid: Tensor, k: Tensor, noise: Noise) -> Tensor:
        """(B, *shape) at the levels ``grid[k]``: where the student arrives by itself, or noised data.

        All samples go all of the way, and each keeps the point that it was to stop at: which one that is depends on
        the sample alone, so that no batch or process changes it.
        """
        shape = m.student.shape
        x: Tensor = start_std(m.student, m.student.sigma_max) * noise.normal(shape, "start")
        if not self.backward:
            x0 = pictures("ImagineFlash", batch, shape)
            return torch.where(_wide(k == 0, x), x.to(x0.dtype), x0 + widen(grid[k], x0) * noise.normal(shape, "n"))
        kept = x
        with torch.no_grad():
            for j in range(1, self.steps):
                a, b = (level.expand(len(x)) for level in (grid[j - 1], grid[j]))
                x = ddim(x, m.student(x, a, batch.cond), a, b)
                kept = torch.where(_wide(k >= j, x), x, kept)
        return kept

    def target(self, m: Models, x: Tensor, x_student: Tensor, sigma: Tensor, cond: Cond, noise: Noise) -> Tensor:
        """The teacher's picture: from the student's x0, noised to a lower level, or from the student's point ``x``."""
        forward, inverse, low, top = native(m.student)
        place = (forward(sigma) - low) / (top - low)
        if self.shift is not None:
            place = place**self.shift
        down = torch.linspace(1, 0, self.teacher_steps + 1, dtype=torch.float64, device=x.device)[:, None]
        levels = inverse(low + (top - low) * place * down).clamp(m.student.sigma_min, m.student.sigma_max)
        levels[-1] = 0
        if self.shift is None:
            levels[0] = sigma
        elif self.again == "own":
            # Rounding would put the highest place above or below the level that x is at.
            levels[0] = torch.where(place >= 1, sigma, levels[0])
            x = ddim(x, x_student, sigma, levels[0])
        else:
            x = x_student + widen(levels[0], x) * noise.normal(x.shape[1:], "again", dtype=x.dtype)
        for a, b in pairwise(levels):
            x = ddim(x, m.teacher(x, a, cond), a, b)
        return x

    def judging_levels(self, D: Denoiser, noise: Noise) -> Tensor:
        """(B,) float64: the level at which the discriminator sees each example."""
        known = levels_at(D, torch.tensor(self.judged_at, dtype=torch.float64, device=noise.seeds.device))
        return known[noise.integers(0, len(known), (), "judged")]

    def noised(self, m: Models, noise: Noise, *given: Tensor) -> tuple[Tensor, ...]:
        """Pictures (B, ...) as the discriminator sees them, all with the same noise."""
        sigma = widen(self.judging_levels(m.student, noise), given[0])
        n = noise.normal(given[0].shape[1:], "judged", dtype=given[0].dtype)
        return tuple(x + sigma * n for x in given)

    def sampler(self, teacher: Generator) -> Tableau:
        """DDIM on the student's levels, the first step with noise correction."""
        D = teacher.denoiser
        std = start_std(D, D.sigma_max) if self.noise_correction else None
        return corrected_ddim(native_levels(D, self.steps), std)


def corrected_ddim(levels: Tensor, std: float | None) -> Tableau:
    """DDIM whose first step goes to ``D + (b / std) x``: it keeps the noise ``x / std`` that the sampler started from.

    ``levels`` falling, ending at 0; ``std`` is the standard deviation of the start, None is plain DDIM. DDIM takes
    ``(x - D) / a`` for the noise, which at a finite level ``a`` lacks ``D / a``. One evaluation a step.
    """
    table = Builder(float(levels[0]))
    for k, (a, b) in enumerate(pairwise(levels.tolist())):
        if k == 0 and std is not None:
            table.row(a, b, {0: b / std}, {0: 1.0})
        else:
            table.row(a, b, {k: b / a}, {k: 1 - b / a})
    return table.build("ddim" if std is None else "ddim-noise-corrected")


Map = Callable[[Tensor], Tensor]


def native(D: Denoiser) -> tuple[Map, Map, float, float]:
    """The time in which a denoiser's levels are even, as a map and its inverse, and that of its lowest and highest.

    The time of its own path; where that is the noise level itself, or there is no path, arctan(sigma / sigma_data).
    """
    inner: Any = D.inner if isinstance(D, Wrapper) else D
    own = getattr(inner, "path", None)
    path = own if isinstance(own, Path) and not isinstance(own, EDMPath) else TRIG(D.sigma_data)
    low, top = path.at(torch.tensor([D.sigma_min, D.sigma_max], dtype=torch.float64)).tolist()
    return path.at, path.sigma, low, top


def levels_at(D: Denoiser, place: Tensor) -> Tensor:
    """The levels at places between 0, the lowest, and 1, the highest; float64, shaped like ``place``."""
    _, inverse, low, top = native(D)
    return inverse(low + (top - low) * place).clamp(D.sigma_min, D.sigma_max)


def native_levels(D: Denoiser, steps: int) -> Tensor:
    """(steps + 1,) float64 levels even in :func:`native` time, from the highest; the last counts as level 0.

    Raises:
        InputError: two of them coincide.
    """
    levels = levels_at(D, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    levels[0], levels[-1] = D.sigma_max, 0.0
    return check_falling(levels, f"the grid of {steps} steps")


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))
