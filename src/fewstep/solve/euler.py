"""Euler's method, which is DDIM (arXiv 2010.02502) in these coordinates, with and without fresh noise."""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from fewstep.core.path import EDM, Path
from fewstep.core.solver import solver
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError


@solver
def euler(sigmas: Tensor, *, frame: Path = EDM) -> Tableau:
    """``x_b = D + (b/a) (x - D)``: holds x0 and the noise fixed over a step. One evaluation a step, order 1.

    ``frame`` changes nothing, because a step with both held fixed is the same in every frame.
    Raises InputError for a bad grid.
    """
    return euler_rows(sigmas, 0.0, 1.0).build("euler")


@solver
def ddim(sigmas: Tensor, *, eta: float = 0.0) -> Tableau:
    """DDIM with fresh noise (arXiv 2010.02502): Euler to the lower level of :func:`ancestral_split`, then noise.

    ``eta=0`` is :func:`euler`; ``eta=1`` draws from DDPM's posterior, whose mean is ``(b/a)^2 x + (1 - (b/a)^2) D``
    and whose variance is ``b^2 (a^2 - b^2) / a^2`` (arXiv 2006.11239). Above 1 the noise grows until all of ``b`` is
    fresh. One evaluation a step, order 1. Raises InputError for a negative or infinite ``eta``, or a bad grid.
    """
    check_stochastic(eta)
    return euler_rows(sigmas, eta, 1.0).build(f"ddim-eta{eta:g}")


def euler_rows(sigmas: Tensor, eta: float, s_noise: float) -> Builder:
    """One row a step: Euler to the lower level of the split, then fresh noise times ``s_noise``; none into level 0."""
    table = Builder(float(sigmas[0]))
    for k, (a, b) in enumerate(itertools.pairwise(sigmas.tolist())):
        down, up = ancestral_split(a, b, eta)
        table.row(a, b, {k: down / a}, {k: 1 - down / a}, {k: s_noise * up})
    return table


def ancestral_split(a: float, b: float, eta: float) -> tuple[float, float]:
    """``(down, up)`` with ``down^2 + up^2 = b^2``: go from level ``a`` to ``down``, then add noise of scale ``up``.

    ``up = eta b sqrt(1 - (b/a)^2)``, at most ``b``: DDIM's sigma (arXiv 2010.02502) in these coordinates.
    """
    ratio = b / a
    up = min(b, eta * b * math.sqrt((1 - ratio) * (1 + ratio)))
    # Not sqrt(b^2 - up^2), which loses every digit when a is huge and eta is 1.
    down = b * math.sqrt(max(0.0, (1 - eta) * (1 + eta) + (eta * ratio) ** 2))
    return down, up


def check_stochastic(eta: float, s_noise: float = 1.0) -> None:
    """Raises InputError unless ``0 <= eta < inf`` and ``0 < s_noise < inf``."""
    if not 0 <= eta < math.inf:
        raise InputError(f"eta must be a finite number >= 0, got {eta!r}: 0 adds no noise, 1 is ancestral sampling")
    if not 0 < s_noise < math.inf:
        raise InputError(
            f"s_noise must be a finite number > 0, got {s_noise!r}: 1 keeps the noise as it is; eta=0 has none"
        )
