"""The cosine grid, uniform in the angle whose tangent is the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.grid.base import warped


def cosine(steps: int, sigma_min: float, sigma_max: float, *, scale: float = 1.0, to_zero: bool = True) -> Tensor:
    """Evenly spaced in ``arctan(sigma / scale)``: the cosine log-SNR clipped at both ends (arXiv 2202.00512, appendix).

    There the log-SNR is -2 log tan(a u + b), with a and b such that its ends are given; here the ends are the two
    levels. arXiv 2404.14507 derives the same grid for Gaussian data of standard deviation ``scale``. ``scale`` is also
    the sigma_data of TrigFlow (arXiv 2410.11081) and, as side / 64, the shift of simple diffusion (arXiv 2301.11093).
    Returns (steps + 1,) float64. Raises InputError for bad ranges or scale outside (0, inf).
    """
    if not 0 < scale < math.inf:
        raise InputError(f"cosine needs 0 < scale < inf, got {scale}")
    return warped(steps, sigma_min, sigma_max, lambda s: torch.atan(s / scale), lambda u: scale * torch.tan(u), to_zero)
