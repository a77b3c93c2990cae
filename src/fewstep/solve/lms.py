"""Linear multistep in sigma: Adams-Bashforth with the exact weights of unequal steps, as k-diffusion's LMS."""

from __future__ import annotations

import itertools

from torch import Tensor

from fewstep.core.solver import lagrange_integrals, slope_row, solver
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError


@solver
def lms(sigmas: Tensor, order: int = 4) -> Tableau:
    """``x_b = x_a + sum_j C_j eps_{k-j}``, where C integrates the Lagrange polynomials in sigma from a to b.

    ``eps = (x - D) / sigma``. Orders 1 to 4, one evaluation a step; the first steps use as many slopes as there are.
    It is the rhoAB of DEIS (arXiv 2204.13902). A step that ends at 0 is not lowered: a polynomial in sigma goes there.
    Raises InputError for an order outside 1..4 or a bad grid.
    """
    if order not in (1, 2, 3, 4):
        raise InputError(f"lms has orders 1, 2, 3 and 4, got {order!r}")
    table = Builder(float(sigmas[0]))
    for k, (a, b) in enumerate(itertools.pairwise(sigmas.tolist())):
        nodes = sigmas[max(0, k + 1 - order) : k + 1].flip(0)
        shares = (lagrange_integrals(nodes, a, b) / (b - a)).tolist()
        others = {k - j: (shares[j], float(nodes[j])) for j in range(1, len(nodes))}
        table.row(a, b, *slope_row(k, a, b, others))
    return table.build(f"lms-{order}")
