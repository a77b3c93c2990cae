"""Heun's method (arXiv 2206.00364): algorithm 1 in the time of any path, and algorithm 2 with fresh noise."""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from fewstep.core.path import EDM, Path
from fewstep.core.solver import solver
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError


@solver
def heun(sigmas: Tensor, *, frame: Path = EDM) -> Tableau:
    """The trapezoidal rule with an Euler predictor, for the ODE of ``x_u = a x`` in the time ``u`` of ``frame``.

    Two evaluations a step, one for a step that ends at 0; order 2. The frame matters: Heun in flow time is not Heun
    in sigma, and on few steps of a flow model it is far better. Raises InputError for a bad grid.
    """
    table = Builder(float(sigmas[0]))
    for s, t in itertools.pairwise(sigmas.tolist()):
        _heun_step(table, s, t, frame)
    return table.build("heun")


@solver
def edm_stochastic(
    sigmas: Tensor, *, churn: float = 40.0, s_min: float = 0.05, s_max: float = 50.0, s_noise: float = 1.003
) -> Tableau:
    """EDM's stochastic sampler (arXiv 2206.00364, algorithm 2): a little noise is added before each Heun step.

    A level ``s`` in ``[s_min, s_max]`` is first raised to ``(1 + gamma) s`` with
    ``gamma = min(churn / steps, sqrt(2) - 1)`` by noise whose scale is multiplied by ``s_noise``; Heun's step in sigma
    then starts from there. The raise is a row of its own that calls nothing. ``s_noise`` above 1 makes up for the noise
    that a trained denoiser removes too much of; only at 1 is the noise level what the denoiser is told. The defaults
    are the paper's for ImageNet-64. Evaluations are those of :func:`heun`, which ``churn=0`` is.

    Raises:
        InputError: ``churn < 0``, not ``0 <= s_min <= s_max``, ``s_noise <= 0``, or a bad grid.
    """
    if not 0 <= churn < math.inf:
        raise InputError(f"edm_stochastic needs a finite churn >= 0, got {churn!r}: 0 is Heun's method without noise")
    if not 0 <= s_min <= s_max:
        raise InputError(f"edm_stochastic needs 0 <= s_min <= s_max, got s_min={s_min!r} and s_max={s_max!r}")
    if not 0 < s_noise < math.inf:
        raise InputError(f"edm_stochastic needs a finite s_noise > 0, got {s_noise!r}: churn=0 is without noise")
    table = Builder(float(sigmas[0]))
    most = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for s, t in itertools.pairwise(sigmas.tolist()):
        gamma = most if s_min <= s <= s_max else 0.0
        if gamma > 0:
            i, added = table.k, s * math.sqrt(gamma * (2 + gamma))
            table.row(None, s * (1 + gamma), {i: 1.0}, {}, {i: s_noise * added})
        _heun_step(table, s * (1 + gamma), t, EDM)
    return table.build("edm-stochastic")


def _heun_step(table: Builder, s: float, t: float, frame: Path) -> None:
    """Adds the two rows of a step from ``s`` to ``t``, or the one that ends at 0."""
    i = table.k
    if t == 0:
        table.row(s, 0.0, {}, {i: 1.0})
        return
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
