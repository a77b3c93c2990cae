"""Choosing a grid by dynamic programming over teacher trajectories (GITS, arXiv 2405.11326)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.errors import InputError


def jump_costs(points: Tensor, outputs: Tensor, levels: Tensor) -> Tensor:
    """(M, M) mean distance to the teacher after one Euler jump from its own state at level i to level j > i.

    ``points`` and ``outputs`` are (M, n, ...): the teacher's states and denoiser outputs at ``levels`` (M,). Entries
    with j <= i are infinite. Distances come from one Gram matrix per trajectory, so the memory is n M^2 numbers.
    """
    count = len(levels)
    stack = torch.cat([points, outputs]).flatten(2).transpose(0, 1)
    gram = torch.zeros(stack.shape[0], 2 * count, 2 * count, dtype=torch.float64, device=stack.device)
    for i, rows in enumerate(stack):
        wide = rows.double()
        gram[i] = wide @ wide.T
    xx, xd, dd = gram[:, :count, :count], gram[:, :count, count:], gram[:, count:, count:]
    lev = levels.to(gram.device)
    keep = (lev[None, :] / lev[:, None]).clamp(max=1.0)
    move = 1 - keep
    # |keep x_i + move D_i - x_j|^2 with i along rows and j along columns.
    own_xx, own_xd, own_dd = (g.diagonal(dim1=1, dim2=2)[:, :, None] for g in (xx, xd, dd))
    square = keep**2 * own_xx + 2 * keep * move * own_xd + move**2 * own_dd
    square = square + own_xx.transpose(1, 2) - 2 * keep * xx - 2 * move * xd.transpose(1, 2)
    cost = square.clamp_min(0).sqrt().mean(0).cpu()
    return cost.masked_fill(torch.ones(count, count).tril().bool(), math.inf)


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
