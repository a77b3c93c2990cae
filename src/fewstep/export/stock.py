"""The search for a stock scheduler of diffusers that is a given table, so that a pipeline needs no code of ours."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.tracing import SCHEDULERS, dense, trace

SPACINGS = ("trailing", "linspace", "leading")
# A network that is told another time than that of its level is another sampler, whatever the weights say.
TIME_SLACK = 0.01


class Pipeline(NamedTuple):
    """What a pipeline does to its scheduler, beside asking it for a number of steps.

    Attributes:
        sigmas: the flow times that it passes when its user gave none; "linspace" is ``linspace(1, 1/N, N)``, as Flux.
        eta: what it passes to ``step`` as eta, if that takes it; None if it passes none (DiT, DDPM).
        scaling: whether it starts at ``init_noise_sigma`` and asks for ``scale_model_input``; not so DiT and DDPM.
    """

    sigmas: Sequence[float] | Literal["linspace"] | None
    eta: float | None
    scaling: bool

    def pushed(self, steps: int) -> list[float] | None:
        """The sigmas that it passes for a number of steps."""
        if isinstance(self.sigmas, str):
            return [float(s) for s in np.linspace(1.0, 1.0 / steps, steps)]
        return None if self.sigmas is None else [float(s) for s in self.sigmas]


def stock_scheduler(
    table: Tableau,
    like: Any,
    *,
    tolerance: float = 1e-4,
    start_std: float | None = None,
    pipeline_sigmas: Sequence[float] | Literal["linspace"] | None = None,
    eta: float | None = 0.0,
    scaling: bool = True,
) -> tuple[dict[str, Any], int] | None:
    """The config (with ``_class_name``) of a stock scheduler that is this table, and its ``num_inference_steps``.

    ``like`` is the scheduler, or its config, of the pipeline that the table is for: betas or flow, and what the network
    predicts, come from there. A config counts only if ``set_timesteps`` with the number of steps, as the pipeline calls
    it, gives the table: all levels, the times that the network is told (to 0.01), all weights, noises by their
    covariance, and the standard deviation of the start, to ``tolerance`` (weights absolute; levels relative to the
    larger of 1 and the level; the start relative). A table that says nothing of its start has that of its first level;
    stock schedulers of variance-preserving models start at unit noise, which in ``x0 + sigma n`` is
    ``start_std=sqrt(1 + sigma^2)``. ``pipeline_sigmas``, ``eta`` and ``scaling`` say what the pipeline does, see
    :class:`Pipeline`; the defaults are those of Stable Diffusion and of SD3, Flux has ``pipeline_sigmas="linspace"``,
    and DiT and DDPM have ``eta=None, scaling=False``.

    Returns None if there is none: then :class:`fewstep.export.TableauScheduler` runs the table.

    Raises:
        InputError: ``like`` is no scheduler, preconditions its network, lacks betas, or does not know the levels.
    """
    from fewstep.export.scheduler import TableauScheduler, model_of, start_of

    if not isinstance(table, Tableau):
        raise InputError(f"stock_scheduler takes a table, got a {type(table).__name__}: only a table has weights")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance must be between 0 and 1, got {tolerance!r}: 1e-4 is what float32 schedulers keep")
    model = model_of(like)
    if start_std is None:
        start_std = start_of(table) or table.start
    if model["path"] == "edm":
        return None
    told = [float(t) for t in TableauScheduler.from_tableau(table, like, start_std=start_std).timesteps]
    wanted = _Wanted(table, told, float(start_std), Pipeline(pipeline_sigmas, eta, scaling), tolerance)
    search = _flow_candidates if model["path"] == "flow" else _vp_candidates
    seen: list[Candidate] = []
    for candidate in itertools.chain(_own(like, table), search(wanted, model)):
        if candidate not in seen and wanted.is_it(*candidate):
            return _whole(candidate[0]), candidate[1]
        seen.append(candidate)
    return None


Candidate = tuple[dict[str, Any], int]


class _Wanted(NamedTuple):
    """The table that is searched for, with the times that the network is told and the start's standard deviation."""

    table: Tableau
    told: list[float]
    start_std: float
    pipeline: Pipeline
    tolerance: float

    def is_it(self, config: Mapping[str, Any], steps: int) -> bool:
        """Whether a config, as the pipeline uses it, is the table. The cheap questions come first."""
        scheduler = _made(config, steps, self.pipeline)
        if scheduler is None or not _close(scheduler.timesteps.tolist(), self.told):
            return False
        # Schedulers that hold a x0 + b n start at 1, those that hold x0 + sigma n at a level; a flow's do not say.
        scale = getattr(scheduler, "init_noise_sigma", None)
        if scale is not None:
            std = math.hypot(1.0, self.table.start) if float(scale) == 1.0 else float(scale)
            far = abs(std / self.start_std - 1) > 10 * self.tolerance
            if far or (float(scale) != 1.0 and not self.pipeline.scaling):
                return False
        options: dict[str, Any] = _schedule(type(scheduler), config, steps, self.pipeline)
        if "num_inference_steps" in options:
            options["steps"] = options.pop("num_inference_steps")
        if self.pipeline.eta is not None and "eta" in inspect.signature(scheduler.step).parameters:
            options["eta"] = self.pipeline.eta
        try:
            found = trace(dict(config), **options)
        except (InputError, RuntimeError):
            # Not linear, refused by the scheduler, or a singular system inside it: either way no table.
            return False
        std = found.meta["traced"]["start_std"]
        if not abs(std / self.start_std - 1) <= self.tolerance:
            return False
        return _apart(self.table, found) <= self.tolerance


def _apart(a: Tableau, b: Tableau) -> float:
    """The largest difference of two samplers: of levels, relative to the larger of 1 and the level, and of weights.

    The start counts at its standard deviation. Noises count by the standard deviation that they give each point, and by
    how a point's noise leans on those of the points before, so that the sign of a noise is no difference.
    """
    first, second = dense(a), dense(b)
    if len(first.calls) != len(second.calls):
        return math.inf
    kept = [(t, d, [*d.calls, t.rows]) for t, d in ((a, first), (b, second))]
    levels = [torch.cat([t.levels[:1], t.sigmas[d.calls], t.levels[-1:]]) for t, d, _ in kept]
    scale = torch.maximum(*levels).clamp(min=1.0)
    fixed = [torch.cat([d.start[rows, None] * math.hypot(1.0, a.start), d.outputs[rows]], 1) for _, d, rows in kept]
    noises = [d.noises[rows] for _, d, rows in kept]
    covariances = [n @ n.T for n in noises]
    spreads = [c.diagonal().sqrt() for c in covariances]
    # Divided by the earlier point's spread: how much of that point's unit noise the later one holds.
    leaning = (covariances[0] - covariances[1]).abs() / torch.maximum(*spreads).clamp(min=1e-12)
    differences = [(levels[0] - levels[1]).abs() / scale, (fixed[0] - fixed[1]).abs(), (spreads[0] - spreads[1]).abs()]
    return float(max(d.max() for d in [*differences, leaning.tril(-1)]))


def _schedule(kind: Any, config: Mapping[str, Any], steps: int, pipeline: Pipeline) -> dict[str, Any]:
    """What the pipeline passes to ``set_timesteps``."""
    pushed = pipeline.pushed(steps)
    takes = "sigmas" in inspect.signature(kind.set_timesteps).parameters
    if pushed is None or not takes or config.get("use_flow_sigmas"):
        return {"num_inference_steps": steps}
    return {"sigmas": pushed}


def _made(config: Mapping[str, Any], steps: int, pipeline: Pipeline) -> Any:
    """The scheduler after ``set_timesteps``; None if its class is missing or it refuses."""
    kind = getattr(import_module("diffusers"), config["_class_name"], None)
    if kind is None or not set(config) - {"_class_name"} <= set(inspect.signature(kind.__init__).parameters):
        return None
    try:
        made = kind(**{k: v for k, v in config.items() if k != "_class_name"})
        made.set_timesteps(**_schedule(kind, config, steps, pipeline))
    except (ValueError, TypeError, LookupError, ImportError, AssertionError, ArithmeticError, NotImplementedError):
        return None
    return made


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every option, so that another version's defaults change nothing."""
    diffusers = import_module("diffusers")
    made = getattr(diffusers, config["_class_name"])(**{k: v for k, v in config.items() if k != "_class_name"})
    options = {k: v for k, v in made.config.items() if not k.startswith("_")}
    return {"_class_name": config["_class_name"], "_diffusers_version": diffusers.__version__, **options}


def _close(told: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(told) == len(wanted) and all(abs(a - b) <= TIME_SLACK for a, b in zip(told, wanted, strict=True))


def _depth(table: Tableau) -> int:
    """The longest history of points or outputs that a row weighs."""
    used = (table.P != 0).any(0) | (table.W != 0).any(0)
    return int(used.nonzero().max()) + 1 if used.any() else 1


def _own(like: Any, table: Tableau) -> Iterator[Candidate]:
    """The scheduler that the pipeline has, as it is."""
    config = dict(like) if isinstance(like, Mapping) else {**like.config, "_class_name": type(like).__name__}
    name = config.get("_class_name")
    if isinstance(name, str) and name in SCHEDULERS:
        kept = {k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}
        for steps in dict.fromkeys((table.nfe, (table.nfe + 1) // 2)):
            yield kept, steps


def _vp_candidates(wanted: _Wanted, model: Mapping[str, Any]) -> Iterator[Candidate]:
    table, n = wanted.table, wanted.table.nfe
    base = {k: v for k, v in model.items() if k != "path" and not (k == "rescale_betas_zero_snr" and not v)}
    depth = _depth(table)

    def spaced(name: str, steps: int, *grids: Mapping[str, Any], **more: Sequence[Any]) -> Iterator[Candidate]:
        for grid in grids or ({},):
            for values in itertools.product(*more.values()):
                yield {"_class_name": name, **base, **grid, **dict(zip(more, values, strict=True))}, steps

    offsets = [{"timestep_spacing": "leading", "steps_offset": k} for k in (0, 1)]
    grids = [{"timestep_spacing": spacing} for spacing in SPACINGS[:2]] + offsets
    curves = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]
    ends = {"final_sigmas_type": ["zero"] if table.end == 0 else ["sigma_min"]}
    if depth == 1:
        for origin in _origins(wanted, model):
            yield from spaced("LCMScheduler", n, original_inference_steps=[origin])
            yield from spaced("TCDScheduler", n, original_inference_steps=[origin])
        yield from spaced("DDIMScheduler", n, *grids, set_alpha_to_one=[True, False], clip_sample=[False])
    if table.noisy:
        variances = ["fixed_small", "fixed_large"]
        yield from spaced("DDPMScheduler", n, *grids, clip_sample=[False], variance_type=variances)
        yield from spaced("EulerAncestralDiscreteScheduler", n, *grids)
        sde: dict[str, Sequence[Any]] = {"algorithm_type": ["sde-dpmsolver++"], "solver_order": [1, 2]}
        yield from spaced("DPMSolverMultistepScheduler", n, *grids, *curves, **sde, **ends)
        return
    if depth == 1:
        yield from spaced("EulerDiscreteScheduler", n, *grids, *curves, **ends)
        yield from spaced("DPMSolverMultistepScheduler", n, *grids, *curves, solver_order=[1], **ends)
        return
    late = {"lower_order_final": [True, False]}
    if depth <= 2 and n % 2:
        yield from spaced("HeunDiscreteScheduler", (n + 1) // 2, *grids, *curves)
    if depth <= 2:
        kinds: dict[str, Sequence[Any]] = {"solver_type": ["midpoint", "heun"], "euler_at_final": [False, True], **late}
        yield from spaced("DPMSolverMultistepScheduler", n, *grids, *curves, solver_order=[2], **kinds, **ends)
    if depth <= 3:
        yield from spaced("DPMSolverMultistepScheduler", n, *grids, *curves, solver_order=[3], **late, **ends)
        yield from spaced("DEISMultistepScheduler", n, *grids, *curves, solver_order=[depth])
    for order in range(max(1, depth - 1), min(3, depth) + 1):
        yield from spaced("UniPCMultistepScheduler", n, *grids, *curves, solver_order=[order], **late, **ends)
    if depth <= 4:
        yield from spaced("LMSDiscreteScheduler", n, *grids, *curves)


def _origins(wanted: _Wanted, model: Mapping[str, Any]) -> list[int]:
    """The ``original_inference_steps`` for which a consistency scheduler's own grid is the table's, N itself first."""
    count, n = int(model.get("num_train_timesteps", 1000)), wanted.table.nfe
    found = []
    for origin in dict.fromkeys([n, 50, *range(n, count + 1)]):
        grid = (np.arange(1, origin + 1) * (count // origin) - 1)[::-1] if n <= origin <= count else np.zeros(0)
        if len(grid) and _close(grid[np.floor(np.linspace(0, origin, n, endpoint=False)).astype(int)], wanted.told):
            found.append(origin)
    return found[:3]


def _flow_candidates(wanted: _Wanted, model: Mapping[str, Any]) -> Iterator[Candidate]:
    n, count = wanted.table.nfe, int(model["num_train_timesteps"])
    base = {"num_train_timesteps": count}
    orders = [("FlowMatchEulerDiscreteScheduler", n), ("FlowMatchHeunDiscreteScheduler", (n + 1) // 2)]
    if wanted.table.noisy:
        orders = [("FlowMatchEulerDiscreteScheduler", n), ("FlowMatchLCMScheduler", n)]
    for name, steps in orders:
        for shift in _shifts(wanted, steps, count):
            config = {"_class_name": name, **base, "shift": shift}
            if wanted.table.noisy and name == "FlowMatchEulerDiscreteScheduler":
                config["stochastic_sampling"] = True
            yield config, steps


def _shifts(wanted: _Wanted, steps: int, count: int) -> list[float]:
    """Shifts that put the second level of the scheduler's own grid where the table has it."""
    if steps == 1:
        return [1.0]
    # The second level that differs from the first: Heun's grid names most levels twice.
    times = [t / count for t in dict.fromkeys(wanted.told)]
    if len(times) < 2 or not 0 < times[1] < 1:
        return []
    pushed = wanted.pipeline.pushed(steps)

    def second(shift: float) -> float:
        # Without sigmas the scheduler spaces its grid between ends that are shifted already, and shifts that again.
        last = shift / count / (1 + (shift - 1) / count)
        raw = pushed[1] if pushed is not None else 1 + (last - 1) / (steps - 1)
        return shift * raw / (1 + (shift - 1) * raw)

    if pushed is not None and (len(pushed) != steps or not 0 < pushed[1] < 1):
        return [1.0]
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if second(math.exp(middle)) < times[1] else (low, middle)
    exact = math.exp((low + high) / 2)
    # People write shifts with few digits; the exact number is what float32 made of one.
    return list(dict.fromkeys([round(exact, 2), round(exact, 4), exact]))
