"""The coordinates of diffusers' schedulers: at each call, how their state and their network's output relate to D.

A scheduler holds ``x_u = a x0 + b n`` and is given a network's output: noise, v, flow velocity or x0. Its own float32
numbers for a and b are used, because a conversion with better ones would not cancel against what it does next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fewstep.core.path import PURE_NOISE
from fewstep.errors import InputError, unknown


class Spot(NamedTuple):
    """One call: ``x = x_u / scale`` at level ``sigma``, where the network's output is ``on_x x_u + on_x0 D``."""

    scale: float
    sigma: float
    on_x: float
    on_x0: float


class Family(NamedTuple):
    """Schedulers that share coordinates: the spot of the call at a timestep, and (scale, level) of the result.

    ``start`` gives (scale, level) of the start where that is not the first call's.
    """

    spot: Callable[[Any, Tensor], Spot]
    end: Callable[[Any], tuple[float, float]]
    start: Callable[[Any], tuple[float, float]] | None = None


def _spot(scheduler: Any, a: float, b: float) -> Spot:
    """The spot of ``x_u = a x0 + b n`` for what the scheduler's network predicts."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    scale = max(a, b / PURE_NOISE)
    sigma = b / scale
    if kind == "epsilon":
        if a < b / PURE_NOISE:
            raise InputError(
                "at pure noise a network that predicts noise says nothing: set prediction_type=v_prediction"
            )
        return Spot(scale, sigma, 1 / b, -a / b)
    if kind == "v_prediction":
        return Spot(scale, sigma, a / b, -1 / b)
    if kind == "flow_prediction":
        return Spot(scale, sigma, 1 / b, -1 / b)
    if kind in ("sample", "original_sample"):
        return Spot(scale, sigma, 0.0, 1.0)
    raise unknown("prediction_type", str(kind), ("epsilon", "v_prediction", "sample", "flow_prediction"))


def _ends(a: float, b: float) -> tuple[float, float]:
    scale = max(a, b / PURE_NOISE)
    return scale, b / scale


def _kept(alpha_bar: Tensor) -> tuple[float, float]:
    """a and b of a variance-preserving step, rounded as the scheduler rounds them."""
    return float(alpha_bar**0.5), float((1 - alpha_bar) ** 0.5)


def _table_spot(scheduler: Any, t: Tensor) -> Spot:
    return _spot(scheduler, *_kept(scheduler.alphas_cumprod[int(t)]))


def _step_back(scheduler: Any, t: int) -> int:
    return t - int(scheduler.config.num_train_timesteps) // int(scheduler.num_inference_steps)


def _ddim_end(scheduler: Any) -> tuple[float, float]:
    t = _step_back(scheduler, int(scheduler.timesteps[-1]))
    return _ends(*_kept(scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod))


def _inverse_start(scheduler: Any) -> tuple[float, float]:
    t = _step_back(scheduler, int(scheduler.timesteps[0]))
    return _ends(*_kept(scheduler.alphas_cumprod[t] if t >= 0 else scheduler.initial_alpha_cumprod))


def _inverse_end(scheduler: Any) -> tuple[float, float]:
    return _ends(*_kept(scheduler.alphas_cumprod[int(scheduler.timesteps[-1])]))


def _first_alpha_end(scheduler: Any) -> tuple[float, float]:
    return _ends(*_kept(scheduler.alphas_cumprod[0]))


def _clean_end(scheduler: Any) -> tuple[float, float]:
    return 1.0, 0.0


def _own_sigma(scheduler: Any) -> Tensor:
    """The level of the coming call of a scheduler that holds ``x0 + sigma n``."""
    i, kind = scheduler.step_index, type(scheduler).__name__
    if kind.startswith(("KDPM2", "DPMSolverSDE")) and not scheduler.state_in_first_order:
        middle = {
            "KDPM2DiscreteScheduler": lambda: scheduler.sigmas_interpol[i],
            "KDPM2AncestralDiscreteScheduler": lambda: scheduler.sigmas_interpol[i - 1],
            "DPMSolverSDEScheduler": lambda: scheduler.mid_point_sigma,
        }
        return middle[kind]()
    return scheduler.sigmas[i]


def _exploding_spot(scheduler: Any, t: Tensor) -> Spot:
    sigma = _own_sigma(scheduler)
    if scheduler.config.get("prediction_type") == "v_prediction":
        on_x0 = float(-sigma / (sigma**2 + 1) ** 0.5)
        return Spot(1.0, float(sigma), -1 / float(sigma**2 + 1) / on_x0, 1 / on_x0)
    return _spot(scheduler, 1.0, float(sigma))


def _preconditioned_spot(scheduler: Any, t: Tensor) -> Spot:
    sigma = scheduler.sigmas[scheduler.step_index]
    skip = float(scheduler.precondition_outputs(1.0, 0.0, sigma))
    out = float(scheduler.precondition_outputs(0.0, 1.0, sigma))
    return Spot(1.0, float(sigma), -skip / out, 1 / out)


def _consistency_spot(scheduler: Any, t: Tensor) -> Spot:
    sigma = scheduler.sigmas[scheduler.step_index]
    skip, out = (float(c) for c in scheduler.get_scalings_for_boundary_condition(sigma))
    if out == 0:
        raise InputError("the consistency function is the identity at sigma_min: leave that level out of timesteps")
    return Spot(1.0, float(sigma), -skip / out, 1 / out)


def _consistency_end(scheduler: Any) -> tuple[float, float]:
    return 1.0, float(scheduler.config.sigma_min)


def _last_sigma_end(scheduler: Any) -> tuple[float, float]:
    return 1.0, float(scheduler.sigmas[-1])


def _pair(scheduler: Any, sigma: Tensor) -> tuple[float, float]:
    a, b = scheduler._sigma_to_alpha_sigma_t(sigma)
    return float(a), float(b)


def _pair_spot(scheduler: Any, t: Tensor) -> Spot:
    return _spot(scheduler, *_pair(scheduler, scheduler.sigmas[scheduler.step_index]))


def _pair_end(scheduler: Any) -> tuple[float, float]:
    return _ends(*_pair(scheduler, scheduler.sigmas[-1]))


def _flow_spot(scheduler: Any, t: Tensor) -> Spot:
    time = float(scheduler.sigmas[scheduler.step_index])
    scale, sigma = _ends(1 - time, time)
    return Spot(scale, sigma, 1 / time, -1 / time)


def _flow_end(scheduler: Any) -> tuple[float, float]:
    time = float(scheduler.sigmas[-1])
    return _ends(1 - time, time)


def _angle_spot(scheduler: Any, t: Tensor) -> Spot:
    a, b = float(scheduler.alphas[scheduler.step_index]), float(scheduler.betas[scheduler.step_index])
    return Spot(*_ends(a, b), a / b, -1 / b)


def _angle_end(scheduler: Any) -> tuple[float, float]:
    return _ends(float(scheduler.alphas[-1]), float(scheduler.betas[-1]))


_EXPLODING = Family(_exploding_spot, _last_sigma_end)
_PRECONDITIONED = Family(_preconditioned_spot, _last_sigma_end)
_PAIR = Family(_pair_spot, _pair_end)
_FLOW = Family(_flow_spot, _flow_end)

SCHEDULERS: dict[str, Family] = {
    "CMStochasticIterativeScheduler": Family(_consistency_spot, _consistency_end),
    "CosineDPMSolverMultistepScheduler": _PRECONDITIONED,
    "DDIMInverseScheduler": Family(_table_spot, _inverse_end, _inverse_start),
    "DDIMParallelScheduler": Family(_table_spot, _ddim_end),
    "DDIMScheduler": Family(_table_spot, _ddim_end),
    "DDPMParallelScheduler": Family(_table_spot, _clean_end),
    "DDPMScheduler": Family(_table_spot, _clean_end),
    "DEISMultistepScheduler": _PAIR,
    "DPMSolverMultistepInverseScheduler": _PAIR,
    "DPMSolverMultistepScheduler": _PAIR,
    "DPMSolverSDEScheduler": _EXPLODING,
    "DPMSolverSinglestepScheduler": _PAIR,
    "EDMDPMSolverMultistepScheduler": _PRECONDITIONED,
    "EDMEulerScheduler": _PRECONDITIONED,
    "EulerAncestralDiscreteScheduler": _EXPLODING,
    "EulerDiscreteScheduler": _EXPLODING,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _FLOW,
    "HeunDiscreteScheduler": _EXPLODING,
    "IPNDMScheduler": Family(_angle_spot, _angle_end),
    "KDPM2AncestralDiscreteScheduler": _EXPLODING,
    "KDPM2DiscreteScheduler": _EXPLODING,
    "LCMScheduler": Family(_table_spot, _clean_end),
    "LMSDiscreteScheduler": _EXPLODING,
    "PNDMScheduler": Family(_table_spot, _ddim_end),
    "SASolverScheduler": _PAIR,
    "TCDScheduler": Family(_table_spot, _first_alpha_end),
    "UniPCMultistepScheduler": _PAIR,
}
"""The classes of diffusers that can be traced."""
