"""What every grid does: check its arguments, space points evenly in some coordinate, pin the ends, append 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.errors import InputError


def check_range(steps: int, sigma_min: float, sigma_max: float) -> None:
    """Raises InputError unless steps is a whole number >= 1 and 0 < sigma_min < sigma_max < inf."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"a grid needs at least 1 step, got {steps!r}: pass a whole number such as 5")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise InputError(f"a grid needs 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}")


def check_falling(levels: Tensor, what: str) -> Tensor:
    """The levels themselves. Raises InputError if two neighbours coincide in float64, as extreme options can make."""
    flat = (~(levels.diff() < 0)).nonzero()
    if len(flat):
        i = int(flat[0])
        raise InputError(
            f"{what} has level {i} at {levels[i]:g} and level {i + 1} at {levels[i + 1]:g}, which must be lower: "
            "take fewer steps or milder options"
        )
    return levels


def warped(
    steps: int,
    sigma_min: float,
    sigma_max: float,
    forward: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    to_zero: bool,
) -> Tensor:
    """(steps + 1,) levels evenly spaced in ``forward(sigma)``, the ends exact; refining keeps the points.

    Raises InputError for bad ranges, and where rounding makes two levels equal.
    """
    check_range(steps, sigma_min, sigma_max)
    count = steps if to_zero else steps + 1
    ends = forward(torch.tensor([sigma_max, sigma_min], dtype=torch.float64))
    levels = inverse(ends[0] + torch.linspace(0, 1, count, dtype=torch.float64) * (ends[1] - ends[0]))
    levels[0] = sigma_max
    if count > 1:
        levels[-1] = sigma_min
    return check_falling(torch.cat([levels, levels.new_zeros(1)]) if to_zero else levels, "the grid")
