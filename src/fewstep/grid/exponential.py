"""The geometric grid with its exponents bent (k-diffusion's polyexponential)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.grid.base import check_range, warped


def polyexponential(
    steps: int, sigma_min: float, sigma_max: float, *, rho: float = 1.0, to_zero: bool = True
) -> Tensor:
    """``log sigma = log sigma_min + r^rho log(sigma_max / sigma_min)`` for r evenly from 1 to 0.

    The grid of that name in k-diffusion. ``rho=1`` is :func:`~fewstep.grid.logsnr.logsnr`, which is known as the
    exponential grid too; a larger ``rho`` spends more steps at low noise.
    Returns (steps + 1,) float64. Raises InputError for bad ranges or rho outside (0, inf).
    """
    check_range(steps, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise InputError(f"polyexponential needs 0 < rho < inf, got {rho}")
    low, width = math.log(sigma_min), math.log(sigma_max / sigma_min)

    def forward(s: Tensor) -> Tensor:
        # Rounding could leave the lower end a hair below 0, whose root is nan.
        return ((torch.log(s) - low) / width).clamp_min(0) ** (1 / rho)

    return warped(steps, sigma_min, sigma_max, forward, lambda r: (low + r**rho * width).exp(), to_zero)
