"""Imagine Flash (arXiv 2405.05224): the student learns on its own way from noise, and starts with the true noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.own import own_grid, own_levels, own_shares, picked
from fewstep.loss.gan import Game
from fewstep.models.discriminator import (
    Discriminator,
    check_game,
    discriminator_config,
    discriminator_loss,
    generator_loss,
    judging,
)
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.step import ddim, pictures

AGAIN = ("own", "fresh")


@dataclass(frozen=True)
class ImagineFlash:
    """A student for few steps, trained on the points that it reaches itself. Data-free without the adversarial term.

    Levels are given by their place between 0, the teacher's lowest, and 1, its highest, even in its own time: that of
    its path, or arctan(sigma / sigma_data) where that is the noise level itself.

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
        if not self.steps >= 1 or not self.teacher_steps >= 1:
            raise InputError(
                f"ImagineFlash needs steps >= 1 and teacher_steps >= 1, got {self.steps} and {self.teacher_steps}"
            )
        if self.shift is not None and not 1 <= self.shift < math.inf:
            raise InputError(f"ImagineFlash(shift=...) is a power of at least 1, or None, got {self.shift}")
        if self.again not in AGAIN:
            raise unknown("noise", self.again, AGAIN)
        check_game("ImagineFlash", self.game, self.judged_at, self.hidden, gan=self.gan, r1=self.r1)
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
        """The student's way to a level of its schedule, the teacher's answer to its x0 there, and one update.

        With the adversarial term a second one, of the discriminator on the x0 that the student was just trained on.
        """
        cond = batch.cond
        levels = own_grid(m.student, self.steps).tolist()
        k = noise.integers(0, self.steps, (), "level")
        sigma = picked(k, levels)
        x0 = pictures("ImagineFlash", batch, m.student.shape) if self.needs_data else None
        x = self.points(m, batch, levels, k, noise)
        seen = judging(noise, self.judging_levels(m), x) if self.gan else None
        kept: list[Tensor] = []

        def loss() -> dict[str, Tensor]:
            own = m.student(x, sigma, cond)
            # Not before, because the target depends on the student's x0: that would take the same pass twice.
            with torch.no_grad():
                target = self.target(m, x, own.detach(), sigma, cond, noise)
            total = (own - target).square().mean()
            told = {"reconstruction": total.detach()}
            if seen is not None:
                at, z = seen
                kept.append(own.detach())
                game = generator_loss(m.teacher, m.discriminator, own + z, at, cond, game=self.game)
                total, told["adversarial"] = total + self.gan * game, game.detach()
            return {"loss": total, **told}

        yield Update("student", loss)
        if seen is None or x0 is None:
            return
        at, z = seen
        real = x0 + z

        def judge() -> dict[str, Tensor]:
            fake = kept.pop() + z
            return discriminator_loss(m.teacher, m.discriminator, real, fake, at, cond, game=self.game, gamma=self.r1)

        yield Update("discriminator", judge)

    def points(self, m: Models, batch: Batch, levels: list[float], k: Tensor, noise: Noise) -> Tensor:
        """(B, *shape) at ``levels[k]``: where the student arrives by itself, or noised data.

        All samples go all of the way, and each keeps the point that it was to stop at: which one that is depends on
        the sample alone, so that no batch or process changes it.
        """
        shape = m.student.shape
        x: Tensor = start_std(m.student, m.student.sigma_max) * noise.normal(shape, "start")
        if not self.backward:
            x0 = pictures("ImagineFlash", batch, shape)
            return torch.where(
                _wide(k == 0, x), x.to(x0.dtype), x0 + widen(picked(k, levels), x0) * noise.normal(shape, "n")
            )
        kept = x
        with torch.no_grad():
            for j in range(1, self.steps):
                a, b = (x.new_full((len(x),), level, dtype=torch.float64) for level in levels[j - 1 : j + 1])
                x = ddim(x, m.student(x, a, batch.cond), a, b)
                kept = torch.where(_wide(k >= j, x), x, kept)
        return kept

    def target(self, m: Models, x: Tensor, x_student: Tensor, sigma: Tensor, cond: Cond, noise: Noise) -> Tensor:
        """The teacher's picture: from the student's x0, noised to a lower level, or from the student's point ``x``."""
        place = own_shares(m.student, sigma)
        if self.shift is not None:
            place = place**self.shift
        down = torch.linspace(1, 0, self.teacher_steps + 1, dtype=torch.float64, device=x.device)[:, None]
        levels = own_levels(m.student, place * down)
        levels[-1] = 0
        if self.shift is None:
            levels[0] = sigma
        elif self.again == "own":
            x = ddim(x, x_student, sigma, levels[0])
        else:
            x = x_student + widen(levels[0], x) * noise.normal(x.shape[1:], "again", dtype=x.dtype)
        for a, b in pairwise(levels):
            x = ddim(x, m.teacher(x, a, cond), a, b)
        return x

    def judging_levels(self, m: Models) -> list[float]:
        """The levels at which the discriminator sees pictures."""
        return own_levels(m.student, torch.tensor(self.judged_at, dtype=torch.float64)).tolist()

    def sampler(self, teacher: Generator) -> Tableau:
        """DDIM on the student's levels, the first step with noise correction."""
        D = teacher.denoiser
        std = start_std(D, D.sigma_max) if self.noise_correction else None
        return corrected_ddim(own_grid(D, self.steps), std)


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


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))
