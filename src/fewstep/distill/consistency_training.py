"""Consistency training (CT, arXiv 2303.01469; iCT, 2310.14189) and tuning (ECT, 2406.14548): from data alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Role, Update
from fewstep.distill.consistency import Consistency, falling_levels
from fewstep.errors import InputError, unknown
from fewstep.solve.step import pictures

Curriculum = Literal["doubling", "growing"]


@dataclass(frozen=True)
class CT(Consistency):
    """Improved consistency training (iCT): neighbouring levels of one picture and one noise, no teacher evaluation.

    The network starts from the weights that it is given, trained or not. ``CT.original()`` is the first paper's.

    Attributes:
        distance: l2, l1, huber (iCT's) or lpips (the first paper's).
        target: the weights of the target: self (iCT) or ema (the first paper).
        target_ema: with target ema and without ``mu``, the target's average.
        optim: of the student; iCT's is RAdam with lr 1e-4.
        curriculum: how the grid gets finer: doubling in equal stages (iCT), or growing like a root (first paper).
        first: intervals of the grid at first (s0).
        last: intervals of the grid at the end (s1).
        mean: of ln sigma in the draw of levels; None draws them uniformly from the grid.
        std: of ln sigma in that draw.
        weighted: weights a pair by the inverse of its gap (iCT), or all alike.
        mu: with target ema, the target average's rate at the first grid, from which it rises as published; None leaves
            it to ``target_ema``.
    """

    curriculum: Curriculum = "doubling"
    first: int = 10
    last: int = 1280
    mean: float | None = -1.1
    std: float = 2.0
    weighted: bool = True
    mu: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curriculum not in ("doubling", "growing"):
            raise unknown("curriculum", self.curriculum, ("doubling", "growing"))
        if not 1 <= self.first <= self.last:
            raise InputError(f"CT needs 1 <= first <= last, got {self.first} and {self.last}")
        if not 0 < self.std < math.inf or not (self.mean is None or math.isfinite(self.mean)):
            raise InputError(
                f"CT needs std > 0 and a finite mean for its draw of levels, got {self.std} and {self.mean}"
            )
        if self.mu is not None and (not 0 < self.mu < 1 or self.target != "ema"):
            raise InputError(
                f"CT takes mu within (0, 1), and with target 'ema' only, got {self.mu} with {self.target!r}"
            )

    @classmethod
    def original(cls, **fields: object) -> CT:
        """The first paper's settings for CIFAR-10, its distance apart: N grows to 151 and mu from 0.9."""
        own: dict[str, object] = {"curriculum": "growing", "first": 2, "last": 150, "mean": None, "weighted": False}
        return cls(**(own | {"distance": "l2", "target": "ema", "mu": 0.9} | fields))  # type: ignore[arg-type]

    def count(self, progress: float) -> int:
        """N, the levels of the grid when the share ``progress`` of the budget is spent.

        Doubling: arXiv 2310.14189, growing: 2303.01469.
        """
        if self.curriculum == "growing":
            low, high = self.first**2, (self.last + 1) ** 2
            return max(1, math.ceil(math.sqrt(progress * (high - low) + low) - 1)) + 1
        stages = math.floor(math.log2(self.last // self.first)) + 1
        stage = min(stages - 1, math.floor(progress * stages))
        return int(min(self.first * 2**stage, self.last)) + 1

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The network that it is given, as a consistency function."""
        roles = self.student(teacher)
        if self.mu is not None:
            roles["student"] = replace(roles["student"], target=Rising(rate=self.mu, method=self))
        return roles

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Algorithm 3 of the first paper: both points share picture and noise."""
        x0, cond = pictures("CT", batch, m.student.shape), batch.cond
        ends, steps = self.ends(m.student), self.count(m.progress) - 1
        grid = falling_levels(steps, *ends, self.rho).to(x0.device)
        edges = chances(steps, *ends, self.rho, self.mean, self.std).cumsum(0).to(x0.device)
        place = noise.uniform((), "level", dtype=torch.float64)
        k = torch.searchsorted(edges, place, right=True).clamp(max=len(grid) - 2)
        a, b = grid[k], grid[k + 1]
        n = noise.normal(x0.shape[1:], "n")
        weight = 1 / (a - b) if self.weighted else torch.ones_like(a)
        x_a, x_b = x0 + widen(a, x0) * n, x0 + widen(b, x0) * n
        yield Update("student", lambda: self.compare(m, x_a, a, x_b, b, cond, weight))


@dataclass(frozen=True)
class Rising(Ema):
    """The average of the first paper's target: ``exp(s0 ln mu0 / (N(k) - 1))``, where ``rate`` is mu0."""

    method: CT | None = None

    def decay(self, step: int, progress: float = 0.0) -> float:
        """See :meth:`fewstep.core.role.Ema.decay`."""
        assert self.method is not None and self.rate is not None
        return math.exp(self.method.first * math.log(self.rate) / (self.method.count(progress) - 1))


@dataclass(frozen=True)
class ECT(Consistency):
    """Tunes a trained denoiser into a consistency model: pairs of levels that start far apart and close in.

    A level ``t`` is drawn log-normally; its partner is ``r = t - t q^-(stage + 1) (1 + k sigmoid(-b t))``, held at
    ``sigma_min`` where it would be lower. In the first stage that is most of the levels, whose target is then the
    picture itself: the student starts as the denoiser that it is.

    Attributes:
        rho: of Karras' grid, for the sampler alone.
        stages: in which the gap shrinks.
        q: by which the gap shrinks from stage to stage.
        k: how much wider the gap is at low levels.
        b: how fast that fades with the level.
        mean: of ln sigma in the draw of levels.
        std: of ln sigma in that draw.
    """

    stages: int = 8
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 1 or not 0 < self.std < math.inf or not math.isfinite(self.mean):
            raise InputError(
                f"ECT needs stages >= 1, std > 0 and a finite mean, got {self.stages}, {self.std} and {self.mean}"
            )
        if not 1 < self.q < math.inf or not 0 <= self.k < math.inf or not math.isfinite(self.b):
            raise InputError(f"ECT needs finite q > 1, k >= 0 and b, got {self.q}, {self.k} and {self.b}")

    def partner(self, t: Tensor, progress: float, low: float) -> Tensor:
        """The lower level r of ``t``, shaped like ``t``, at least ``low``, when ``progress`` of the budget is spent."""
        stage = min(self.stages - 1, math.floor(progress * self.stages))
        gap = self.q ** -(stage + 1) * (1 + self.k * torch.sigmoid(-self.b * t))
        return (t * (1 - gap)).clamp(min=low)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The teacher, as a consistency function."""
        return self.student(teacher)

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Both points share picture and noise; the weight is the inverse of their gap."""
        x0, cond = pictures("ECT", batch, m.student.shape), batch.cond
        low, top = self.ends(m.student)
        t = self.draw(noise, low, top)
        r = self.partner(t, m.progress, low)
        n = noise.normal(x0.shape[1:], "n")
        x_t, x_r = x0 + widen(t, x0) * n, x0 + widen(r, x0) * n
        yield Update("student", lambda: self.compare(m, x_t, t, x_r, r, cond, 1 / (t - r)))

    def draw(self, noise: Noise, low: float, top: float) -> Tensor:
        """(B,) float64: log-normal levels between ``low`` and ``top``, both left out."""
        ends = torch.tensor([low, top], dtype=torch.float64)
        low_p, top_p = torch.special.ndtr((ends.log() - self.mean) / self.std).tolist()
        # The middle of each cell of the uniform draw, because its lower edge would make the gap 0.
        place = noise.uniform((), "level", dtype=torch.float64) + 2.0**-54
        return (self.mean + self.std * torch.special.ndtri(low_p + (top_p - low_p) * place)).exp()


@lru_cache(maxsize=16)
def chances(steps: int, low: float, top: float, rho: float, mean: float | None, std: float) -> Tensor:
    """(steps,) float64: the probability of each interval of Karras' falling grid (arXiv 2310.14189)."""
    if mean is None:
        return torch.full((steps,), 1 / steps, dtype=torch.float64)
    below = torch.special.ndtr((falling_levels(steps, low, top, rho).log() - mean) / std)
    mass = below[:-1] - below[1:]
    return mass / mass.sum()
