"""Grids that are uniform in the native time of a path."""

from __future__ import annotations

import math

from torch import Tensor

from fewstep.core.path import Path, VPPath
from fewstep.errors import InputError
from fewstep.grid.base import check_range, warped


def time(steps: int, sigma_min: float, sigma_max: float, *, path: Path, to_zero: bool = True) -> Tensor:
    """Evenly spaced in the time ``u`` of ``path``, from ``path.at(sigma_max)`` to ``path.at(sigma_min)``.

    This is the grid that samples a model as it was trained. On a ``DDPM`` path the indices are fractional; use
    :func:`~fewstep.grid.discrete.discrete` for whole ones. Returns (steps + 1,) float64.
    Raises InputError for bad ranges or a ``path`` that is none.
    """
    if not isinstance(path, Path):
        raise InputError(f"time needs a path such as fewstep.FLOW or fewstep.VP, got {path!r}")
    return warped(steps, sigma_min, sigma_max, path.at, path.sigma, to_zero)


def vp_time(
    steps: int, sigma_min: float, sigma_max: float, *, rho: float = 1.0, epsilon: float = 1e-3, to_zero: bool = True
) -> Tensor:
    """Evenly spaced in ``t^(1/rho)`` of the linear-beta VP process with sigma(1) the largest, sigma(epsilon) the least.

    The two betas follow from the two levels (arXiv 2011.13456; as used by arXiv 2206.00364, table 1, and 2312.00094).
    Returns (steps + 1,) float64. Raises InputError for bad ranges, rho <= 0 or epsilon outside (0, 1).
    """
    check_range(steps, sigma_min, sigma_max)
    if not rho > 0 or not 0 < epsilon < 1:
        raise InputError(f"vp_time needs rho > 0 and 0 < epsilon < 1, got rho={rho}, epsilon={epsilon}")
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon - high) / (epsilon - 1)
    path = VPPath(beta_d, high - 0.5 * beta_d)
    return warped(steps, sigma_min, sigma_max, lambda s: path.at(s) ** (1 / rho), lambda w: path.sigma(w**rho), to_zero)
