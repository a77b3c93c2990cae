"""DPM-Solver++ for the diffusion SDE (arXiv 2211.01095), in the forms that k-diffusion made common.

``dx = (1 + eta) (D - x) dlam + sqrt(2 eta) sigma dW`` runs from high to low noise in ``lam = -ln sigma`` and has the
same marginals for every ``eta``; ``eta=0`` is the ODE, ``eta=1`` the reverse of the noising process.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from fewstep.core.solver import solver, step_size
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError
from fewstep.solve.euler import ancestral_split, check_stochastic


@solver
def dpmpp_sde(sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5) -> Tableau:
    """DPM-Solver++ SDE: an ancestral step to a middle level, a second one over the whole step with both outputs.

    The middle level ``m`` lies the fraction ``r`` down in log sigma; the second step uses
    ``(1 - 1/(2r)) D(x, a) + 1/(2r) D(y, m)``. The noises of the two steps come from one Brownian path in sigma, as with
    k-diffusion's Brownian tree: the whole step's noise is ``sqrt(q) z + sqrt(1 - q) z'`` with ``q = (a - m)/(a - b)``,
    where ``z`` made the middle point and ``z'`` is fresh. This correlation is what makes the variance right to second
    order: independent noises lose the part of it that the second output carries, and leave first order.
    Both steps use DDIM's split, so an ``eta`` between 0 and 1 is the SDE above with ``eta^2``. Two evaluations a step,
    one for a step that ends at 0. ``eta=0`` is DPM-Solver++(2S).

    Raises:
        InputError: ``eta < 0``, ``s_noise <= 0``, ``r`` outside (0, 1), or a bad grid.
    """
    check_stochastic(eta, s_noise)
    if not 0 < r < 1:
        raise InputError(f"dpmpp_sde needs a middle level with 0 < r < 1, got r={r!r}: 0.5 is the usual one")
    table = Builder(float(sigmas[0]))
    for a, b in itertools.pairwise(sigmas.tolist()):
        i = table.k
        if b == 0:
            table.row(a, 0.0, {}, {i: 1.0})
            continue
        m = a * math.exp(-r * step_size(a, b))
        down, up = ancestral_split(a, m, eta)
        table.row(a, m, {i: down / a}, {i: 1 - down / a}, {i: s_noise * up})
        down, up = ancestral_split(a, b, eta)
        d, second = 1 - down / a, 1 / (2 * r)
        shared = (a - m) / (a - b)
        noises = {i: s_noise * up * math.sqrt(shared), i + 1: s_noise * up * math.sqrt(1 - shared)}
        table.row(m, b, {i: down / a}, {i: (1 - second) * d, i + 1: second * d}, noises)
    return table.build("dpmpp-sde")


@solver
def dpmpp2m_sde(sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, midpoint: bool = True) -> Tableau:
    """DPM-Solver++(2M) SDE. One evaluation a step.

    ``midpoint`` is the usual form; without it D is taken as linear in log sigma over the step, k-diffusion's "heun".
    ``eta=0`` is :func:`fewstep.solve.dpmpp.dpmpp` of order 2 with ``exact=not midpoint``. A step that ends at 0 is D.
    Raises InputError for ``eta < 0``, ``s_noise <= 0`` or a bad grid.
    """
    table = _multistep(sigmas, 2, eta, s_noise, midpoint=midpoint, second=0.0)
    return table.build(f"dpmpp-2m-sde{'' if midpoint else '-exact'}")


@solver
def dpmpp3m_sde(sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, exact: bool = False) -> Tableau:
    """DPM-Solver++(3M) SDE as in k-diffusion. One evaluation a step.

    As published its second difference lacks a factor 2, which ``exact=True`` puts in. The second step takes D as linear
    in log sigma, so that ``eta=0`` is :func:`fewstep.solve.dpmpp.dpmpp` of order 3 from the third step on, and, with
    ``exact=True``, from the first. A step that ends at 0 gives D.
    Raises InputError for ``eta < 0``, ``s_noise <= 0`` or a bad grid.
    """
    table = _multistep(sigmas, 3, eta, s_noise, midpoint=False, second=2.0 if exact else 1.0)
    return table.build(f"dpmpp-3m-sde{'-exact' if exact else ''}")


def _multistep(sigmas: Tensor, order: int, eta: float, s_noise: float, *, midpoint: bool, second: float) -> Builder:
    """Rows of the variation-of-constants formula: D is a polynomial in log sigma through the last outputs."""
    check_stochastic(eta, s_noise)
    grid = sigmas.tolist()
    table = Builder(grid[0])
    for k, (a, b) in enumerate(itertools.pairwise(grid)):
        if b == 0:
            table.row(a, 0.0, {}, {k: 1.0})
            continue
        h = step_size(a, b)
        past = [step_size(*pair) / h for pair in itertools.pairwise(grid[max(0, k - order + 1) : k + 1])][::-1]
        weights = _weights((1 + eta) * h, past, midpoint, second)
        noise = s_noise * b * math.sqrt(-math.expm1(-2 * eta * h))
        outputs = {k - j: w for j, w in enumerate(weights)}
        table.row(a, b, {k: (b / a) * math.exp(-eta * h)}, outputs, {k: noise})
    return table


def _weights(h: float, past: list[float], midpoint: bool, second: float) -> list[float]:
    """Weights of D_k, D_{k-1}, ...: ``h`` is (1 + eta) times the step, ``past`` the earlier steps in units of the step.

    The slope and curvature of D stay measured in steps of the grid, so ``eta`` enters through ``h`` alone.
    """
    phi1 = -math.expm1(-h)
    if not past:
        return [phi1]
    phi2 = 1 - phi1 / h
    if len(past) == 1:
        slope = (0.5 * phi1 if midpoint else phi2) / past[0]
        return [phi1 + slope, -slope]
    r0, r1 = past
    # d1 and d2 of the paper as combinations of A = (D_k - D_{k-1})/r0 and B = (D_{k-1} - D_{k-2})/r1.
    on_b = -(phi2 * r0 + second * (0.5 - phi2 / h)) / (r0 + r1)
    on_a = phi2 - on_b
    return [phi1 + on_a / r0, -on_a / r0 + on_b / r1, -on_b / r1]
