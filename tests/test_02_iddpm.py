"""Learned variances: the published chain in its own scale, exact laws, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import CountingDenoiser, Generator, InputError, Mixture, Noise, Step, sample
from fewstep.core.path import DDPM, DDPMPath
from fewstep.grid import karras, logsnr
from fewstep.solve.euler import ddim
from fewstep.solve.iddpm import LearnedVariance

START, END = 20.0, 0.05


@cache
def problem() -> Mixture:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.3 + torch.rand(5, 4, generator=generator, dtype=torch.float64), [1, 2, 3, 2, 1])


@cache
def start() -> Tensor:
    return START * torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class WithFraction(CountingDenoiser):
    """A denoiser with a variance fraction: a number, or a function of the state and the level."""

    def __init__(self, denoiser: Any, fraction: float | Callable[[Tensor, float], Tensor]) -> None:
        super().__init__(denoiser)
        self.fraction = fraction

    def features(
        self, x: Tensor, sigma: Tensor | float, cond: Any, taps: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert tuple(taps) == ("logvar_frac",)
        own = self.fraction(x, float(sigma)) if callable(self.fraction) else torch.full_like(x, self.fraction)
        return self(x, sigma, cond), {"logvar_frac": own}


def varied(x: Tensor, sigma: float) -> Tensor:
    return torch.sigmoid(x / sigma + math.log(sigma))


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("top", [START, 1e8])
def test_without_extra_variance_it_is_ddim_with_all_its_noise(to_zero: bool, top: float) -> None:
    grid, noise, x = karras(9, 0.02, top, to_zero=to_zero), Noise.of(4, 8), top / START * start()
    wanted = sample(problem(), x, ddim(grid, eta=1.0), noise=noise)
    D = WithFraction(problem(), 0.0)
    sampler = LearnedVariance(grid)
    assert float((sampler(D, x, noise=noise) - wanted).abs().max()) < 1e-12 * max(1.0, float(wanted.abs().max()))
    assert D.nfe == sampler.nfe == 9
    assert (sampler.start, sampler.end, sampler.noisy) == (top, 0.0 if to_zero else 0.02, True)


def respaced(table: DDPMPath, times: list[int]) -> tuple[list[float], list[float]]:
    """The products of kept signal at these times and the betas of the shortened chain, both with time increasing."""
    kept = (1 / (1 + table.levels**2)).tolist()
    products = [kept[t] for t in times]
    return products, [1 - now / before for before, now in pairwise([1.0, *products])]


@pytest.mark.parametrize("clip", [False, True])
def test_it_is_the_published_chain_in_its_own_scale(clip: bool) -> None:
    """Betas, posterior mean coefficients and interpolated log variances as improved DDPM has them, per pixel."""
    times = [0, 60, 200, 333, 500, 650, 800, 999]
    products, betas = respaced(DDPM, times)
    levels = torch.cat([DDPM.levels[times].flip(0), torch.zeros(1, dtype=torch.float64)])
    x, noise = start() / START * float(levels[0]), Noise.of(7, 8)
    found = LearnedVariance(levels, clip)(WithFraction(problem(), varied), x, noise=noise)
    scaled = x * math.sqrt(products[-1])
    for k, i in enumerate(reversed(range(len(times)))):
        sigma, before = float(levels[k]), products[i - 1] if i else 1.0
        x = scaled / math.sqrt(products[i])
        x0 = problem()(x, sigma)
        x0 = x0.clamp(-1, 1) if clip else x0
        on_x0 = betas[i] * math.sqrt(before) / (1 - products[i])
        on_x = (1 - before) * math.sqrt(1 - betas[i]) / (1 - products[i])
        mean = on_x0 * x0 + on_x * scaled
        if i == 0:
            scaled = mean
            break
        small, large = math.log(betas[i] * (1 - before) / (1 - products[i])), math.log(betas[i])
        v = varied(x, sigma)
        unit = noise.normal((4,), "step", k, dtype=torch.float64)
        scaled = mean + (0.5 * (v * large + (1 - v) * small)).exp() * unit
    assert float((found - scaled).abs().max()) < 1e-10
    assert (float(found.abs().max()) <= 1) == clip


class Units:
    """In place of noise: the noise of step k is 1 in sample k + 1 and 0 elsewhere; a linear run then shows weights."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps + 1

    def normal(self, shape: Any, what: str, k: int, dtype: torch.dtype) -> Tensor:
        unit = torch.zeros(len(self), 1, dtype=dtype)
        unit[k + 1] = 1
        return unit


def final_variance(grid: Tensor, variance: float, fraction: float) -> float:
    D = WithFraction(Mixture(torch.zeros(1, 1), variance), fraction)
    x = torch.zeros(len(grid), 1, dtype=torch.float64)
    x[0] = math.sqrt(variance + float(grid[0]) ** 2)
    noise: Any = Units(len(grid) - 1)
    return float(LearnedVariance(grid)(D, x, noise=noise).square().sum())


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_extremes_are_right_for_a_point_and_for_a_unit_gaussian(steps: int) -> None:
    """The smaller variance is exact when x0 is known, the larger one when x0 ~ N(0, 1): in any number of steps."""
    for top in (START, 1e8):
        grid = logsnr(steps, END, top, to_zero=False)
        assert final_variance(grid, 0.0, 0.0) == pytest.approx(END**2, rel=1e-9)
        assert final_variance(grid, 1.0, 1.0) == pytest.approx(1 + END**2, rel=1e-9)
        assert final_variance(grid, 0.3, 0.0) < 0.3 + END**2 < final_variance(grid, 0.3, 1.0)


def test_the_larger_variance_is_larger_and_one_step_from_pure_noise_is_a_unit_gaussian() -> None:
    for a, b in ((1e8, 80.0), (80.0, 0.002), (1.0, 0.999), (0.1, 0.05)):
        found = []
        for fraction in (0.0, 0.5, 1.0):
            D = WithFraction(Mixture(torch.zeros(1, 1), 0.0), fraction)
            noise: Any = Units(1)
            out = LearnedVariance(torch.tensor([a, b], dtype=torch.float64))(
                D, torch.zeros(2, 1, dtype=torch.float64), noise=noise
            )
            found.append(float(out[1]))
        small, middle, large = found
        assert small <= middle <= large
        assert middle == pytest.approx(math.sqrt(small * large), rel=1e-12)
        assert small**2 == pytest.approx(b**2 * (a - b) * (a + b) / a**2, rel=1e-12)
        assert large**2 == pytest.approx((a - b) * (a + b) * (1 + b**2) / (1 + a**2), rel=1e-12)
    assert large > 0


def test_learned_variance_shows_its_steps() -> None:
    sampler, seen = LearnedVariance(karras(5, 0.1, START)), list[Step]()
    out = sampler(WithFraction(problem(), varied), start(), noise=Noise.of(1, 8), on_step=seen.append)
    assert [s.level for s in seen] == sampler.levels.tolist()
    assert torch.equal(seen[-1].point, out)
    assert seen[0].denoised is not None
    assert torch.equal(seen[0].denoised, problem()(start(), START))
    noise = Noise.of(1, 8)
    for rows in (slice(0, 3), slice(3, None)):
        part = sampler(WithFraction(problem(), varied), start()[rows], noise=noise[rows])
        assert float((part - out[rows]).abs().max()) < 1e-12


def test_one_step_to_zero_needs_no_noise() -> None:
    sampler = LearnedVariance(torch.tensor([START, 0.0]))
    assert not sampler.noisy
    found = sampler(WithFraction(problem(), 1.0), start())
    assert torch.equal(found, problem()(start(), START))


def test_generators_sample_with_it() -> None:
    small = WithFraction(Mixture(torch.tensor([[-0.5, 0.3], [0.4, 0.1]]), 0.01), 0.5)
    generator = Generator(small, LearnedVariance(karras(12, 0.02, 80.0)))
    pictures = generator.sample(16, progress=False)
    assert float((pictures[:, 0].abs() - 0.45).abs().max()) < 0.6
    assert torch.equal(pictures, generator.sample(16, progress=False, batch=5))


def taps(D: Any) -> Any:
    return LearnedVariance(karras(3, 0.1, START))(D, start(), noise=Noise.of(0, 8))


class Other(WithFraction):
    """Returns a fraction of another shape or name."""

    def features(self, x: Tensor, sigma: Any, cond: Any, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        out, found = super().features(x, sigma, cond, taps)
        return out, {"logvar": found["logvar_frac"]} if self.fraction else {"logvar_frac": found["logvar_frac"][:, :2]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LearnedVariance(torch.tensor([1.0, 2.0])), "must decrease"),
        (lambda: LearnedVariance(torch.tensor([1.0])), "at least two levels"),
        (lambda: LearnedVariance(karras(3, 0.1, 20.0))(problem(), start()), "adds noise: pass noise="),
        (
            lambda: LearnedVariance(karras(3, 0.1, 20.0))(problem(), start(), noise=Noise.of(0, 9)),
            "9 sources for 8 samples",
        ),
        (lambda: taps(problem()), r"Mixture has no features\(\), so no learned variance 'logvar_frac'"),
        (lambda: taps(Other(problem(), 1.0)), r"'logvar_frac' of shape \(8, 4\), got only \['logvar'\]"),
        (lambda: taps(Other(problem(), 0.0)), r"'logvar_frac' of shape \(8, 4\), got \(8, 2\)"),
    ],
)
def test_bad_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
