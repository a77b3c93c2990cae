"""Grids: functions ``(steps, sigma_min, sigma_max, ...) -> (steps + 1,)`` decreasing float64 levels.

They end at 0, with the last positive level at ``sigma_min`` (a single step goes from ``sigma_max`` to 0);
with ``to_zero=False`` they end at ``sigma_min`` itself.
"""

from collections.abc import Callable

from torch import Tensor

from fewstep.errors import unknown
from fewstep.grid.flow_shift import flow_shift
from fewstep.grid.karras import karras
from fewstep.grid.logsnr import logsnr
from fewstep.grid.time import vp_time

GRIDS: dict[str, Callable[..., Tensor]] = {
    "karras": karras,
    "logsnr": logsnr,
    "vp_time": vp_time,
    "flow_shift": flow_shift,
}


def grid(name: str, steps: int, sigma_min: float, sigma_max: float, **options: float) -> Tensor:
    """The grid of that name.

    Raises:
        InputError: no such grid, steps < 1, or not 0 < sigma_min < sigma_max.
    """
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    return GRIDS[name](steps, sigma_min, sigma_max, **options)


__all__ = ["GRIDS", "flow_shift", "grid", "karras", "logsnr", "vp_time"]
