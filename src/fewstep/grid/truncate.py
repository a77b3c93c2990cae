"""The end of a grid, for starting from a picture instead of noise."""

from __future__ import annotations

from torch import Tensor

from fewstep.core.solver import check_grid
from fewstep.errors import InputError


def truncate(levels: Tensor, strength: float) -> Tensor:
    """The last ``int(steps strength)`` steps of a grid of ``steps``, at least one (image to image, arXiv 2108.01073).

    Add noise of the first level kept to a picture and sample from there; ``strength=1`` keeps the whole grid. The
    count is rounded down as in diffusers, which however refuses to run when nothing is left. Returns float64 levels.
    Raises InputError for a grid that does not decrease or a strength outside (0, 1].
    """
    grid = check_grid(levels)
    if not 0 < strength <= 1:
        raise InputError(f"strength is the share of the steps to keep, in (0, 1], got {strength}")
    kept = max(1, int((len(grid) - 1) * strength))
    return grid[-kept - 1 :].clone()
