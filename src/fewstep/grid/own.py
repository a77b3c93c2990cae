"""Levels that are even in a denoiser's own time, for methods and guidance that speak of shares of it.

A share is 0 at the denoiser's lowest level and 1 at its highest, and even in the native time of the path of the network
under all wrappers. Where that time is the noise level itself (EDM's path), or there is no path, it is
``arctan(sigma / sigma_data)`` instead: shares of the noise level would put nearly all levels where there is nothing but
noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.core.denoiser import Denoiser, Wrapper
from fewstep.core.path import HIGHEST_PICTURED, TRIG, EDMPath, Path
from fewstep.errors import InputError
from fewstep.grid.base import check_falling
from fewstep.grid.coordinate import Coordinate, coordinate_maps


def own_path(D: Any) -> Path:
    """The path in whose time a denoiser's levels are even: see the head of this file."""
    inner: Any = D.inner if isinstance(D, Wrapper) else D
    path = getattr(inner, "path", None)
    return path if isinstance(path, Path) and not isinstance(path, EDMPath) else TRIG(D.sigma_data)


def own_levels(D: Denoiser, shares: Tensor, sigma_max: float | None = None) -> Tensor:
    """The levels at shares of the denoiser's own time, float64, of the shape and device of ``shares``.

    ``shares`` lie within [0, 1]; 0 is exactly the lowest level, and 1 the highest, or ``sigma_max`` if that is given.

    Raises:
        InputError: ``sigma_max`` is outside of the denoiser's levels, or what :func:`informed_at` refuses.
    """
    low, top = D.sigma_min, D.sigma_max if sigma_max is None else sigma_max
    if not low < top <= D.sigma_max:
        raise InputError(
            f"sigma_max={top:g} is outside of the teacher's levels, {low:g} to {D.sigma_max:g}: leave it out"
        )
    informed_at(D, top)
    return between(shares, low, top, own_path(D))


def own_shares(D: Denoiser, sigma: Tensor | float) -> Tensor:
    """The inverse of :func:`own_levels`: the shares (float64, within [0, 1]) of the levels ``sigma``, of any shape."""
    path, level = own_path(D), torch.as_tensor(sigma, dtype=torch.float64)
    first, last = path.at(torch.tensor([D.sigma_min, D.sigma_max], dtype=torch.float64)).tolist()
    share = (path.at(level.clamp(D.sigma_min, D.sigma_max)) - first) / (last - first)
    return share.clamp(0, 1).masked_fill(level <= D.sigma_min, 0.0).masked_fill(level >= D.sigma_max, 1.0)


def own_grid(D: Denoiser, steps: int) -> Tensor:
    """(steps + 1,) float64 falling levels even in the denoiser's own time, from its highest; the last counts as 0.

    Raises:
        InputError: two of them coincide, or what :func:`own_levels` refuses.
    """
    levels = own_levels(D, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    levels[-1] = 0.0
    return check_falling(levels, f"the grid of {steps} steps")


def between(shares: Tensor, low: float, top: float, coordinate: Coordinate) -> Tensor:
    """The levels at ``shares`` of the way from ``low`` to ``top`` in a coordinate, float64; 0 and 1 are the very ends.

    Raises:
        InputError: an unknown coordinate, see :func:`fewstep.grid.coordinate.coordinate_maps`.
    """
    forward, inverse = coordinate_maps(coordinate)
    # On the host, and used as numbers: nothing is copied to the device of the shares.
    first, last = forward(torch.tensor([low, top], dtype=torch.float64)).tolist()
    sigma = inverse(first + (last - first) * shares.double().clamp(0, 1)).clamp(low, top)
    return sigma.masked_fill(shares >= 1, top).masked_fill(shares <= 0, low)


def informed_at(D: Denoiser, top: float) -> None:
    """Raises InputError for pure noise of level ``top`` and a network that predicts noise, which there says nothing."""
    inner: Any = D.inner if isinstance(D, Wrapper) else D
    if top > HIGHEST_PICTURED and getattr(inner, "predicts", None) == "noise":
        raise InputError(
            f"a network that predicts noise says nothing of x0 at sigma {top:g}, pure noise: set sigma_max, of the "
            "method or of the teacher, such as 80, or use a teacher that predicts x0, v or velocity"
        )


def picked(k: Tensor, values: Sequence[float]) -> Tensor:
    """``values[k]``, float64, of the shape and device of ``k``, without copying the few numbers to that device."""
    made = torch.full(k.shape, values[0], dtype=torch.float64, device=k.device)
    for at, value in enumerate(values[1:], 1):
        made = made.masked_fill(k == at, value)
    return made
