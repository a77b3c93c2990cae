"""Solvers: measured orders, counted evaluations, the published recurrences written out, and what peers' code scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import EDM, FLOW, TRIG, VP, CountingDenoiser, InputError, Mixture, Noise, Path, Tableau, sample
from fewstep.grid import karras
from fewstep.solve import (
    SOLVERS,
    build,
    dpmpp,
    dpmpp1,
    dpmpp2m,
    dpmpp3m,
    dpmpp3m_exact,
    euler,
    heun,
    ipndm,
    ipndm1,
    ipndm2,
    ipndm3,
    ipndm4,
)

START, END = 10.0, 0.05
TO_ZERO = torch.tensor([12.0, 9.0, 5.0, 3.2, 1.7, 1.2, 0.5, 0.2, 0.0], dtype=torch.float64)
TO_MIN = TO_ZERO[:-1]
UNEVEN = torch.tensor([9, 7, 4, 3.2, 1.7, 1.2, 0.5], dtype=torch.float64)
Denoise = Callable[[Tensor, float], Tensor]
# Evaluations a step of those that need more than one.
TWO = ("heun", "edm_stochastic", "dpm2", "dpm2_ancestral", "dpmpp2s", "dpmpp2s_ancestral", "dpmpp_sde", "res")
STAGES = dict.fromkeys((*TWO, "amed_table"), 2) | dict.fromkeys(("dpm3", "dpmpp3s", "dpm_single", "epd_table"), 3)
QUIET = sorted(name for name in SOLVERS if not SOLVERS[name](TO_ZERO).noisy)


@cache
def problem() -> Mixture:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.3 + torch.rand(5, 4, generator=generator, dtype=torch.float64), [1, 2, 3, 2, 1])


@cache
def start() -> Tensor:
    return START * torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@cache
def exact(level: float) -> Tensor:
    # Steps of 1/100 in log sigma are good to 1e-9.
    return start() if level == START else problem().flow(start(), START, level, 4 + int(100 * math.log(START / level)))


def spaced(steps: int, frame: Path | None) -> Tensor:
    """A grid from START to END, uniform in the frame's time, or in log sigma without one."""
    if frame is None:
        return torch.linspace(math.log(START), math.log(END), steps + 1, dtype=torch.float64).exp()
    levels = frame.sigma(torch.linspace(float(frame.at(START)), float(frame.at(END)), steps + 1, dtype=torch.float64))
    levels[0], levels[-1] = START, END
    return levels


def order(solver: Callable[[Tensor], Tableau], frame: Path | None = None, steps: int = 64) -> float:
    errors = [
        float((sample(problem(), start(), solver(spaced(n, frame))) - exact(END)).abs().max())
        for n in (steps, 2 * steps)
    ]
    return math.log2(errors[0] / errors[1])


# ---- the published recurrences, in their own coordinates


def ddim(D: Denoise, x: Tensor, sigmas: list[float]) -> Tensor:
    for a, b in pairwise(sigmas):
        x = x + (b - a) * (x - D(x, a)) / a
    return x


def edm_heun(D: Denoise, x: Tensor, sigmas: list[float]) -> Tensor:
    for a, b in pairwise(sigmas):
        d = (x - D(x, a)) / a
        y = x + (b - a) * d
        if b > 0:
            y = x + (b - a) * (d + (y - D(y, b)) / b) / 2
        x = y
    return x


def flow_heun(D: Denoise, x: Tensor, sigmas: list[float]) -> Tensor:
    """Heun on dz/dt = v(z, t) with z = (1 - t) x0 + t n and v = n - x0."""

    def velocity(z: Tensor, t: float) -> Tensor:
        return (z - D(z / (1 - t), t / (1 - t))) / t

    times = [s / (1 + s) for s in sigmas]
    z = (1 - times[0]) * x
    for t, s in pairwise(times):
        v = velocity(z, t)
        y = z + (s - t) * v
        z = y if s == 0 else z + (s - t) * (v + velocity(y, s)) / 2
    return z / (1 - times[-1])


def scaled_heun(
    D: Denoise,
    x: Tensor,
    times: list[float],
    scale: Callable[[float], tuple[float, float]],
    level: Callable[[float], tuple[float, float]],
) -> Tensor:
    """Heun on EDM's general ODE, dx/dt = (level'/level + scale'/scale) x - level' scale/level D(x/scale, level)."""

    def slope(z: Tensor, t: float) -> Tensor:
        (s, ds), (v, dv) = scale(t), level(t)
        return (dv / v + ds / s) * z - dv * s / v * D(z / s, v)

    z = scale(times[0])[0] * x
    for t, u in pairwise(times):
        d = slope(z, t)
        y = z + (u - t) * d
        z = z + (u - t) * (d + slope(y, u)) / 2
    return z / scale(times[-1])[0]


def vp_heun(D: Denoise, x: Tensor, sigmas: list[float], beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    def level(t: float) -> tuple[float, float]:
        v = math.sqrt(math.exp(beta_d * t * t / 2 + beta_min * t) - 1)
        return v, (beta_d * t + beta_min) * (v + 1 / v) / 2

    def scale(t: float) -> tuple[float, float]:
        v, dv = level(t)
        return 1 / math.sqrt(1 + v * v), -v * dv * (1 + v * v) ** -1.5

    logs = [math.log(1 + s * s) for s in sigmas]
    times = [(math.sqrt(beta_min**2 + 2 * beta_d * y) - beta_min) / beta_d for y in logs]
    return scaled_heun(D, x, times, scale, level)


def trig_heun(D: Denoise, x: Tensor, sigmas: list[float]) -> Tensor:
    def level(t: float) -> tuple[float, float]:
        return math.tan(t), 1 / math.cos(t) ** 2

    return scaled_heun(D, x, [math.atan(s) for s in sigmas], lambda t: (math.cos(t), -math.sin(t)), level)


def multistep(D: Denoise, x: Tensor, sigmas: list[float], top: int, variant: str = "", falling: bool = False) -> Tensor:
    """DPM-Solver++ 1, 2M and 3M; ``variant`` "taylor" for 2M, "full" for the 3M with its whole second difference."""
    outs: list[Tensor] = []
    steps = len(sigmas) - 1
    for i, (a, b) in enumerate(pairwise(sigmas)):
        outs.append(D(x, a))
        use = min(top, i + 1, steps - i) if falling else min(top, i + 1)
        if b == 0:
            x = outs[-1]
            continue
        h = math.log(a / b)
        p1 = math.exp(-h) - 1
        p2 = p1 / h + 1
        p3 = p2 / h - 0.5
        new = b / a * x - p1 * outs[-1]
        if use > 1:
            r0 = math.log(sigmas[i - 1] / a) / h
            first = (outs[-1] - outs[-2]) / r0
        if use == 2:
            new = new + p2 * first if variant else new - 0.5 * p1 * first
        if use == 3:
            r1 = math.log(sigmas[i - 2] / sigmas[i - 1]) / h
            second = (outs[-2] - outs[-3]) / r1
            d1 = first + r0 / (r0 + r1) * (first - second)
            d2 = (first - second) / (r0 + r1)
            new = new + p2 * d1 - (2 if variant else 1) * p3 * d2
        x = new
    return x


def adams(D: Denoise, x: Tensor, sigmas: list[float], top: int) -> Tensor:
    slopes: list[Tensor] = []
    for a, b in pairwise(sigmas):
        slopes.append((x - D(x, a)) / a)
        use = min(top, len(slopes))
        d = slopes[::-1]
        if use == 1:
            mean = d[0]
        elif use == 2:
            mean = (3 * d[0] - d[1]) / 2
        elif use == 3:
            mean = (23 * d[0] - 16 * d[1] + 5 * d[2]) / 12
        else:
            mean = (55 * d[0] - 59 * d[1] + 37 * d[2] - 9 * d[3]) / 24
        x = x + (b - a) * mean
    return x


PUBLISHED: dict[str, tuple[Callable[[Tensor], Tableau], Callable[..., Tensor], dict[str, Any], bool]] = {
    # name: (solver, recurrence, its options, whether it also runs to level 0)
    "euler": (euler, ddim, {}, True),
    "heun": (heun, edm_heun, {}, True),
    "heun-flow": (lambda s: heun(s, frame=FLOW), flow_heun, {}, True),
    "heun-vp": (lambda s: heun(s, frame=VP), vp_heun, {}, False),
    "heun-trig": (lambda s: heun(s, frame=TRIG), trig_heun, {}, False),
    "dpmpp1": (dpmpp1, multistep, {"top": 1}, True),
    "dpmpp2m": (dpmpp2m, multistep, {"top": 2}, True),
    "dpmpp2m-falling": (lambda s: dpmpp2m(s, lower_order_final=True), multistep, {"top": 2, "falling": True}, True),
    "dpmpp2m-taylor": (lambda s: dpmpp(s, 2, exact=True), multistep, {"top": 2, "variant": "taylor"}, True),
    "dpmpp3m": (dpmpp3m, multistep, {"top": 3}, True),
    "dpmpp3m-falling": (lambda s: dpmpp3m(s, lower_order_final=True), multistep, {"top": 3, "falling": True}, True),
    "ipndm1": (ipndm1, adams, {"top": 1}, True),
    "ipndm2": (ipndm2, adams, {"top": 2}, True),
    "ipndm3": (ipndm3, adams, {"top": 3}, True),
    "ipndm4": (ipndm4, adams, {"top": 4}, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ends", ["zero", "min"])
def test_every_solver_is_its_published_recurrence(name: str, ends: str) -> None:
    solver, recurrence, options, runs_to_zero = PUBLISHED[name]
    sigmas = TO_ZERO if ends == "zero" and runs_to_zero else TO_MIN
    x = float(sigmas[0]) * start() / START
    wanted = recurrence(problem(), x, sigmas.tolist(), **options)
    found = sample(problem(), x, solver(sigmas))
    assert found.dtype == torch.float64
    assert float((found - wanted).abs().max()) < 1e-12 * max(1.0, float(wanted.abs().max()))


def test_the_exact_third_order_ramps_up_with_taylor_steps() -> None:
    x = float(TO_MIN[0]) * start() / START
    wanted = multistep(problem(), x, TO_MIN.tolist(), top=3, variant="full")
    assert float((sample(problem(), x, dpmpp3m_exact(TO_MIN)) - wanted).abs().max()) < 1e-12
    assert torch.equal(dpmpp3m_exact(TO_MIN).W, dpmpp(TO_MIN, 3, exact=True).W)


# ---- orders


@pytest.mark.parametrize(
    ("solver", "stated"),
    [
        (euler, 1),
        (dpmpp1, 1),
        (dpmpp2m, 2),
        (lambda s: dpmpp(s, 2, exact=True), 2),
        (dpmpp3m, 2),
        (ipndm1, 1),
        (ipndm2, 2),
    ],
    ids=["euler", "dpmpp1", "dpmpp2m", "dpmpp2-exact", "dpmpp3m", "ipndm1", "ipndm2"],
)
def test_measured_order(solver: Callable[[Tensor], Tableau], stated: int) -> None:
    assert order(solver, steps=128) == pytest.approx(stated, abs=0.15)


@pytest.mark.parametrize("frame", [EDM, FLOW, VP, TRIG], ids=["edm", "flow", "vp", "trig"])
def test_heun_is_of_second_order_in_every_frame(frame: Path) -> None:
    assert order(lambda s: heun(s, frame=frame), frame, steps=256 if frame == EDM else 128) == pytest.approx(
        2, abs=0.15
    )


def test_a_table_measures_its_own_order() -> None:
    assert heun(spaced(8, None), frame=FLOW).order(FLOW) == pytest.approx(2, abs=0.15)
    with pytest.raises(InputError, match="no order to measure"):
        euler(spaced(8, None))[1:3].order()


def from_exact(table: Tableau, first: int) -> float:
    """The error at the end when the rows before ``first`` are replaced by the true trajectory."""
    levels = table.levels.tolist()
    points = [exact(s) for s in levels[: first + 1]]
    outs = [problem()(p, s) for p, s in zip(points, levels[: first + 1], strict=True)]
    for k in range(first, table.rows):
        if len(outs) == k:
            outs.append(problem()(points[k], levels[k]))
        terms = [table.P[k, j] * points[k - j] for j in range(table.P.shape[1]) if k >= j]
        terms += [table.W[k, j] * outs[k - j] for j in range(table.W.shape[1]) if k >= j]
        points.append(torch.stack(terms).sum(0))
    return float((points[-1] - exact(levels[-1])).abs().max())


def test_the_third_order_is_reached_from_exact_starting_values() -> None:
    grids = [spaced(n, None) for n in (60, 120)]
    full = [from_exact(dpmpp3m_exact(g), 2) for g in grids]
    published = [from_exact(dpmpp3m(g), 2) for g in grids]
    assert math.log2(full[0] / full[1]) == pytest.approx(3, abs=0.15)
    assert math.log2(published[0] / published[1]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("top", [1, 2, 3, 4])
def test_ipndm_has_its_order_on_equal_steps(top: int) -> None:
    grids = [torch.linspace(START, 2.0, n + 1, dtype=torch.float64) for n in (128, 256)]
    errors = [from_exact(ipndm(g, top), top - 1) for g in grids]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(top, abs=0.15)


@pytest.mark.parametrize(
    ("solver", "degree"),
    [
        (dpmpp1, 0),
        (dpmpp2m, 0),
        (lambda s: dpmpp(s, 2, exact=True), 1),
        (dpmpp3m, 1),
        (dpmpp3m_exact, 2),
    ],
    ids=["dpmpp1", "dpmpp2m", "dpmpp2-exact", "dpmpp3m", "dpmpp3m-exact"],
)
def test_exact_for_polynomials_in_log_sigma(solver: Callable[[Tensor], Tableau], degree: int) -> None:
    row = solver(UNEVEN).W[-1].tolist()
    a, b = UNEVEN[-2:].tolist()
    h = math.log(a / b)
    assert solver(UNEVEN).P[-1, 0] == pytest.approx(b / a, rel=1e-14)
    for power in range(4):
        # Integral over [0, h] of exp(t - h) t^power, by parts: I_m = h^m - m I_{m-1}.
        wanted = 1 - math.exp(-h)
        for m in range(1, power + 1):
            wanted = h**m - m * wanted
        found = sum(w * math.log(a / float(UNEVEN[-2 - j])) ** power for j, w in enumerate(row))
        assert (abs(found - wanted) < 1e-12) == (power <= degree), (power, found, wanted)


@pytest.mark.parametrize("top", [1, 2, 3, 4])
def test_ipndm_is_exact_for_polynomial_slopes_on_equal_steps(top: int) -> None:
    table = ipndm(torch.linspace(10.0, 2.0, 9, dtype=torch.float64), top)
    sigmas = table.sigmas.tolist()
    for power in range(top + 1):
        # x = sigma^(power+1)/(power+1) has the slope sigma^power, that is, the output D = x - sigma^(power+1).
        points = [s ** (power + 1) / (power + 1) for s in [*sigmas, 2.0]]
        outs = [x - s ** (power + 1) for x, s in zip(points, sigmas, strict=False)]
        found = sum(float(table.P[-1, j]) * points[-2 - j] + float(table.W[-1, j]) * outs[-1 - j] for j in range(top))
        assert (abs(found - points[-1]) < 1e-10 * points[0]) == (power < top), (power, found, points[-1])


# ---- evaluations


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("to_zero", [True, False])
def test_counted_evaluations(name: str, steps: int, to_zero: bool) -> None:
    table = SOLVERS[name](karras(steps, 0.02, 20.0, to_zero=to_zero))
    counted = CountingDenoiser(problem())
    x = 2 * start()
    out = sample(counted, x, table, noise=Noise.of(0, len(x)))
    assert counted.nfe == table.nfe
    assert counted.images == table.nfe * len(x)
    stages = STAGES.get(name, 1)
    assert table.nfe == stages * steps - (stages - 1 if to_zero else 0)
    assert (table.start, float(table.levels[-1])) == (20.0, 0.0 if to_zero else 0.02)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", QUIET)
def test_one_step_to_zero_is_the_denoised_start(name: str) -> None:
    x = 2 * start()
    found = sample(problem(), x, SOLVERS[name](torch.tensor([20.0, 0.0])))
    assert float((found - problem()(x, 20.0)).abs().max()) < 1e-12


@pytest.mark.parametrize("name", QUIET)
def test_every_solver_is_consistent(name: str) -> None:
    """A point mass at m with x = m + sigma n: every row's weights must carry both m and n to the next level."""
    table = SOLVERS[name](karras(9, 0.02, 1e8))
    point = Mixture(torch.full((1, 3), 0.7), 0.0)
    unit = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    on_line: list[Tensor] = []
    sample(point, 0.7 + 1e8 * unit, table, on_step=lambda s: on_line.append(s.point - 0.7 - s.level * unit))
    scale = (1 + table.levels).reshape(-1, 1, 1)
    assert float((torch.stack(on_line) / scale).abs().max()) < 1e-6


def test_a_solver_is_rebuilt_from_what_its_table_remembers() -> None:
    for made in (heun(TO_MIN, frame=VP(9.0)), dpmpp(TO_MIN, 3, exact=True), ipndm4(TO_MIN), dpmpp2m(TO_MIN)):
        again = build(made.meta["solver"], TO_MIN, **made.meta["options"])
        assert torch.equal(again.P, made.P)
        assert torch.equal(again.W, made.W)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: euler(torch.tensor([1.0])), "at least two levels"),
        (lambda: euler(torch.tensor([1.0, 2.0])), "must decrease: level 0 is 1 and level 1 is 2"),
        (lambda: euler(torch.tensor([2.0, 1.0, 1.0])), "must decrease: level 1"),
        (lambda: euler(torch.tensor([math.inf, 1.0])), "1e8"),
        (lambda: euler(torch.tensor([1.0, -0.5])), "end at 0 or above"),
        (lambda: dpmpp(TO_MIN, 4), "orders 1, 2 and 3"),
        (lambda: ipndm(TO_MIN, 5), "orders 1, 2, 3 and 4"),
        (lambda: build("dpmpp2n", TO_MIN), "did you mean .*'dpmpp2m'"),
        (lambda: build("euler", TO_MIN, order=3), "cannot take the options"),
    ],
)
def test_bad_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
