"""The table of solvers: functions from a grid to a Tableau, each of which leaves its name and options in the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor

from fewstep.core.path import Path, path_config, path_from_config
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown

Options = ParamSpec("Options")
SOLVERS: dict[str, Callable[..., Tableau]] = {}


def check_grid(sigmas: Tensor) -> Tensor:
    """The grid as (N+1,) float64 on the CPU.

    Raises:
        InputError: not one-dimensional with at least two levels, non-finite, not strictly decreasing, or negative.
    """
    grid = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    if grid.ndim != 1 or len(grid) < 2:
        raise InputError(f"a grid is a list of at least two levels, got shape {tuple(grid.shape)}")
    if not grid.isfinite().all():
        raise InputError(f"a grid must be finite (write pure noise of a flow as 1e8), got {grid.tolist()}")
    rising = (grid.diff() >= 0).nonzero()
    if len(rising):
        i = int(rising[0])
        raise InputError(f"a grid must decrease: level {i} is {grid[i]:g} and level {i + 1} is {grid[i + 1]:g}")
    if grid[-1] < 0:
        raise InputError(f"a grid must end at 0 or above, got {grid[-1]:g}")
    return grid


def solver(
    build: Callable[Concatenate[Tensor, Options], Tableau],
) -> Callable[Concatenate[Tensor, Options], Tableau]:
    """Decorator: checks the grid, records name and options in the table's meta, and adds the function to SOLVERS."""

    @wraps(build)
    def make(sigmas: Tensor, *args: Options.args, **options: Options.kwargs) -> Tableau:
        made = build(check_grid(sigmas), *args, **options)
        names = list(build.__annotations__)[1:]
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **options}
        stored = {k: path_config(v) if isinstance(v, Path) else v for k, v in given.items()}
        return replace(made, meta={**made.meta, "solver": build.__name__, "options": stored})

    SOLVERS[build.__name__] = make
    return make


def build(name: str, sigmas: Tensor, **options: Any) -> Tableau:
    """The table of the named solver on a grid; a path among the options may be its description.

    Raises:
        InputError: no such solver, an option it does not have, or a bad grid.
    """
    if name not in SOLVERS:
        raise unknown("solver", name, SOLVERS)
    ready = {k: path_from_config(v) if isinstance(v, dict) else v for k, v in options.items()}
    try:
        return SOLVERS[name](sigmas, **ready)
    except TypeError as error:
        raise InputError(f"solver {name!r} cannot take the options {sorted(options)}: {error}") from None


def slope_row(
    k: int, a: float, b: float, shares: Mapping[int, tuple[float, float]], own: float | None = None
) -> tuple[dict[int, float], dict[int, float]]:
    """Weights of points and of outputs of the step ``x_b = x_a + (b - a) sum_i share_i eps_i`` in the noise form.

    ``eps_i = (x_i - D_i) / sigma_i`` is the slope that row i saw. Row ``k`` stands at the level ``a``; ``shares`` maps
    each other row to ``(share_i, sigma_i)``. The share of row k is what is left of 1, as in every consistent method,
    unless it is given.
    """
    rest = sum(share for share, _ in shares.values()) if own is None else 1 - own
    # b/a and not 1 + (b - a)/a, which would lose the digits of b when a is pure noise.
    keep = b / a
    points, outputs = {k: keep + (1 - keep) * rest}, {k: (1 - keep) * (1 - rest)}
    for i, (share, sigma) in shares.items():
        points[i] = (b - a) * share / sigma
        outputs[i] = -points[i]
    return points, outputs


def lagrange_basis(nodes: Tensor, at: Tensor) -> Tensor:
    """(n, m) values at ``at`` (m,) of the n Lagrange polynomials on ``nodes`` (n,), which must differ."""
    rows = []
    for j, node in enumerate(nodes):
        others = torch.cat([nodes[:j], nodes[j + 1 :]])
        rows.append(((at[:, None] - others) / (node - others)).prod(1))
    return torch.stack(rows)


def lagrange_integrals(nodes: Tensor, start: float, end: float) -> Tensor:
    """(n,) integrals over [start, end] of the Lagrange polynomials on ``nodes`` (n,), which must differ."""
    # Gauss' rule is exact here, and products of differences keep their digits on geometric grids; powers do not.
    at, weights = _gauss(len(nodes))
    return lagrange_basis(nodes, start + (end - start) * at) @ weights * (end - start)


def quadrature(start: float, end: float) -> tuple[Tensor, Tensor]:
    """(m,) places and weights that integrate over [start, end], in log sigma, to rounding.

    Gauss' rule of 16 points on panels no longer than 1. The functions of solvers have their singularities pi/2 or more
    off the real line (``log(1 + sigma^2)``, ``atan(sigma)``), so that the rule's error is below 1e-20 of them.
    """
    at, weights = _gauss(16)
    edges = torch.linspace(start, end, 1 + max(1, math.ceil(abs(end - start))), dtype=torch.float64)
    width = edges.diff()[:, None]
    return (edges[:-1, None] + width * at).flatten(), (width * weights).flatten()


@cache
def _gauss(n: int) -> tuple[Tensor, Tensor]:
    """(n,) places and weights of Gauss' rule on [0, 1]."""
    at, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy(0.5 + 0.5 * at), torch.from_numpy(0.5 * weights)


def phi(k: int, z: float) -> float:
    """The k-th function of exponential integrators, ``phi_0 = e^z`` and ``phi_k = (phi_{k-1} - 1/(k-1)!) / z``."""
    if abs(z) < 1:
        return sum(z**n / math.factorial(n + k) for n in range(20))
    value = math.exp(z) if k == 0 else math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def step_size(a: float, b: float) -> float:
    """``h = ln(a / b)``, infinite when the step ends at 0."""
    return math.log(a / b) if b > 0 else math.inf
