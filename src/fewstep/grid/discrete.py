"""Grids picked from the table of levels that a discrete model was trained at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.core.path import DDPMPath
from fewstep.errors import InputError, unknown
from fewstep.grid.base import check_falling, check_range


def sd_levels() -> Tensor:
    """(1000,) increasing levels of Stable Diffusion 1, 2 and XL: betas linear in their root, 0.00085 to 0.012."""
    roots = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64)
    return DDPMPath(tuple((roots**2).tolist())).levels


def iddpm_levels(count: int = 1000, *, offset: float = 0.008, beta_max: float = 0.999) -> Tensor:
    """(count,) increasing levels of improved DDPM (arXiv 2102.09672): its shifted cosine, betas cut at ``beta_max``.

    There ``alpha_bar(t)`` is ``cos^2((t + offset) / (1 + offset) pi / 2)`` over its value at 0. These are
    also the levels of the iDDPM column of arXiv 2206.00364, table 1, without its level 0.
    Raises InputError unless count >= 2, offset > 0 and 0 < beta_max < 1.
    """
    if count < 2 or not offset > 0 or not 0 < beta_max < 1:
        raise InputError(
            "iddpm_levels needs count >= 2, offset > 0 and 0 < beta_max < 1, "
            f"got count={count}, offset={offset}, beta_max={beta_max}"
        )
    times = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    kept = torch.cos((times + offset) / (1 + offset) * (math.pi / 2)) ** 2
    return DDPMPath(tuple((1 - kept[1:] / kept[:-1]).clamp(max=beta_max).tolist())).levels


def discrete(
    steps: int,
    sigma_min: float,
    sigma_max: float,
    *,
    table: Sequence[float] | Tensor | None = None,
    spacing: str = "trailing",
    offset: int = 0,
    interpolate: str = "linear",
    to_zero: bool = True,
) -> Tensor:
    """Levels of a discrete model, at the indices that its schedulers choose (names of arXiv 2305.08891, table 2).

    ``table`` holds the T levels the model knows, rising or falling; without one it is :func:`sd_levels`. Only the part
    within [sigma_min, sigma_max], or 1 percent beyond, is used, so the range may be wider than the table. With indices
    counted upwards from 0 at the lowest level, ``spacing`` is

    * "trailing": ``round(T - k T / steps) - 1``, which starts at the highest level;
    * "leading": ``(steps - 1 - k) floor(T / steps) + offset``, which starts below it;
    * "linspace": ``steps`` fractional indices evenly from T - 1 to 0 (a single step is at T - 1);
    * "sgm": ``steps + 1`` of those, without the last; ComfyUI's sgm_uniform, which has ``interpolate="log"``.

    A level at a fractional index is interpolated linearly in sigma, or in log sigma with ``interpolate="log"``. The
    grid ends at 0; with ``to_zero=False`` at the lowest level of the table, which "linspace", and "leading" without an
    offset, reach by themselves and so are spaced as for one step more. Returns (steps + 1,) float64, whose last
    positive level is the table's and not ``sigma_min``.

    Raises InputError for bad ranges, a table that is not one-dimensional, positive, finite and strictly monotone, a
    table with fewer than two levels in the range, an index outside it, an unknown spacing or interpolation, more whole
    indices than levels, or an offset that is negative or that the spacing does not use.
    """
    check_range(steps, sigma_min, sigma_max)
    if spacing not in SPACINGS:
        raise unknown("spacing", spacing, SPACINGS)
    if interpolate not in ("linear", "log"):
        raise unknown("interpolation", interpolate, ("linear", "log"))
    if offset < 0 or (offset and spacing != "leading"):
        raise InputError(f"offset={offset} with spacing {spacing!r}: it is >= 0, and 0 unless the spacing is 'leading'")
    levels = _known_levels(table, sigma_min, sigma_max)
    places = _places(spacing, steps, len(levels), offset)
    if not to_zero and places[-1] > 0:
        places = torch.cat([places, places.new_zeros(1)])
    elif not to_zero:
        places = _places(spacing, steps + 1, len(levels), offset)
    left = places.long().clamp(max=len(levels) - 2)
    values = levels.log() if interpolate == "log" else levels
    picked = values[left] + (places - left) * (values[left + 1] - values[left])
    picked = picked.exp() if interpolate == "log" else picked
    return check_falling(torch.cat([picked, picked.new_zeros(1)]) if to_zero else picked, "the grid")


def _known_levels(table: Sequence[float] | Tensor | None, sigma_min: float, sigma_max: float) -> Tensor:
    """The rising levels of the table that lie in the range."""
    levels = sd_levels() if table is None else torch.as_tensor(table, dtype=torch.float64, device="cpu").detach()
    if levels.ndim != 1 or len(levels) < 2:
        raise InputError(f"a table of levels is a list of at least two numbers, got shape {tuple(levels.shape)}")
    levels = levels.flip(0) if levels[0] > levels[-1] else levels
    if not levels.isfinite().all() or levels[0] <= 0:
        raise InputError(
            f"a table of levels must be positive and finite (write pure noise as 1e8), got {levels[0]:g} .. "
            f"{levels[-1]:g}"
        )
    flat = (~(levels.diff() > 0)).nonzero()
    if len(flat):
        i = int(flat[0])
        raise InputError(
            f"a table of levels must rise or fall strictly: {levels[i]:g} is next to {levels[i + 1]:g}; sort it and "
            "drop repeated levels"
        )
    inside = levels[(levels >= 0.99 * sigma_min) & (levels <= 1.01 * sigma_max)]
    if len(inside) < 2:
        raise InputError(
            f"{len(inside)} of the table's levels, {levels[0]:g} .. {levels[-1]:g}, lie between {sigma_min:g} and "
            f"{sigma_max:g}: pass the table of this model, or a wider range"
        )
    return inside


def _places(spacing: str, steps: int, count: int, offset: int) -> Tensor:
    """(steps,) falling indices into a table of ``count`` levels, as float64."""
    places = SPACINGS[spacing](steps, count) + offset
    if spacing in ("trailing", "leading") and steps > count:
        raise InputError(f"{steps} whole indices cannot be chosen from {count} levels: use spacing='linspace'")
    if places[0] > count - 1:
        raise InputError(f"offset={offset} puts the first of {steps} indices at {places[0]:g}, beyond {count - 1}")
    return places


def _trailing(steps: int, count: int) -> Tensor:
    return (count - torch.arange(steps, dtype=torch.float64) * (count / steps)).round() - 1


def _leading(steps: int, count: int) -> Tensor:
    return (torch.arange(steps, dtype=torch.float64) * (count // steps)).flip(0)


def _linspace(steps: int, count: int) -> Tensor:
    return torch.linspace(count - 1, 0, steps, dtype=torch.float64)


def _sgm(steps: int, count: int) -> Tensor:
    return _linspace(steps + 1, count)[:-1]


SPACINGS: dict[str, Callable[[int, int], Tensor]] = {
    "trailing": _trailing,
    "leading": _leading,
    "linspace": _linspace,
    "sgm": _sgm,
}
