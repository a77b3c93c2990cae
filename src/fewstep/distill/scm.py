"""Continuous-time consistency models (sCM, arXiv 2410.11081): the limit of consistency training for infinite levels."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, Precond, Wrapper
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Losses, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.loss.tangent import MODES, TAMED, Mode, Tamed, directional, tamed
from fewstep.models.consistency import anchored
from fewstep.models.frozen import frozen, network_under
from fewstep.models.trigflow import LogVariance, smooth, trigflow
from fewstep.solve.consistency import consistency
from fewstep.solve.step import pictures

Source = Literal["teacher", "data"]
SOURCES = ("teacher", "data")


@dataclass(frozen=True)
class SCM:
    """Trains a consistency function along exact tangents of trajectories, without a grid. Needs data.

    The student is the teacher's own network, seen in TrigFlow's coordinates. With ``source`` teacher (sCD) the
    trajectory is the teacher's, guidance and all; with ``data`` (sCT) it is that of picture and noise, and the teacher
    is only the start.

    Attributes:
        steps: evaluations of the shipped sampler; training is the same for all.
        middle: angles t = atan(sigma / sigma_data) of the sampler between the first level and 0, falling, ``steps - 1``
            of them. Without any: 1.1 for two evaluations, as published, otherwise evenly spaced.
        source: of the trajectories: teacher (sCD) or data (sCT).
        sigma_data: spread of the data in TrigFlow's angle; None is the teacher's own number.
        sigma_max: the highest level that is trained, and that sampling starts from; None is the teacher's.
        mean: of ln sigma in the draw of levels.
        std: of ln sigma in that draw.
        tame: of the tangent: norm (its root mean square is put below 1), clip (entries within [-1, 1]) or none.
        constant: c in norm's g / (|g| + c).
        warmup: share of the run in which the unstable part of the tangent grows from 0 to full; 0 starts in full.
        prior: whether losses are weighed by 1 / sigma.
        adaptive: whether the variance of the loss at each level is learned and divided out.
        tangent: how it is computed: forward (exact), difference (central differences), or auto (differences, with a
            warning, where the network has an operation without a forward derivative).
        optim: of the student; the paper's is RAdam with betas (0.9, 0.99).
        variance: of the learned variance.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = True
    # The paper's point for two evaluations.
    published_middle: ClassVar[float] = 1.1

    steps: int = 2
    middle: tuple[float, ...] = ()
    source: Source = "teacher"
    sigma_data: float | None = None
    sigma_max: float | None = None
    mean: float = -1.0
    std: float = 1.4
    tame: Tamed = "norm"
    constant: float = 0.1
    warmup: float = 0.1
    prior: bool = True
    adaptive: bool = True
    tangent: Mode = "forward"
    optim: Optim = Optim(lr=1e-4, betas=(0.9, 0.99), decay="cosine", clip=1.0)
    variance: Optim = Optim(lr=1e-3)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.steps < 1 or not self.std > 0 or not 0 <= self.warmup <= 1 or not self.constant > 0:
            raise InputError(
                f"{name} needs steps >= 1, std > 0, 0 <= warmup <= 1 and constant > 0, got {self.steps}, {self.std}, "
                f"{self.warmup} and {self.constant}"
            )
        if self.middle and len(self.middle) != self.steps - 1:
            raise InputError(
                f"{name} with steps={self.steps} has {self.steps - 1} angles in the middle, got {self.middle}: "
                "give as many, or leave middle out"
            )
        if not math.isfinite(self.mean) or max(self.std, self.constant) == math.inf:
            raise InputError(
                f"{name} needs a finite mean, std and constant, got {self.mean}, {self.std} and {self.constant}"
            )
        if self.sigma_data is not None and not 0 < self.sigma_data < math.inf:
            raise InputError(f"{name} needs a finite sigma_data > 0, got {self.sigma_data}")
        for what, value, known in (
            ("source", self.source, SOURCES),
            ("way to tame a tangent", self.tame, TAMED),
            ("mode of differentiation", self.tangent, MODES),
        ):
            if value not in known:
                raise unknown(what, value, known)

    def ends(self, teacher: Denoiser) -> tuple[float, float]:
        """The lowest and the highest level.

        Raises:
            InputError: the highest is outside of the teacher's levels, or ``middle`` does not fall between them.
        """
        name, low, most = type(self).__name__, teacher.sigma_min, teacher.sigma_max
        top = most if self.sigma_max is None else self.sigma_max
        if not low < top <= most:
            raise InputError(
                f"{name}(sigma_max={top:g}) is outside of the teacher's levels, {low:g} to {most:g}: leave it out"
            )
        d = self.spread(teacher)
        around = [math.atan(top / d), *self.middle, math.atan(low / d)]
        if any(not b < a for a, b in itertools.pairwise(around)):
            raise InputError(
                f"{name}: the angles {self.middle} in the middle must fall between {around[0]:.4g} and {around[-1]:.4g}"
            )
        return low, top

    def spread(self, D: Denoiser) -> float:
        """sigma_data of TrigFlow's angle."""
        return float(D.sigma_data) if self.sigma_data is None else self.sigma_data

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The teacher where it is asked, the student that starts as it is, and the variance, which never ships.

        Raises:
            InputError: see :meth:`ends`, :func:`fewstep.models.trigflow.smooth`, or guidance that data cannot teach.
        """
        self.ends(teacher.denoiser)
        if self.source == "data" and isinstance(teacher.denoiser, Wrapper):
            raise InputError(
                f"{type(self).__name__}(source='data') never asks the teacher, so its guidance would be lost: "
                "use source='teacher', or pass the teacher without guidance"
            )
        made, form = frozen(teacher.denoiser), self.form(teacher)
        roles = {"student": Role(lambda: copy.deepcopy(form), self.optim, self.ema, ships=True)}
        roles |= {"variance": Role(LogVariance, self.variance)} if self.adaptive else {}
        return ({"teacher": Role(lambda: made)} if self.source == "teacher" else {}) | roles

    def form(self, teacher: Generator) -> Precond:
        """The teacher's network as a consistency function, on the same weights.

        Noise, v and velocity make a denoiser that is the identity at level 0 by itself. One that prints x0 is made the
        identity at its lowest level.
        """
        made = smooth(network_under(teacher.denoiser))
        return anchored(made, made.sigma_min) if made.predicts == "x0" and made.kind == "path" else made

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Algorithm 1."""
        xh, t, slope = self.point(m, batch, noise)
        trained = ("student", "variance") if self.adaptive else "student"
        yield Update(trained, lambda: self.loss(m, xh, t, slope, batch.cond))

    def levels(self, noise: Noise, low: float, top: float) -> Tensor:
        """(B,) float64: log-normal levels, held within the ends."""
        return (noise.normal((), "level", dtype=torch.float64) * self.std + self.mean).exp().clamp(low, top)

    def point(self, m: Models, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """``(x_t, t, dx_t/dt)``: (B, ...), (B,) float64 and (B, ...), in TrigFlow's coordinates."""
        x0 = pictures(type(self).__name__, batch, m.student.shape)
        d = self.spread(m.student)
        t = torch.atan(self.levels(noise, *self.ends(m.student)) / d)
        cos, sin = widen(t.cos(), x0), widen(t.sin(), x0)
        z = d * noise.normal(x0.shape[1:], "n")
        xh = cos * x0 + sin * z
        if self.source == "data":
            return xh, t, cos * z - sin * x0
        with torch.no_grad():
            return xh, t, trigflow(m.teacher, d)(xh, t, batch.cond)

    def direction(self, student: Any, xh: Tensor, t: Tensor, slope: Tensor, cond: Cond, r: float) -> Tensor:
        """``cos(t) df/dt`` of the student along ``slope``, its second half times ``r``: (B, ...), without a graph.

        ``g = -cos^2 (sd F - dx/dt) - r cos sin (x + sd dF/dt)`` (algorithm 1, with F for sd F in the code): with
        tangents ``cos sin (dx/dt, 1)`` nothing in it grows at either end.
        """
        view = trigflow(student, self.spread(student))
        scale = t.cos() * t.sin()
        value, change = directional(
            lambda x, u: view(x, u, cond), (xh, t), (widen(scale, xh) * slope, scale), self.tangent
        )
        return -widen(t.cos() ** 2, xh) * (value - slope) - r * (widen(scale, xh) * xh + change)

    def loss(self, m: Models, xh: Tensor, t: Tensor, slope: Tensor, cond: Cond) -> Losses:
        """Equation 8 with the learned variance: ``W e^-v |F - F- - g|^2 + v``, the mean over pixels and batch.

        ``F-`` is this pass' own value without its gradient, so that no rounding or dropout stands between them.
        """
        d = self.spread(m.student)
        r = min(1.0, m.progress / self.warmup) if self.warmup else 1.0
        g = tamed(self.direction(m.student, xh, t, slope, cond, r), self.tame, self.constant)
        F = trigflow(m.student, d)(xh, t, cond) / d
        sigma = d * t.tan()
        weight = 1 / sigma if self.prior else torch.ones_like(sigma)
        each = (F - F.detach() - g).square().flatten(1).mean(1) * weight.to(F)
        if not self.adaptive:
            return each.mean()
        v = m.variance(sigma)
        return {"loss": (each * torch.exp(-v) + v).mean(), "weighted": each.mean()}

    def sampler(self, teacher: Generator) -> Tableau:
        """Multistep consistency sampling (arXiv 2303.01469, algorithm 1) at the angles of ``middle``."""
        low, top = self.ends(teacher.denoiser)
        d, first = self.spread(teacher.denoiser), math.atan(top / self.spread(teacher.denoiser))
        angles = self.middle
        if not angles:
            even = tuple(first * (1 - k / self.steps) for k in range(1, self.steps))
            angles = (self.published_middle,) if self.steps == 2 and self.published_middle < first else even
        levels = torch.tensor([top, *(d * math.tan(t) for t in angles), 0.0], dtype=torch.float64)
        own = network_under(teacher.denoiser)
        held = own.predicts == "x0" or own.kind != "path"
        return consistency(levels, sigma_min=low if held else 0.0)
