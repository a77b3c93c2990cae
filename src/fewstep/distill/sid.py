"""Score identity distillation (SiD, arXiv 2404.04057; with guidance, 2406.01561): data-free, one step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond, take
from fewstep.core.denoiser import Denoiser, Wrapper, start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Optim, Role, Update, portions
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.guide.cfg import CFG, guided
from fewstep.loss.draw import Draw, KarrasUniform, LogNormal
from fewstep.loss.dsm import dsm
from fewstep.models.frozen import frozen, network_under, nulls_of
from fewstep.solve.euler import euler

# Student, teacher and fake score.
GRAPHS = 3
# Passes of fewer samples cost nearly as much as of this many: a batch of 4 in three parts took half as long again.
LEAST = 4
WHOLE = slice(None)
Parts = tuple[Callable[[], dict[str, Tensor]], ...]


@dataclass(frozen=True)
class SiD:
    """A model-based Fisher divergence whose gradient flows through the teacher and the fake score.

    A teacher that is guided already is matched as it is. The three scales guide a teacher that is not; long and short
    guidance (SiD-LSG) is all of them alike, 2 in the paper and 1.5 for its lowest FID.

    Attributes:
        alpha: weight of the squared difference; 1.2 in the paper, 1.0 for its AFHQ. At 0.5 it is half the gradient of
            the Fisher divergence.
        sigma_init: the student's only noise level, as scale and as condition.
        draw: noise levels of the student's loss, held within the teacher's.
        fake_draw: noise levels of the fake score's, held within the teacher's.
        kappa_train: guidance scale of the fake score while it learns; 1 is none.
        kappa_fake: guidance scale of the fake score in the student's loss.
        kappa_teacher: guidance scale of the teacher; 1 leaves it as it is.
        student: optimizer of the student. The paper's lr is 1e-5 at 50 M parameters and 500 M images.
        fake: optimizer of the fake score.
        ema: the average that ships.
        lean: takes the student's update in three parts of the batch, one after the other, because it needs the graphs
            of three networks at once: the same gradients with a third of the memory. Parts have at least
            4 samples, so that a batch below 8 is taken whole.
    """

    needs_data: ClassVar[bool] = False

    alpha: float = 1.0
    sigma_init: float = 2.5
    draw: KarrasUniform = KarrasUniform(top=0.8)
    fake_draw: LogNormal = LogNormal()
    kappa_train: float = 1.0
    kappa_fake: float = 1.0
    kappa_teacher: float = 1.0
    student: Optim = Optim(lr=2e-4, betas=(0.0, 0.999))
    fake: Optim = Optim(lr=4e-4, betas=(0.0, 0.999))
    ema: Ema = Ema(power=0.08)
    lean: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.sigma_init > 0 or not math.isfinite(self.alpha):
            raise InputError(f"{name} needs sigma_init > 0 and a finite alpha, got {self.sigma_init} and {self.alpha}")
        for key in ("kappa_train", "kappa_fake", "kappa_teacher"):
            if not 0 <= getattr(self, key) < math.inf:
                raise InputError(f"{name} needs {key} >= 0 and finite (1 is no guidance), got {getattr(self, key)}")

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Student and fake score start as the network of the teacher, which may be guided.

        Raises:
            InputError: there is no network, ``sigma_init`` is outside of its levels, or see :meth:`matched`.
        """
        D = teacher.denoiser
        made, whole = network_under(D), frozen(self.matched(teacher))
        if not D.sigma_min <= self.sigma_init <= D.sigma_max * (1 + 1e-6):
            raise InputError(
                f"{type(self).__name__} with sigma_init {self.sigma_init:g} is outside of the teacher's levels, "
                f"{D.sigma_min:g} to {D.sigma_max:g}: choose one within"
            )
        return {
            "teacher": Role(lambda: whole),
            "fake": Role(lambda: copy.deepcopy(made), self.fake),
            "student": Role(lambda: copy.deepcopy(made), self.student, self.ema, ships=True),
        }

    def matched(self, teacher: Generator) -> Denoiser:
        """The teacher under ``kappa_teacher``; it also brings the null values with which the fake score is guided.

        Raises:
            InputError: guidance of a teacher without conditions, or of one that is guided already.
        """
        D = teacher.denoiser
        scales = [k for k in (self.kappa_train, self.kappa_fake, self.kappa_teacher) if k != 1]
        if not scales:
            return D
        if not isinstance(D, Wrapper):
            # Made for its null values, which any scale but 1 comes with.
            made: Any = guided(teacher, scales[0]).denoiser
            return CFG(D, self.kappa_teacher, made.nulls)
        if self.kappa_teacher != 1:
            raise InputError(
                f"{type(self).__name__} with kappa_teacher {self.kappa_teacher:g} would guide a {type(D).__name__} "
                "again: pass the teacher without it, or leave kappa_teacher at 1"
            )
        return D

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """One update of the fake score, then one of the student, on separate noise."""
        with torch.no_grad():
            made = self.generate(m, noise, "fake", batch.cond)
        yield self.fake_update(m, made, batch, noise.fold("fake"))

        def student_loss(samples: slice = WHOLE) -> dict[str, Tensor]:
            cond, own = take(batch.cond, samples), noise[samples]
            x = self.generate(m, own, "student", cond)
            return self.student_losses(m, x, Batch(None, cond), own.fold("student"))

        yield Update("student", student_loss, self.portions(student_loss, noise))

    def portions(self, loss: Callable[[slice], dict[str, Tensor]], noise: Noise) -> Parts:
        """How a loss of the student over some of the samples of ``noise`` runs, see ``lean``."""
        count = min(GRAPHS, len(noise) // LEAST) if self.lean else 1
        return portions(loss, len(noise), count) if count > 1 else ()

    def generate(self, m: Models, noise: Noise, part: str, cond: Cond) -> Tensor:
        """The student's samples (B, ...) for one part of the randomness."""
        z = noise.normal(m.student.shape, part, "z")
        made: Tensor = m.student(start_std(m.student, self.sigma_init) * z, self.sigma_init, cond)
        return made

    def fake_update(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> Update:
        """Denoising of the student's samples ``x``, which have no gradient."""
        return Update("fake", lambda: self.denoising(m, x, batch.cond, noise))

    def denoising(self, m: Models, x: Tensor, cond: Cond, noise: Noise) -> Tensor:
        """The fake score's loss on samples ``x`` (B, ...)."""
        sigma, weight = within(self.fake_draw, noise, m.fake)
        return dsm(self.fake_score(m, self.kappa_train), x, noise.normal(x.shape[1:], "n"), sigma, weight, cond)

    def student_losses(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """What the student's samples ``x``, with a graph, are trained with: ``loss`` and what is worth watching."""
        return self.matching(m, x, batch.cond, batch.cond, noise)

    def matching(self, m: Models, x: Tensor, cond: Cond, told: Cond, noise: Noise) -> dict[str, Tensor]:
        """The paper's loss on samples ``x`` of ``cond``; the teacher is ``told`` a condition of its own."""
        s, _ = within(self.draw, noise, m.student)
        y = x + widen(s, x) * noise.normal(x.shape[1:], "n")
        d_teacher, d_fake = m.teacher(y, s, told), self.fake_score(m, self.kappa_fake)(y, s, cond)
        return sid_loss(x, d_teacher, d_fake, self.alpha)

    def fake_score(self, m: Models, scale: float) -> Denoiser:
        """The fake score under a guidance scale."""
        own: Denoiser = m.fake
        return own if scale == 1 else CFG(own, scale, nulls_of(m.teacher))

    def sampler(self, teacher: Generator) -> Tableau:
        """One evaluation at ``sigma_init``."""
        return euler(torch.tensor([self.sigma_init, 0.0]))


def within(draw: Draw, noise: Noise, D: Denoiser) -> tuple[Tensor, Tensor]:
    """Levels and weights of ``draw``, the levels held to those that ``D`` was trained at."""
    sigma, weight = draw(noise, D.sigma_data)
    return sigma.clamp(D.sigma_min, D.sigma_max), weight


def sid_loss(x: Tensor, d_teacher: Tensor, d_fake: Tensor, alpha: float) -> dict[str, Tensor]:
    """The generator's loss ``d ((D_T - x) - alpha d) / omega`` with ``d = D_T - D_F`` and ``omega = mean|x - D_T|``.

    All (B, ...). Nothing is detached but omega. Its value says little (it is 0 in expectation at alpha 1); the
    Fisher divergence between fake and teacher, returned beside it, falls as the student learns.
    """
    difference = d_teacher - d_fake
    each = difference * ((d_teacher - x) - alpha * difference)
    loss = (each.flatten(1).mean(1) / distances(x, d_teacher)).mean()
    return {"loss": loss, "fisher": difference.detach().square().mean()}


@torch.no_grad()
def distances(x: Tensor, d_teacher: Tensor) -> Tensor:
    """``omega`` (B,): the mean of ``|x - D_T|`` of each sample, at least 1e-5; no gradient."""
    return (x - d_teacher).abs().flatten(1).mean(1).clamp_min(1e-5)
