"""Tracing: an existing linear sampler, run on unit vectors, becomes a :class:`~fewstep.core.tableau.Tableau`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.tracing.coordinates import SCHEDULERS
from fewstep.tracing.dense import Dense, RowDifference, compare, dense
from fewstep.tracing.kdiffusion import function_source
from fewstep.tracing.schedulers import looks_like_a_scheduler, scheduler_config, scheduler_source
from fewstep.tracing.unit import trace_source


def trace(
    sampler: Callable[..., Any] | Any,
    sigmas: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    check: bool = True,
    tolerance: float | None = None,
    **options: Any,
) -> Tableau:
    """The table of an existing sampler: a function of denoiser, start and levels, or a scheduler of diffusers.

    * ``trace(f, sigmas)`` for ``f(denoise, x, sigmas)`` or a sampler of the k-diffusion form, with its ``options``.
      The start is a point at ``sigmas[0]``, the result one at ``sigmas[-1]``.
    * ``trace(scheduler, steps=20)`` for an instance, a configuration with ``_class_name``, a scheduler_config.json, a
      folder with one, or the name of a class; ``options`` go to its ``set_timesteps`` or ``step`` (``eta=1.0``).
      ``sigmas`` then are in the scheduler's own time and take the place of ``steps``.

    ``check`` replays the table against the sampler on a non-linear denoiser with the same noises. ``tolerance`` is what
    may differ, relative to the larger of 1 and the point: by default 1e-9, and 1e-4 for a scheduler, whose
    state passes through float32. The sampler runs two or three times, and torch's random state is left as it was.
    ``meta["traced"]`` says where the table came from, by how much the replay differed, and under "draws" of which of
    the sampler's noises, counted from 0, each row's noise is made.

    Raises:
        InputError: the sampler is not linear in start, outputs and noises (clipping, thresholding, adaptive steps),
            does what no table holds, never calls the denoiser, or was given a grid or options that it cannot take.
    """
    if isinstance(sampler, Tableau):
        raise InputError(f"{sampler.name!r} is a table already: there is nothing to trace")
    if looks_like_a_scheduler(sampler):
        source = scheduler_source(sampler, steps, sigmas, options)
    elif not callable(sampler):
        raise InputError(
            "trace takes a function f(denoise, x, sigmas), a scheduler of diffusers, its configuration or its file, "
            f"got {type(sampler).__name__}"
        )
    elif sigmas is None:
        raise InputError("a function is traced on levels: trace(f, sigmas), for example karras(20, 0.002, 80.0)")
    elif steps is not None:
        raise InputError(f"steps={steps} goes with a scheduler; a function takes its levels from sigmas")
    else:
        source = function_source(sampler, sigmas, options)
    return trace_source(source, check=check, tolerance=tolerance)


__all__ = ["SCHEDULERS", "Dense", "RowDifference", "compare", "dense", "scheduler_config", "trace"]
