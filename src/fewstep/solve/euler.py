"""Euler's method, which is DDIM (arXiv 2010.02502) in these coordinates."""

from __future__ import annotations

import itertools

from torch import Tensor

from fewstep.core.path import EDM, Path
from fewstep.core.solver import solver
from fewstep.core.tableau import Builder, Tableau


@solver
def euler(sigmas: Tensor, *, frame: Path = EDM) -> Tableau:
    """``x_b = D + (b/a) (x - D)``: holds x0 and the noise fixed over a step. One evaluation a step, order 1.

    ``frame`` changes nothing, because a step with both held fixed is the same in every frame.
    Raises InputError for a bad grid.
    """
    table = Builder(float(sigmas[0]))
    grid = sigmas.tolist()
    for k, (a, b) in enumerate(itertools.pairwise(grid)):
        table.row(a, b, {k: b / a}, {k: 1 - b / a})
    return table.build("euler")
