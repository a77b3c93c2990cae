"""What every calibration stands on: the teacher's converged trajectories, a clock, and the task at hand."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewstep.core.cond import Cond, take
from fewstep.core.denoiser import Denoiser, start_std
from fewstep.core.noise import Noise
from fewstep.core.sample import Sampler, trajectory
from fewstep.core.solver import build
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.grid.karras import karras

FINE = 96


def chunks(D: Denoiser, batch: int, x: Tensor, sigma: Tensor | float, cond: Cond) -> Tensor:
    """``D(x, sigma, cond)`` a batch at a time, in the dtype of ``x``."""
    parts = [D(x[i : i + batch], sigma, take(cond, slice(i, i + batch))) for i in range(0, len(x), batch)]
    return torch.cat(parts).to(x.dtype)


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """(B,) root mean square difference of each sample, float64."""
    return (a - b).flatten(1).double().square().mean(1).sqrt()


@dataclass(frozen=True)
class Teacher:
    """Converged trajectories of a denoiser.

    Attributes:
        levels: (M,) float64, decreasing, all positive.
        start: (n, *shape) points at ``levels[0]``, whole.
        points: (M, n, q) points at every level, the pixels ``pixels`` of them.
        outputs: (M, n, q) the denoiser's outputs there.
        pixels: (q,) indices of the flattened pixels that are kept; None for all.
        cond: the conditions of the trajectories.
    """

    levels: Tensor
    start: Tensor
    points: Tensor
    outputs: Tensor
    pixels: Tensor | None
    cond: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def end(self) -> Tensor:
        """(n, q) the denoised last point: where the trajectories end at level 0."""
        return self.outputs[-1]

    def view(self, x: Tensor) -> Tensor:
        """(B, q) the kept pixels of (B, *shape)."""
        return x.flatten(1) if self.pixels is None else x.flatten(1)[:, self.pixels]

    def part(self, index: slice) -> Teacher:
        """Some of the trajectories."""
        rows = self.points[:, index], self.outputs[:, index]
        return Teacher(self.levels, self.start[index], *rows, self.pixels, take(self.cond, index))

    def index(self, sigma: float) -> int:
        """Which of ``levels`` is nearest to ``sigma``."""
        return int((self.levels - sigma).abs().argmin())

    def at(self, sigma: float) -> Tensor:
        """(n, q) points at any level: the cubic in log sigma through points and slopes ``x - D``; the end at 0."""
        if sigma <= 0:
            return self.end
        if sigma >= float(self.levels[0]):
            return self.points[0]
        k = min(int((self.levels > sigma).sum()), len(self.levels) - 1)
        u = math.log(float(self.levels[k - 1]) / sigma) / (h := math.log(float(self.levels[k - 1] / self.levels[k])))
        x0, x1 = self.points[k - 1], self.points[k]
        d0, d1 = -h * (x0 - self.outputs[k - 1]), -h * (x1 - self.outputs[k])
        u = min(u, 1.0)
        low, high = (1 + 2 * u) * (1 - u) ** 2, u * u * (3 - 2 * u)
        return low * x0 + high * x1 + u * (1 - u) ** 2 * d0 - u * u * (1 - u) * d1

    def error(self, D: Denoiser, sampler: Sampler, batch: int) -> float:
        """Mean over trajectories of the RMSE between the sampler's end and the teacher's at the same level."""
        goal, total = self.at(sampler.end), 0.0
        noise = Noise.of(0, len(self), self.start.device).fold("check")
        scale = sampler.start / float(self.levels[0])
        for i in range(0, len(self), batch):
            rows = slice(i, i + batch)
            found = sampler(D, self.start[rows] * scale, take(self.cond, rows), noise=noise[rows])
            total += float(rmse(self.view(found), goal[rows]).sum())
        return total / len(self)


def follow(
    D: Denoiser,
    levels: Tensor,
    noise: Noise,
    cond: Cond,
    *,
    batch: int = 1024,
    dtype: torch.dtype = torch.float32,
    memory: int = 1 << 30,
    say: Callable[[str], None] = lambda text: None,
) -> Teacher:
    """Follows one trajectory per noise source through all ``levels`` with the third-order DPM-Solver++.

    When points and outputs of all pixels would take more than ``memory`` bytes, a random choice of the pixels is kept,
    the same in all trajectories; the networks always see whole pictures.

    Raises:
        InputError: the denoiser's output is not finite (names the row and the level).
    """
    n, numel = len(noise), math.prod(D.shape)
    room = max(64, memory // (2 * len(levels) * n * dtype.itemsize))
    pixels = None
    if room < numel:
        order = Noise.of(0, 1).uniform((numel,), "pixels", dtype=torch.float64)[0].argsort()
        pixels = order[:room].sort().values.to(noise.seeds.device)
    start = noise.normal(D.shape, dtype=dtype) * start_std(D, float(levels[0]))
    table = build("dpmpp", levels, order=3, exact=True)
    shape = (len(levels), n, numel if pixels is None else room)
    made = Teacher(levels, start, start.new_empty(shape), start.new_empty(shape), pixels, dict(cond))
    for i in range(0, n, batch):
        rows = slice(i, i + batch)
        own = take(cond, rows)
        for step in trajectory(D, start[rows], table, own):
            out = D(step.point, levels[-1], own) if step.denoised is None else step.denoised
            if not out.isfinite().all():
                raise InputError(
                    f"the teacher's output is not finite at row {step.k} of its {len(levels) - 1} steps, sigma "
                    f"{float(levels[step.k]):g}: check its sigma range ({D.sigma_min:g} to {D.sigma_max:g}) and dtype"
                )
            made.points[step.k, rows], made.outputs[step.k, rows] = made.view(step.point), made.view(out)
            say(f"teacher, {i}/{n} trajectories, level {step.k}/{len(levels) - 1}")
    return made


def fine_levels(D: Denoiser, grid: Tensor | None, count: int = FINE) -> Tensor:
    """The positive levels the teacher is followed through: dense, and holding the wanted grid if there is one."""
    if grid is None:
        # Above a few hundred standard deviations of the data nothing happens; 1e8 is one step from there.
        top = min(D.sigma_max, 80.0 * max(1.0, 2 * getattr(D, "sigma_data", 0.5)))
        fine = karras(count, D.sigma_min, top, to_zero=False)
        return fine if top == D.sigma_max else torch.cat([fine.new_tensor([D.sigma_max]), fine])
    knots = [s for s in grid.tolist() if s > 0]
    if grid[-1] == 0 and knots[-1] > D.sigma_min:
        knots.append(D.sigma_min)
    if len(knots) < 2:
        raise InputError(f"the grid {grid.tolist()} lies below the denoiser's sigma_min {D.sigma_min:g}")
    each = math.ceil(count / (len(knots) - 1))
    ramp = torch.linspace(0, 1, each + 1, dtype=torch.float64)
    parts = [torch.exp(math.log(a) + ramp * math.log(b / a)) for a, b in itertools.pairwise(knots)]
    for part, a in zip(parts, knots[:-1], strict=True):
        part[0] = a
    return torch.cat([p[:-1] for p in parts] + [torch.tensor(knots[-1:], dtype=torch.float64)])


class Clock:
    """Time since it was made, against a budget in seconds (None: no limit)."""

    def __init__(self, budget: float | None = None) -> None:
        self.budget, self.began = budget, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether work of ``seconds`` would still end in time."""
        return self.budget is None or self.spent + seconds <= self.budget


class Progress:
    """A spinner line while it works, on a terminal and only when asked for."""

    def __init__(self, shown: bool) -> None:
        self.status = Console(stderr=True).status("calibrate") if shown else None

    def __enter__(self) -> Progress:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, text: str) -> None:
        """Shows ``text``."""
        if self.status is not None:
            self.status.update(f"calibrate: {text}")


@dataclass(frozen=True)
class Task:
    """One calibration: what every method is given.

    Attributes:
        D: the denoiser to be sampled from, guidance included.
        nfe: evaluations of the result, at most.
        grid: the grid, when it is given; None when the method chooses it.
        teacher: trajectories; the last ``held`` of them are for choices, the others for fitting.
        held: see ``teacher``.
        seed: of whatever else the method draws.
        batch: pictures at a time.
        clock: time spent and allowed; a method stops improving when it is over.
        say: shows progress.
    """

    D: Denoiser
    nfe: int
    grid: Tensor | None
    teacher: Teacher
    held: int
    seed: int = 0
    batch: int = 1024
    clock: Clock = field(default_factory=Clock)
    say: Callable[[str], None] = lambda text: None

    @property
    def fit(self) -> Teacher:
        """The trajectories for fitting."""
        return self.teacher.part(slice(0, len(self.teacher) - self.held))

    @property
    def choose(self) -> Teacher:
        """The trajectories for choices."""
        return self.teacher.part(slice(len(self.teacher) - self.held, None))

    def noise(self, *key: int | str) -> Noise:
        """Sources for as many further trajectories as :attr:`fit` has, a function of the seed and ``key``."""
        count = len(self.teacher) - self.held
        return Noise.of(self.seed, count, self.teacher.start.device).fold("further", *key)


@dataclass(frozen=True)
class Fitted:
    """What a method returns: the sampler, the fixed solver it started from, and JSON-able facts."""

    sampler: Sampler
    start: Tableau
    facts: dict[str, Any] = field(default_factory=dict)
