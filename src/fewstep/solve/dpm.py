"""DPM-Solver (arXiv 2206.00927): exponential integrators in log sigma on the noise that the denoiser implies.

With ``eps = (x - D) / sigma`` and ``h = ln(a / b)``, every step is ``x_b = x_a + (b - a) * mean slope``. The forms that
work on D itself are in :mod:`fewstep.solve.dpmpp` and :mod:`fewstep.solve.dpmpp_single`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from fewstep.core.solver import phi, slope_row, solver, step_size
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError


@solver
def dpm1(sigmas: Tensor) -> Tableau:
    """DPM-Solver-1, which is Euler. One evaluation a step, order 1. Raises InputError for a bad grid."""
    table = Builder(float(sigmas[0]))
    for a, b in itertools.pairwise(sigmas.tolist()):
        _first(table, a, b)
    return table.build("dpm-1")


@solver
def dpm2(sigmas: Tensor, *, r: float = 0.5, taylor: bool = False) -> Tableau:
    """DPM-Solver-2: one intermediate level ``a e^(-r h)``. Two evaluations a step, order 2.

    The end is ``x_a + (b - a) ((1 - w) eps_a + w eps_m)`` with ``w = 1/(2 r)``, or with ``taylor=True`` the weight that
    is exact for a slope linear in log sigma. A step that ends at 0 is of order 1 and takes one evaluation.
    Raises InputError for r outside (0, 1] or a bad grid.
    """
    _check_fraction("dpm2", "r", r)
    table = Builder(float(sigmas[0]))
    for a, b in itertools.pairwise(sigmas.tolist()):
        if b > 0:
            _second(table, a, b, r, taylor)
        else:
            _first(table, a, b)
    return table.build("dpm-2")


@solver
def dpm3(sigmas: Tensor, *, r1: float = 1 / 3, r2: float = 2 / 3) -> Tableau:
    """DPM-Solver-3: intermediate levels ``a e^(-r1 h)`` and ``a e^(-r2 h)``. Three evaluations a step.

    The order is 3 for ``r2 = 2/3`` and any ``r1``, otherwise 2. A step that ends at 0 is of order 1 and takes one
    evaluation. Raises InputError unless 0 < r1 < r2 <= 1, or for a bad grid.
    """
    _check_fraction("dpm3", "r2", r2)
    if not 0 < r1 < r2:
        raise InputError(f"dpm3 needs 0 < r1 < r2, got r1={r1!r} and r2={r2!r}; the paper has 1/3 and 2/3")
    table = Builder(float(sigmas[0]))
    for a, b in itertools.pairwise(sigmas.tolist()):
        if b > 0:
            _third(table, a, b, r1, r2)
        else:
            _first(table, a, b)
    return table.build("dpm-3")


@solver
def dpm_single(sigmas: Tensor, orders: int | Sequence[int] = 3) -> Tableau:
    """Single steps of DPM-Solver with an order for each: ``orders`` has one entry a step, or is one number for all.

    A step of order p takes p evaluations; one that ends at 0 is of order 1. The paper's "fast" sampler for a budget of
    ``nfe`` evaluations is uniform in log sigma and does not reach 0::

        orders = fast_orders(nfe)
        dpm_single(logsnr(len(orders), sigma_min, sigma_max, to_zero=False), orders)

    Raises InputError for an order outside 1..3, another number of orders than steps, or a bad grid.
    """
    steps = len(sigmas) - 1
    each = [orders] * steps if isinstance(orders, int) else list(orders)
    if len(each) != steps or not all(order in (1, 2, 3) for order in each):
        raise InputError(f"dpm_single needs an order of 1, 2 or 3 for each of its {steps} steps, got {orders!r}")
    table = Builder(float(sigmas[0]))
    for (a, b), order in zip(itertools.pairwise(sigmas.tolist()), each, strict=True):
        if order == 1 or b == 0:
            _first(table, a, b)
        elif order == 2:
            _second(table, a, b, 0.5, False)
        else:
            _third(table, a, b, 1 / 3, 2 / 3)
    return table.build("dpm-single")


def fast_orders(nfe: int) -> tuple[int, ...]:
    """The orders of DPM-Solver-fast's steps, which sum to ``nfe``: as many 3 as fit, then what is left.

    Raises InputError for ``nfe`` below 1.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise InputError(f"fast_orders needs a whole number of evaluations >= 1, got {nfe!r}")
    threes, rest = divmod(nfe, 3)
    # A multiple of 3 gives one step of order 3 up, so that the last step is always of a lower order.
    return (3,) * (threes - 1) + (2, 1) if rest == 0 else (3,) * threes + (rest,)


@solver
def dpm_multistep(sigmas: Tensor, order: int = 2, *, exact: bool = False, lower_order_final: bool = False) -> Tableau:
    """The multistep solver of order 1, 2 or 3 on the noise. One evaluation a step.

    It is :func:`fewstep.solve.dpmpp` with the noise in place of D: what the published code calls DPM-Solver (not ++)
    multistep. Order 2 is the published "midpoint" form and order 3 the published one, whose second difference lacks a
    factor 2, so that its order is 2; ``exact=True`` integrates the interpolating polynomial in log sigma exactly.
    ``lower_order_final`` lets the order fall over the last steps. The first steps and a step that ends at 0 are of
    lower order, the latter of order 1. Raises InputError for an order outside 1..3 or a bad grid.
    """
    if order not in (1, 2, 3):
        raise InputError(f"dpm_multistep has orders 1, 2 and 3, got {order!r}")
    table = Builder(float(sigmas[0]))
    grid = sigmas.tolist()
    steps = len(grid) - 1
    for k, (a, b) in enumerate(itertools.pairwise(grid)):
        use = min(order, k + 1, steps - k if lower_order_final else order) if b > 0 else 1
        shares = {k - j: (w, grid[k - j]) for j, w in enumerate(_shares(grid, k, use, exact), 1)}
        table.row(a, b, *slope_row(k, a, b, shares))
    return table.build(f"dpm-{order}{'m' if order > 1 else ''}{'-exact' if exact and order > 1 else ''}")


def _shares(grid: list[float], k: int, order: int, exact: bool) -> list[float]:
    """Shares of the slopes of rows k - 1 and k - 2 in the mean slope of step k."""
    if order == 1:
        return []
    h = step_size(grid[k], grid[k + 1])
    r0 = step_size(grid[k - 1], grid[k]) / h
    slope = _linear(h)
    if order == 2:
        return [-(slope if exact else 0.5) / r0]
    r1 = step_size(grid[k - 2], grid[k - 1]) / h
    curve = (2 if exact else 1) * phi(3, h) / phi(1, h)
    # The paper's divided differences as combinations of (e_k - e_{k-1})/r0 and (e_{k-1} - e_{k-2})/r1.
    on_b = -(slope * r0 + curve) / (r0 + r1)
    on_a = slope - on_b
    return [-on_a / r0 + on_b / r1, -on_b / r1]


def _linear(h: float) -> float:
    """The mean of log sigma's progress over a step, from 0 to 1, when sigma moves evenly: 1/2 for a short step."""
    return phi(2, h) / phi(1, h)


def _first(table: Builder, a: float, b: float) -> None:
    i = table.k
    table.row(a, b, *slope_row(i, a, b, {}))


def _second(table: Builder, a: float, b: float, r: float, taylor: bool) -> None:
    i, m = table.k, a * (b / a) ** r
    _first(table, a, m)
    share = (_linear(step_size(a, b)) if taylor else 0.5) / r
    table.row(m, b, *slope_row(i, a, b, {i + 1: (share, m)}))


def _third(table: Builder, a: float, b: float, r1: float, r2: float) -> None:
    i, h = table.k, step_size(a, b)
    m1, m2 = (a * (b / a) ** r for r in (r1, r2))
    _first(table, a, m1)
    table.row(m1, m2, *slope_row(i, a, m2, {i + 1: (r2 / r1 * _linear(r2 * h), m1)}))
    table.row(m2, b, *slope_row(i, a, b, {i + 2: (_linear(h) / r2, m2)}))


def _check_fraction(name: str, what: str, value: float) -> None:
    if not 0 < value <= 1 or not math.isfinite(value):
        raise InputError(f"{name} needs 0 < {what} <= 1, the place of the intermediate level, got {value!r}")
