"""Coordinates: increasing functions of the noise level, in which levels are spaced or put between others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.path import Path
from fewstep.errors import InputError, unknown

Coordinate = str | Path
Map = Callable[[Tensor], Tensor]


def coordinate_maps(coordinate: Coordinate) -> tuple[Map, Map]:
    """The map from levels to the coordinate, and its inverse; both take and give float64 tensors of any shape.

    ``"log"`` is log sigma, ``"sigma"`` the level itself, ``"rho7"`` (or another number) sigma^(1/7) as in Karras' grid,
    and a path stands for its native time; ``DDPM(betas)`` is the step index of a discrete model, log sigma linear
    between the indices. Raises InputError for anything else.
    """
    if isinstance(coordinate, Path):
        return coordinate.at, coordinate.sigma
    if coordinate == "log":
        return torch.log, torch.exp
    if coordinate == "sigma":
        return torch.clone, torch.clone
    if isinstance(coordinate, str) and coordinate.startswith("rho"):
        rho = _number(coordinate)
        return lambda s: s ** (1 / rho), lambda w: w**rho
    raise unknown("coordinate", str(coordinate), ("log", "sigma", "rho7", "a path such as fewstep.FLOW"))


def _number(name: str) -> float:
    try:
        rho = float(name.removeprefix("rho"))
    except ValueError:
        rho = 0.0
    if not 0 < rho < float("inf"):
        raise InputError(f"coordinate {name!r}: expected 'rho' and a positive number, such as 'rho7'")
    return rho
