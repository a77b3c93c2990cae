"""Samplers that are plain functions: ``f(denoise, x, sigmas)``, and the form that k-diffusion gave them.

The k-diffusion form is ``f(model, x, sigmas, extra_args=None, callback=None, disable=None, ..., noise_sampler=None)``
with ``model(x, sigma * ones(B)) -> x0``; a ``noise_sampler(sigma, sigma_next)`` is given the unit noise of a Brownian
path between two levels. Its samplers of a range, ``f(model, x, sigma_min, sigma_max, ...)``, are called with the ends
of the grid.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.tracing.unit import Source, Tap


def function_source(sampler: Callable[..., Any], sigmas: Tensor | Sequence[float], options: dict[str, Any]) -> Source:
    """A function as a source: its start is a point at ``sigmas[0]``, its result one at ``sigmas[-1]``.

    Raises:
        InputError: a bad grid, an option that the function does not take, or a function of another form.
    """
    name = getattr(sampler, "__name__", type(sampler).__name__)
    grid = _grid(sigmas)
    try:
        signature = inspect.signature(sampler)
    except (TypeError, ValueError):
        raise InputError(f"{name} has no signature to read: wrap it as lambda denoise, x, sigmas: ...") from None
    names = signature.parameters
    if "rtol" in names or "atol" in names:
        raise InputError(
            f"{name} chooses its steps by the values (it takes rtol and atol): an adaptive sampler has no table; trace "
            "one with fixed levels"
        )
    ranged = "sigma_max" in names and "sigmas" not in names
    levels: tuple[Any, ...] = (float(grid[-1]), float(grid[0])) if ranged else (grid,)
    if ranged and not levels[0] > 0:
        raise InputError(f"{name} runs between two positive levels: end the grid above 0, got {levels[0]:g}")
    kdiffusion = "extra_args" in names or "noise_sampler" in names
    given = {"disable": True, **options} if kdiffusion and "disable" in names else dict(options)

    def run(tap: Tap, x: Tensor) -> Tensor:
        keywords = dict(given)
        if "noise_sampler" in names and keywords.get("noise_sampler") is None:
            keywords["noise_sampler"] = tap.brownian

        def model(x: Tensor, sigma: Tensor | float, **extra: Any) -> Tensor:
            return tap.evaluate(x, sigma)

        return sampler(model, x, *(v.clone() if isinstance(v, Tensor) else v for v in levels), **keywords)

    try:
        signature.bind(None, None, *levels, **given)
    except TypeError as error:
        raise InputError(
            f"{name}{signature} cannot be called as f(denoise, x, sigmas) with the options {sorted(options)}: {error}"
        ) from None
    form = "k-diffusion" if kdiffusion else "function"
    kept = {k: v for k, v in options.items() if isinstance(v, str | int | float | bool | None)}
    return Source(name, float(grid[0]), float(grid[-1]), run, 1e-9, {"form": form, "sampler": name, "options": kept})


def _grid(sigmas: Tensor | Sequence[float]) -> Tensor:
    """Levels in either direction, for a function may also run backwards."""
    grid = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    if grid.ndim != 1 or len(grid) < 2 or not grid.isfinite().all() or (grid < 0).any():
        raise InputError(
            "a function is traced on a list of at least two finite levels >= 0 (pure noise of a flow is 1e8), "
            f"got {grid.tolist()}"
        )
    return grid
