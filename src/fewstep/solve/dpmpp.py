"""DPM-Solver++ multistep (arXiv 2211.01095): exponential Adams-Bashforth in log sigma, on the denoiser's outputs."""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from fewstep.core.solver import solver, step_size
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError


@solver
def dpmpp(sigmas: Tensor, order: int = 2, *, exact: bool = False, lower_order_final: bool = False) -> Tableau:
    """The multistep solver of order 1, 2 or 3. One evaluation a step.

    With ``h = ln(a/b)`` and divided differences of D in log sigma:
    order 1 is ``(b/a) x + (1 - b/a) D``; order 2 is the published "midpoint" 2M, ``exact=True`` the "taylor" form that
    is exact for D linear in log sigma; order 3 is the published 3M, whose second difference lacks a factor 2 and whose
    order is therefore 2 (the damping often helps below 30 steps), ``exact=True`` the true third-order one.
    ``lower_order_final`` lets the order fall over the last steps, as for samplers with fewer than 15 steps.
    A step that ends at 0 is of order 1. Raises InputError for an order outside 1..3 or a bad grid.
    """
    if order not in (1, 2, 3):
        raise InputError(f"dpmpp has orders 1, 2 and 3, got {order!r}")
    table = Builder(float(sigmas[0]))
    grid = sigmas.tolist()
    steps = len(grid) - 1
    for k, (a, b) in enumerate(itertools.pairwise(grid)):
        use = min(order, k + 1, steps - k if lower_order_final else order) if b > 0 else 1
        outputs = _weights(grid, k, use, exact)
        table.row(a, b, {k: b / a}, outputs)
    return table.build(f"dpmpp-{order}{'m' if order > 1 else ''}{'-exact' if exact and order > 1 else ''}")


def _weights(grid: list[float], k: int, order: int, exact: bool) -> dict[int, float]:
    """Weights of D_k, D_{k-1}, ...: phi functions of h on the (scaled) divided differences."""
    h = step_size(grid[k], grid[k + 1])
    phi1 = -math.expm1(-h)
    if order == 1:
        return {k: phi1}
    r0 = step_size(grid[k - 1], grid[k]) / h
    phi2 = 1 - phi1 / h
    if order == 2:
        slope = phi2 if exact else 0.5 * phi1
        return {k: phi1 + slope / r0, k - 1: -slope / r0}
    r1 = step_size(grid[k - 2], grid[k - 1]) / h
    phi3 = 0.5 - phi2 / h
    # d1 and d2 of the paper as combinations of A = (D_k - D_{k-1})/r0 and B = (D_{k-1} - D_{k-2})/r1.
    first, second = phi2, (2 if exact else 1) * phi3
    on_b = -(first * r0 + second) / (r0 + r1)
    on_a = first - on_b
    return {k: phi1 + on_a / r0, k - 1: -on_a / r0 + on_b / r1, k - 2: -on_b / r1}


@solver
def dpmpp1(sigmas: Tensor) -> Tableau:
    """:func:`dpmpp` of order 1, which is Euler."""
    return dpmpp(sigmas, 1)


@solver
def dpmpp2m(sigmas: Tensor, *, lower_order_final: bool = False) -> Tableau:
    """:func:`dpmpp` of order 2 as published: DPM-Solver++(2M)."""
    return dpmpp(sigmas, 2, lower_order_final=lower_order_final)


@solver
def dpmpp3m(sigmas: Tensor, *, lower_order_final: bool = False) -> Tableau:
    """:func:`dpmpp` of order 3 as published: DPM-Solver++(3M)."""
    return dpmpp(sigmas, 3, lower_order_final=lower_order_final)


@solver
def dpmpp3m_exact(sigmas: Tensor, *, lower_order_final: bool = False) -> Tableau:
    """:func:`dpmpp` of order 3 with the full second difference: third order."""
    return dpmpp(sigmas, 3, exact=True, lower_order_final=lower_order_final)
