"""The grid that is uniform in the logarithm of the signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.grid.base import warped


def logsnr(steps: int, sigma_min: float, sigma_max: float, *, to_zero: bool = True) -> Tensor:
    """Geometric levels (arXiv 2206.00927): the limit of Karras' grid for rho to infinity.

    Returns (steps + 1,) float64. Raises InputError for bad ranges.
    """
    return warped(steps, sigma_min, sigma_max, torch.log, torch.exp, to_zero)
