"""UniPC (arXiv 2302.04867): a multistep predictor, and a corrector that costs no evaluation.

The denoiser is called at the predicted points only. Its output there corrects the point before the next step starts
from it. A correction is a sum of outputs, so that a table needs no row of its own for it: each row starts from the
predicted point and carries the correction along.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.solver import phi, slope_row, solver, step_size
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError, unknown


@solver
def unipc(
    sigmas: Tensor,
    order: int = 2,
    *,
    variant: Literal["bh1", "bh2"] = "bh2",
    predict: Literal["x0", "noise"] = "x0",
    lower_order_final: bool = False,
    corrector: bool = True,
    disable_corrector: Sequence[int] = (),
) -> Tableau:
    """The UniPC solver with a predictor of order 1 to 4. One evaluation a step.

    With the corrector the order is one more, if the first steps are exact or short: they are of lower order.
    ``predict`` says whether polynomials run through D or through the noise ``(x - D) / sigma``. ``variant`` is the
    function B(z): z for "bh1" and ``e^z - 1`` for "bh2", where ``z = ln(b/a)`` for x0 and ``ln(a/b)`` for the noise.
    It matters only where the published method fixes a weight at 1/2: the predictor of order 2 and the corrector of
    order 1.
    ``lower_order_final`` lets the order fall over the last steps, as published for few steps;
    ``disable_corrector`` names steps, from 0, whose end is not corrected; the last one never is. A step that ends at 0
    returns D. The points of the table are the predicted ones.

    Raises:
        InputError: an order outside 1..4, an unknown variant or prediction, a step of ``disable_corrector`` that the
            grid does not have, or a bad grid.
    """
    if order not in (1, 2, 3, 4):
        raise InputError(f"unipc has orders 1, 2, 3 and 4, got {order!r}")
    if variant not in ("bh1", "bh2"):
        raise unknown("variant of unipc", str(variant), ("bh1", "bh2"))
    if predict not in ("x0", "noise"):
        raise unknown("prediction of unipc", str(predict), ("x0", "noise"))
    grid = sigmas.tolist()
    steps = len(grid) - 1
    strange = [i for i in disable_corrector if i not in range(steps)]
    if strange:
        raise InputError(f"disable_corrector has steps 0 to {steps - 1} on this grid, got {strange}")
    table = Builder(grid[0])
    correction: dict[int, float] = {}
    for k, (a, b) in enumerate(itertools.pairwise(grid)):
        if b == 0:
            table.row(a, b, {}, {k: 1.0})
            continue
        use = min(order, k + 1, steps - k if lower_order_final else order)
        predicted, corrected = _step(grid, k, use, variant, predict)
        rows = predicted.keys() | correction.keys()
        scale = b / a if predict == "x0" else 1.0
        total = {i: predicted.get(i, 0.0) + scale * correction.get(i, 0.0) for i in rows}
        if predict == "x0":
            table.row(a, b, {k: b / a}, total)
        else:
            shares = {i: (w / (b - a), grid[i]) for i, w in total.items() if i != k}
            table.row(a, b, *slope_row(k, a, b, shares))
        correction = {}
        if corrector and k not in disable_corrector:
            correction = {i: w - predicted.get(i, 0.0) for i, w in corrected.items()}
    return table.build(f"unipc-{order}-{variant}{'-noise' if predict == 'noise' else ''}")


def _step(
    grid: list[float], k: int, order: int, variant: str, predict: str
) -> tuple[dict[int, float], dict[int, float]]:
    """Weights of the outputs (or noises) of rows k + 1, k, k - 1, ... that predict and correct the end of step k."""
    a, b = grid[k], grid[k + 1]
    h = step_size(a, b)
    z = -h if predict == "x0" else h
    base = 1 - b / a if predict == "x0" else b - a
    bh = z if variant == "bh1" else math.expm1(z)
    scale = -bh if predict == "x0" else -b * bh
    # Where other outputs lie, in steps from the newest one; the predicted end is at 1.
    places = [-step_size(grid[k - m], a) / h for m in range(1, order)]
    before = [k - m for m in range(1, order)]
    weights = [0.5] if order == 2 else _weights(places, z, bh)
    predicted = _differences(k, before, places, weights, scale, base)
    before, places = [*before, k + 1], [*places, 1.0]
    weights = [0.5] if order == 1 else _weights(places, z, bh)
    return predicted, _differences(k, before, places, weights, scale, base)


def _weights(places: list[float], z: float, bh: float) -> list[float]:
    """The weights of divided differences that integrate monomials up to the number of ``places`` exactly."""
    if not places:
        return []
    r = torch.tensor(places, dtype=torch.float64)
    powers = torch.arange(len(places), dtype=torch.float64)
    moments = [z * phi(n + 1, z) * math.factorial(n) / bh for n in range(1, len(places) + 1)]
    return torch.linalg.solve(r ** powers[:, None], r.new_tensor(moments)).tolist()


def _differences(
    k: int, rows: list[int], places: list[float], weights: list[float], scale: float, base: float
) -> dict[int, float]:
    """``base u_k + scale sum_m weight_m (u_m - u_k) / place_m`` as weights of the u."""
    each = {i: scale * w / r for i, r, w in zip(rows, places, weights, strict=True)}
    return {k: base - sum(each.values()), **each}
