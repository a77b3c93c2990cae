"""DPM-Solver++ single-step (arXiv 2211.01095): exponential Runge-Kutta methods in log sigma, on the denoiser's outputs.

The forms that work on the noise instead are in :mod:`fewstep.solve.dpm`.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from fewstep.core.solver import phi, solver, step_size
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError


@solver
def dpmpp2s(sigmas: Tensor, *, r: float = 0.5, taylor: bool = False) -> Tableau:
    """DPM-Solver++(2S): one intermediate level ``m = a e^(-r h)``. Two evaluations a step, order 2.

    The end is ``(b/a) x + (1 - b/a) ((1 - w) D_a + w D_m)`` with ``w = 1/(2 r)``, or with ``taylor=True`` the weight
    that is exact for D linear in log sigma. A step that ends at 0 is of order 1 and takes one evaluation.
    Raises InputError for r outside (0, 1] or a bad grid.
    """
    if not 0 < r <= 1:
        raise InputError(f"dpmpp2s needs 0 < r <= 1, the place of the intermediate level, got {r!r}")
    table = Builder(float(sigmas[0]))
    for a, b in itertools.pairwise(sigmas.tolist()):
        if b == 0:
            _first(table, a, b)
            continue
        i, h, m = table.k, step_size(a, b), a * (b / a) ** r
        _first(table, a, m)
        whole = -math.expm1(-h)
        late = h * phi(2, -h) / r if taylor else whole / (2 * r)
        table.row(m, b, {i: b / a}, {i: whole - late, i + 1: late})
    return table.build("dpmpp-2s")


@solver
def dpmpp3s(sigmas: Tensor, *, r1: float = 1 / 3, r2: float = 2 / 3) -> Tableau:
    """DPM-Solver++(3S): intermediate levels ``a e^(-r1 h)`` and ``a e^(-r2 h)``. Three evaluations a step.

    The order is 3 for ``r2 = 2/3`` and any ``r1``, otherwise 2. A step that ends at 0 is of order 1 and takes one
    evaluation. Raises InputError unless 0 < r1 < r2 <= 1, or for a bad grid.
    """
    if not 0 < r1 < r2 <= 1:
        raise InputError(f"dpmpp3s needs 0 < r1 < r2 <= 1, got r1={r1!r} and r2={r2!r}; the paper has 1/3 and 2/3")
    table = Builder(float(sigmas[0]))
    for a, b in itertools.pairwise(sigmas.tolist()):
        if b == 0:
            _first(table, a, b)
            continue
        i, h = table.k, step_size(a, b)
        m1, m2 = (a * (b / a) ** r for r in (r1, r2))
        _first(table, a, m1)
        late = r2 / r1 * r2 * h * phi(2, -r2 * h)
        table.row(m1, m2, {i: m2 / a}, {i: -math.expm1(-r2 * h) - late, i + 1: late})
        late = h * phi(2, -h) / r2
        table.row(m2, b, {i: b / a}, {i: -math.expm1(-h) - late, i + 2: late})
    return table.build("dpmpp-3s")


def _first(table: Builder, a: float, b: float) -> None:
    table.row(a, b, {table.k: b / a}, {table.k: 1 - b / a})
