"""Score identity distillation (SiD, arXiv 2404.04057): data-free, one step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.loss.draw import KarrasUniform, LogNormal
from fewstep.loss.dsm import dsm
from fewstep.solve.euler import euler


@dataclass(frozen=True)
class SiD:
    """A model-based Fisher divergence whose gradient flows through the teacher and the fake score.

    Attributes:
        alpha: weight of the squared difference; 1.2 in the paper, 1.0 for its AFHQ.
        sigma_init: the student's only noise level, as scale and as condition.
        draw: noise levels of the student's loss.
        fake_draw: noise levels of the fake score's.
        student: optimizer of the student. The paper's lr is 1e-5 at 50 M parameters and 500 M images.
        fake: optimizer of the fake score.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = False

    alpha: float = 1.0
    sigma_init: float = 2.5
    draw: KarrasUniform = KarrasUniform(top=0.8)
    fake_draw: LogNormal = LogNormal()
    student: Optim = Optim(lr=2e-4, betas=(0.0, 0.999))
    fake: Optim = Optim(lr=4e-4, betas=(0.0, 0.999))
    ema: Ema = Ema(power=0.08)

    def __post_init__(self) -> None:
        if not self.sigma_init > 0:
            raise InputError(f"SiD needs sigma_init > 0, got {self.sigma_init}")

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Student and fake score start as the teacher."""
        made = teacher.network
        return {
            "teacher": Role(lambda: made),
            "fake": Role(lambda: copy.deepcopy(made), self.fake),
            "student": Role(lambda: copy.deepcopy(made), self.student, self.ema, ships=True),
        }

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """One update of the fake score, then one of the student, on separate noise."""
        cond, shape = batch.cond, m.student.shape

        def generate(part: str) -> Tensor:
            z = noise.normal(shape, part, "z")
            made: Tensor = m.student(self.sigma_init * z, self.sigma_init, cond)
            return made

        with torch.no_grad():
            x_fake = generate("fake")
        own = noise.fold("fake")
        sigma, weight = self.fake_draw(own, m.fake.sigma_data)
        yield Update("fake", lambda: dsm(m.fake, x_fake, own.normal(shape, "n"), sigma, weight, cond))

        def student_loss() -> dict[str, Tensor]:
            x = generate("student")
            other = noise.fold("student")
            s, _ = self.draw(other, m.student.sigma_data)
            y = x + widen(s, x) * other.normal(shape, "n")
            d_teacher, d_fake = m.teacher(y, s, cond), m.fake(y, s, cond)
            return sid_loss(x, d_teacher, d_fake, self.alpha)

        yield Update("student", student_loss)

    def sampler(self, teacher: Generator) -> Tableau:
        """One evaluation at ``sigma_init``."""
        return euler(torch.tensor([self.sigma_init, 0.0]))


def sid_loss(x: Tensor, d_teacher: Tensor, d_fake: Tensor, alpha: float) -> dict[str, Tensor]:
    """The generator's loss ``d ((D_T - x) - alpha d) / omega`` with ``d = D_T - D_F`` and ``omega = mean|x - D_T|``.

    All (B, ...). Nothing is detached but omega. Its value says little (it is 0 in expectation at alpha 1); the
    Fisher divergence between fake and teacher, returned beside it, falls as the student learns.
    """
    difference = d_teacher - d_fake
    with torch.no_grad():
        omega = (x - d_teacher).abs().flatten(1).mean(1).clamp_min(1e-5)
    each = difference * ((d_teacher - x) - alpha * difference)
    loss = (each.flatten(1).mean(1) / omega).mean()
    return {"loss": loss, "fisher": difference.detach().square().mean()}
