"""DEIS (arXiv 2204.13902): Adams-Bashforth on the noise, interpolated in a coordinate of choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.path import Path, VPPath
from fewstep.core.solver import lagrange_basis, lagrange_integrals, quadrature, slope_row, solver
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError, unknown

BASES = ("t", "rho", "lambda")


@solver
def deis(
    sigmas: Tensor,
    order: int = 3,
    *,
    basis: Literal["t", "rho", "lambda"] = "t",
    frame: Path | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Tableau:
    """``x_b = x_a + sum_j C_j eps_{k-j}``, where C integrates over sigma the Lagrange polynomials in ``basis``.

    ``order`` counts the slopes used, 1 to 4; the first steps use as many as there are. One evaluation a step.

    * ``basis="t"`` is tAB, in the time of the path ``frame``. Without one it is the linear-beta VP process with
      ``sigma(1) = sigma_max`` and ``sigma(1/1000) = sigma_min``, the range that published results of EDM models take
      whatever the grid; nothing else depends on the two.
    * ``basis="rho"`` is rhoAB, in sigma itself: :func:`fewstep.solve.lms` but for a step that ends at 0.
    * ``basis="lambda"`` is in log sigma: the "logrho" of diffusers, and
      :func:`fewstep.solve.dpm_multistep` with ``exact=True``.

    The integrals are exact to rounding, but for the kinks of a ``DDPM`` frame (1e-5 of the weights). A step to 0 is of
    order 1. Raises InputError for an order outside 1..4, an unknown basis, a frame with a basis other than "t", not
    0 < sigma_min < sigma_max, or a bad grid.
    """
    if order not in (1, 2, 3, 4):
        raise InputError(f"deis has orders 1, 2, 3 and 4, got {order!r}")
    if basis not in BASES:
        raise unknown("basis of deis", str(basis), BASES)
    if frame is not None and basis != "t":
        raise InputError(f"deis takes a frame with basis='t' only, got basis={basis!r}: leave one of them out")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise InputError(f"deis needs 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}")
    path = _vp(sigma_min, sigma_max) if frame is None else frame
    coordinate = torch.log if basis == "lambda" else path.at
    table = Builder(float(sigmas[0]))
    for k, (a, b) in enumerate(itertools.pairwise(sigmas.tolist())):
        nodes = sigmas[max(0, k + 1 - order) : k + 1].flip(0) if b > 0 else sigmas[k : k + 1]
        if basis == "rho":
            shares = lagrange_integrals(nodes, a, b) / (b - a)
        else:
            shares = _integrals(nodes, a, b, coordinate) / (b - a)
        others = {k - j: (float(shares[j]), float(nodes[j])) for j in range(1, len(nodes))}
        table.row(a, b, *slope_row(k, a, b, others))
    return table.build(f"deis-{basis}ab-{order}")


def _vp(sigma_min: float, sigma_max: float) -> VPPath:
    """The linear-beta process through (t, sigma) = (1, sigma_max) and (1/1000, sigma_min)."""
    start, low, high = 1e-3, math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (high - low / start) / (1 - start)
    return VPPath(beta_d, high - beta_d / 2)


def _integrals(nodes: Tensor, a: float, b: float, coordinate: Callable[[Tensor], Tensor]) -> Tensor:
    """Integrals over sigma from a to b > 0 of the Lagrange polynomials in ``coordinate(sigma)``, on ``nodes``."""
    if len(nodes) == 1:
        return nodes.new_tensor([b - a])
    at, weights = quadrature(math.log(a), math.log(b))
    levels = at.exp()
    return lagrange_basis(coordinate(nodes), coordinate(levels)) @ (weights * levels)
