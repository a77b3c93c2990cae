"""The published recurrences of deterministic solvers as plain loops, for tests to hold tables against.

Each takes a denoiser ``D(x, sigma)``, a point at the first level, the levels, and what it needs to be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.integrate import quad
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]


def slope(D: Denoise, x: Tensor, s: float) -> Tensor:
    return (x - D(x, s)) / s


def dpm(D: Denoise, x: Tensor, sigmas: list[float], top: int, r: Sequence[float] = (), taylor: bool = False) -> Tensor:
    """DPM-Solver-2 and -3 with exponentials of h, and the first-order one where the end is 0."""
    for a, b in pairwise(sigmas):
        e0 = slope(D, x, a)
        if b == 0 or top == 1:
            x = x + (b - a) * e0
            continue
        h = math.log(a / b)
        first = x - b * math.expm1(h) * e0
        if top == 2:
            m = a * math.exp(-r[0] * h)
            e1 = slope(D, x - m * math.expm1(r[0] * h) * e0, m)
            gain = (math.expm1(h) / h - 1) / r[0] if taylor else math.expm1(h) / (2 * r[0])
            x = first - b * gain * (e1 - e0)
        else:
            r1, r2 = r
            s1, s2 = a * math.exp(-r1 * h), a * math.exp(-r2 * h)
            e1 = slope(D, x - s1 * math.expm1(r1 * h) * e0, s1)
            p22 = math.expm1(r2 * h) / (r2 * h) - 1
            e2 = slope(D, x - s2 * math.expm1(r2 * h) * e0 - r2 / r1 * s2 * p22 * (e1 - e0), s2)
            x = first - b / r2 * (math.expm1(h) / h - 1) * (e2 - e0)
    return x


def dpm_pp(D: Denoise, x: Tensor, sigmas: list[float], r: Sequence[float], taylor: bool = False) -> Tensor:
    """DPM-Solver++(2S) and (3S)."""
    for a, b in pairwise(sigmas):
        d0 = D(x, a)
        if b == 0:
            x = d0
            continue
        h = math.log(a / b)
        first = b / a * x - math.expm1(-h) * d0
        p2 = math.expm1(-h) / h + 1
        s1 = a * math.exp(-r[0] * h)
        d1 = D(s1 / a * x - math.expm1(-r[0] * h) * d0, s1)
        if len(r) == 1:
            x = first + (p2 / r[0] if taylor else -math.expm1(-h) / (2 * r[0])) * (d1 - d0)
        else:
            r1, r2 = r
            s2 = a * math.exp(-r2 * h)
            p22 = math.expm1(-r2 * h) / (r2 * h) + 1
            d2 = D(s2 / a * x - math.expm1(-r2 * h) * d0 + r2 / r1 * p22 * (d1 - d0), s2)
            x = first + p2 / r2 * (d2 - d0)
    return x


def noise_multistep(D: Denoise, x: Tensor, sigmas: list[float], top: int, full: bool = False) -> Tensor:
    """DPM-Solver multistep; ``full`` integrates the Newton polynomial exactly."""
    outs: list[Tensor] = []
    for i, (a, b) in enumerate(pairwise(sigmas)):
        outs.append(slope(D, x, a))
        use = min(top, i + 1) if b > 0 else 1
        if use == 1:
            x = x + (b - a) * outs[-1]
            continue
        h = math.log(a / b)
        f1, f2 = math.expm1(h), math.expm1(h) / h - 1
        r0 = math.log(sigmas[i - 1] / a) / h
        one = (outs[-1] - outs[-2]) / r0
        new = x - b * f1 * outs[-1]
        if use == 2:
            x = new - b * (f2 if full else 0.5 * f1) * one
        else:
            r1 = math.log(sigmas[i - 2] / sigmas[i - 1]) / h
            two = (outs[-2] - outs[-3]) / r1
            d1, d2 = one + r0 / (r0 + r1) * (one - two), (one - two) / (r0 + r1)
            x = new - b * f2 * d1 - (2 if full else 1) * b * (f2 / h - 0.5) * d2
    return x


def adams(D: Denoise, x: Tensor, sigmas: list[float], top: int, time: Any = None, to_zero: int = 1) -> Tensor:
    """x_b = x_a + sum_j C_j eps_j: the integrals by polynomials in sigma, or by adaptive quadrature in ``time``."""
    outs: list[Tensor] = []
    for i, (a, b) in enumerate(pairwise(sigmas)):
        outs.append(slope(D, x, a))
        use = min(top, i + 1) if b > 0 else min(top, i + 1, to_zero)
        nodes = sigmas[i - use + 1 : i + 1][::-1]
        new = x
        for j, node in enumerate(nodes):
            rest = [m for m in nodes if m != node]
            if time is None or b == 0:
                poly = np.poly1d(rest, r=True)
                whole = (poly / poly(node)).integ() if rest else np.poly1d([1.0, 0.0])
                c = whole(b) - whole(a)
            else:
                c = sum(quad(basis, lo, hi, (node, rest, time), epsabs=0, epsrel=1e-13)[0] for lo, hi in halves(a, b))
            new = new + c * outs[-1 - j]
        x = new
    return x


def basis(u: float, node: float, rest: list[float], time: Any) -> float:
    """A Lagrange polynomial in ``time``, times dsigma/du with u = ln sigma."""
    t = float(time(math.exp(u)))
    return math.exp(u) * math.prod((t - time(m)) / (time(node) - time(m)) for m in rest)


def halves(a: float, b: float) -> list[tuple[float, float]]:
    u = np.linspace(math.log(a), math.log(b), 3).tolist()
    return list(pairwise(u))


def vp_time(s: float, low: float = 0.002, high: float = 80.0) -> float:
    """The t of 1 + s^2 = exp(bd t^2 / 2 + bm t) through (0.001, low) and (1, high)."""
    y0, y1 = math.log1p(low**2), math.log1p(high**2)
    bd = 2 * (y0 / 1e-3 - y1) / (1e-3 - 1)
    bm = y1 - bd / 2
    return (math.sqrt(bm * bm + 2 * bd * math.log1p(s * s)) - bm) / bd


def exponential(D: Denoise, x: Tensor, sigmas: list[float], c2: float, c3: float) -> Tensor:
    """Hochbruck and Ostermann's third-order family on dx/dlambda = D - x, with the phi functions by their recursion."""

    def phi12(z: float) -> tuple[float, float]:
        one = (math.exp(z) - 1) / z
        return one, (one - 1) / z

    gamma = (3 * c3**2 - 2 * c3) / (2 * c2 - 3 * c2**2)
    for a, b in pairwise(sigmas):
        k1 = D(x, a)
        if b == 0:
            x = k1
            continue
        h = math.log(a / b)
        (p1, p2), (q1, q2), (w1, w2) = phi12(-h), phi12(-c2 * h), phi12(-c3 * h)
        k2 = D(math.exp(-c2 * h) * x + h * c2 * q1 * k1, a * math.exp(-c2 * h))
        a32 = gamma * c2 * q2 + c3**2 / c2 * w2
        k3 = D(math.exp(-c3 * h) * x + h * ((c3 * w1 - a32) * k1 + a32 * k2), a * math.exp(-c3 * h))
        b2, b3 = gamma / (gamma * c2 + c3) * p2, p2 / (gamma * c2 + c3)
        x = math.exp(-h) * x + h * ((p1 - b2 - b3) * k1 + b2 * k2 + b3 * k3)
    return x


def exponential_adams(D: Denoise, x: Tensor, sigmas: list[float], top: int) -> Tensor:
    """Integrals of e^(u - h) times Lagrange polynomials in u = ln(a / sigma), by parts."""
    outs: list[Tensor] = []
    for i, (a, b) in enumerate(pairwise(sigmas)):
        outs.append(D(x, a))
        use = min(top, i + 1) if b > 0 else 1
        new = b / a * x
        nodes = [math.log(a / s) for s in sigmas[i - use + 1 : i + 1][::-1]]
        for j, node in enumerate(nodes):
            if use == 1:
                new = new + (1 - b / a) * outs[-1]
                continue
            poly = np.poly1d([m for m in nodes if m != node], r=True)
            poly, c, sign, h = poly / poly(node), 0.0, 1, math.log(a / b)
            while poly.coeffs.any():
                c += sign * (poly(h) - math.exp(-h) * poly(0.0))
                poly, sign = poly.deriv(), -sign
            new = new + c * outs[-1 - j]
        x = new
    return x


def uni(
    D: Denoise,
    x: Tensor,
    sigmas: list[float],
    top: int,
    variant: str = "bh2",
    noise: bool = False,
    falling: bool = False,
    uncorrected: Sequence[int] = (),
) -> Tensor:
    """UniPC as published: predict, call, correct with the same outputs and the new one; no call at the corrected."""
    outs: list[Tensor] = []
    steps = len(sigmas) - 1
    out, predicted = D(x, sigmas[0]), x
    for i, (a, b) in enumerate(pairwise(sigmas)):
        outs.append((predicted - out) / a if noise else out)
        if b == 0:
            return out
        use = min(top, i + 1, steps - i if falling else top)
        h = math.log(a / b)
        hh = h if noise else -h
        B = hh if variant == "bh1" else math.expm1(hh)
        rks = [-math.log(sigmas[i - m] / a) / h for m in range(1, use)]
        d1s = [(outs[-1 - m] - outs[-1]) / r for m, r in zip(range(1, use), rks, strict=True)]
        q, factorial, bs = math.expm1(hh) / hh - 1, 1, []
        for n in range(1, use + 1):
            factorial *= n
            bs.append(q * factorial / B)
            q = q / hh - 1 / (factorial * (n + 1))
        R = np.array([[r ** (n - 1) for r in [*rks, 1.0]] for n in range(1, use + 1)])
        base = x - b * math.expm1(h) * outs[-1] if noise else b / a * x - math.expm1(-h) * outs[-1]
        scale = b * B if noise else B
        rho = [0.5] if use == 2 else np.linalg.solve(R[:-1, :-1], bs[:-1]).tolist()
        predicted = base - scale * sum(w * d for w, d in zip(rho, d1s, strict=True)) if d1s else base
        if i == steps - 1:
            return predicted
        out = D(predicted, b)
        x = predicted
        if i not in uncorrected:
            rho = [0.5] if use == 1 else np.linalg.solve(R, bs).tolist()
            new = (predicted - out) / b if noise else out
            x = base - scale * sum(w * d for w, d in zip(rho, [*d1s, new - outs[-1]], strict=True))
    raise AssertionError("a grid has at least one step")
