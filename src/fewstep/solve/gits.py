"""GITS: the levels between which the teacher's trajectories bend least, for a fixed solver (arXiv 2405.11326)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.solver import build
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.gits import METRICS, jump_costs, shortest_path
from fewstep.grid.karras import karras
from fewstep.solve.teacher import Fitted, Task

COEFFICIENTS = (0.8, 0.9, 1.0, 1.1, 1.15, 1.2)


@torch.no_grad()
def gits(
    task: Task,
    *,
    solver: str = "ipndm",
    order: int | None = None,
    coefficient: float | Literal["auto"] = "auto",
    metric: str = "auto",
) -> Fitted:
    """The named solver on the grid that dynamic programming chooses among the teacher's levels.

    The cost of an edge is the harm of one Euler jump from the teacher's own state, see
    :func:`fewstep.grid.gits.jump_costs` for ``metric``; a later edge counts ``coefficient`` times as much per step.
    The paper takes "dev" and 1.15. "auto" tries the metrics "dev" and "l2", and the coefficients 0.8 to 1.2, and keeps
    the grid with the least error on ``task.choose``. ``order`` is passed to a solver that has one. No network is
    trained and nothing but the levels changes. It starts from the same solver on Karras' grid with rho 7. The result
    ends at level 0.

    Raises:
        InputError: a given grid (the method is a choice of grid), an unknown solver or metric, coefficient <= 0, or
            fewer evaluations than one step of the solver needs.
    """
    if task.grid is not None:
        raise InputError("gits chooses the levels itself: pass nfe instead of a grid, or take another method")
    if metric not in (*METRICS, "auto"):
        raise unknown("metric", metric, (*METRICS, "auto"))
    if coefficient != "auto" and not 0 < float(coefficient) < math.inf:
        raise InputError(f"gits needs coefficient 'auto' or 0 < coefficient < inf, got {coefficient!r}")
    options: dict[str, Any] = {} if order is None else {"order": order}
    start = _start(task, solver, options)
    steps = len(start.levels.unique()) - 1
    teacher, held = task.fit, task.choose
    if steps > len(teacher.levels):
        raise InputError(f"{steps} steps cannot be chosen from a teacher of {len(teacher.levels)} levels")
    tried: dict[str, float] = {}
    found: list[tuple[float, str, float, Tableau]] = []
    for kind in ("dev", "l2") if metric == "auto" else (metric,):
        if found and not task.clock.allows():
            break
        cost = jump_costs(teacher.points, teacher.outputs, teacher.levels, metric=kind)
        for value in COEFFICIENTS if coefficient == "auto" else (float(coefficient),):
            table = build(solver, _levels(teacher.levels, cost, steps, value), **options)
            task.say(f"{kind}, coefficient {value:g}")
            error = tried[f"{kind} {value:g}"] = held.error(task.D, table, task.batch)
            found.append((error, kind, value, table))
            if not task.clock.allows():
                break
    _, kind, value, best = min(found, key=lambda entry: entry[0])
    facts = {"coefficient": value, "metric": kind, "levels": best.levels.unique().flip(0).tolist()}
    return Fitted(best, start, {**facts, "choose_rmse": tried})


def _start(task: Task, solver: str, options: dict[str, Any]) -> Tableau:
    """The solver on Karras' grid with as many steps as the evaluations allow."""
    for steps in range(task.nfe, 0, -1):
        table = build(solver, karras(steps, task.D.sigma_min, float(task.teacher.levels[0])), **options)
        if table.nfe <= task.nfe:
            return table
    raise InputError(f"one step of {solver!r} takes more than nfe={task.nfe} evaluations: allow more")


def _levels(levels: Tensor, cost: Tensor, steps: int, coefficient: float) -> Tensor:
    """(steps + 1,) the chosen levels and 0, whose step is the denoiser's last output."""
    index = shortest_path(cost, steps - 1, coefficient) if steps > 1 else [0]
    return torch.cat([levels[index], levels.new_zeros(1)])
