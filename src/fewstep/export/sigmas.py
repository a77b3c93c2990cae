"""Levels alone, for tools that take a list of sigmas and bring a sampler of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.exact import bimodal
from fewstep.core.path import FlowPath, Path
from fewstep.core.sample import sample
from fewstep.core.solver import SOLVERS, build
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown

FORMATS = ("json", "text", "comfyui", "diffusers")
# Solvers that call the model between two levels of their grid.
SEVERAL_CALLS = (
    *("amed_table", "dpm2", "dpm2_ancestral", "dpm3", "dpm_single", "dpmpp2s", "dpmpp2s_ancestral", "dpmpp3s"),
    *("dpmpp_sde", "edm_stochastic", "epd_table", "heun", "res"),
)
# Schedulers of diffusers that call it twice a step, but for the last one.
TWO_CALLS = ("HeunDiscrete", "FlowMatchHeun", "KDPM2Discrete", "KDPM2Ancestral", "DPMSolverSDE")
# Our solvers under the names that tools have for them: ComfyUI's sampler, and the class of diffusers that takes a list.
PLAIN: dict[str, tuple[str, str | None]] = {
    "euler": ("euler", "EulerDiscreteScheduler"),
    "heun": ("heun", "HeunDiscreteScheduler"),
    "dpmpp2m": ("dpmpp_2m", "DPMSolverMultistepScheduler"),
    "lms": ("lms", None),
    "ipndm": ("ipndm", None),
    "deis": ("deis", None),
    "unipc": ("uni_pc_bh2", "UniPCMultistepScheduler"),
}
NOISY: dict[str, tuple[str, str | None]] = {
    "consistency": ("lcm", "LCMScheduler"),
    "euler_ancestral": ("euler_ancestral", None),
    "dpmpp_sde": ("dpmpp_sde", None),
    "dpmpp2m_sde": ("dpmpp_2m_sde", "DPMSolverMultistepScheduler"),
}


def step_levels(table: Tableau) -> Tensor:
    """The decreasing levels (N + 1,) between which a table steps, float64; the last is the table's end.

    Levels of trial points, of points between two levels, and of noise that is added first are left out. Points between
    levels are recognised in tables of solvers, and of traced schedulers, that are known to have them.
    """
    traced = str(table.meta.get("traced", {}).get("scheduler", ""))
    points = list(range(table.rows + 1))
    if traced.startswith(TWO_CALLS):
        calls = [k for k, row in enumerate(table.plan) if row.sigma is not None]
        points = [*calls[::2], table.rows]
    elif table.meta.get("solver") in SEVERAL_CALLS:
        points = sorted({table.rows, *(i for k in range(table.rows) for i in _starts(table, k))})
    levels: list[float] = []
    for k in points:
        level = float(table.levels[k])
        if not levels or level < levels[-1] * (1 - 1e-9):
            levels.append(level)
    return torch.tensor(levels, dtype=torch.float64)


def _starts(table: Tableau, k: int) -> list[int]:
    """The points that a row steps from. A row to level 0 may weigh outputs alone, and starts at its own point."""
    row = table.plan[k]
    outputs = dict(row.outputs)
    # A slope (y - D) / sigma weighs point and output by opposite numbers: it is no start.
    found = [i for i, w in row.points if abs(w + outputs.get(i, 0.0)) > 1e-9 * abs(w)]
    return found or [k]


def sigma_list(table: Tableau, *, steps: int | None = None, path: Path | None = None) -> Tensor:
    """The levels of a table's steps as a list (N + 1,) that decreases to 0, float64.

    ``steps`` other than the table's own are interpolated as published for Align Your Steps (arXiv 2404.14507): log
    sigma linear in the fraction of steps, between the first and the last positive level, which are kept; 0 comes after
    them. A table that ends above 0 has its last level replaced by 0, as is done with those published levels. With a
    ``path`` the list holds its native times: ``FLOW`` gives ``t = sigma / (1 + sigma)`` and ``FLOW(shift=3)`` the times
    that a tool which shifts by 3 must be given.

    Raises:
        InputError: ``table`` is no table, ``steps`` < 1, or the table has a single level.
    """
    if not isinstance(table, Tableau):
        raise InputError(f"a list of sigmas is made of a table, got a {type(table).__name__}: only a table has levels")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r}")
    levels = step_levels(table)
    if len(levels) < 2:
        raise InputError(f"{table.name!r} stays at level {float(levels[0]):g}: there is no list to make of it")
    # AYS counts its last, lowest level among those that are interpolated, and only then replaces it by 0.
    places = levels if table.end > 0 else levels[:-1]
    wanted = (steps or len(levels) - 1) + (1 if table.end > 0 else 0)
    if wanted != len(places):
        at = torch.linspace(0, len(places) - 1, wanted, dtype=torch.float64)
        left = at.long().clamp(max=max(len(places) - 2, 0))
        right = (left + 1).clamp(max=len(places) - 1)
        logs = places.log()
        between = (logs[left] + (at - left) * (logs[right] - logs[left])).exp()
        between[0] = places[0]
        if wanted > 1:
            between[-1] = places[-1]
        places = between
    if len(places) > 1 and bool((places.diff() >= 0).any()):
        raise InputError(f"{table.name!r} has {len(levels) - 1} levels, too few to make {steps} different ones of")
    sigmas = torch.cat([places[:-1] if table.end > 0 else places, torch.zeros(1, dtype=torch.float64)])
    return sigmas if path is None else torch.cat([path.at(sigmas[:-1]), sigmas[-1:]])


class Plain(NamedTuple):
    """The plain solver whose results on a table's grid are nearest to the table's own, and how good they are.

    Errors are root mean squares over samples of a one-dimensional mixture with known denoiser, from the same starts,
    against its converged differential equation; nan for tables that add noise, where ``apart`` compares weights.

    Attributes:
        name: the nearest solver.
        apart: how far the solver's results are from the table's.
        table_error: of the table itself.
        best: the solver with the smallest error.
        best_error: its error.
    """

    name: str
    apart: float
    table_error: float
    best: str
    best_error: float


def plain_sampler(table: Tableau) -> Plain:
    """Compares a table with the plain solvers on its own grid: what a list of sigmas keeps of it.

    Raises:
        InputError: as :func:`sigma_list`.
    """
    sigmas = sigma_list(table)
    known = NOISY if table.noisy else PLAIN
    made = {name: build(name, sigmas) for name in known if name in SOLVERS}
    if table.noisy:
        spreads = {name: _weights_apart(table, other) for name, other in made.items()}
        nearest = min(spreads, key=lambda name: spreads[name])
        return Plain(nearest, spreads[nearest], math.nan, nearest, math.nan)
    problem = bimodal()
    x, exact = _known(table.start, table.end or 1e-4)
    result = sample(problem, x, table)
    found = {name: sample(problem, x, other) for name, other in made.items()}
    apart = {name: _rms(end - result) for name, end in found.items()}
    errors = {name: _rms(end - exact) for name, end in found.items()}
    nearest, best = min(apart, key=lambda name: apart[name]), min(errors, key=lambda name: errors[name])
    return Plain(nearest, apart[nearest], _rms(result - exact), best, errors[best])


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@cache
def _known(start: float, end: float) -> tuple[Tensor, Tensor]:
    """Starts (33, 1) on the mixture at level ``start``, and the ends of their trajectories at ``end``."""
    x = torch.linspace(-2.0, 2.0, 33, dtype=torch.float64)[:, None] * math.hypot(1.0, start)
    return x, bimodal().flow(x, start, end, steps=200)


def _weights_apart(a: Tableau, b: Tableau) -> float:
    """The largest difference of what two tables make of outputs and noise, relative to 1 and to the levels."""
    from fewstep.tracing import dense

    kept, noises = [], []
    for table in (a, b):
        weights = dense(table)
        rows = [*weights.calls, table.rows]
        kept.append(weights.outputs[rows])
        sizes = weights.noises[rows].square().sum(1).sqrt()
        noises.append(sizes / table.levels[rows].clamp(min=1e-12))
    if kept[0].shape != kept[1].shape:
        return math.inf
    return max(float((kept[0] - kept[1]).abs().max()), float((noises[0] - noises[1]).abs().max()))


def rounded_times(times: Sequence[float]) -> tuple[list[int], list[int]]:
    """Whole timesteps, and those that were moved down by one or more because two would have been the same.

    Raises:
        InputError: more timesteps than whole numbers down to 0.
    """
    whole: list[int] = []
    moved: list[int] = []
    for time in times:
        near = round(time)
        if whole and near >= whole[-1]:
            near = whole[-1] - 1
            moved.append(near)
        if near < 0:
            raise InputError(
                f"{len(times)} timesteps from {times[0]:g} do not fit on different whole numbers: take fewer"
            )
        whole.append(near)
    return whole, moved


def as_text(
    table: Tableau,
    form: str,
    *,
    steps: int | None = None,
    path: Path | None = None,
    times: Sequence[float] | None = None,
    digits: int = 6,
) -> str:
    """The list of :func:`sigma_list` as a tool takes it; ends with a newline.

    ``form`` is "json" (an object with ``sigmas``, their kind and the nearest plain sampler), "text" (a number a line),
    "comfyui" (one line with commas, for the node that takes sigmas by hand), or "diffusers" (the arguments of a
    pipeline). ``times`` are the model's timesteps of the levels, for "diffusers"; numbers have ``digits`` digits.

    Raises:
        InputError: an unknown form, or as :func:`sigma_list`.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    values = [float(f"{float(v):.{digits}g}") for v in sigma_list(table, steps=steps, path=path)]
    flow = isinstance(path, FlowPath)
    if form == "text":
        return "".join(f"{v:.{digits}g}\n" for v in values)
    if form == "comfyui":
        return ", ".join(f"{v:.{digits}g}" for v in values) + "\n"
    if form == "json":
        kind = "flow time" if flow else "sigma"
        names = (NOISY if table.noisy else PLAIN)[plain_sampler(table).name]
        body: dict[str, Any] = {"name": table.name, "kind": kind, "steps": len(values) - 1, "sigmas": values}
        if flow:
            assert isinstance(path, FlowPath)
            body["shift"] = path.shift
        body |= {"nearest": {"comfyui": names[0], "diffusers": names[1]}, "noisy": table.noisy}
        return json.dumps(body, indent=2) + "\n"
    if flow:
        # Schedulers of flow models add the 0 themselves.
        return f"sigmas={values[:-1]}\n"
    lines = [] if times is None else [f"timesteps={rounded_times(times)[0]}"]
    return "\n".join([*lines, f"sigmas={values}"]) + "\n"
