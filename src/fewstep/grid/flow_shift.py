"""The shifted uniform grid of flow models."""

from __future__ import annotations

from torch import Tensor

from fewstep.core.path import FlowPath
from fewstep.errors import InputError
from fewstep.grid.base import warped


def flow_shift(steps: int, sigma_min: float, sigma_max: float, *, shift: float = 3.0, to_zero: bool = True) -> Tensor:
    """Evenly spaced in unshifted flow time, then ``t' = shift t / (1 + (shift - 1) t)`` (arXiv 2403.03206, eq. 23).

    ``shift=1`` is uniform flow time; more spends steps at high noise. Returns (steps + 1,) float64 noise levels
    ``sigma = t' / (1 - t')``. Raises InputError for bad ranges or shift <= 0.
    """
    if not shift > 0:
        raise InputError(f"flow_shift needs shift > 0, got {shift}")
    path = FlowPath(shift)
    return warped(steps, sigma_min, sigma_max, path.at, path.sigma, to_zero)
