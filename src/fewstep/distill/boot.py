"""BOOT (arXiv 2306.05544): a one-step student, bootstrapped along the teacher's trajectory from its noisy end."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import HIGHEST_PICTURED, TRIG, widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.coordinate import Coordinate
from fewstep.grid.own import between, informed_at, own_path
from fewstep.models.flow_map import UNTIL, Told, flow_map
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.euler import euler

GRIDS, WEIGHTS = ("cosine", "karras", "native"), ("slope", "constant")


@dataclass(frozen=True)
class BOOT:
    """A student that makes, from noise alone, the signal ``y(s) = x(s) - s n`` of the teacher's trajectory. Data-free.

    It is shown the start and told the level ``s``; one step of the teacher leads from its signal at ``s`` to the
    target at the next lower level. The signal at the lowest level is the picture.

    Attributes:
        steps: 1, the evaluations of the student.
        intervals: levels are trained against those ``1 / intervals`` of the grid below.
        grid: levels even in arctan(sigma / scale) (cosine), in sigma^(1/7) (karras), or in the teacher's own
            time (native): that of its path, or arctan(sigma / sigma_data) where that is the noise level itself.
        scale: of the cosine grid.
        sigma_min: the lowest level, whose signal is the picture. None is the teacher's.
        weight: of the squared error at the lower level: constant, or slope, which divides it by the square of the
            step's share 1 - s'/s and so weighs the error of dy/dlog s alike everywhere.
        order: of the teacher's step: 1 is the paper's, with one evaluation; 2 is Heun's in log s, with two.
        boundary: weight of the error at the highest level, where the teacher's own estimate is the target; 0 leaves
            the condition out.
        anneal: share of the budget in which the levels that are trained spread from the noisy end to all; 0 trains all
            from the beginning.
        optim: of the student.
        target: an average of the student that makes the targets; None is the student itself, as in the paper.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = False
    any_steps: ClassVar[bool] = False

    steps: int = 1
    intervals: int = 32
    grid: Literal["cosine", "karras", "native"] = "cosine"
    scale: float = 1.0
    sigma_min: float | None = None
    weight: Literal["slope", "constant"] = "constant"
    order: Literal[1, 2] = 1
    boundary: float = 1.0
    anneal: float = 0.5
    optim: Optim = Optim(lr=1e-4, decay="cosine", clip=1.0)
    target: Ema | None = None
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        if self.steps != 1:
            raise InputError(f"BOOT makes one-step students, got steps={self.steps}: use sfd or cd for more steps")
        finite = 0 < self.scale < math.inf and 0 <= self.boundary < math.inf
        if not self.intervals >= 1 or not finite or not 0 <= self.anneal <= 1:
            raise InputError(
                "BOOT needs intervals >= 1, scale > 0 and boundary >= 0, both finite, and anneal in [0, 1], got "
                f"{self.intervals}, {self.scale}, {self.boundary} and {self.anneal}"
            )
        for what, value, known in (("grid", self.grid, GRIDS), ("weight", self.weight, WEIGHTS)):
            if value not in known:
                raise unknown(what, value, known)
        if self.order not in (1, 2):
            raise InputError(f"BOOT takes steps of order 1 or 2, got {self.order!r}")

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the teacher's own one-step estimate, whatever level it is told.

        Raises:
            InputError: see :meth:`ends`, or :class:`fewstep.models.extended.Extended`.
        """
        self.ends(teacher.denoiser)
        self.level(teacher.denoiser, torch.ones(1, dtype=torch.float64))
        made, form = frozen(teacher.denoiser), flow_map(network_under(teacher.denoiser))
        return {
            "teacher": Role(lambda: made),
            "student": Role(lambda: copy.deepcopy(form), self.optim, self.ema, self.target, ships=True),
        }

    def ends(self, D: Denoiser) -> tuple[float, float]:
        """The lowest and the highest level.

        Raises:
            InputError: ``sigma_min`` is outside of the teacher's levels, or a network that predicts noise is asked for
                pictures at pure noise.
        """
        least, top = D.sigma_min, D.sigma_max
        low = least if self.sigma_min is None else self.sigma_min
        if not least <= low < top:
            raise InputError(
                f"BOOT(sigma_min={low:g}) is outside of the teacher's levels, {least:g} to {top:g}: leave sigma_min out"
            )
        informed_at(D, top)
        return low, top

    def level(self, D: Denoiser, u: Tensor) -> Tensor:
        """The level at the place ``u`` in [0, 1] of the grid, float64; the ends of the range are exact.

        Raises:
            InputError: Karras' grid from pure noise, or what :meth:`ends` refuses.
        """
        low, top = self.ends(D)
        return between(u, low, top, self._coordinate(D, top))

    def _coordinate(self, D: Denoiser, top: float) -> Coordinate:
        if self.grid == "cosine":
            return TRIG(self.scale)
        if self.grid == "karras":
            if top > HIGHEST_PICTURED:
                raise InputError(
                    f"Karras' grid cannot start at sigma {top:g}, the pure noise of a flow model or of zero terminal "
                    "SNR: use grid cosine or native"
                )
            return "rho7"
        return own_path(D)

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The bootstrapping loss and the boundary condition; the targets are made outside of the update."""
        cond, teacher = batch.cond, m.teacher
        n = noise.normal(teacher.shape, "n")
        top = teacher.sigma_max
        start = start_std(teacher, top) * n
        s, t = self.drawn(teacher, noise, m.progress)
        with torch.no_grad():
            y = signal(m.target("student"), start, top, s, cond)
            aim = bootstrap(teacher, y, n, s, t, cond, order=self.order)
            edge = teacher(start, top, cond) if self.boundary else None
        weight = (1 - t / s) ** -2 if self.weight == "slope" else torch.ones_like(s)

        def bootstrapping() -> dict[str, Tensor]:
            error = (signal(m.student, start, top, t, cond) - aim).square()
            loss = (widen(weight, error) * error).mean()
            return {"loss": loss, "bootstrap": loss}

        def at_the_edge() -> dict[str, Tensor]:
            at_top = torch.full((len(start),), top, dtype=torch.float64, device=start.device)
            assert edge is not None
            loss = (signal(m.student, start, top, at_top, cond) - edge).square().mean()
            return {"loss": self.boundary * loss, "boundary": loss}

        yield Update.of("student", bootstrapping, *(() if edge is None else (at_the_edge,)))

    def drawn(self, D: Denoiser, noise: Noise, progress: float) -> tuple[Tensor, Tensor]:
        """``(s, s')``, both (B,) float64: a level and the one ``1 / intervals`` of the grid below it.

        ``s'`` lies in the part of the grid that is open: from the noisy end down, all of it after ``anneal``.
        """
        gap = 1 / self.intervals
        opened = 1.0 if self.anneal == 0 else min(1.0, progress / self.anneal)
        reach = (1 - gap) * opened
        lower = (1 - gap) - reach * noise.uniform((), "level", dtype=torch.float64)
        return self.level(D, lower + gap), self.level(D, lower)

    def sampler(self, teacher: Generator) -> Tableau:
        """One evaluation at the highest level, whose output is the picture."""
        return euler(torch.tensor([self.ends(teacher.denoiser)[1], 0.0], dtype=torch.float64))

    def ships(self, network: Denoiser) -> Told:
        """The student, told the lowest level."""
        return Told(network, UNTIL, [self.ends(network)[0]])


def signal(student: Denoiser, start: Tensor, top: float, s: Tensor, cond: Cond) -> Tensor:
    """``y(n, s)`` (B, ...): the student at ``start``, pure noise of level ``top``, told the levels ``s`` (B,)."""
    return student(start, top, {**cond, UNTIL: s})


def bootstrap(
    D: Denoiser, y: Tensor, n: Tensor, s: Tensor, t: Tensor, cond: Cond | None = None, *, order: int = 1
) -> Tensor:
    """The signal at levels ``t`` < ``s`` (both (B,), positive) after a step of the signal-ODE from ``y`` at ``s``.

    With ``x = y + s n`` the noise cancels in the flow's ODE: ``dy / dlog s = y - D(y + s n, s)``, the Signal-ODE of
    arXiv 2306.05544. Order 1 holds D: ``(t/s) y + (1 - t/s) D``, which is DDIM's step less its noise. Order 2 is Heun's
    step of the same exponential form, with the mean of D at both ends.
    """
    kept = widen(t / s, y)
    first = D(y + widen(s, y) * n, s, cond).to(y.dtype)
    ahead = torch.lerp(first, y, kept)
    if order == 1:
        return ahead
    second = D(ahead + widen(t, y) * n, t, cond).to(y.dtype)
    return torch.lerp((first + second) / 2, y, kept)
