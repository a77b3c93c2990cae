"""Choosing a grid by dynamic programming over teacher trajectories (GITS, arXiv 2405.11326)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.solver import check_grid
from fewstep.errors import InputError, unknown


def gits(
    points: Tensor,
    outputs: Tensor,
    levels: Tensor,
    steps: int,
    *,
    coefficient: float = 1.15,
    metric: str = "dev",
    to_zero: bool = True,
) -> Tensor:
    """The (steps + 1,) levels of a teacher's trajectories between which Euler does least harm.

    ``points`` and ``outputs`` are (M, n, ...): the teacher's states and denoiser outputs at ``levels`` (M,). The paper
    follows 256 trajectories with iPNDM on 60 steps of Karras' grid. The first and last level are always kept. If the
    last is positive, 0 is appended to it; if it is 0, the last positive level is chosen too. ``to_zero=False`` ends at
    the last level, which must then be positive. ``metric`` is that of :func:`jump_costs`, ``coefficient`` that of
    :func:`shortest_path`; the paper tries 0.8 to 1.2.

    Raises InputError for shapes that do not agree, levels that do not decrease, an unknown metric, coefficient <= 0,
    more steps than the levels allow, or ``to_zero=False`` with a trajectory to 0.
    """
    grid = check_grid(levels)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"a grid needs at least 1 step, got {steps!r}: pass a whole number such as 5")
    if not 0 < coefficient < math.inf:
        raise InputError(f"gits needs 0 < coefficient < inf, got {coefficient}")
    if grid[-1] == 0 and not to_zero:
        raise InputError("to_zero=False, but the trajectory ends at level 0: leave out its last point")
    append = to_zero and bool(grid[-1] > 0)
    jumps = steps - 1 if append else steps
    if jumps > len(grid) - 1:
        raise InputError(f"{steps} steps cannot be chosen from a trajectory of {len(grid)} levels: record a finer one")
    cost = jump_costs(points, outputs, grid, metric=metric)
    chosen = grid[shortest_path(cost, jumps, coefficient)] if jumps else grid[:1]
    return torch.cat([chosen, chosen.new_zeros(1)]) if append else chosen


def jump_costs(points: Tensor, outputs: Tensor, levels: Tensor, *, metric: str = "l2") -> Tensor:
    """(M, M) mean distance to the teacher after one Euler jump from its own state at level i to level j > i.

    ``points`` and ``outputs`` are (M, n, ...): the teacher's states and denoiser outputs at ``levels`` (M,). Entries
    with j <= i are infinite. The distances, means over the n trajectories, are

    * "l2": the Euclidean distance to the teacher's state. It comes from one Gram matrix per trajectory, so the memory
      is n M^2 numbers;
    * "l1": the sum of absolute differences, which takes M^2 / 2 passes over the states;
    * "dev": the deviation of the jump's end less that of the teacher's state, each the distance to the straight line
      through the trajectory's two ends. It is the paper's choice, may be negative, and takes M passes.

    Raises InputError for shapes that do not agree or an unknown metric.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if points.shape != outputs.shape or points.ndim < 3 or len(points) != len(levels) or len(levels) < 2:
        raise InputError(
            "points and outputs must be (M, n, ...) at M >= 2 levels, got "
            f"{tuple(points.shape)} and {tuple(outputs.shape)} at {len(levels)}"
        )
    lev = levels.to(points.device)
    keep = (lev[None, :] / lev[:, None]).clamp(max=1.0)
    cost = METRICS[metric](points, outputs, keep).cpu()
    count = len(levels)
    return cost.masked_fill(torch.ones(count, count).tril().bool(), math.inf)


def _euclidean(points: Tensor, outputs: Tensor, keep: Tensor) -> Tensor:
    """(M, M) mean of ``|keep x_i + (1 - keep) D_i - x_j|``, i along rows and j along columns."""
    count = len(keep)
    stack = torch.cat([points, outputs]).flatten(2).transpose(0, 1)
    gram = torch.zeros(stack.shape[0], 2 * count, 2 * count, dtype=torch.float64, device=stack.device)
    for i, rows in enumerate(stack):
        wide = rows.double()
        gram[i] = wide @ wide.T
    xx, xd, dd = gram[:, :count, :count], gram[:, :count, count:], gram[:, count:, count:]
    move = 1 - keep
    own_xx, own_xd, own_dd = (g.diagonal(dim1=1, dim2=2)[:, :, None] for g in (xx, xd, dd))
    square = keep**2 * own_xx + 2 * keep * move * own_xd + move**2 * own_dd
    square = square + own_xx.transpose(1, 2) - 2 * keep * xx - 2 * move * xd.transpose(1, 2)
    return square.clamp_min(0).sqrt().mean(0)


def _absolute(points: Tensor, outputs: Tensor, keep: Tensor) -> Tensor:
    """As :func:`_euclidean`, with the sum of absolute differences."""
    cost = torch.zeros_like(keep, dtype=torch.float64)
    for i in range(len(keep)):
        x, d = points[i].flatten(1).double(), outputs[i].flatten(1).double()
        for j in range(i + 1, len(keep)):
            end = torch.lerp(d, x, keep[i, j].double())
            cost[i, j] = (end - points[j].flatten(1)).abs().sum(1).mean()
    return cost


def _deviation(points: Tensor, outputs: Tensor, keep: Tensor) -> Tensor:
    """(M, M) mean of how much further from the chord the jump ends than the teacher's state does."""
    xx, xd, dd = (torch.zeros(points.shape[:2], dtype=torch.float64, device=points.device) for _ in range(3))
    end = points[-1].flatten(1).double()
    chord = points[0].flatten(1).double() - end
    chord = chord / chord.norm(dim=1, keepdim=True).clamp_min(1e-300)

    def across(x: Tensor) -> Tensor:
        """What is left of ``x - end`` beside the chord; the jump is linear, so it may be taken before it."""
        away = x.flatten(1).double() - end
        return away - (away * chord).sum(1, keepdim=True) * chord

    for i in range(len(keep)):
        x, d = across(points[i]), across(outputs[i])
        xx[i], xd[i], dd[i] = (x * x).sum(1), (x * d).sum(1), (d * d).sum(1)
    k = keep[:, :, None]
    square = k**2 * xx[:, None] + 2 * k * (1 - k) * xd[:, None] + (1 - k) ** 2 * dd[:, None]
    return (square.clamp_min(0).sqrt() - xx.sqrt()[None]).mean(2)


METRICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l2": _euclidean,
    "l1": _absolute,
    "dev": _deviation,
}


def shortest_path(cost: Tensor, steps: int, coefficient: float = 1.0) -> list[int]:
    """The ``steps + 1`` indices from the first to the last level with the least total ``cost``.

    A later edge counts ``coefficient`` times as much per step after it; above 1 favours fewer errors late.
    Raises InputError if there are fewer levels than asked for.
    """
    count = len(cost)
    if not 1 <= steps <= count - 1:
        raise InputError(f"{steps} steps cannot be chosen from {count} levels: steps must be in 1..{count - 1}")
    value = torch.full((count,), math.inf, dtype=torch.float64)
    value[-1] = 0
    choices = []
    for _ in range(steps):
        value, choice = (cost + coefficient * value).min(1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return path
