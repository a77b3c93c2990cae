"""The grid whose points are quantiles of a beta distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.grid.base import check_range, warped
from fewstep.grid.coordinate import Coordinate, coordinate_maps


def beta(
    steps: int,
    sigma_min: float,
    sigma_max: float,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    coordinate: Coordinate = "log",
    to_zero: bool = True,
) -> Tensor:
    """Quantiles of Beta(alpha, beta) at even probabilities, over a coordinate of the noise level (arXiv 2407.12173).

    Parameters below 1 put more points at both ends. The paper spaces a model's time so: pass its path as
    ``coordinate``. ``coordinate="sigma"`` is what diffusers calls beta sigmas. ComfyUI takes the whole indices nearest
    to those of ``coordinate=DDPM(betas), to_zero=False`` and puts 0 for the last level.
    Returns (steps + 1,) float64. Raises InputError for bad ranges, alpha or beta outside (0, 100], an unknown
    coordinate, or parameters so small that levels coincide.
    """
    check_range(steps, sigma_min, sigma_max)
    if not 0 < alpha <= 100 or not 0 < beta <= 100:
        raise InputError(f"the beta grid needs alpha and beta in (0, 100], got {alpha} and {beta}")
    forward, inverse = coordinate_maps(coordinate)
    top, bottom = forward(torch.tensor([sigma_max, sigma_min], dtype=torch.float64)).tolist()

    def probability(s: Tensor) -> Tensor:
        shares = ((forward(s) - bottom) / (top - bottom)).tolist()
        return torch.tensor([incomplete_beta(x, alpha, beta) for x in shares], dtype=torch.float64)

    def level(p: Tensor) -> Tensor:
        shares = torch.tensor([beta_quantile(q, alpha, beta) for q in p.tolist()], dtype=torch.float64)
        return inverse(bottom + shares * (top - bottom))

    return warped(steps, sigma_min, sigma_max, probability, level, to_zero)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), the distribution function of Beta(a, b), for x in [0, 1].

    By its continued fraction, good to 1e-13 for a and b up to 100.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    # The fraction converges fast on this side of the mean; the other side follows by symmetry.
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    return math.exp(_log_weight(x, a, b)) * _fraction(x, a, b) / a


def _log_weight(x: float, a: float, b: float) -> float:
    """``log(x^a (1 - x)^b / B(a, b))``."""
    return a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)


def _fraction(x: float, a: float, b: float) -> float:
    """``1 / (1 + d1 / (1 + d2 / ...))``, evaluated forwards by the modified Lentz method."""
    upper, lower = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = lower
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            lower = 1 / (1 + term * lower)
            upper = 1 + term / upper
            change = upper * lower
            value *= change
        if abs(change - 1) < 1e-15:
            break
    return value


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x in [0, 1] with ``incomplete_beta(x, a, b) = p``: Newton steps that a shrinking bracket keeps in place."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    # Near 1 the distance to 1 is what carries the digits.
    if p > 0.5:
        return 1 - beta_quantile(1 - p, b, a)
    low, high, x = 0.0, 1.0, a / (a + b)
    for _ in range(200):
        excess = incomplete_beta(x, a, b) - p
        low, high = (low, x) if excess > 0 else (x, high)
        slope = math.exp(_log_weight(x, a, b)) / (x * (1 - x))
        new = x - excess / slope if slope > 0 else low
        if not low < new < high:
            new = 0.5 * (low + high)
        if abs(new - x) <= 1e-14 * x:
            return new
        x = new
    return x
