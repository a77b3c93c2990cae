"""The grid of Karras et al."""

from __future__ import annotations

from torch import Tensor

from fewstep.errors import InputError
from fewstep.grid.base import warped


def karras(steps: int, sigma_min: float, sigma_max: float, *, rho: float = 7.0, to_zero: bool = True) -> Tensor:
    """Evenly spaced in ``sigma^(1/rho)`` (arXiv 2206.00364, eq. 5); a larger ``rho`` spends more steps at low noise.

    Returns (steps + 1,) float64. Raises InputError for bad ranges or rho <= 0.
    """
    if not rho > 0:
        raise InputError(f"karras needs rho > 0, got {rho}")
    return warped(steps, sigma_min, sigma_max, lambda s: s ** (1 / rho), lambda w: w**rho, to_zero)
