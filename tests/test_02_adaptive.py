"""Adaptive steps: the published algorithm written out, tolerances met, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import CountingDenoiser, Generator, InputError, Mixture, Noise, Step
from fewstep.solve.adaptive import AdaptiveDPM

START, END = 20.0, 0.05


@cache
def problem() -> Mixture:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.3 + torch.rand(5, 4, generator=generator, dtype=torch.float64), [1, 2, 3, 2, 1])


@cache
def start() -> Tensor:
    return START * torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@cache
def exact() -> Tensor:
    return problem().flow(start(), START, END, 600)


class Run:
    """The published adaptive solver written out on the noise prediction in ``t = -ln sigma``, one branch at a time."""

    def __init__(self, order: int, rtol: float, atol: float, eta: float, p: float, i: float, d: float) -> None:
        self.order, self.rtol, self.atol, self.eta = order, rtol, atol, eta
        over = 1.5 if eta else order
        self.b = ((p + i + d) / over, -(p + 2 * d) / over, d / over)
        self.accepted, self.rejected = 0, 0

    def eps(self, x: Tensor, t: float) -> Tensor:
        return (x - problem()(x, math.exp(-t))) / math.exp(-t)

    def pair(self, x: Tensor, s: float, t: float) -> tuple[Tensor, Tensor]:
        h, sigma = t - s, math.exp(-t)
        e0 = self.eps(x, s)
        if self.order == 2:
            mid = s + h / 2
            e1 = self.eps(x - math.exp(-mid) * math.expm1(h / 2) * e0, mid)
            low = x - sigma * math.expm1(h) * e0
            return low, low - sigma * math.expm1(h) * (e1 - e0)
        s1, s2 = s + h / 3, s + 2 * h / 3
        e1 = self.eps(x - math.exp(-s1) * math.expm1(h / 3) * e0, s1)
        low = x - sigma * math.expm1(h) * e0 - 3 / 2 * sigma * math.expm1(h) * (e1 - e0)
        u2 = x - math.exp(-s2) * math.expm1(2 * h / 3) * e0
        u2 = u2 - 2 * math.exp(-s2) * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * (e1 - e0)
        e2 = self.eps(u2, s2)
        return low, x - sigma * math.expm1(h) * e0 - 3 / 2 * sigma * (math.expm1(h) / h - 1) * (e2 - e0)

    def __call__(self, x: Tensor, noise: Noise) -> Tensor:
        s, end, h, previous = -math.log(START), -math.log(END), 0.05, x
        errs: list[float] = []
        while s < end - 1e-5:
            t = min(end, s + h)
            lower, up = t, 0.0
            if self.eta:
                a, b = math.exp(-s), math.exp(-t)
                up = min(b, self.eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
                lower = min(end, -math.log(math.sqrt(b**2 - up**2)))
                up = math.sqrt(b**2 - math.exp(-lower) ** 2)
            low, high = self.pair(x, s, lower)
            delta = (self.rtol * torch.maximum(low.abs(), previous.abs())).clamp(min=self.atol)
            error = float(torch.linalg.norm((low - high) / delta)) / math.sqrt(x.numel())
            inverse = 1 / (1e-8 + error)
            errs = errs or [inverse] * 3
            errs[0] = inverse
            factor = 1 + math.atan(errs[0] ** self.b[0] * errs[1] ** self.b[1] * errs[2] ** self.b[2] - 1)
            h = h * factor
            if factor < 0.81:
                self.rejected += 1
                continue
            errs[2], errs[1] = errs[1], errs[0]
            unit = noise.normal((4,), "step", self.accepted, dtype=torch.float64)
            previous, x, s = low, high + up * unit, t
            self.accepted += 1
        return x


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(
    ("tolerance", "pid"), [(1.0, (0.0, 1.0, 0.0)), (0.02, (0.0, 1.0, 0.0)), (0.1, (0.3, 0.6, 0.1))]
)
def test_it_is_the_published_algorithm(
    order: int, eta: float, tolerance: float, pid: tuple[float, float, float]
) -> None:
    rtol, atol, noise = 0.05 * tolerance, 0.0078 * tolerance, Noise.of(3, 8)
    p, i, d = pid
    ours = AdaptiveDPM(START, END, order, rtol, atol, pcoeff=p, icoeff=i, dcoeff=d, eta=eta, max_steps=5000)
    published = Run(order, rtol, atol, eta, *pid)
    wanted = published(start(), noise)
    counted = CountingDenoiser(problem())
    found = ours(counted, start(), noise=noise)
    assert (ours.accepted, ours.rejected) == (published.accepted, published.rejected)
    assert float((found - wanted).abs().max()) < 1e-10
    assert counted.nfe == ours.nfe == order * ours.accepted + (order - 1) * ours.rejected


def test_some_steps_are_rejected_and_tried_again() -> None:
    sampler = AdaptiveDPM(START, END, rtol=1e-4, atol=1e-4, h_init=2.0)
    sampler(problem(), start())
    assert sampler.rejected > 0
    assert sampler.accepted > 10


@pytest.mark.parametrize("order", [2, 3])
def test_the_error_falls_with_the_tolerance(order: int) -> None:
    errors, spent = [], []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        sampler = AdaptiveDPM(START, END, order, rtol=tolerance, atol=tolerance)
        found = sampler(problem(), start())
        errors.append(float((found - exact()).square().mean().sqrt()))
        spent.append(sampler.nfe)
        # The tolerance is one step's; what the steps add up to is a few times as much.
        assert errors[-1] < 4 * tolerance
    assert all(b < a / 5 for a, b in pairwise(errors))
    # Steps shrink as the root of the tolerance that the order says.
    assert spent[-1] / spent[-2] == pytest.approx(10 ** (1 / order), rel=0.15)


@pytest.mark.parametrize("order", [2, 3])
def test_every_accepted_step_meets_the_tolerance(order: int) -> None:
    rtol, atol, seen = 1e-2, 2e-3, list[Step]()
    AdaptiveDPM(START, END, order, rtol=rtol, atol=atol, h_init=2.0)(problem(), start(), on_step=seen.append)
    retry = Run(order, rtol, atol, 0.0, 0.0, 1.0, 0.0)
    # Accepted means 1 + atan(E^(-1/order) - 1) >= 0.81.
    most = (1 + math.tan(0.81 - 1)) ** -order
    previous, errors = start(), []
    for here, there in pairwise(seen):
        low, high = retry.pair(here.point, -math.log(here.level), -math.log(there.level))
        assert float((high - there.point).abs().max()) < 1e-11
        delta = (rtol * torch.maximum(low.abs(), previous.abs())).clamp(min=atol)
        errors.append(float(((low - high) / delta).square().mean().sqrt()))
        previous = low
    assert max(errors) <= most
    assert max(errors) > 0.3


def test_the_higher_order_is_cheaper_when_accuracy_counts() -> None:
    runs = [AdaptiveDPM(START, END, order, rtol=1e-4, atol=1e-4) for order in (2, 3)]
    for run in runs:
        run(problem(), start())
    assert runs[1].nfe < runs[0].nfe / 1.5


def test_what_it_says_about_itself() -> None:
    sampler = AdaptiveDPM(START, END)
    assert (sampler.start, sampler.end, sampler.nfe, sampler.name) == (START, END, 0, "dpm-adaptive")
    assert not sampler.noisy
    seen: list[Step] = []
    counted = CountingDenoiser(problem())
    out = sampler(counted, start(), on_step=seen.append)
    assert [s.k for s in seen] == list(range(sampler.accepted + 1))
    assert (seen[0].level, seen[-1].level, seen[-1].denoised) == (START, END, None)
    assert all(a.level > b.level for a, b in pairwise(seen))
    assert torch.equal(seen[0].point, start())
    assert torch.equal(seen[-1].point, out)
    for step in seen[:-1]:
        assert step.denoised is not None
        assert torch.equal(step.denoised, problem()(step.point, step.level))
    first = sampler.nfe
    sampler(counted, start())
    assert sampler.nfe == first
    assert counted.nfe == 2 * first


def test_a_batch_shares_its_steps_within_the_tolerance() -> None:
    alone, together = list[Step](), list[Step]()
    sampler = AdaptiveDPM(START, END, rtol=1e-3, atol=1e-3)
    one = sampler(problem(), start()[:1], on_step=alone.append)
    all_of_them = sampler(problem(), start(), on_step=together.append)
    assert [s.level for s in alone] != [s.level for s in together]
    assert 0 < float((all_of_them[:1] - one).abs().max()) < 1e-3


def test_from_pure_noise_in_float32() -> None:
    unit = Noise.of(1, 8).normal((4,), "start", dtype=torch.float64)
    for eta in (0.0, 1.0):
        sampler = AdaptiveDPM(1e8, END, eta=eta, max_steps=3000)
        wide = sampler(problem(), 1e8 * unit, noise=Noise.of(2, 8))
        narrow = sampler(problem(), (1e8 * unit).float(), noise=Noise.of(2, 8))
        assert narrow.dtype == torch.float32
        assert float((wide - narrow.double()).abs().max()) < 1e-3
    wanted = problem().flow(1e8 * unit, 1e8, END, 500)
    found = AdaptiveDPM(1e8, END, rtol=1e-4, atol=1e-4)(problem(), 1e8 * unit)
    assert float((found - wanted).abs().max()) < 5e-3


def test_its_noise_has_the_right_size() -> None:
    """On a point mass every sample at level b is the point plus b times a unit normal, whatever the steps."""
    point, n = Mixture(torch.full((1, 4), 0.7), 0.0), 2000
    unit = Noise.of(5, n).normal((4,), "start", dtype=torch.float64)
    sampler = AdaptiveDPM(START, END, eta=1.0)
    levels: list[float] = []
    out = sampler(
        point, 0.7 + START * unit, noise=Noise.of(6, n), on_step=lambda s: levels.append(float(s.point.std()) / s.level)
    )
    assert levels == pytest.approx([1.0] * len(levels), abs=5 / math.sqrt(8 * n))
    assert len(levels) > 5
    assert abs(float(torch.corrcoef(torch.stack([out.flatten(), unit.flatten()]))[0, 1])) < 0.1


def test_it_gives_up_and_says_so() -> None:
    with pytest.raises(InputError, match=r"more than max_steps=7 steps: it stands at sigma .* rtol=1e-06"):
        AdaptiveDPM(START, END, rtol=1e-6, atol=1e-6, max_steps=7)(problem(), start())

    def rough(x: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        return torch.where(torch.as_tensor(sigma) > 1.0, x * 0, x * math.nan)

    with pytest.raises(InputError, match=r"not finite between sigma 0\.\d+ and 0\.05"):
        AdaptiveDPM(START, END, order=2, max_steps=50)(rough, start())  # type: ignore[arg-type]


def test_generators_sample_with_it() -> None:
    small = Mixture(torch.tensor([[-0.5, 0.3], [0.4, 0.1]]), 0.01)
    for sampler in (AdaptiveDPM(80.0, 0.02), AdaptiveDPM(80.0, 0.02, eta=1.0)):
        pictures = Generator(small, sampler).sample(16, progress=False)
        assert float((pictures[:, 0].abs() - 0.45).abs().max()) < 0.6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaptiveDPM(0.05, 20.0), "0 < sigma_end < sigma_start < inf, got 20.0 and 0.05"),
        (lambda: AdaptiveDPM(20.0, 0.0), "0 < sigma_end < sigma_start < inf, got 0.0"),
        (lambda: AdaptiveDPM(math.inf, 1.0), "< inf, got 1.0 and inf"),
        (lambda: AdaptiveDPM(20.0, 0.1, order=1), "orders 2 and 3, got 1"),
        (lambda: AdaptiveDPM(20.0, 0.1, rtol=-0.1), "rtol >= 0 and atol > 0, got rtol=-0.1"),
        (lambda: AdaptiveDPM(20.0, 0.1, atol=0.0), "rtol >= 0 and atol > 0, got rtol=0.05 and atol=0.0"),
        (lambda: AdaptiveDPM(20.0, 0.1, h_init=0.0), "h_init > 0 in log sigma, got 0.0"),
        (lambda: AdaptiveDPM(20.0, 0.1, accept_safety=1.5), "accept_safety <= 1, got 1.5"),
        (lambda: AdaptiveDPM(20.0, 0.1, icoeff=math.nan), "finite pcoeff, icoeff and dcoeff, got 0.0, nan and 0.0"),
        (lambda: AdaptiveDPM(20.0, 0.1, max_steps=0), "max_steps >= 1, got 0"),
        (lambda: AdaptiveDPM(20.0, 0.1, eta=-1.0), "eta must be a finite number >= 0, got -1.0"),
        (lambda: AdaptiveDPM(20.0, 0.1, s_noise=0.0), "s_noise must be a finite number > 0, got 0.0"),
        (lambda: AdaptiveDPM(20.0, 0.1, eta=1.0)(problem(), start()), r"adds noise: pass noise=Noise.of\(seed, 8\)"),
        (lambda: AdaptiveDPM(20.0, 0.1)(problem(), start(), noise=Noise.of(0, 7)), "7 sources for 8 samples"),
    ],
)
def test_bad_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
