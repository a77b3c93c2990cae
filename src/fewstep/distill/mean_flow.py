"""MeanFlow (arXiv 2505.13447): a network learns the average velocity between two times, one evaluation jumps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Classes, Cond, drop, null
from fewstep.core.denoiser import Denoiser, Precond, Wrapper
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW, widen
from fewstep.core.role import Ema, Losses, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.loss.tangent import MODES, Mode, directional
from fewstep.models.flow_map import UNTIL, flow_map, landing
from fewstep.models.frozen import frozen, network_under
from fewstep.models.trigflow import View, smooth
from fewstep.solve.euler import euler
from fewstep.solve.step import pictures

Source = Literal["data", "teacher"]
SOURCES = ("data", "teacher")


@dataclass(frozen=True)
class MeanFlow:
    """Tunes a trained network into its own average velocity between any two times. Needs data.

    The network is told a second time, where its step ends; told the same time twice it is the denoiser that it was.
    With ``source`` data the velocity at a point is that of picture and noise; with teacher it is the teacher's,
    guidance and all.

    Attributes:
        steps: evaluations of the shipped sampler, evenly spaced in flow time; training is the same for all.
        source: of the velocity: data or teacher.
        guidance: built-in guidance of ``source`` data (omega): the velocity is ``omega v + mix u(c) + (1 - omega - mix)
            u(null)``; 1 is none.
        mix: share kappa of the student's own conditional velocity in that.
        drop: share of labels dropped with built-in guidance; dropped samples keep the plain velocity.
        sigma_max: the highest level that is trained, and that sampling starts from; None is the teacher's.
        mean: of logit t in the draw of each of the two times; the later is t, the earlier r.
        std: of logit t in that draw.
        mean_r: of logit r in a draw of its own; None is as for t.
        std_r: of logit r in that draw; None is as for t.
        ratio: share of samples with r below t; the rest have r = t, plain flow matching.
        power: p of the adaptive weight 1 / (|error|^2 + c)^p; 0 is the plain square.
        constant: c in it, in units of the squared norm over the whole picture.
        tangent: how du/dt is computed: forward (exact), difference (central differences), or auto.
        optim: of the student.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = True

    steps: int = 1
    source: Source = "data"
    guidance: float = 1.0
    mix: float = 0.0
    drop: float = 0.1
    sigma_max: float | None = None
    mean: float = -0.4
    std: float = 1.0
    mean_r: float | None = None
    std_r: float | None = None
    ratio: float = 0.25
    power: float = 1.0
    constant: float = 1e-3
    tangent: Mode = "forward"
    optim: Optim = Optim(lr=2e-4, betas=(0.9, 0.95), decay="cosine", clip=1.0)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.std > 0 or not (self.std_r is None or self.std_r > 0):
            raise InputError(f"MeanFlow needs steps >= 1, std > 0 and std_r > 0, got {self}")
        numbers = (self.mean, self.std, self.mean_r or 0.0, self.std_r or 1.0, self.power, self.constant)
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"MeanFlow needs finite settings, got {self}")
        if not (0 <= self.ratio <= 1 and 0 <= self.drop < 1 and self.power >= 0 and self.constant > 0):
            raise InputError(
                "MeanFlow needs 0 <= ratio <= 1, 0 <= drop < 1, power >= 0 and constant > 0, got "
                f"{self.ratio}, {self.drop}, {self.power} and {self.constant}"
            )
        if not (0 <= self.guidance < math.inf and 0 <= self.mix < 1):
            raise InputError(f"MeanFlow needs guidance >= 0 and 0 <= mix < 1, got {self.guidance} and {self.mix}")
        for what, value, known in (("source", self.source, SOURCES), ("mode of differentiation", self.tangent, MODES)):
            if value not in known:
                raise unknown(what, value, known)
        if self.builtin and self.source == "teacher":
            raise InputError(
                "MeanFlow's built-in guidance belongs to source='data': with source='teacher' pass a guided teacher"
            )

    @property
    def builtin(self) -> bool:
        """Whether the velocity is guided by the student itself."""
        return self.guidance != 1 or self.mix != 0

    def ends(self, teacher: Denoiser) -> tuple[float, float]:
        """The lowest and the highest flow time, ``t = sigma / (1 + sigma)``.

        Raises:
            InputError: the highest level is outside of the teacher's.
        """
        low, most = teacher.sigma_min, teacher.sigma_max
        top = most if self.sigma_max is None else self.sigma_max
        if not low < top <= most:
            raise InputError(
                f"MeanFlow(sigma_max={top:g}) is outside of the teacher's levels, {low:g} to {most:g}: leave it out"
            )
        return low / (1 + low), top / (1 + top)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the teacher, whatever second time it is told.

        Raises:
            InputError: see :meth:`ends`, :meth:`check_guidance` and :func:`fewstep.models.flow_map.flow_map`.
        """
        self.ends(teacher.denoiser)
        self.check_guidance(teacher)
        made, form = frozen(teacher.denoiser), flow_map(smooth(network_under(teacher.denoiser)))
        student = {"student": Role(lambda: copy.deepcopy(form), self.optim, self.ema, ships=True)}
        return ({"teacher": Role(lambda: made)} if self.source == "teacher" else {}) | student

    def check_guidance(self, teacher: Generator) -> None:
        """Raises InputError for guidance that cannot be had."""
        if self.source == "data" and isinstance(teacher.denoiser, Wrapper):
            raise InputError(
                "MeanFlow(source='data') never asks the teacher, so its guidance would be lost: use source='teacher', "
                "or the method's own guidance="
            )
        if self.builtin and not isinstance(teacher.conds, Classes):
            has = "no conditions" if teacher.conds is None else f"{type(teacher.conds).__name__}"
            raise InputError(
                f"built-in guidance needs a teacher with classes, this one has {has}: leave guidance and mix out, or "
                "distil a guided teacher with source='teacher'"
            )

    def times(self, noise: Noise, low: float, top: float) -> tuple[Tensor, Tensor]:
        """``(t, r)`` (B,) float64 with ``0 < r <= t``: a sorted pair of logit-normal draws, or r = t."""
        own = (self.mean if self.mean_r is None else self.mean_r, self.std if self.std_r is None else self.std_r)
        a, b = (
            (noise.normal((), name, dtype=torch.float64) * std + mean).sigmoid()
            for name, (mean, std) in (("t", (self.mean, self.std)), ("r", own))
        )
        t = torch.maximum(a, b).clamp(low, top)
        r = torch.minimum(torch.minimum(a, b), t)
        return t, torch.where(noise.uniform((), "jump") < self.ratio, r, t)

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Algorithm 1 of the paper."""
        x0, cond = pictures("MeanFlow", batch, m.student.shape), batch.cond
        t, r = self.times(noise, *self.ends(m.student))
        n = noise.normal(x0.shape[1:], "n")
        z = widen(1 - t, x0) * x0 + widen(t, x0) * n
        told: Cond = cond
        with torch.no_grad():
            if self.source == "teacher":
                v = View(m.teacher, FLOW)(z, t, cond)
            else:
                v, told = self.guided(m, z, t, n - x0, cond, noise)
        yield Update("student", lambda: self.loss(m, z, t, r, v, told))

    def guided(self, m: Models, z: Tensor, t: Tensor, v: Tensor, cond: Cond, noise: Noise) -> tuple[Tensor, Cond]:
        """The velocity to learn and the conditions, some of them dropped, for built-in guidance (appendix B)."""
        if not self.builtin or not cond:
            return v, cond
        free = velocity(m.student, z, t, t, null(cond))
        aim = self.guidance * v + (1 - self.guidance - self.mix) * free
        if self.mix:
            aim = aim + self.mix * velocity(m.student, z, t, t, cond)
        gone = noise.uniform((), "drop") < self.drop
        return torch.where(gone.reshape(-1, *[1] * (v.ndim - 1)), v, aim), drop(cond, gone)

    def aim(self, student: Any, z: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond) -> Tensor:
        """``v - (t - r) du/dt`` with du/dt along ``(v, 1)`` in (z, t) (eq. 6 and 8): (B, ...), without a graph."""
        gap = t - r
        _, change = directional(
            lambda x, u: velocity(student, x, u, r, cond), (z, t), (widen(gap, z) * v, gap), self.tangent
        )
        return v - change

    def loss(self, m: Models, z: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond) -> Losses:
        """Equation 9 with the adaptive weight of section 4.3; a scalar."""
        aim = self.aim(m.student, z, t, r, v, cond)
        square = (velocity(m.student, z, t, r, cond) - aim).square().flatten(1).sum(1)
        weight = (square.detach() + self.constant) ** -self.power
        return {"loss": (weight * square).mean(), "square": square.detach().mean()}

    def table(self, D: Denoiser) -> Tableau:
        """Euler at times evenly spaced from the highest to 0."""
        top = self.ends(D)[1]
        t = top * (1 - torch.arange(self.steps + 1, dtype=torch.float64) / self.steps)
        return euler(t / (1 - t))

    def sampler(self, teacher: Generator) -> Tableau:
        """Each evaluation's average velocity is followed to the next time, ``z_r = z_t - (t - r) u`` (eq. 12)."""
        return self.table(teacher.denoiser)

    def ships(self, network: Precond) -> Denoiser:
        """The student, told where each step of the sampler ends."""
        return landing(network, self.table(network))


def velocity(student: Any, z: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
    """The average velocity u(z_t, r, t) (B, ...) of a flow map: ``z`` (B, ...), flow times ``t`` > 0 and ``r`` (B,)."""
    return View(student, FLOW)(z, t, {**cond, UNTIL: r / (1 - r)})
