"""Gaussians whose trajectories have a closed form, as teachers and as tables, for the tests of the geometry page."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fewstep.core.exact import Mixture
from fewstep.core.tableau import Builder, Tableau
from fewstep.grid.karras import karras
from fewstep.solve.teacher import Teacher

LEVELS = karras(24, 0.02, 20.0, to_zero=False)


def gaussian(*variances: float) -> Mixture:
    """A Gaussian in as many dimensions as there are variances, away from the origin."""
    mean = torch.linspace(-0.7, 0.4, len(variances), dtype=torch.float64)
    return Mixture(mean[None], torch.tensor([variances]), sigma_min=0.02, sigma_max=20.0)


def starts(problem: Mixture, n: int = 5, level: float = 20.0) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return problem.draw(n, 1) + level * torch.randn((n, *problem.shape), generator=g, dtype=torch.float64)


def exact_teacher(problem: Mixture, levels: Tensor = LEVELS) -> Teacher:
    """The closed-form trajectories of a Gaussian."""
    start = starts(problem, level=float(levels[0]))
    points = torch.stack([problem.flow(start, float(levels[0]), s) for s in levels.tolist()])
    outputs = torch.stack([problem(x, s) for x, s in zip(points, levels, strict=True)])
    return Teacher(levels, start, points, outputs, None, {})


def exact_table(variance: float, levels: Tensor) -> Tableau:
    """Follows a Gaussian of mean 0 exactly, with weights on two points and two outputs."""
    table = Builder(float(levels[0]))
    for k, (a, b) in enumerate(itertools.pairwise(levels.tolist())):
        gain = math.sqrt((variance + b * b) / (variance + a * a))
        kept = variance / (variance + a * a)
        before = math.sqrt((variance + float(levels[k - 1]) ** 2) / (variance + a * a)) if k else 0.0
        points, outputs = {k: gain - 0.5 * kept}, {k: 0.5}
        if k:
            old = float(levels[k - 1])
            points |= {k: gain - 0.5 * kept - 0.2 * before - 0.1 * before * variance / (variance + old**2), k - 1: 0.2}
            outputs |= {k - 1: 0.1}
        table.row(a, b, points, outputs)
    return table.build("exact")
