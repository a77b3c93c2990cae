"""iPNDM: Adams-Bashforth weights for equal steps, on the slopes of any grid (arXiv 2204.13902; 2202.09778)."""

from __future__ import annotations

import itertools

from torch import Tensor

from fewstep.core.solver import solver
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@solver
def ipndm(sigmas: Tensor, order: int = 4) -> Tableau:
    """``x_b = x_a + (b - a) sum_j w_j eps_{k-j}`` with ``eps = (x - D) / sigma`` and the weights of equal steps.

    The first steps use the lower orders. One evaluation a step. On unequal steps the asymptotic order is 2 at most;
    published few-step results use it all the same, because at 4 to 10 evaluations it is hard to beat.
    Raises InputError for an order outside 1..4 or a bad grid.
    """
    if order not in ADAMS_BASHFORTH:
        raise InputError(f"ipndm has orders 1, 2, 3 and 4, got {order!r}")
    table = Builder(float(sigmas[0]))
    grid = sigmas.tolist()
    for k, (a, b) in enumerate(itertools.pairwise(grid)):
        points, outputs = {k: 1.0}, {}
        for j, w in enumerate(ADAMS_BASHFORTH[min(order, k + 1)]):
            slope = (b - a) * w / grid[k - j]
            points[k - j] = points.get(k - j, 0.0) + slope
            outputs[k - j] = -slope
        table.row(a, b, points, outputs)
    return table.build(f"ipndm-{order}")


@solver
def ipndm1(sigmas: Tensor) -> Tableau:
    """:func:`ipndm` of order 1, which is Euler."""
    return ipndm(sigmas, 1)


@solver
def ipndm2(sigmas: Tensor) -> Tableau:
    """:func:`ipndm` of order 2."""
    return ipndm(sigmas, 2)


@solver
def ipndm3(sigmas: Tensor) -> Tableau:
    """:func:`ipndm` of order 3."""
    return ipndm(sigmas, 3)


@solver
def ipndm4(sigmas: Tensor) -> Tableau:
    """:func:`ipndm` of order 4."""
    return ipndm(sigmas, 4)
