"""Inversion of Euler's method: the recurrences, how well sampling undoes it, and what acceleration buys."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import EDM, FLOW, CountingDenoiser, InputError, Mixture, sample
from fewstep.core.sample import Step
from fewstep.grid import logsnr
from fewstep.solve.euler import euler
from fewstep.solve.invert import Aidi, aidi, ddim_invert

START, END = 20.0, 0.05
UNEVEN = torch.tensor([12.0, 9.0, 5.0, 3.2, 1.7, 1.2, 0.5, 0.2], dtype=torch.float64)
TO_ZERO = torch.cat([UNEVEN, UNEVEN.new_zeros(1)])


@cache
def problem() -> Mixture:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.3 + torch.rand(5, 4, generator=generator, dtype=torch.float64), [1, 2, 3, 2, 1])


@cache
def pictures() -> Tensor:
    x = problem().draw(24)
    return x + END * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def grid(steps: int = 20) -> Tensor:
    return logsnr(steps, END, START, to_zero=False)


def error(inverse: Any, sigmas: Tensor, x: Tensor | None = None) -> float:
    """How far sampling from the inverse of the pictures is from the pictures."""
    x = pictures() if x is None else x
    return float((sample(problem(), inverse(problem(), x), euler(sigmas)) - x).abs().max())


def here(x: Tensor, sigmas: list[float]) -> Tensor:
    for b, a in pairwise(sigmas):
        x = x + (a - b) * (x - problem()(x, b)) / b
    return x


def following(x: Tensor, sigmas: list[float], state: Callable[[float], tuple[float, float]]) -> Tensor:
    """DDIM inversion as written for z = alpha x0 + beta n: the noise that the network sees in z_b at the time of a."""
    alpha, _ = state(sigmas[0])
    z = alpha * x
    for b, a in pairwise(sigmas):
        (alpha_b, beta_b), (alpha_a, beta_a) = state(b), state(a)
        eps = (z - alpha_a * problem()(z / alpha_a, a)) / beta_a
        z = alpha_a / alpha_b * (z - beta_b * eps) + beta_a * eps
    return z / alpha_a


def preserving(s: float) -> tuple[float, float]:
    return 1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s)


def straight(s: float) -> tuple[float, float]:
    return 1 / (1 + s), s / (1 + s)


def fixed_point(x: Tensor, sigmas: Tensor, iterations: int, average: bool) -> Tensor:
    known = None
    for b, a in pairwise(sigmas.flip(0).tolist()):
        images: list[Tensor] = []
        z = x if known is None else x + (a - b) * (x - known) / b
        for _ in range(iterations):
            known = problem()(z, a)
            images.append(x + (a - b) * (z - known) / a)
            z = (images[-1] + images[-2]) / 2 if average and len(images) > 1 else images[-1]
        x = z
    return x


@pytest.mark.parametrize(
    ("make", "recurrence"),
    [
        (ddim_invert, here),
        (partial(ddim_invert, at="next"), partial(following, state=preserving)),
        (partial(ddim_invert, at="next", frame=FLOW), partial(following, state=straight)),
        (partial(ddim_invert, at="next", frame=EDM), partial(following, state=lambda s: (1.0, s))),
    ],
    ids=["here", "next", "next-flow", "next-edm"],
)
def test_ddim_inversion_is_its_recurrence(make: Any, recurrence: Callable[[Tensor, list[float]], Tensor]) -> None:
    table, rising = make(UNEVEN), UNEVEN.flip(0).tolist()
    wanted = recurrence(pictures(), rising)
    assert float((sample(problem(), pictures(), table) - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
    assert table.nfe == len(UNEVEN) - 1
    assert (table.start, float(table.levels[-1])) == (0.2, 12.0)


@pytest.mark.parametrize("at", ["here", "next"])
def test_ddim_inversion_from_level_zero(at: Any) -> None:
    """The first step shows the denoiser the picture at the first positive level; the rest is as from there."""
    found = sample(problem(), pictures(), ddim_invert(TO_ZERO, at=at))
    first = following(pictures(), [0.0, 0.2], preserving)
    wanted = sample(problem(), first, ddim_invert(UNEVEN, at=at))
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
    assert ddim_invert(TO_ZERO, at=at).nfe == len(UNEVEN)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO], ids=["min", "zero"])
def test_fixed_point_inversion_is_its_recurrence(average: bool, sigmas: Tensor) -> None:
    table = aidi(sigmas, iterations=4, average=average)
    wanted = fixed_point(pictures(), sigmas, 4, average)
    assert float((sample(problem(), pictures(), table) - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
    assert table.nfe == 4 * (len(sigmas) - 1)
    assert (table.start, float(table.levels[-1])) == (float(sigmas[-1]), 12.0)


@pytest.mark.parametrize("at", ["here", "next"])
def test_explicit_inversion_is_of_first_order(at: Any) -> None:
    errors = [error(ddim_invert(grid(n), at=at), grid(n)) for n in (160, 320)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)


def test_a_constant_denoiser_is_inverted_exactly() -> None:
    point = Mixture(torch.full((1, 4), 0.75), 0.0)
    noise = torch.randn(24, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for inverse in (ddim_invert(grid(6)), Aidi(grid(6), iterations=2)):
        found = inverse(point, 0.75 + END * noise)
        assert float((found - 0.75 - START * noise).abs().max()) < 1e-12 * START


def test_reconstruction_converges_with_the_iterations() -> None:
    errors = {n: error(aidi(grid(), iterations=n), grid()) for n in (1, 2, 4, 6, 11, 20, 40)}
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert errors[1] > 1e-2
    assert errors[4] < 3e-3
    assert errors[11] < 1e-6
    assert errors[20] < 1e-10
    assert errors[40] < 1e-13
    assert errors[6] < error(aidi(grid(), iterations=6, average=True), grid())


def test_the_iteration_contracts_as_on_a_gaussian() -> None:
    """There the residual shrinks by (a - b) a / (variance + a^2) each time, for every state."""
    variance, a, b = 0.6, 3.0, 0.4
    gaussian = Mixture(torch.zeros(1, 3, dtype=torch.float64), variance)
    sigmas = torch.tensor([a, b], dtype=torch.float64)
    points = [sample(gaussian, pictures()[:, :3], aidi(sigmas, iterations=n)) for n in range(1, 8)]
    for first, second, third in zip(points, points[1:], points[2:], strict=False):
        ratio = (third - second) / (second - first)
        assert ratio.flatten().tolist() == pytest.approx([(a - b) * a / (variance + a * a)] * ratio.numel(), rel=1e-9)


def test_averaging_helps_where_the_map_turns_round() -> None:
    """A denoiser as steep as under strong guidance makes the slope of the map close to -1."""

    class Steep(Mixture):
        def __call__(self, x: Tensor, sigma: Any, cond: Any = None) -> Tensor:
            return 2.2 * x

    steep = Steep(torch.zeros(1, 4, dtype=torch.float64), 1.0)
    sigmas, x = torch.tensor([5.0, 1.0], dtype=torch.float64), pictures()
    errors = []
    for average in (False, True):
        found = sample(steep, x, aidi(sigmas, iterations=8, average=average))
        errors.append(float((sample(steep, found, euler(sigmas)) - x).abs().max()))
    assert errors[1] < 0.1 * errors[0]


# ---- Anderson acceleration


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO], ids=["min", "zero"])
def test_without_memory_it_is_the_plain_iteration(sigmas: Tensor) -> None:
    plain = sample(problem(), pictures(), aidi(sigmas, iterations=3))
    found = Aidi(sigmas, iterations=3, memory=0)(problem(), pictures())
    assert float((found - plain).abs().max()) < 1e-12 * float(plain.abs().max())


def test_one_step_of_memory_solves_a_scalar_slope() -> None:
    gaussian = Mixture(torch.full((1, 4), 0.3), 0.6)
    sigmas = torch.tensor([6.0, 0.5], dtype=torch.float64)
    solve = lambda n: Aidi(sigmas, iterations=n, memory=1)(gaussian, pictures())  # noqa: E731
    errors = [float((sample(gaussian, solve(n), euler(sigmas)) - pictures()).abs().max()) for n in (1, 2, 3)]
    assert errors[0] > 0.1
    assert errors[1] < 1e-12
    # A residual that has died out is no reason to divide by it.
    assert errors[2] < 1e-12


def test_memory_pays_on_long_steps() -> None:
    sigmas = grid(6)
    plain = error(aidi(sigmas, iterations=8), sigmas)
    fast = [error(Aidi(sigmas, iterations=8, memory=m), sigmas) for m in (1, 2, 4)]
    assert fast[0] < 0.3 * plain
    assert fast[1] < 0.03 * plain
    assert error(Aidi(sigmas, iterations=40, memory=4), sigmas) < 1e-10


def test_level_zero_is_inverted_too() -> None:
    sigmas = torch.cat([grid(), torch.zeros(1, dtype=torch.float64)])
    x = problem()(pictures(), END)
    assert error(Aidi(sigmas, iterations=30, memory=3), sigmas, x) < 1e-10
    assert error(aidi(sigmas, iterations=30), sigmas, x) < 1e-8


def test_each_sample_is_its_own_problem() -> None:
    inverse = Aidi(grid(5), iterations=5, memory=2)
    whole, part = inverse(problem(), pictures()), inverse(problem(), pictures()[3:7])
    assert float((whole[3:7] - part).abs().max()) < 1e-9


def test_it_is_a_sampler() -> None:
    inverse = Aidi(TO_ZERO, iterations=3, memory=2)
    counted, steps = CountingDenoiser(problem()), list[Step]()
    found = inverse(counted, pictures().reshape(24, 2, 2).flatten(1).float(), on_step=steps.append)
    assert found.dtype == torch.float32
    assert (inverse.start, inverse.end, inverse.nfe) == (0.0, 12.0, 24)
    assert counted.nfe == inverse.nfe
    assert [s.k for s in steps] == list(range(25))
    assert [s.level for s in steps] == [0.0, *[v for v in UNEVEN.flip(0).tolist() for _ in range(3)][1:], 12.0]
    assert torch.equal(steps[-1].point, found)
    assert all((s.denoised is None) == (s.k == 24) for s in steps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddim_invert(UNEVEN, at="there"), "did you mean 'here'"),  # type: ignore[arg-type]
        (lambda: ddim_invert(UNEVEN.flip(0)), "must decrease"),
        (lambda: aidi(UNEVEN, iterations=0), "iterations >= 1, got 0"),
        (lambda: Aidi(UNEVEN, iterations=1.5), "iterations >= 1, got 1.5"),  # type: ignore[arg-type]
        (lambda: Aidi(UNEVEN, memory=-1), "memory >= 0, got -1"),
        (lambda: Aidi(UNEVEN[:1]), "at least two levels"),
        (lambda: ddim_invert(UNEVEN).order(), "no order to measure"),
    ],
)
def test_bad_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
