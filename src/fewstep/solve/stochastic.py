"""Ancestral samplers: an ODE step to a lower level than wanted, then fresh noise up to it.

The split of a step is DDIM's with ``eta`` (arXiv 2010.02502), as k-diffusion uses it: see
:func:`fewstep.solve.euler.ancestral_split`. ``eta=0`` leaves the ODE solver; ``s_noise`` multiplies the noise.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from fewstep.core.solver import solver
from fewstep.core.tableau import Builder, Tableau
from fewstep.solve.euler import ancestral_split, check_stochastic, euler_rows


@solver
def euler_ancestral(sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0) -> Tableau:
    """Euler's step to the lower level, then noise: :func:`fewstep.solve.euler.ddim` with a factor on the noise.

    ``eta=1`` is ancestral sampling of DDPM (arXiv 2006.11239). One evaluation a step, order 1 without noise.
    Raises InputError for ``eta < 0``, ``s_noise <= 0`` or a bad grid.
    """
    check_stochastic(eta, s_noise)
    return euler_rows(sigmas, eta, s_noise).build("euler-ancestral")


@solver
def dpm2_ancestral(sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0) -> Tableau:
    """DPM-Solver-2 (arXiv 2206.00927) to the lower level, by a middle level halfway in log sigma, then noise.

    Two evaluations a step, one for a step that ends at 0 or where all of the level is fresh noise; order 2 without
    noise. From pure noise the second output's weight is about ``a / sqrt(a down)``: this method, which holds the noise
    prediction rather than x0, wants a start at the scale of the data's own range, such as 80.
    Raises InputError for ``eta < 0``, ``s_noise <= 0`` or a bad grid.
    """
    check_stochastic(eta, s_noise)
    table = Builder(float(sigmas[0]))
    for a, b in itertools.pairwise(sigmas.tolist()):
        down, up = ancestral_split(a, b, eta)
        i = table.k
        if down == 0:
            table.row(a, b, {}, {i: 1.0}, {i: s_noise * up})
            continue
        m = math.sqrt(a) * math.sqrt(down)
        table.row(a, m, {i: m / a}, {i: 1 - m / a})
        # x + (down - a) (y - D(y)) / m with the middle point y written out: the large weights of x would cancel.
        pull = (a - down) / m
        table.row(m, b, {i: down / a}, {i: -pull * (1 - m / a), i + 1: pull}, {i + 1: s_noise * up})
    return table.build("dpm2-ancestral")


@solver
def dpmpp2s_ancestral(sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0) -> Tableau:
    """DPM-Solver++(2S) (arXiv 2211.01095) to the lower level, by a middle level halfway in log sigma, then noise.

    Two evaluations a step, one for a step that ends at 0 or where all of the level is fresh noise; order 2 without
    noise. Raises InputError for ``eta < 0``, ``s_noise <= 0`` or a bad grid.
    """
    check_stochastic(eta, s_noise)
    table = Builder(float(sigmas[0]))
    for a, b in itertools.pairwise(sigmas.tolist()):
        down, up = ancestral_split(a, b, eta)
        i = table.k
        if down == 0:
            table.row(a, b, {}, {i: 1.0}, {i: s_noise * up})
            continue
        m = math.sqrt(a) * math.sqrt(down)
        table.row(a, m, {i: m / a}, {i: 1 - m / a})
        table.row(m, b, {i: down / a}, {i + 1: 1 - down / a}, {i + 1: s_noise * up})
    return table.build("dpmpp2s-ancestral")
