"""Target-driven distillation (TDD, arXiv 2409.01347): consistency towards the levels that few-step samplers visit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, drop
from fewstep.core.denoiser import Denoiser, Wrapper
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.pipeline import TextConditions
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.base import check_falling
from fewstep.grid.own import own_levels, own_path
from fewstep.guide.cfg import CFG
from fewstep.loss.draw import edm_weight
from fewstep.loss.huber import pixel_huber
from fewstep.models.flow_map import Clipped
from fewstep.models.frozen import frozen, network_under, nulls_of
from fewstep.solve.consistency import tcd
from fewstep.solve.step import ddim, pictures

Aim = Literal["drawn", "any", "end"]
AIMS = ("drawn", "any", "end")
Weight = Literal["edm", "landing"]
WEIGHTS = ("edm", "landing")
# Shares of the own time at which the published sampler calls the network, by its number of steps.
UNEVEN: dict[int, tuple[float, ...]] = {
    5: (1.0, 0.875, 0.751, 0.499, 0.251),
    6: (1.0, 0.875, 0.751, 0.627, 0.499, 0.251),
    7: (1.0, 0.875, 0.751, 0.627, 0.499, 0.375, 0.251),
}


@dataclass(frozen=True)
class TDD:
    """Trains the student to land, in one DDIM step to a drawn level, where it lands from the teacher's next point.

    Times are shares of the teacher's own time, 0 at its lowest level and 1 at its highest: the time of its path, or
    arctan(sigma / sigma_data) where that is the noise level itself. Needs data.

    Attributes:
        steps: evaluations of the shipped sampler, 4 to 8 in the paper; training is the same for all of ``schedules``.
        grid: DDIM steps of the teacher, of which each iteration takes one; 250 in the paper.
        target: where the two steps land: drawn is the paper's choice, any is uniform below the teacher's point, end is
            always the lowest level, as in consistency distillation.
        schedules: numbers of steps whose even schedules make up the levels that are drawn from.
        window: how far below the highest of these that is below the teacher's point others may be drawn, as a share.
        s_ratio: a drawn level is moved down by a share of its time, uniform below this; 0.3 in the paper.
        guidance: scale of the guidance around the teacher, 1 is none. The published w of 3.5 is scale 4.5.
        null_share: share of examples without their condition, in teacher and student alike, so that the student can be
            guided by any scale itself (decoupled guidance); 0.2 in the paper.
        huber: c of the pixel-wise Huber loss, 0.001 in the paper.
        weight: of an error in the student's estimate: edm is the inverse of what EDM's preconditioning scales a
            network's output by, the same for every landing; landing is the paper's, the difference where both land,
            which trains low noise far more slowly. With target end take landing: edm diverged there.
        eta: of the sampler: 0 follows the trajectory; above, it steps to ``(1 - eta)`` times the next time and adds
            noise.
        schedule: of the sampler: even, or the published uneven places of 5, 6 and 7 steps.
        clip: bound of the estimate of x0 at sampling; None clips nothing.
        sigma_max: the highest level; None is the teacher's.
        optim: of the student; the paper's lr is 1e-6 for LoRA of rank 64 on SDXL.
        ema: the average that ships; the paper keeps none.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = True

    steps: int = 4
    grid: int = 250
    target: Aim = "drawn"
    schedules: tuple[int, ...] = (4, 5, 6, 7, 8)
    window: float = 0.26
    s_ratio: float = 0.3
    guidance: float = 1.0
    null_share: float = 0.2
    huber: float = 1e-3
    weight: Weight = "edm"
    eta: float = 0.0
    schedule: Literal["even", "uneven"] = "even"
    clip: float | None = None
    sigma_max: float | None = None
    optim: Optim = Optim(lr=1e-4, clip=1.0)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.grid < 2 or not self.schedules or min(self.schedules) < 1:
            raise InputError(f"TDD needs steps >= 1, grid >= 2 and schedules of steps >= 1, got {self}")
        for what, value in (("s_ratio", self.s_ratio), ("null_share", self.null_share), ("eta", self.eta)):
            if not 0 <= value <= 1:
                raise InputError(f"TDD needs {what} within [0, 1], got {value}")
        if not (self.window >= 0 and 0 < self.huber < math.inf and (self.clip is None or self.clip > 0)):
            raise InputError(f"TDD needs window >= 0, huber > 0 and clip > 0, got {self}")
        if not 0 <= self.guidance < math.inf:
            raise InputError(f"TDD needs a scale of guidance >= 0 (1 is none), got {self.guidance}")
        for what, name, known in (
            ("target", self.target, AIMS),
            ("schedule", self.schedule, ("even", "uneven")),
            ("weight", self.weight, WEIGHTS),
        ):
            if name not in known:
                raise unknown(what, name, known)
        if self.schedule == "uneven" and self.steps not in UNEVEN:
            raise InputError(f"the uneven schedule has {', '.join(map(str, UNEVEN))} steps, got steps={self.steps}")

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the network of the teacher, which is guided as asked for.

        Raises:
            InputError: guidance of an unconditional or of a guided teacher, or what :func:`fewstep.grid.own.own_levels`
                refuses.
        """
        self.levels(teacher.denoiser)
        made, whole = network_under(teacher.denoiser), frozen(guided_for(teacher, self.guidance, "TDD"))
        return {
            "teacher": Role(lambda: whole),
            "student": Role(lambda: copy.deepcopy(made), self.optim, self.ema, ships=True),
        }

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Algorithm 1, with what both land at solved for the estimate of x0 that the student should have had.

        See :func:`aimed_at`. A difference between such estimates loses nothing to the noise that both landings share.
        """
        x0 = pictures("TDD", batch, m.student.shape)
        j = noise.integers(1, self.grid + 1, (), "level")
        below = (j - 1).double() / self.grid
        shares = torch.stack([j.double() / self.grid, below, self.aims(below, noise)])
        a, b, c = own_levels(m.student, shares, self.sigma_max)
        cond = batch.cond
        if self.null_share:
            cond = drop(cond, noise.uniform((), "null") < self.null_share, nulls_of(m.teacher))
        x_a = x0 + widen(a, x0) * noise.normal(x0.shape[1:], "n")
        with torch.no_grad():
            taught = m.teacher(x_a, a, cond)
            x_b = ddim(x_a, taught, a, b)
            aim = aimed_at(m.student(x_b, b, cond), taught, a, b, c)
        weight = widen(weight_of(self.weight, m.student, a, c), x_a)

        def loss() -> Tensor:
            return pixel_huber(weight * (m.student(x_a, a, cond) - aim), self.huber).mean()

        yield Update("student", loss)

    def aims(self, below: Tensor, noise: Noise) -> Tensor:
        """(B,) float64: the share of the own time to land at, at most ``below`` (B,), the teacher's."""
        if self.target == "end":
            return torch.zeros_like(below)
        share = noise.uniform((), "aim", dtype=torch.float64)
        if self.target == "any":
            return share * below
        known = visited(self.schedules, below.device)
        # Rounded as the grid is, so that a visited level that is on the grid counts as reached.
        most = torch.searchsorted(known, below + 1e-9, right=True) - 1
        least = torch.searchsorted(known, known[most] - self.window - 1e-9)
        picked = known[least + (share * (most - least + 1)).long()]
        return picked.minimum(below) * (1 - noise.uniform((), "moved", dtype=torch.float64) * self.s_ratio)

    def levels(self, D: Denoiser) -> Tensor:
        """(steps + 1,) float64: the levels of the shipped sampler, falling to 0.

        Raises:
            InputError: see :func:`fewstep.grid.own.own_levels`.
        """
        even = (torch.arange(self.steps, 0, -1, dtype=torch.float64) / self.steps).tolist()
        shares = torch.tensor(UNEVEN[self.steps] if self.schedule == "uneven" else even, dtype=torch.float64)
        falling = own_levels(D, shares, self.sigma_max)
        return check_falling(torch.cat([falling, falling.new_zeros(1)]), f"TDD's schedule of {self.steps} steps")

    def sampler(self, teacher: Generator) -> Tableau:
        """Steps along the trajectory, with noise where ``eta`` is above 0 (:func:`fewstep.solve.consistency.tcd`)."""
        return tcd(self.levels(teacher.denoiser), gamma=self.eta, frame=own_path(teacher.denoiser))

    def ships(self, network: Denoiser) -> Denoiser:
        """The student, its estimates clipped if that was asked for."""
        return network if self.clip is None else Clipped(network, self.clip)


@lru_cache(maxsize=8)
def visited(schedules: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """The shares of the own time, rising from 0, that even schedules of these numbers of steps visit; made once."""
    shares = {0.0} | {k / steps for steps in schedules for k in range(1, steps + 1)}
    return torch.tensor(sorted(shares), dtype=torch.float64, device=device)


def guided_for(teacher: Generator, scale: float, method: str) -> Denoiser:
    """The teacher under guidance of ``scale``, which also holds the null values of its conditions.

    Raises:
        InputError: guidance of an unconditional teacher, or of one that is guided already.
    """
    D, conds = teacher.denoiser, teacher.conds
    if scale != 1 and conds is None:
        raise InputError(
            f"{method}(guidance={scale:g}) needs a teacher with classes or prompts: this has no conditions"
        )
    if scale != 1 and isinstance(D, Wrapper):
        raise InputError(
            f"{method}(guidance={scale:g}): the teacher is a {type(D).__name__} already: leave guidance out"
        )
    if conds is None or isinstance(D, Wrapper):
        return D
    nulls = (lambda: dict(conds.nulls(""))) if isinstance(conds, TextConditions) else None
    return CFG(D, scale, nulls)


def aimed_at(own: Tensor, taught: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The estimate of x0 at ``a`` that lands at ``c`` where the student's ``own`` estimate at ``b`` does: (B, ...).

    DDIM with the teacher's estimate ``taught`` leads from ``a`` to ``b``; levels are (B,), and ``c`` lies beyond ``b``
    or is equal to it, on either side of ``a``. ``J(x_a, a, c) = J(x_b, b, c)`` holds where the estimate at ``a`` is
    ``own`` drawn towards ``taught`` by the share ``c (a - b) / (b (a - c))``: 1, exactly, where the step reaches ``c``.
    """
    share = torch.where(b == c, torch.ones_like(c), c * (a - b) / (b * (a - c)))
    return torch.lerp(own.to(taught.dtype), taught, widen(share, taught))


def weight_of(kind: Weight, D: Denoiser, a: Tensor, c: Tensor) -> Tensor:
    """The weight (B,), float64, of an error in the estimate of x0 at levels ``a``, for a landing at ``c``, both (B,).

    edm is the root of :func:`fewstep.loss.draw.edm_weight`, ``1 / c_out``. landing is what the error is where it lands,
    in the network's own state: ``k |1 - c / a|`` with the weight ``k`` of the picture there.
    """
    if kind == "edm":
        return edm_weight(a, D.sigma_data).sqrt()
    return own_scale(D, c) * (1 - c / a).abs()


def own_scale(D: Denoiser, level: Tensor) -> Tensor:
    """The weight of the picture in the state of the denoiser's own path at ``level``; float64, of its shape."""
    path = own_path(D)
    return path.coeffs(path.at(level.clamp(min=D.sigma_min))).a


__all__ = ["TDD", "WEIGHTS", "Weight", "aimed_at", "guided_for", "own_scale", "visited", "weight_of"]
