"""iPNDM: Adams-Bashforth weights for equal steps, on the slopes of any grid (arXiv 2204.13902; 2202.09778).

iPNDM_v takes the weights of the steps as they are.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

from torch import Tensor

from fewstep.core.solver import slope_row, solver
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError, unknown
from fewstep.solve.lms import lms

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
        weights = ADAMS_BASHFORTH[min(order, k + 1)]
        others = {k - j: (w, grid[k - j]) for j, w in enumerate(weights) if j > 0}
        table.row(a, b, *slope_row(k, a, b, others))
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


@solver
def ipndm_v(sigmas: Tensor, order: int = 4, *, compat: Literal["diff-sampler"] | None = None) -> Tableau:
    """Variable-step iPNDM: the exact Adams-Bashforth weights of unequal steps, that is, :func:`fewstep.solve.lms`.

    ``compat="diff-sampler"`` takes the closed forms of that program's code instead, which published results of
    "iPNDM_v" come from. Its orders 1 and 2 are the exact ones. Those of 3 and 4 are not: the third weighs a quadratic
    wrongly, and the shares of the fourth sum to 1 on equal or geometric steps only. Its few-step results are good all
    the same. Raises InputError for an order outside 1..4, another ``compat`` or a bad grid.
    """
    if order not in ADAMS_BASHFORTH:
        raise InputError(f"ipndm_v has orders 1, 2, 3 and 4, got {order!r}")
    if compat is None:
        return replace(lms(sigmas, order), name=f"ipndm_v-{order}")
    if compat != "diff-sampler":
        raise unknown("compat of ipndm_v", str(compat), ("diff-sampler",))
    table = Builder(float(sigmas[0]))
    grid = sigmas.tolist()
    for k, (a, b) in enumerate(itertools.pairwise(grid)):
        use = min(order, k + 1)
        widths = [grid[k - j] - grid[k + 1 - j] for j in range(use)]
        own, *others = _published_weights(widths)
        shares = {k - j: (w, grid[k - j]) for j, w in enumerate(others, 1)}
        table.row(a, b, *slope_row(k, a, b, shares, own))
    return table.build(f"ipndm_v-{order}-diff-sampler")


def _published_weights(widths: list[float]) -> list[float]:
    """diff-sampler's weights of the newest slope and older ones, from the widths of this step and those before it."""
    h, *older = widths
    if not older:
        return [1.0]
    h1 = older[0]
    weights = [1 + h / h1 / 2, -h / h1 / 2]
    if len(older) == 1:
        return weights
    h2 = older[1]
    place = h / (3 * (h + h1))
    third = (1 - place * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
    weights = [weights[0] + third, weights[1] - (1 + h1 / h2) * third, third * h1 / h2]
    if len(older) == 2:
        return weights
    h3 = older[2]
    fourth = (1 - place) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
    fourth *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    q = h1 * (h1 + h2) / (h2 * (h2 + h3))
    return [
        weights[0] + fourth,
        weights[1] - (1 + h1 / h2 + q) * fourth,
        weights[2] + (h1 / h2 + q * (1 + h2 / h3)) * fourth,
        -fourth * q * h1 / h2,
    ]
