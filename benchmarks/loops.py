"""What benchmarks/overhead.py runs against: published recurrences as plain loops, and the names of peers' samplers.

In a loop ``t`` is a list of falling levels above 0 and ``D(x, s)`` the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from numpy.polynomial import polynomial
from torch import Tensor

# Karras' levels throughout; the tensor that comes back from the network means noise, the schedulers' default.
DIFFUSERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "euler": [("EulerDiscreteScheduler", {"use_karras_sigmas": True}), ("EDMEulerScheduler", {})],
    "heun": [("HeunDiscreteScheduler", {"use_karras_sigmas": True})],
    "dpm2": [("KDPM2DiscreteScheduler", {"use_karras_sigmas": True})],
    "dpmpp2s": [("DPMSolverSinglestepScheduler", {"solver_order": 2, "use_karras_sigmas": True})],
    "dpmpp2m": [
        ("DPMSolverMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": True}),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 2}),
    ],
    "dpmpp3m": [
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
    ],
    "ipndm4": [("IPNDMScheduler", {})],
    "lms4": [("LMSDiscreteScheduler", {"use_karras_sigmas": True})],
    "deis3": [("DEISMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True})],
    "unipc2": [("UniPCMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": True})],
    "unipc3": [("UniPCMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True})],
    "euler_ancestral": [("EulerAncestralDiscreteScheduler", {})],
    "dpmpp2m_sde": [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ],
}
KDIFFUSION = {
    "euler": "sample_euler",
    "heun": "sample_heun",
    "dpm2": "sample_dpm_2",
    "dpmpp2s": "sample_dpmpp_2s_ancestral",
    "dpmpp2m": "sample_dpmpp_2m",
    "dpmpp3m": "sample_dpmpp_3m_sde",
    "lms4": "sample_lms",
    "euler_ancestral": "sample_euler_ancestral",
    "dpmpp2m_sde": "sample_dpmpp_2m_sde",
}

Denoise = Callable[[Tensor, Any], Tensor]


def euler(D: Denoise, x: Tensor, t: Sequence[Any]) -> Tensor:
    """DDIM."""
    for a, b in pairwise(t):
        x = x + (b - a) * ((x - D(x, a)) / a)
    return x


def heun(D: Denoise, x: Tensor, t: Sequence[Any]) -> Tensor:
    """Heun in sigma (arXiv 2206.00364)."""
    for a, b in pairwise(t):
        d = (x - D(x, a)) / a
        y = x + (b - a) * d
        x = x + (b - a) * (0.5 * d + 0.5 * ((y - D(y, b)) / b))
    return x


def dpm2(D: Denoise, x: Tensor, t: Sequence[Any]) -> Tensor:
    """DPM-Solver-2 (arXiv 2206.00927)."""
    for a, b in pairwise(t):
        m = (a * b) ** 0.5
        y = x + (m - a) * ((x - D(x, a)) / a)
        x = x + (b - a) * ((y - D(y, m)) / m)
    return x


def dpmpp2s(D: Denoise, x: Tensor, t: Sequence[Any]) -> Tensor:
    """DPM-Solver++(2S) (arXiv 2211.01095)."""
    for a, b in pairwise(t):
        m = (a * b) ** 0.5
        y = (m / a) * x - (m / a - 1) * D(x, a)
        x = (b / a) * x - (b / a - 1) * D(y, m)
    return x


def dpmpp2m(D: Denoise, x: Tensor, t: Sequence[float], *, order: int = 2) -> Tensor:
    """DPM-Solver++(2M) and (3M) as published (arXiv 2211.01095)."""
    past: list[tuple[Tensor, float]] = []
    for a, b in pairwise(t):
        d, h = D(x, a), math.log(a / b)
        if not past:
            x = (b / a) * x - math.expm1(-h) * d
        elif order == 2 or len(past) == 1:
            r = past[-1][1] / h
            x = (b / a) * x - math.expm1(-h) * ((1 + 1 / (2 * r)) * d - (1 / (2 * r)) * past[-1][0])
        else:
            (d2, h2), (d1, h1) = past
            r0, r1 = h1 / h, h2 / h
            first, second = (d - d1) / r0, (d1 - d2) / r1
            slope, bend = first + (first - second) * (r0 / (r0 + r1)), (first - second) / (r0 + r1)
            p2 = math.expm1(-h) / h + 1
            x = (b / a) * x - math.expm1(-h) * d + p2 * slope - (p2 / h - 0.5) * bend
        past = [*past, (d, h)][1 - order :]
    return x


def ipndm(D: Denoise, x: Tensor, t: Sequence[Any], *, order: int) -> Tensor:
    """iPNDM as diff-sampler writes it (arXiv 2202.09778)."""
    past: list[Tensor] = []
    for a, b in pairwise(t):
        d = (x - D(x, a)) / a
        use = min(order, len(past) + 1)
        if use == 1:
            x = x + (b - a) * d
        elif use == 2:
            x = x + (b - a) * (3 * d - past[-1]) / 2
        elif use == 3:
            x = x + (b - a) * (23 * d - 16 * past[-1] + 5 * past[-2]) / 12
        else:
            x = x + (b - a) * (55 * d - 59 * past[-1] + 37 * past[-2] - 9 * past[-3]) / 24
        past = [*past, d][1 - order :]
    return x


def lms_weights(t: Sequence[float], order: int) -> list[list[float]]:
    """For each step the integrals over it of the Lagrange polynomials on the newest levels, newest first."""
    rows = []
    for k, (a, b) in enumerate(pairwise(t)):
        nodes = [t[k - j] - a for j in range(min(order, k + 1))]
        row = []
        for j, node in enumerate(nodes):
            others = [other for i, other in enumerate(nodes) if i != j]
            whole = polynomial.polyint(polynomial.polyfromroots(others))
            row.append(float(polynomial.polyval(b - a, whole) / math.prod(node - o for o in others)))
        rows.append(row)
    return rows


def multistep(D: Denoise, x: Tensor, t: Sequence[Any], *, weights: list[list[float]], order: int) -> Tensor:
    """Linear multistep with weights that are ready: LMS, and DEIS of any basis (arXiv 2204.13902)."""
    past: list[Tensor] = []
    for k, a in enumerate(t[:-1]):
        past = [*past, (x - D(x, a)) / a][-order:]
        x = x + sum(w * d for w, d in zip(weights[k], reversed(past), strict=True))
    return x


def euler_ancestral(D: Denoise, x: Tensor, t: Sequence[float], *, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Ancestral sampling."""
    for a, b in pairwise(t):
        up = b * math.sqrt(1 - (b / a) ** 2)
        x = x + (b * b / a - a) * ((x - D(x, a)) / a)
        x = x + draw(x) * up
    return x


def dpmpp2m_sde(D: Denoise, x: Tensor, t: Sequence[float], *, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """DPM-Solver++(2M) SDE, midpoint, eta 1, as in k-diffusion."""
    old, last = None, 0.0
    for a, b in pairwise(t):
        d, h = D(x, a), math.log(a / b)
        gain = -math.expm1(-2 * h)
        x = (b / a * math.exp(-h)) * x + gain * d
        if old is not None:
            x = x + (0.5 * gain * h / last) * (d - old)
        x = x + draw(x) * (b * math.sqrt(gain))
        old, last = d, h
    return x


def plain(solver: str, t: list[float], draw: Callable[[Tensor], Tensor] = torch.randn_like) -> dict[str, Any]:
    """The plain loops ``f(D, x)`` of a solver on levels t, by contender's name; none for UniPC."""
    levels = list(torch.tensor(t, dtype=torch.float32))
    slopes: dict[str, Any] = {"euler": euler, "heun": heun, "dpm2": dpm2}
    slopes |= {f"ipndm{order}": partial(ipndm, order=order) for order in (2, 3, 4)}
    for name, order in (("lms4", 4), ("deis3", 3)):
        if name == solver:
            slopes[name] = partial(multistep, weights=lms_weights(t, order), order=order)
    others: dict[str, Any] = {"dpmpp2s": dpmpp2s, "dpmpp2m": dpmpp2m, "dpmpp3m": partial(dpmpp2m, order=3)}
    others |= {
        "euler_ancestral": partial(euler_ancestral, draw=draw),
        "dpmpp2m_sde": partial(dpmpp2m_sde, draw=draw),
    }
    if solver in slopes:
        return {"loop": partial(slopes[solver], t=t), "loop0d": partial(slopes[solver], t=levels)}
    return {"loop": partial(others[solver], t=t)} if solver in others else {}
