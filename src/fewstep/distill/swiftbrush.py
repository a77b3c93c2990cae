"""SwiftBrush (arXiv 2312.05239): one step from prompts or labels alone; teacher and fake score guided alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, Precond, Wrapper, rewrapped
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import VP, EDMPath, widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.distill.vsd import VSD
from fewstep.errors import InputError, unknown
from fewstep.guide import guided
from fewstep.guide.dynamic import guided_at
from fewstep.loss.draw import KarrasUniform, edm_weight
from fewstep.loss.dsm import dsm
from fewstep.loss.matching import Normaliser, directed, direction
from fewstep.models.frozen import Frozen, frozen, nulls_of


@dataclass(frozen=True)
class SwiftBrush(VSD):
    """Variational score distillation in the teacher's own time, with the same guidance on teacher and fake score.

    No picture is read: batches hold prompts or labels alone. The paper's fake score is a LoRA on the frozen teacher:
    pass ``lora=LoRA(64, 108), lora_roles=("fake",)``, or ``--lora 64 --lora-roles fake``.

    Attributes:
        guidance: scale of classifier-free guidance on teacher and fake score, 4.5 in the paper; None is the
            teacher's own guidance, on both, and none where it has none.
        times: shares of the teacher's own time between which the compared levels are drawn evenly; () takes
            ``draw`` and ``fake_draw`` instead. A teacher whose time is the level itself has that of VP's linear betas.
        fake_weight: of the fake score's squared error, with ``times``: noise is the published one of the noise
            prediction, ``1 / (sigma^2 (1 + sigma^2))`` in x0; edm is EDM's.
        steps: evaluations of the student; 1 in the paper.
        student: optimizer of the student; the paper's lr is 1e-6, for 866 M parameters.
        fake: optimizer of the fake score; the paper's lr is 1e-3, for LoRA layers of rank 64.
    """

    guidance: float | None = None
    times: tuple[float, ...] = (0.02, 0.98)
    fake_weight: Literal["noise", "edm"] = "noise"
    normaliser: Normaliser = "vp"
    student: Optim = Optim(lr=1e-4, clip=1.0)
    fake: Optim = Optim(lr=1e-4, clip=1.0)
    ema: Ema = Ema(power=0.05)
    draw: KarrasUniform = KarrasUniform(top=0.98, bottom=0.02)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise InputError(f"{name} needs guidance >= 0 (1 is none), got {self.guidance}")
        if self.times and not (len(self.times) == 2 and 0 <= self.times[0] < self.times[1] <= 1):
            raise InputError(f"{name} needs times 0 <= from < to <= 1, or () for draw, got {self.times}")
        if self.fake_weight not in ("noise", "edm"):
            raise unknown("weight of the fake score's error", self.fake_weight, ("noise", "edm"))

    def scales(self, noise: Noise) -> Tensor | None:
        """(B,) the guidance scale of each sample; None leaves that to the teacher's own guidance."""
        if self.guidance is None or self.guidance == 1:
            return None
        return torch.full((len(noise),), self.guidance, device=noise.seeds.device)

    @property
    def highest(self) -> float | None:
        """The largest scale of guidance that is asked for; None where the teacher's own is taken."""
        return self.guidance

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of VSD; the teacher is wrapped in guidance where some is asked for, which gives its null conditions.

        Raises:
            InputError: see :meth:`VSD.roles`, guidance asked of an unconditional teacher, or of one that has some.
        """
        asked, found = self.highest, super().roles(teacher)
        if asked is None:
            return found
        if not isinstance(teacher.denoiser, Precond):
            raise InputError(
                f"{type(self).__name__} was asked for guidance {asked:g} and the teacher is a "
                f"{type(teacher.denoiser).__name__} already: take that off, or leave guidance out to use it on both"
            )
        if asked != 1:
            whole = frozen(guided(teacher, asked).denoiser)
            found["teacher"] = Role(lambda: whole)
        return found

    def student_losses(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """The update of arXiv 2312.05239, at levels that are even in the teacher's time, as in its released code."""
        if not self.times:
            return super().student_losses(m, x, batch, noise)
        sigma = self.level(m.student, noise, self.times)
        with torch.no_grad():
            y = x + widen(sigma, x) * noise.normal(x.shape[1:], "n")
            d_fake, d_teacher = self.estimates(m, y, sigma, batch.cond, noise)
            g = direction(x, d_fake, d_teacher, sigma, self.normaliser)
        return {"loss": directed(x, g), "fisher": (d_fake - d_teacher).square().mean()}

    def level(self, D: Any, noise: Noise, times: tuple[float, ...]) -> Tensor:
        """(B,) levels that are drawn evenly between two shares of the time of ``D``."""
        low, high = times
        return own_time(D, low + (high - low) * noise.uniform((), "sigma", dtype=torch.float64))

    def estimates(self, m: Models, y: Tensor, sigma: Tensor, cond: Cond, noise: Noise) -> tuple[Tensor, Tensor]:
        """Both under the same guidance: the fake score stands in for the teacher's network."""
        scale = self.scales(noise)
        if scale is not None and cond:
            nulls = nulls_of(m.teacher)
            d_fake = guided_at(m.fake, y, sigma, cond, scale, nulls)
            return d_fake, guided_at(m.teacher.network, y, sigma, cond, scale, nulls)
        # The teacher first: guidance that makes its null conditions when they are first needed has them then.
        d_teacher, wrapped = m.teacher(y, sigma, cond), m.teacher
        fake: Denoiser = m.fake
        if isinstance(wrapped, Frozen):
            fake = cast(Wrapper, rewrapped(wrapped.wrapper, m.fake))
        return fake(y, sigma, cond), d_teacher

    def fake_update(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> Update:
        """The paper's regression of the noise, at all of the teacher's times and without guidance."""
        if not self.times:
            return super().fake_update(m, x, batch, noise)
        sigma = self.level(m.fake, noise, (0.0, 1.0))
        weight = (
            1 / (sigma**2 * (1 + sigma**2)) if self.fake_weight == "noise" else edm_weight(sigma, m.fake.sigma_data)
        )
        n = noise.normal(x.shape[1:], "n")
        return Update("fake", lambda: dsm(m.fake, x, n, sigma, weight, batch.cond))


def own_time(D: Any, share: Tensor) -> Tensor:
    """(B,) float32 levels at the ``share`` (B,) in [0, 1] of the time that ``D`` was trained in, 0 its lowest level.

    Where the time is the level itself, as in EDM's own path, it is that of the VP path with linear betas
    (arXiv 2011.13456).
    """
    path = VP if isinstance(D.path, EDMPath) else D.path
    low, high = float(path.at(D.sigma_min)), float(path.at(D.sigma_max))
    return path.sigma(low + share.double() * (high - low)).clamp(D.sigma_min, D.sigma_max).float()
