"""A finer grid through the points of a coarse one, as teachers of few-step students use it."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.solver import check_grid
from fewstep.errors import InputError
from fewstep.grid.base import check_falling
from fewstep.grid.coordinate import Coordinate, coordinate_maps


def refine(levels: Tensor, factor: int, *, coordinate: Coordinate = "log") -> Tensor:
    """Puts ``factor - 1`` levels into every interval of a grid, evenly in a coordinate of the noise level.

    Every ``factor``-th level of the result is a level of the grid, bit for bit. A last interval to 0 stays whole, so
    (N + 1,) levels become (factor (N - 1) + 2,) if they end at 0 and (factor N + 1,) if not. ``coordinate`` is "log",
    "sigma", "rho7" (for Karras' grids; any number will do) or a path, whose native time it then is. float64.
    Raises InputError for a grid that does not decrease, factor < 1, an unknown coordinate, or levels too near to each
    other to be divided.
    """
    grid = check_grid(levels)
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise InputError(f"refine needs a whole factor >= 1, got {factor!r}")
    forward, inverse = coordinate_maps(coordinate)
    positive = grid[grid > 0]
    at = forward(positive)[:, None]
    shares = torch.arange(factor, dtype=torch.float64) / factor
    fine = inverse(at[:-1] + shares * (at[1:] - at[:-1]))
    fine[:, 0] = positive[:-1]
    return check_falling(torch.cat([fine.flatten(), grid[len(positive) - 1 :]]), "the refined grid")
