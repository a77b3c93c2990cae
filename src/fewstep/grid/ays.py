"""Align Your Steps: levels optimised for some well-known models (arXiv 2404.14507)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.errors import InputError, unknown
from fewstep.grid.base import check_falling, check_range

# arXiv 2404.14507, table 3: the levels of ten steps. Samplers put 0 for the last number.
LEVELS: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def ays(
    steps: int,
    sigma_min: float,
    sigma_max: float,
    *,
    model: str = "sd15",
    rescale: bool = False,
    to_zero: bool = True,
) -> Tensor:
    """The published levels of ``model`` ("sd15", "sdxl", "deepfloyd" or "svd"), for any number of steps.

    As the authors do it, log sigma is interpolated linearly between the eleven published levels, at ``steps + 1``
    equidistant indices; the last level becomes 0. So the last positive level is above ``sigma_min``; with
    ``to_zero=False`` the lowest published level stays. The range given must be the model's own within 1 percent. With
    ``rescale=True`` any range will do: the log levels are stretched so that the lowest and highest of the eleven are
    ``sigma_min`` and ``sigma_max``. Returns (steps + 1,) float64.
    Raises InputError for bad ranges, an unknown model, or a range that is not the model's.
    """
    check_range(steps, sigma_min, sigma_max)
    if model not in LEVELS:
        raise unknown("model of Align Your Steps", model, LEVELS)
    table = torch.tensor(LEVELS[model], dtype=torch.float64)
    high, low = float(table[0]), float(table[-1])
    if not rescale and not (abs(sigma_max / high - 1) < 0.01 and abs(sigma_min / low - 1) < 0.01):
        raise InputError(
            f"the levels of {model} go from {high:g} to {low:g}, not from {sigma_max:g} to {sigma_min:g}: "
            "give that range, or pass rescale=True to stretch them"
        )
    if rescale:
        table = sigma_min * (table / low) ** (math.log(sigma_max / sigma_min) / math.log(high / low))
    place = torch.linspace(0, len(table) - 1, steps + 1, dtype=torch.float64)
    left = place.long().clamp(max=len(table) - 2)
    # As a power of the ratio, so that published levels stay what they are to the last digit.
    levels = table[left] * (table[left + 1] / table[left]) ** (place - left)
    levels[0], levels[-1] = (sigma_max, sigma_min) if rescale else (high, low)
    if to_zero:
        levels[-1] = 0.0
    return check_falling(levels, "the grid")
