"""Variational score distillation (Diff-Instruct, arXiv 2305.18455; SwiftBrush, 2312.05239): data-free, one step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW, HIGHEST_PICTURED, widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.loss.draw import KarrasUniform, edm_weight
from fewstep.loss.dsm import dsm
from fewstep.loss.matching import NORMALISERS, Normaliser, directed, direction
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.consistency import consistency


@dataclass(frozen=True)
class VSD:
    """Moves the student's samples along the difference of two scores: the teacher's, and that of a fake score.

    The fake score starts as the teacher and learns the student's samples. Neither gets a gradient from the student's
    loss. A student of several steps learns each of them on what it made in the steps before, from noise.

    Attributes:
        steps: evaluations of the student.
        levels: those that it is evaluated at, falling, ``steps`` of them; the first is its start. Without any they
            are spaced as Karras', or evenly in a flow model's time, from ``sigma_init``.
        sigma_init: the level that the student starts from; None is the teacher's highest.
        normaliser: of the difference: sample is DMD's, vp SwiftBrush's weight in its own time, none 1.
        draw: noise levels at which student and teacher are compared.
        fake_draw: noise levels of the fake score's training.
        ratio: updates of the fake score for each of the student.
        student: optimizer of the student.
        fake: optimizer of the fake score.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = False
    any_steps: ClassVar[bool] = False

    steps: int = 1
    levels: tuple[float, ...] = ()
    sigma_init: float | None = None
    normaliser: Normaliser = "sample"
    draw: KarrasUniform = KarrasUniform(top=0.98, bottom=0.02)
    fake_draw: KarrasUniform = KarrasUniform(top=1.0)
    ratio: int = 1
    student: Optim = Optim(lr=1e-4)
    fake: Optim = Optim(lr=1e-4)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.steps < 1 or self.ratio < 1 or not (self.sigma_init is None or self.sigma_init > 0):
            raise InputError(
                f"{name} needs steps >= 1, ratio >= 1 and sigma_init > 0, got steps={self.steps}, ratio={self.ratio} "
                f"and sigma_init={self.sigma_init}"
            )
        if self.normaliser not in NORMALISERS:
            raise unknown("normaliser", self.normaliser, NORMALISERS)
        if self.levels and (
            len(self.levels) != self.steps
            or any(not 0 < b < a for a, b in itertools.pairwise(self.levels))
            or self.sigma_init not in (None, self.levels[0])
        ):
            raise InputError(
                f"{name} with steps={self.steps} needs as many falling levels, of which the first is sigma_init, got "
                f"{self.levels}: leave levels out"
            )

    def grid(self, teacher: Denoiser) -> list[float]:
        """The student's levels, the first where it starts.

        Raises:
            InputError: they are outside of the teacher's levels.
        """
        low, high = teacher.sigma_min, teacher.sigma_max
        top = self.levels[0] if self.levels else self.sigma_init or high
        if self.levels:
            found = list(self.levels)
        elif top > HIGHEST_PICTURED:
            # Karras' grid from pure noise would have hardly a level where pictures form.
            times = torch.arange(self.steps, 0, -1, dtype=torch.float64) / self.steps
            found = [top, *FLOW.sigma(times[1:]).tolist()]
        else:
            found = karras(self.steps, low, top, to_zero=False)[:-1].tolist() if self.steps > 1 else [top]
        if not low <= found[-1] <= found[0] <= high * (1 + 1e-6):
            raise InputError(
                f"{type(self).__name__} at levels {found[0]:g} to {found[-1]:g} is outside of the teacher's, {low:g} "
                f"to {high:g}: choose sigma_init or levels within"
            )
        return found

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Student and fake score start as the network of the teacher, which may be guided.

        Raises:
            InputError: there is no network, or see :meth:`grid`.
        """
        self.grid(teacher.denoiser)
        made, whole = network_under(teacher.denoiser), frozen(teacher.denoiser)
        return {
            "teacher": Role(lambda: whole),
            "fake": Role(lambda: copy.deepcopy(made), self.fake),
            "student": Role(lambda: copy.deepcopy(made), self.student, self.ema, ships=True),
        }

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The student every ``ratio`` iterations, then the fake score on the same samples."""
        cond, levels = batch.cond, self.grid(m.student)
        # The same step for all samples, micro-batches and processes: the ones before it are run for it.
        k = int(m.common(i).integers(0, len(levels), (), "step"))
        with torch.no_grad():
            start = rollout(m.student, levels[: k + 1], noise, cond)

        def generate() -> Tensor:
            samples: Tensor = m.student(start, levels[k], cond)
            return samples

        made: list[Tensor] = []
        if i % self.ratio == 0:
            yield self.student_update(m, generate, made, batch, noise.fold("student"))
        if not made:
            with torch.no_grad():
                made.append(generate())
        yield self.fake_update(m, made.pop(), batch, noise.fold("fake"))

    def student_update(
        self, m: Models, generate: Callable[[], Tensor], made: list[Tensor], batch: Batch, noise: Noise
    ) -> Update:
        """The student's update on the samples that ``generate`` makes, which it puts into ``made`` when it runs."""

        def loss() -> dict[str, Tensor]:
            x = generate()
            made.append(x.detach())
            return self.student_losses(m, x, batch, noise)

        return Update("student", loss)

    def student_losses(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """What the student's samples ``x``, with a graph, are trained with: ``loss`` and what is worth watching."""
        sigma, _ = self.draw(noise, m.student.sigma_data)
        with torch.no_grad():
            y = x + widen(sigma, x) * noise.normal(x.shape[1:], "n")
            d_fake, d_teacher = self.estimates(m, y, sigma, batch.cond, noise)
            g = direction(x, d_fake, d_teacher, sigma, self.normaliser)
        return {"loss": directed(x, g), "fisher": (d_fake - d_teacher).square().mean()}

    def estimates(self, m: Models, y: Tensor, sigma: Tensor, cond: Cond, noise: Noise) -> tuple[Tensor, Tensor]:
        """What the fake score and the teacher say of ``y`` at ``sigma``."""
        return m.fake(y, sigma, cond), m.teacher(y, sigma, cond)

    def fake_update(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> Update:
        """Denoising of the student's samples ``x``, which have no gradient."""
        sigma, _ = self.fake_draw(noise, m.fake.sigma_data)
        weight, n = edm_weight(sigma, m.fake.sigma_data), noise.normal(x.shape[1:], "n")
        return Update("fake", lambda: dsm(m.fake, x, n, sigma, weight, batch.cond))

    def sampler(self, teacher: Generator) -> Tableau:
        """One evaluation at each level, with fresh noise between them."""
        return consistency(torch.tensor([*self.grid(teacher.denoiser), 0.0], dtype=torch.float64), sigma_min=0.0)


def rollout(student: Denoiser, levels: list[float], noise: Noise, cond: Cond) -> Tensor:
    """What the student is given at the last of ``levels``: pure noise at the first, its own samples noised after it.

    Backward simulation (arXiv 2405.14867, section 4.5).
    """
    x = start_std(student, levels[0]) * noise.normal(student.shape, "start")
    for k, (here, there) in enumerate(itertools.pairwise(levels)):
        x = student(x, here, cond)
        x = x + there * noise.normal(student.shape, "again", k)
    return x
