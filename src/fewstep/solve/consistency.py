"""Multistep sampling with consistency models: jump to the data, add noise, jump again."""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from fewstep.core.path import VP, Path
from fewstep.core.solver import solver
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError


@solver
def consistency(sigmas: Tensor, *, sigma_min: float = 0.0) -> Tableau:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1): ``x_b = D + sqrt(b^2 - sigma_min^2) z``.

    ``sigma_min`` is the level that the consistency function's output is held to be at; the paper's models use 0.002,
    most later ones 0. A grid that ends at 0 or at ``sigma_min`` ends with the output itself. One evaluation a step.

    Raises:
        InputError: ``sigma_min < 0`` or above a positive level of the grid, or a bad grid.
    """
    lowest = min(s for s in sigmas.tolist() if s > 0)
    if not 0 <= sigma_min <= lowest:
        raise InputError(
            f"consistency needs 0 <= sigma_min <= the lowest positive level {lowest:g}, got sigma_min={sigma_min!r}"
        )
    table = Builder(float(sigmas[0]))
    for k, (a, b) in enumerate(itertools.pairwise(sigmas.tolist())):
        added = math.sqrt((b - sigma_min) * (b + sigma_min)) if b > sigma_min else 0.0
        table.row(a, b, {}, {k: 1.0}, {k: added})
    return table.build("consistency")


@solver
def tcd(sigmas: Tensor, *, gamma: float = 0.3, frame: Path = VP) -> Tableau:
    """Strategic stochastic sampling of trajectory consistency models (arXiv 2402.19159; 2310.02279).

    To reach level ``b`` the sampler goes along the trajectory to a lower level ``s``, holding x0 and the noise
    prediction fixed as Euler does, and adds noise of variance ``b^2 - s^2``. ``s`` lies at ``(1 - gamma)`` times the
    time of ``b`` in ``frame``, by default DDPM's linear betas in continuous form; ``DDPM(betas)`` is a teacher's own
    table. The published sampler rounds that time down to a whole step of the teacher's 1000; here it is not rounded,
    which moves ``s`` by less than one of those steps. ``gamma=0`` is :func:`fewstep.solve.euler.euler`; ``gamma=1`` is
    :func:`consistency`, given a frame whose time 0 is level 0. A discrete frame starts above 0: its first level is then
    the lowest ``s``, and a ``b`` below that is reached without noise. One evaluation a step.

    Raises:
        InputError: ``gamma`` outside [0, 1], or a bad grid.
    """
    if not 0 <= gamma <= 1:
        raise InputError(f"tcd needs 0 <= gamma <= 1, got {gamma!r}: 0 adds no noise, 1 keeps nothing but the output")
    table = Builder(float(sigmas[0]))
    for k, (a, b) in enumerate(itertools.pairwise(sigmas.tolist())):
        s = _lower_level(b, gamma, frame)
        table.row(a, b, {k: s / a}, {k: 1 - s / a}, {k: math.sqrt((b - s) * (b + s))})
    return table.build(f"tcd-gamma{gamma:g}")


def _lower_level(b: float, gamma: float, frame: Path) -> float:
    """The noise level at ``(1 - gamma)`` times the time of level ``b``; never above ``b``."""
    if b == 0 or gamma == 0:
        return b
    return min(b, float(frame.sigma((1 - gamma) * frame.at(b))))
