"""Heun's method (arXiv 2206.00364, algorithm 1) in the time of any path."""

from __future__ import annotations

import itertools

from torch import Tensor

from fewstep.core.path import EDM, Path
from fewstep.core.solver import solver
from fewstep.core.tableau import Builder, Tableau


@solver
def heun(sigmas: Tensor, *, frame: Path = EDM) -> Tableau:
    """The trapezoidal rule with an Euler predictor, for the ODE of ``x_u = a x`` in the time ``u`` of ``frame``.

    Two evaluations a step, one for a step that ends at 0; order 2. The frame matters: Heun in flow time is not Heun
    in sigma, and on few steps of a flow model it is far better. Raises InputError for a bad grid.
    """
    table = Builder(float(sigmas[0]))
    grid = sigmas.tolist()
    for s, t in itertools.pairwise(grid):
        i = table.k
        if t == 0:
            table.row(s, 0.0, {}, {i: 1.0})
            continue
        u, w = float(frame.at(s)), float(frame.at(t))
        here, there = (tuple(float(c) for c in frame.coeffs(v)) for v in (u, w))
        # dx_u/du = da D + db (x - D)/sigma, written with the unscaled x.
        slope_x, slope_d = here[3] / s, here[2] - here[3] / s
        x, d = (here[0] + (w - u) * slope_x) / there[0], (w - u) * slope_d / there[0]
        table.row(s, t, {i: x}, {i: d})
        half = 0.5 * (w - u) / there[0]
        end_x, end_d = there[3] / t, there[2] - there[3] / t
        points = {i: here[0] / there[0] + half * slope_x, i + 1: half * end_x}
        table.row(t, t, points, {i: half * slope_d, i + 1: half * end_d})
    return table.build("heun")
