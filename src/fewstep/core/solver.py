"""The table of solvers: functions from a grid to a Tableau, each of which leaves its name and options in the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec

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


def lagrange_integrals(nodes: Tensor, start: float, end: float) -> Tensor:
    """(n,) integrals over [start, end] of the Lagrange polynomials on ``nodes`` (n,), which must differ."""
    n = len(nodes)
    # Shifted and scaled so that the Vandermonde matrix stays well conditioned for geometric grids.
    width = end - start
    z = (nodes - start) / width
    powers = torch.arange(n, dtype=torch.float64)
    moments = 1 / (powers + 1)
    return torch.linalg.solve((z[:, None] ** powers).T, moments) * width


def step_size(a: float, b: float) -> float:
    """``h = ln(a / b)``, infinite when the step ends at 0."""
    return math.log(a / b) if b > 0 else math.inf
