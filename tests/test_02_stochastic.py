"""Stochastic and consistency samplers: published recurrences with the same noises, and limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import EDM, FLOW, VP, Mixture, Noise, Tableau, sample
from fewstep.core.path import DDPM
from fewstep.solve.consistency import consistency, tcd
from fewstep.solve.dpmpp import dpmpp
from fewstep.solve.dpmpp_sde import dpmpp2m_sde, dpmpp3m_sde, dpmpp_sde
from fewstep.solve.euler import ddim, euler
from fewstep.solve.heun import edm_stochastic, heun
from fewstep.solve.stochastic import dpm2_ancestral, dpmpp2s_ancestral, euler_ancestral

TO_ZERO = torch.tensor([12.0, 9.0, 5.0, 3.2, 1.7, 1.2, 0.5, 0.2, 0.0], dtype=torch.float64)
TO_MIN = TO_ZERO[:-1]
Denoise = Callable[[Tensor, float], Tensor]
Draw = Callable[[], Tensor]
Solver = Callable[[Tensor], Tableau]


@cache
def problem() -> Mixture:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.3 + torch.rand(5, 4, generator=generator, dtype=torch.float64), [1, 2, 3, 2, 1])


@cache
def start() -> Tensor:
    return 12.0 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- the published recurrences, each drawing its noises in the order of the table's rows


def split(a: float, b: float, eta: float) -> tuple[float, float]:
    up = min(b, eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
    return math.sqrt(b**2 - up**2), up


def ancestral(D: Denoise, x: Tensor, sigmas: list[float], draw: Draw, eta: float, s_noise: float = 1.0) -> Tensor:
    for a, b in pairwise(sigmas):
        down, up = split(a, b, eta)
        z = draw()
        x = x + (down - a) * (x - D(x, a)) / a
        x = x + z * s_noise * up if b > 0 else x
    return x


def dpm2(D: Denoise, x: Tensor, sigmas: list[float], draw: Draw, eta: float, s_noise: float) -> Tensor:
    for a, b in pairwise(sigmas):
        down, up = split(a, b, eta)
        d = (x - D(x, a)) / a
        draw()
        if down == 0:
            return x - a * d
        mid = math.exp((math.log(a) + math.log(down)) / 2)
        y = x + d * (mid - a)
        x = x + (y - D(y, mid)) / mid * (down - a) + draw() * s_noise * up
    return x


def two_s(D: Denoise, x: Tensor, sigmas: list[float], draw: Draw, eta: float, s_noise: float) -> Tensor:
    for a, b in pairwise(sigmas):
        down, up = split(a, b, eta)
        first = D(x, a)
        draw()
        if down == 0:
            return first
        t, t_next = -math.log(a), -math.log(down)
        h = t_next - t
        s = t + h / 2
        y = math.exp(-s) / a * x - math.expm1(-h / 2) * first
        x = down / a * x - math.expm1(-h) * D(y, math.exp(-s)) + draw() * s_noise * up
    return x


def sde(D: Denoise, x: Tensor, sigmas: list[float], draw: Draw, eta: float, s_noise: float, r: float) -> Tensor:
    for a, b in pairwise(sigmas):
        first = D(x, a)
        if b == 0:
            return first
        m = math.exp((1 - r) * math.log(a) + r * math.log(b))
        # A Brownian path in sigma, by its increments over the two parts of the step; each use is scaled to unit size.
        early, late = math.sqrt(a - m) * draw(), math.sqrt(m - b) * draw()
        down, up = split(a, m, eta)
        y = down / a * x - math.expm1(math.log(down / a)) * first + early / math.sqrt(a - m) * s_noise * up
        both = (1 - 1 / (2 * r)) * first + 1 / (2 * r) * D(y, m)
        down, up = split(a, b, eta)
        whole = (early + late) / math.sqrt(a - b)
        x = down / a * x - math.expm1(math.log(down / a)) * both + whole * s_noise * up
    return x


def two_m(D: Denoise, x: Tensor, sigmas: list[float], draw: Draw, eta: float, s_noise: float, midpoint: bool) -> Tensor:
    old, h_last = torch.zeros(0), 0.0
    for i, (a, b) in enumerate(pairwise(sigmas)):
        new, z = D(x, a), draw()
        if b == 0:
            return new
        h = math.log(a) - math.log(b)
        gain = -math.expm1(-h - eta * h)
        x = b / a * math.exp(-eta * h) * x + gain * new
        if i:
            r = h_last / h
            x = x + (0.5 * gain if midpoint else gain / (-h - eta * h) + 1) * (new - old) / r
        x = x + z * s_noise * b * math.sqrt(-math.expm1(-2 * eta * h))
        old, h_last = new, h
    return x


def three_m(D: Denoise, x: Tensor, sigmas: list[float], draw: Draw, eta: float, s_noise: float, twice: int) -> Tensor:
    outs: list[Tensor] = []
    steps: list[float] = []
    for a, b in pairwise(sigmas):
        outs.insert(0, D(x, a))
        z = draw()
        if b == 0:
            return outs[0]
        h = math.log(a) - math.log(b)
        wide = h * (eta + 1)
        x = math.exp(-wide) * x - math.expm1(-wide) * outs[0]
        phi_2 = math.expm1(-wide) / wide + 1
        if len(outs) == 2:
            x = x + phi_2 * (outs[0] - outs[1]) / (steps[0] / h)
        elif len(outs) > 2:
            r0, r1 = steps[0] / h, steps[1] / h
            d1_0, d1_1 = (outs[0] - outs[1]) / r0, (outs[1] - outs[2]) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            x = x + phi_2 * d1 - twice * (phi_2 / wide - 0.5) * (d1_0 - d1_1) / (r0 + r1)
        x = x + z * s_noise * b * math.sqrt(-math.expm1(-2 * h * eta))
        steps.insert(0, h)
    return x


def churned(D: Denoise, x: Tensor, sigmas: list[float], draw: Draw, churn: float, low: float, high: float) -> Tensor:
    for a, b in pairwise(sigmas):
        gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1) if low <= a <= high else 0.0
        hat = a + gamma * a
        if gamma > 0:
            x = x + math.sqrt(hat**2 - a**2) * 1.003 * draw()
        d = (x - D(x, hat)) / hat
        draw()
        y = x + (b - hat) * d
        if b > 0:
            y = x + (b - hat) * (d / 2 + (y - D(y, b)) / b / 2)
            draw()
        x = y
    return x


def consistent(D: Denoise, x: Tensor, sigmas: list[float], draw: Draw, lowest: float) -> Tensor:
    x = D(x, sigmas[0])
    for tau in sigmas[1:-1]:
        x = D(x + math.sqrt(tau**2 - lowest**2) * draw(), tau)
    return x


PUBLISHED: dict[str, tuple[Solver, Callable[..., Tensor], tuple[Any, ...]]] = {
    "ddim-0": (ddim, ancestral, (0.0,)),
    "ddim-0.6": (lambda s: ddim(s, eta=0.6), ancestral, (0.6,)),
    "ddim-1": (lambda s: ddim(s, eta=1.0), ancestral, (1.0,)),
    "euler-a": (euler_ancestral, ancestral, (1.0, 1.0)),
    "euler-a-0.7": (lambda s: euler_ancestral(s, eta=0.7, s_noise=1.1), ancestral, (0.7, 1.1)),
    "dpm2-a": (dpm2_ancestral, dpm2, (1.0, 1.0)),
    "dpm2-a-0.7": (lambda s: dpm2_ancestral(s, eta=0.7, s_noise=0.9), dpm2, (0.7, 0.9)),
    "2s-a": (dpmpp2s_ancestral, two_s, (1.0, 1.0)),
    "2s-a-0.7": (lambda s: dpmpp2s_ancestral(s, eta=0.7, s_noise=0.9), two_s, (0.7, 0.9)),
    "sde": (dpmpp_sde, sde, (1.0, 1.0, 0.5)),
    "sde-0.7": (lambda s: dpmpp_sde(s, eta=0.7, s_noise=1.2, r=0.3), sde, (0.7, 1.2, 0.3)),
    "2m-sde": (dpmpp2m_sde, two_m, (1.0, 1.0, True)),
    "2m-sde-heun": (lambda s: dpmpp2m_sde(s, eta=0.5, s_noise=1.1, midpoint=False), two_m, (0.5, 1.1, False)),
    "3m-sde": (dpmpp3m_sde, three_m, (1.0, 1.0, 1)),
    "3m-sde-exact": (lambda s: dpmpp3m_sde(s, eta=0.4, s_noise=0.9, exact=True), three_m, (0.4, 0.9, 2)),
    "edm": (edm_stochastic, churned, (40.0, 0.05, 50.0)),
    "edm-window": (lambda s: edm_stochastic(s, churn=1.0, s_min=0.5, s_max=5.0), churned, (1.0, 0.5, 5.0)),
    "consistency": (consistency, consistent, (0.0,)),
    "consistency-min": (lambda s: consistency(s, sigma_min=0.05), consistent, (0.05,)),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ends", ["zero", "min"])
def test_every_sampler_is_its_published_recurrence(name: str, ends: str) -> None:
    solver, recurrence, options = PUBLISHED[name]
    grid = TO_ZERO if ends == "zero" or name.startswith("consistency") else TO_MIN
    noise, rows = Noise.of(11, 6), itertools.count()
    wanted = recurrence(
        problem(),
        start(),
        grid.tolist(),
        lambda: noise.normal((4,), "step", next(rows), dtype=torch.float64),
        *options,
    )
    found = sample(problem(), start(), solver(grid), noise=noise)
    assert float((found - wanted).abs().max()) < 1e-12 * max(1.0, float(wanted.abs().max()))


# ---- limits


def test_without_noise_the_ode_solvers_remain() -> None:
    for grid in (TO_ZERO, TO_MIN):
        for quiet in (ddim(grid), euler_ancestral(grid, eta=0.0), tcd(grid, gamma=0.0)):
            assert not quiet.noisy
            assert torch.equal(quiet.P, euler(grid).P)
            assert torch.equal(quiet.W, euler(grid).W)
        pairs = [
            (dpmpp2m_sde(grid, eta=0.0), dpmpp(grid, 2)),
            (dpmpp2m_sde(grid, eta=0.0, midpoint=False), dpmpp(grid, 2, exact=True)),
            (dpmpp3m_sde(grid, eta=0.0, exact=True), dpmpp(grid, 3, exact=True)),
            (dpmpp_sde(grid, eta=0.0), dpmpp2s_ancestral(grid, eta=0.0)),
        ]
        for found, wanted in pairs:
            assert not found.noisy
            if found.rows == wanted.rows == len(grid) - 1:
                assert float((found.W - wanted.W).abs().max()) < 1e-13
                assert float((found.P - wanted.P).abs().max()) < 1e-13
            gap = sample(problem(), start(), found) - sample(problem(), start(), wanted)
            assert float(gap.abs().max()) < 1e-12


def test_3m_sde_without_noise_is_3m_from_its_third_step_on() -> None:
    found, published, taylor = dpmpp3m_sde(TO_MIN, eta=0.0), dpmpp(TO_MIN, 3), dpmpp(TO_MIN, 2, exact=True)
    assert float((found.W[2:] - published.W[2:]).abs().max()) < 1e-13
    assert float((found.W[:2, :2] - taylor.W[:2]).abs().max()) < 1e-13
    assert float((found.W[1] - published.W[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("grid", [TO_ZERO, TO_MIN], ids=["zero", "min"])
def test_no_churn_is_heun(grid: Tensor) -> None:
    for quiet in (edm_stochastic(grid, churn=0.0), edm_stochastic(grid, s_min=100.0, s_max=200.0)):
        assert not quiet.noisy
        for key in ("sigmas", "levels", "P", "W", "Z"):
            assert torch.equal(getattr(quiet, key), getattr(heun(grid), key))


def test_tcd_goes_from_euler_to_consistency() -> None:
    for grid in (TO_ZERO, TO_MIN):
        for frame in (VP, EDM, FLOW):
            most = tcd(grid, gamma=1.0, frame=frame)
            assert not most.P.any()
            assert torch.equal(most.W, consistency(grid).W)
            assert torch.equal(most.Z, consistency(grid).Z)
        noises = [tcd(grid, gamma=g).Z[:7, 0] for g in (0.0, 0.1, 0.3, 0.7, 1.0)]
        assert all(bool((b > a).all()) for a, b in pairwise(noises))


def test_in_sigma_tcd_keeps_the_share_that_gamma_says() -> None:
    table = tcd(TO_MIN, gamma=0.25, frame=EDM)
    assert table.P[:, 0].tolist() == pytest.approx((0.75 * TO_MIN[1:] / TO_MIN[:-1]).tolist(), rel=1e-14)
    assert table.Z[:, 0].tolist() == pytest.approx((math.sqrt(1 - 0.75**2) * TO_MIN[1:]).tolist(), rel=1e-14)


def test_tcd_is_the_published_step_of_a_discrete_teacher() -> None:
    """Even times, so that half of each is whole and the published rounding does nothing; all in DDPM's own scale."""
    times, gamma = [998, 700, 402, 100], 0.5
    kept = 1 / (1 + DDPM.levels**2)
    noise, levels = Noise.of(2, 6), DDPM.levels[times]
    x = start() / 12 * float(levels[0])
    found = sample(problem(), x, tcd(levels, gamma=gamma, frame=DDPM), noise=noise)
    scaled = x * float(kept[times[0]].sqrt())
    for k, (t, t_next) in enumerate(pairwise(times)):
        x0 = problem()(scaled / kept[t].sqrt(), float(levels[k]))
        eps = (scaled - kept[t].sqrt() * x0) / (1 - kept[t]).sqrt()
        s = kept[math.floor((1 - gamma) * t_next)]
        z = noise.normal((4,), "step", k, dtype=torch.float64)
        scaled = s.sqrt() * x0 + (1 - s).sqrt() * eps
        scaled = (kept[t_next] / s).sqrt() * scaled + (1 - kept[t_next] / s).sqrt() * z
    assert float((found - scaled / kept[times[-1]].sqrt()).abs().max()) < 1e-10


def test_tcd_below_the_first_level_of_a_discrete_frame_adds_no_noise() -> None:
    first = float(DDPM.levels[0])
    table = tcd(torch.tensor([1.0, 0.5, first / 2], dtype=torch.float64), gamma=0.4, frame=DDPM)
    assert float(table.Z[0, 0]) > 0.1
    assert float(table.Z[1, 0]) == 0
    assert float(table.P[1, 0]) == pytest.approx(first / 2 / 0.5, rel=1e-12)


def test_the_output_of_a_consistency_model_is_at_its_lowest_level() -> None:
    table = consistency(TO_MIN, sigma_min=0.2)
    assert (table.Z[:, 0] ** 2 + 0.2**2).tolist() == pytest.approx((TO_MIN[1:] ** 2).tolist(), rel=1e-12)
    assert float(table.Z[-1, 0]) == 0
    assert table.W[:, 0].tolist() == [1.0] * 7
    assert not table.P.any()
