"""The front door of every sampler that is searched for, fitted or learned on a frozen denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser, module_of
from fewstep.core.noise import Noise
from fewstep.core.sample import Sampler
from fewstep.core.solver import check_grid
from fewstep.errors import InputError, unknown
from fewstep.solve.teacher import FINE, Clock, Fitted, Progress, Task, fine_levels, follow

# Method -> file of this folder and function in it; imported when asked for.
CALIBRATIONS: Mapping[str, tuple[str, str]] = {
    "least-squares": ("least_squares", "least_squares"),
    "gits": ("gits", "gits"),
    "amed": ("amed", "amed"),
    "amed-plugin": ("amed_plugin", "amed_plugin"),
    "usf": ("usf_search", "usf"),
    "epd": ("epd", "epd"),
    "aligner": ("aligner", "aligner"),
    "gaussian": ("gaussian", "gaussian"),
}


@torch.no_grad()
def calibrate(
    D: Denoiser,
    *,
    nfe: int | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    method: str = "least-squares",
    trajectories: int = 256,
    seed: int = 0,
    cond: Cond | None = None,
    batch: int = 1024,
    budget: float | None = None,
    memory: int = 1 << 30,
    device: torch.device | str | None = None,
    progress: bool = False,
    **options: Any,
) -> Any:
    """A sampler for ``D`` with ``nfe`` evaluations whose levels are chosen too, or on the grid ``sigmas``.

    ``method`` is one of CALIBRATIONS; ``options`` are its own, such as ``ridge`` and ``searches`` of "least-squares"
    (:func:`fewstep.solve.least_squares.least_squares`). The result is a :class:`Tableau`, or another
    :class:`Sampler` when its weights depend on the picture.

    ``trajectories`` of the denoiser are followed to convergence, under ``cond`` (of any batch size, its rows are used
    in turn); three quarters of them are for fitting and the others for choices. Guidance belongs into ``D``. A quarter
    as many further ones, used for nothing else, decide whether the fitted sampler or the fixed solver that it started
    from is returned, so that the result is never worse there; ``meta["calibration"]`` reports both errors.

    ``budget`` in seconds ends the search early; without one the result depends on nothing but the arguments. At most
    ``memory`` bytes are kept of the trajectories: of larger pictures, a random choice of the pixels. ``D`` needs
    ``shape``, ``sigma_min`` and ``sigma_max``.

    Raises:
        InputError: neither or both of nfe and sigmas, nfe < 1, a bad grid, fewer than 8 trajectories, an unknown
            method or option, or a denoiser whose output is not finite (names row and level).
    """
    grid = check_request(nfe, sigmas, trajectories, method, options)
    if budget is not None and not budget > 0:
        raise InputError(f"the budget is in seconds and must be above 0, got {budget}")
    if batch < 1 or memory < 1:
        raise InputError(f"batch and memory must be at least 1, got {batch} and {memory}")
    module, clock = module_of(D), Clock(budget)
    if device is None:
        device = "cpu" if module is None else next((p.device for p in module.parameters()), "cpu")
    check = trajectories // 4
    with Progress(progress) as say:
        noise = Noise.of(seed, trajectories + check, device).fold("calibrate")
        conds = repeated(cond, trajectories + check, torch.device(device))
        levels = fine_levels(D, grid)
        everything = follow(D, levels, noise, conds, batch=batch, memory=memory, say=say)
        work, fresh = everything.part(slice(0, trajectories)), everything.part(slice(trajectories, None))
        count = nfe if nfe is not None else len(levels if grid is None else grid) - 1
        task = Task(D, count, grid, work, trajectories // 4, seed, batch, clock, say)
        fitted: Fitted = _method(method)(task, **options)
        errors = {"start": fresh.error(D, fitted.start, batch), "fitted": fresh.error(D, fitted.sampler, batch)}
    facts = {"method": method, "trajectories": trajectories, "check_trajectories": check, "seed": seed}
    return _better(task, fitted, errors, facts)


def _better(task: Task, fitted: Fitted, errors: Mapping[str, float], facts: Mapping[str, Any]) -> Any:
    """The better of the fitted sampler and its start on the check, with the report of both."""
    better = errors["fitted"] <= errors["start"]
    kept: Any = fitted.sampler if better else fitted.start
    report = {
        **facts,
        "nfe": kept.nfe,
        "started_from": fitted.start.name,
        "check_rmse_start": errors["start"],
        "check_rmse_fitted": errors["fitted"],
        "kept": "fitted" if better else "start",
        "sigma_min": task.D.sigma_min,
        "sigma_max": task.D.sigma_max,
        "shape": list(task.D.shape),
        **fitted.facts,
    }
    name = "calibrated" if facts["method"] == "least-squares" else facts["method"]
    return replace(kept, name=f"{name}-{kept.nfe}", meta={**kept.meta, "calibration": report})


def check_request(
    nfe: int | None,
    sigmas: Tensor | Sequence[float] | None,
    trajectories: int,
    method: str = "least-squares",
    options: Mapping[str, Any] | None = None,
) -> Tensor | None:
    """The given grid, checked, or None; raises what :func:`calibrate` says it raises for its arguments."""
    known = options_of(method)
    if (nfe is None) == (sigmas is None):
        raise InputError("calibrate takes either nfe (the grid is chosen) or sigmas (the grid is given)")
    if nfe is not None and (isinstance(nfe, bool) or not isinstance(nfe, int) or not 1 <= nfe <= FINE // 2):
        raise InputError(f"calibrate needs a whole number of evaluations from 1 to {FINE // 2}, got nfe={nfe!r}")
    if trajectories < 8:
        raise InputError(f"calibrate needs at least 8 trajectories, got {trajectories}; 256 is a good number")
    for name, value in (options or {}).items():
        if name not in known:
            raise unknown(f"option of {method}", name, known)
        _check_kind(method, name, value)
    ridge = (options or {}).get("ridge", "auto")
    if ridge != "auto" and (isinstance(ridge, str) or not ridge >= 0):
        raise InputError(f"ridge must be 'auto' or a number >= 0, got {ridge!r}")
    return None if sigmas is None else check_grid(torch.as_tensor(sigmas, dtype=torch.float64))


def options_of(method: str) -> tuple[str, ...]:
    """The names of a method's own options; raises InputError for an unknown method."""
    if method not in CALIBRATIONS:
        raise unknown("calibration method", method, CALIBRATIONS)
    parameters = signature(_method(method)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY)


def _check_kind(method: str, name: str, value: Any) -> None:
    """Raises InputError for a value of another kind than an option's default, before any work is done."""
    wanted = str(signature(_method(method)).parameters[name].annotation)
    whole = isinstance(value, int) and not isinstance(value, bool)
    named = isinstance(value, str) and (f"'{value}'" in wanted.replace('"', "'") or wanted.startswith("str"))
    fits = {"bool": isinstance(value, bool), "int": whole, "float": whole or isinstance(value, float)}
    first = next((kind for kind in fits if wanted.startswith(kind)), None)
    wrong = not named if isinstance(value, str) or wanted.startswith("str") else not (first is None or fits[first])
    if wrong and not (value is None and "None" in wanted):
        raise InputError(f"option {name} of {method} is of kind {wanted}, got {value!r}")


def repeated(cond: Cond | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """``n`` rows of a condition of any batch size, used in turn."""
    if not cond:
        return {}
    rows = torch.arange(n) % len(next(iter(cond.values())))
    return {k: v[rows.to(v.device)].to(device) for k, v in cond.items()}


def _method(name: str) -> Callable[..., Fitted]:
    module, function = CALIBRATIONS[name]
    found: Callable[..., Fitted] = getattr(import_module(f"fewstep.solve.{module}"), function)
    return found


def report_of(sampler: Sampler) -> dict[str, Any]:
    """What :func:`calibrate` wrote of a sampler; empty for others."""
    meta = getattr(sampler, "meta", {})
    found = meta.get("calibration", {}) if isinstance(meta, Mapping) else {}
    return dict(found) if isinstance(found, Mapping) else {}
