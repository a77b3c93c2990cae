"""Grids: functions ``(steps, sigma_min, sigma_max, ...) -> (steps + 1,)`` decreasing float64 levels.

They end at 0, with the last positive level at ``sigma_min`` (a single step goes from ``sigma_max`` to 0);
with ``to_zero=False`` they end at ``sigma_min`` itself. ``discrete`` and ``ays`` take their levels, ends included, from
a table, and check it against the range. ``GRIDS`` names those that need no further argument; :func:`refine` and
:func:`truncate` change a grid, and :func:`gits` chooses one from a teacher's trajectories. :func:`own_grid` is even in
the own time of a denoiser.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fewstep.errors import InputError, unknown
from fewstep.grid.ays import ays
from fewstep.grid.beta import beta
from fewstep.grid.cosine import cosine
from fewstep.grid.discrete import discrete, iddpm_levels, sd_levels
from fewstep.grid.dynamic_shift import dynamic_shift
from fewstep.grid.exponential import polyexponential
from fewstep.grid.flow_shift import flow_shift
from fewstep.grid.gits import gits
from fewstep.grid.karras import karras
from fewstep.grid.logsnr import logsnr
from fewstep.grid.own import own_grid, own_levels, own_path, own_shares
from fewstep.grid.refine import refine
from fewstep.grid.time import time, vp_time
from fewstep.grid.truncate import truncate

# Other libraries' name of the geometric grid.
exponential = logsnr

GRIDS: dict[str, Callable[..., Tensor]] = {
    "karras": karras,
    "logsnr": logsnr,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "cosine": cosine,
    "beta": beta,
    "vp_time": vp_time,
    "flow_shift": flow_shift,
    "discrete": discrete,
    "ays": ays,
}


def grid(name: str, steps: int, sigma_min: float, sigma_max: float, **options: Any) -> Tensor:
    """The grid of that name.

    Raises:
        InputError: no such grid, an option it does not have, steps < 1, or not 0 < sigma_min < sigma_max.
    """
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    known = list(inspect.signature(GRIDS[name]).parameters)[3:]
    for option in options:
        if option not in known:
            raise InputError(f"grid {name!r} has no option {option!r}: it has {', '.join(known)}")
    return GRIDS[name](steps, sigma_min, sigma_max, **options)


__all__ = [
    "GRIDS",
    "ays",
    "beta",
    "cosine",
    "discrete",
    "dynamic_shift",
    "exponential",
    "flow_shift",
    "gits",
    "grid",
    "iddpm_levels",
    "karras",
    "logsnr",
    "own_grid",
    "own_levels",
    "own_path",
    "own_shares",
    "polyexponential",
    "refine",
    "sd_levels",
    "time",
    "truncate",
    "vp_time",
]
