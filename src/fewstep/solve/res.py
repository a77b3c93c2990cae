"""RES, refined exponential solvers (arXiv 2308.02157): exponential Runge-Kutta and Adams methods in log sigma, on D.

Their coefficients fulfil the order conditions of stiff problems, at order 3 the last one in its weak form
(Hochbruck and Ostermann, doi 10.1137/040611434).
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from fewstep.core.solver import lagrange_basis, phi, quadrature, solver, step_size
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError


@solver
def res(sigmas: Tensor, order: int = 2, *, c2: float = 0.5, c3: float = 1.0) -> Tableau:
    """The single-step solver of order 2 or 3, with as many evaluations a step.

    The stages stand at ``a e^(-c2 h)`` and, at order 3, ``a e^(-c3 h)``. Order 2 is DPM-Solver++(2S) in its Taylor
    form with ``r = c2``. Order 3 takes the family with ``b2 : b3 = gamma : 1`` and
    ``2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2)``; ``c2 = 1/3, c3 = 2/3`` makes gamma 0 and is DPM-Solver++(3S).
    A step that ends at 0 is of order 1 and takes one evaluation.

    Raises InputError for an order other than 2 and 3, ``c2`` or ``c3`` outside (0, 1], at order 3 ``c2 = 2/3`` or
    ``c2 = c3``, which have no third order, or a bad grid.
    """
    if order not in (2, 3):
        raise InputError(f"res has orders 2 and 3, got {order!r}")
    if not 0 < c2 <= 1 or not 0 < c3 <= 1:
        raise InputError(f"res needs 0 < c2 <= 1 and 0 < c3 <= 1, the places of the stages, got c2={c2!r}, c3={c3!r}")
    if order == 3 and (c2 == c3 or abs(c2 - 2 / 3) < 1e-9):
        raise InputError(f"res of order 3 needs c2 other than 2/3 and c3, got c2={c2!r} and c3={c3!r}")
    table = Builder(float(sigmas[0]))
    for a, b in itertools.pairwise(sigmas.tolist()):
        if b == 0:
            _stage(table, table.k, a, a, b, {})
        elif order == 2:
            _second(table, a, b, c2)
        else:
            _third(table, a, b, c2, c3)
    return table.build(f"res-{order}s")


@solver
def res_multistep(sigmas: Tensor, order: int = 2) -> Tableau:
    """Exponential Adams-Bashforth of order 1 to 4: integrates the polynomial through the last outputs exactly.

    ``x_b = (b/a) x_a + sum_j W_j D_{k-j}`` with ``W_j`` the integral of ``e^(lambda - lambda_b)`` times the Lagrange
    polynomials in ``lambda = -ln sigma``. One evaluation a step; the first steps use as many outputs as there are, and
    a step that ends at 0 is of order 1. Orders 2 and 3 are :func:`fewstep.solve.dpmpp` with ``exact=True``.
    Raises InputError for an order outside 1..4 or a bad grid.
    """
    if order not in (1, 2, 3, 4):
        raise InputError(f"res_multistep has orders 1, 2, 3 and 4, got {order!r}")
    table = Builder(float(sigmas[0]))
    for k, (a, b) in enumerate(itertools.pairwise(sigmas.tolist())):
        outputs = {k: 1 - b / a}
        if b > 0:
            at, weights = quadrature(0.0, step_size(a, b))
            nodes = (a / sigmas[max(0, k + 1 - order) : k + 1].flip(0)).log()
            parts = lagrange_basis(nodes, at) @ (weights * b / a * at.exp())
            outputs = {k - j: w for j, w in enumerate(parts.tolist())}
        table.row(a, b, {k: b / a}, outputs)
    return table.build(f"res-{order}m")


def _stage(table: Builder, base: int, called: float, a: float, b: float, late: dict[int, float]) -> None:
    """A row from point ``base`` at ``a`` to ``b``: ``late`` weighs later outputs, the rest falls to base's own."""
    first = (1 - b / a if b == 0 else -math.expm1(-step_size(a, b))) - sum(late.values())
    table.row(called, b, {base: b / a}, {base: first, **late})


def _second(table: Builder, a: float, b: float, c2: float) -> None:
    i, h, m = table.k, step_size(a, b), a * (b / a) ** c2
    _stage(table, i, a, a, m, {})
    _stage(table, i, m, a, b, {i + 1: h * phi(2, -h) / c2})


def _third(table: Builder, a: float, b: float, c2: float, c3: float) -> None:
    i, h = table.k, step_size(a, b)
    m2, m3 = (a * (b / a) ** c for c in (c2, c3))
    gamma = c3 * (3 * c3 - 2) / (c2 * (2 - 3 * c2))
    _stage(table, i, a, a, m2, {})
    a32 = gamma * c2 * phi(2, -c2 * h) + c3**2 / c2 * phi(2, -c3 * h)
    _stage(table, i, m2, a, m3, {i + 1: h * a32})
    b3 = h * phi(2, -h) / (gamma * c2 + c3)
    _stage(table, i, m3, a, b, {i + 1: gamma * b3, i + 2: b3})
