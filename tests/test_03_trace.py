"""Tracing of functions: the table is the function, its history is the shortest, and what is not linear is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.cli import parse
from fewstep.cli.compare_tableaux import CompareTableaux
from fewstep.core.exact import Mixture
from fewstep.core.noise import Noise
from fewstep.core.sample import sample, trajectory
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError
from fewstep.grid import flow_shift, karras
from fewstep.solve import SOLVERS, build
from fewstep.tracing import compare, dense, trace

Denoise = Callable[..., Tensor]
GRID = torch.tensor([12.0, 9.0, 5.0, 3.2, 1.7, 1.2, 0.5, 0.2, 0.0], dtype=torch.float64)


@cache
def problem() -> Mixture:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 1, 2, 2, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.4, [1, 2, 3, 2, 1])


@cache
def draws(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(6, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(count))


# ---- samplers as plain functions


def plain_euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    for a, b in pairwise(sigmas):
        x = x + (b - a) * (x - denoise(x, a)) / a
    return x


def plain_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    old, before = None, 0.0
    for a, b in pairwise(sigmas.tolist()):
        out = denoise(x, a)
        if b == 0:
            return out
        h = math.log(a / b)
        mixed = out if old is None else out + (out - old) * h / (2 * before)
        x, old, before = b / a * x - math.expm1(-h) * mixed, out, h
    return x


def plain_adams(denoise: Denoise, x: Tensor, sigmas: Tensor, order: int = 3) -> Tensor:
    weights = {1: [1.0], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12]}
    slopes: list[Tensor] = []
    for a, b in pairwise(sigmas.tolist()):
        slopes.insert(0, (x - denoise(x, a)) / a)
        x = x + (b - a) * sum(w * d for w, d in zip(weights[min(order, len(slopes))], slopes, strict=False))
    return x


def plain_restart(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Noise before the first call, two noises in one step, one used again later, and one after the last call."""
    levels = sigmas.tolist()
    x = x + 0.3 * torch.randn_like(x)
    first = torch.randn(x.shape, dtype=x.dtype)
    for k, (a, b) in enumerate(pairwise(levels)):
        x = b / a * x + (1 - b / a) * denoise(x, a)
        if k == 1:
            second = torch.normal(torch.zeros_like(x), 2.0)
            x = x + 0.1 * first + 0.2 * second
        if k == 3:
            x = x + 0.4 * first + torch.empty_like(x).normal_(0.0, 0.5)
    return x + 0.05 * torch.normal(0.0, 1.0, size=x.shape, dtype=x.dtype)


def plain_pair(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Two noises that are always used in one proportion are one noise."""
    for a, b in pairwise(sigmas.tolist()):
        low = 0.8 * b
        x = low / a * x + (1 - low / a) * denoise(x, a)
        size = math.sqrt(b * b - low * low)
        x = x + size * (0.6 * torch.randn_like(x) - 0.8 * torch.randn_like(x))
    return x


# ---- samplers of the k-diffusion form


def slope(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    return (x - denoised) / sigma.reshape(-1, *[1] * (x.ndim - 1))


def split(a: Tensor, b: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    up = torch.minimum(b, eta * (b**2 * (a**2 - b**2) / a**2).sqrt())
    return (b**2 - up**2).sqrt(), up


def k_heun(
    model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None,
    s_churn: float = 0.0, s_noise: float = 1.0, second: bool = True,
) -> Tensor:  # fmt: skip
    assert disable is True
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)
        hat = sigmas[i] * (gamma + 1)
        if gamma > 0:
            x = x + torch.randn_like(x) * s_noise * (hat**2 - sigmas[i] ** 2) ** 0.5
        d = slope(x, hat * ones, model(x, hat * ones, **(extra_args or {})))
        dt = sigmas[i + 1] - hat
        if sigmas[i + 1] == 0 or not second:
            x = x + d * dt
        else:
            d2 = slope(x + d * dt, sigmas[i + 1] * ones, model(x + d * dt, sigmas[i + 1] * ones, **(extra_args or {})))
            x = x + (d + d2) / 2 * dt
    return x


def k_euler(
    model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None, disable: Any = None, s_churn: float = 0.0
) -> Tensor:
    return k_heun(model, x, sigmas, extra_args, None, disable, s_churn, second=False)


def k_dpm_2(
    model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None, noise_sampler: Any = None, eta: float = 0.0
) -> Tensor:
    ones = x.new_ones([x.shape[0]])
    for a, b in pairwise(sigmas):
        down, up = split(a, b, eta)
        d = slope(x, a * ones, model(x, a * ones))
        if down == 0:
            x = x + d * (down - a)
        else:
            mid = a.log().lerp(down.log(), 0.5).exp()
            y = x + d * (mid - a)
            x = x + slope(y, mid * ones, model(y, mid * ones)) * (down - a)
            x = x + noise_sampler(a, b) * up
    return x


def k_lms(model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None, order: int = 4) -> Tensor:
    ones, slopes = x.new_ones([x.shape[0]]), list[Tensor]()
    levels = sigmas.numpy()
    for i in range(len(sigmas) - 1):
        slopes.append(slope(x, sigmas[i] * ones, model(x, sigmas[i] * ones)))
        use = min(i + 1, order)
        for j in range(use):
            basis = np.polynomial.Polynomial([1.0])
            for k in range(use):
                if k != j:
                    basis *= np.polynomial.Polynomial([-levels[i - k], 1.0]) / (levels[i - j] - levels[i - k])
            whole = basis.integ()
            x = x + (whole(levels[i + 1]) - whole(levels[i])) * slopes[i - j]
    return x


def k_2m_sde(
    model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None, noise_sampler: Any = None, eta: float = 1.0
) -> Tensor:
    ones, old, before = x.new_ones([x.shape[0]]), None, None
    for a, b in pairwise(sigmas):
        out = model(x, a * ones)
        if b == 0:
            return out
        h = a.log() - b.log()
        x = b / a * (-eta * h).exp() * x - (-(1 + eta) * h).expm1() * out
        if old is not None:
            x = x - 0.5 * (-(1 + eta) * h).expm1() * h / before * (out - old)
        if eta:
            x = x + noise_sampler(a, b) * b * (-(-2 * eta * h).expm1()).sqrt()
        old, before = out, h
    return x


def k_2m(model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
    return k_2m_sde(model, x, sigmas, extra_args, eta=0.0)


def k_euler_ancestral(
    model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None, noise_sampler: Any = None, eta: float = 1.0
) -> Tensor:
    ones = x.new_ones([x.shape[0]])
    for a, b in pairwise(sigmas):
        down, up = split(a, b, eta)
        x = x + slope(x, a * ones, model(x, a * ones)) * (down - a)
        if b > 0:
            x = x + noise_sampler(a, b) * up
    return x


def k_2s_ancestral(
    model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None, noise_sampler: Any = None
) -> Tensor:
    ones = x.new_ones([x.shape[0]])
    for a, b in pairwise(sigmas):
        down, up = split(a, b, 1.0)
        out = model(x, a * ones)
        if down == 0:
            x = out
        else:
            mid = (a * down).sqrt()
            out = model(mid / a * x - ((mid / a).log()).expm1() * out, mid * ones)
            x = down / a * x - (down / a).log().expm1() * out
        if b > 0:
            x = x + noise_sampler(a, b) * up
    return x


def k_sde(model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None, noise_sampler: Any = None) -> Tensor:
    """Its two noises of a step belong to intervals that overlap."""
    ones = x.new_ones([x.shape[0]])
    for a, b in pairwise(sigmas):
        out = model(x, a * ones)
        if b == 0:
            return out
        mid = (a * b).sqrt()
        down, up = split(a, mid, 1.0)
        y = down / a * x + (1 - down / a) * out + noise_sampler(a, mid) * up
        out = model(y, mid * ones)
        down, up = split(a, b, 1.0)
        x = down / a * x + (1 - down / a) * out + noise_sampler(a, b) * up
    return x


def k_range(model: Denoise, x: Tensor, sigma_min: float, sigma_max: float, n: int, extra_args: Any = None) -> Tensor:
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), n + 1, dtype=torch.float64).exp()
    return k_euler(model, x, levels, extra_args, True)


# ---- the table is the function


class Draws(Noise):
    """The listed draws, mixed as a traced table says that its rows' noises are."""

    def __init__(self, table: Tableau) -> None:
        super().__init__(torch.zeros(6, dtype=torch.int64))
        object.__setattr__(self, "mixes", table.meta["traced"].get("draws", {}))

    def normal(self, shape: Any, *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        mixed = [c * draws(60)[int(m)] for m, c in self.mixes[str(key[-1])].items()]  # type: ignore[attr-defined]
        return torch.stack(mixed).sum(0)


class Walk:
    """A noise sampler on a walk whose increments are the listed draws, from low levels to high."""

    def __init__(self, levels: list[float]) -> None:
        self.levels = sorted(levels)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        first, last = (min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - s)) for s in (sigma_next, sigma))
        widths = [self.levels[i + 1] - self.levels[i] for i in range(first, last)]
        steps = [math.sqrt(w) * draws(60)[i] for i, w in zip(range(first, last), widths, strict=True)]
        return torch.stack(steps).sum(0) / math.sqrt(sum(widths))


# name: (function, options, history, evaluations on 8 steps)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], int, int]] = {
    "euler": (plain_euler, {}, 1, 8),
    "2m": (plain_2m, {}, 2, 8),
    "adams": (plain_adams, {}, 3, 8),
    "adams2": (plain_adams, {"order": 2}, 2, 8),
    "restart": (plain_restart, {}, 3, 8),
    "pair": (plain_pair, {}, 1, 8),
    "k-euler": (k_euler, {}, 1, 8),
    "k-euler-churn": (k_euler, {"s_churn": 2.0}, 1, 8),
    "k-heun": (k_heun, {}, 2, 15),
    "k-heun-churn": (k_heun, {"s_churn": 2.0, "s_noise": 1.003}, 2, 15),
    "k-dpm-2": (k_dpm_2, {}, 2, 15),
    "k-dpm-2-ancestral": (k_dpm_2, {"eta": 1.0}, 2, 15),
    "k-lms": (k_lms, {}, 4, 8),
    "k-lms-2": (k_lms, {"order": 2}, 2, 8),
    "k-2m": (k_2m, {}, 2, 8),
    "k-2m-sde": (k_2m_sde, {}, 2, 8),
    "k-euler-ancestral": (k_euler_ancestral, {}, 1, 8),
    "k-euler-ancestral-half": (k_euler_ancestral, {"eta": 0.5}, 1, 8),
    "k-2s-ancestral": (k_2s_ancestral, {}, 2, 15),
    "k-sde": (k_sde, {}, 2, 15),
}


def as_given(list_of_draws: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch's normal draws those of the list, in order."""
    monkeypatch.setattr(torch, "randn_like", lambda x: list_of_draws.pop(0))
    monkeypatch.setattr(torch, "randn", lambda *size, **kind: list_of_draws.pop(0))
    monkeypatch.setattr(torch, "normal", lambda mean, std, **kind: mean + std * list_of_draws.pop(0))
    monkeypatch.setattr(Tensor, "normal_", lambda self, mean, std: self.copy_(mean + std * list_of_draws.pop(0)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_traced_function_is_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, options, history, evaluations = FUNCTIONS[name]
    table = trace(function, GRID, **options)
    called = table.sigmas[~table.sigmas.isnan()].tolist()
    given = {**options, **({"disable": True} if function in (k_heun, k_euler) else {})}
    if function in (k_dpm_2, k_2m_sde, k_euler_ancestral, k_2s_ancestral, k_sde) and table.noisy:
        # The middle levels of these carry a boundary of the walk only where a noise ends there.
        given["noise_sampler"] = Walk(called if function is k_sde else GRID[:-1].tolist())
    elif function is k_dpm_2:
        given["noise_sampler"] = lambda a, b: torch.zeros(())
    exact, x, listed = problem(), 12.0 * draws(61)[60], list(draws(60))
    as_given(listed, monkeypatch)
    wanted = function(exact, x, GRID, **given)
    monkeypatch.undo()
    found = sample(exact, x, table, noise=Draws(table))
    assert float((found - wanted).abs().max()) < 1e-12 * max(1.0, float(wanted.abs().max()))
    assert (table.P.shape[1], table.nfe) == (history, evaluations)
    assert (table.start, float(table.levels[-1])) == (12.0, 0.0)
    assert table.meta["traced"]["replay_error"] < 1e-12
    assert Tableau.from_json(table.to_json()).meta == table.meta


def test_a_sampler_of_a_range_is_called_with_the_ends_of_the_grid() -> None:
    table = trace(k_range, [12.0, 0.1], n=5)
    same = torch.tensor([12.0 * (0.1 / 12.0) ** (i / 5) for i in range(6)], dtype=torch.float64)
    assert all(row.within(1e-12) for row in compare(table, build("euler", same)))


@pytest.mark.parametrize("name", ["euler", "2m", "adams", "k-heun", "k-lms", "k-2m-sde"])
def test_tracing_twice_gives_the_same_bits(name: str) -> None:
    function, options, _, _ = FUNCTIONS[name]
    assert trace(function, GRID, **options).to_json() == trace(function, GRID, **options).to_json()


def test_the_random_state_is_left_alone() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    trace(plain_restart, GRID)
    assert torch.equal(torch.get_rng_state(), before)


# ---- the fold


def test_rows_have_the_ratio_form_with_one_point() -> None:
    for table, own in (
        (trace(plain_2m, GRID), build("dpmpp2m", GRID)),
        (trace(plain_euler, GRID), build("euler", GRID)),
    ):
        assert float((table.P - own.P).abs().max()) < 1e-14
        assert float((table.W - own.W).abs().max()) < 1e-13
    for name in ("k-heun", "k-dpm-2", "k-2s-ancestral", "k-sde"):
        assert all(len(row.points) <= 1 for row in trace(FUNCTIONS[name][0], GRID, **FUNCTIONS[name][1]).plan)


def test_noises_get_rows() -> None:
    table = trace(plain_restart, GRID)
    # One silent row before the first call, one for the second noise of step 1; the noise used twice is drawn once.
    assert table.sigmas.isnan().nonzero().flatten().tolist() == [0, 2]
    assert float(table.levels[3]) == float(table.levels[2])
    assert len(dense(table).draws) == 5
    assert float(trace(plain_pair, GRID).Z[0, 0]) == pytest.approx(math.sqrt(81.0 - 0.64 * 81.0), rel=1e-14)
    mixed = trace(plain_pair, GRID).meta["traced"]["draws"]["0"]
    assert [mixed["0"], mixed["1"]] == pytest.approx([0.6, -0.8], rel=1e-13)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_own_solver_is_traced_to_itself(name: str) -> None:
    own = build(name, karras(6, 0.05, 20.0))

    def run(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
        points, outputs, noises = [x], dict[int, Tensor](), dict[int, Tensor]()
        for k, row in enumerate(own.plan):
            if row.sigma is not None:
                outputs[k] = denoise(points[k], row.sigma)
            if row.draw:
                noises[k] = torch.randn_like(x)
            terms = [w * points[i] for i, w in row.points] + [w * outputs[i] for i, w in row.outputs]
            points.append(sum([*terms, *(w * noises[i] for i, w in row.noises)], torch.zeros_like(x)))
        return points[-1]

    table = trace(run, own.levels[[0, -1]])
    assert all(row.within(1e-11) for row in compare(table, own))
    assert table.P.shape[1] <= own.P.shape[1]
    assert table.nfe == own.nfe


def test_weights_stay_accurate_from_pure_noise() -> None:
    grid = flow_shift(6, 0.02, 1e8)

    def ratio(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
        for a, b in pairwise(sigmas.tolist()):
            x = b / a * x + (1 - b / a) * denoise(x, a)
        return x

    for function, name in ((ratio, "euler"), (plain_2m, "dpmpp2m")):
        table, own = trace(function, grid), build(name, grid)
        assert all(row.within(1e-12) for row in compare(table, own))
        assert float(((table.P - own.P) / own.P.clamp_min(1e-300)).abs().max()) < 1e-12


# ---- own solvers and traced recurrences are the same samplers


@pytest.mark.parametrize(
    ("function", "name", "options"),
    [
        ("k-euler", "euler", {}),
        ("k-heun", "heun", {}),
        ("k-dpm-2", "dpm2", {}),
        ("adams", "ipndm3", {}),
        ("k-lms", "lms", {}),
        ("k-2m", "dpmpp2m", {}),
        ("k-2m-sde", "dpmpp2m_sde", {}),
        ("k-euler-ancestral", "euler_ancestral", {}),
        ("k-euler-ancestral-half", "euler_ancestral", {"eta": 0.5}),
        ("k-dpm-2-ancestral", "dpm2_ancestral", {}),
        ("k-2s-ancestral", "dpmpp2s_ancestral", {}),
        ("k-sde", "dpmpp_sde", {}),
        ("pair", "euler_ancestral", None),
    ],
)
def test_own_solvers_are_the_traced_recurrences(function: str, name: str, options: dict[str, Any] | None) -> None:
    traced = trace(FUNCTIONS[function][0], GRID, **FUNCTIONS[function][1])
    found = compare(traced, build(name, GRID, **(options or {})))
    # A split of the noise that is not DDIM's must show, from the first noise on.
    assert all(row.within(1e-12) for row in found) == (options is not None)
    assert found[1].within(1e-12)


# ---- dense weights and comparison


def random_table(seed: int, rows: int = 7, depth: int = 3) -> Tableau:
    generator = torch.Generator().manual_seed(seed)
    made = Builder(5.0)
    for k in range(rows):
        window = range(max(0, k + 1 - depth), k + 1)
        numbers = torch.randn(3, depth, generator=generator, dtype=torch.float64)
        made.row(
            None if k % 3 == 1 else 5.0 - 0.5 * k,
            4.5 - 0.5 * k,
            {i: float(numbers[0, k - i]) for i in window},
            {i: float(numbers[1, k - i]) for i in window if i % 3 != 1},
            {i: float(numbers[2, k - i]) for i in window if i % 2 == 0},
        )
    return made.build("random")


@pytest.mark.parametrize("seed", range(4))
def test_dense_weights_make_every_point(seed: int) -> None:
    table = random_table(seed)
    weights, noise = dense(table), Noise.of(seed, 6)
    steps = list(trajectory(problem(), 5.0 * draws(1)[0], table, noise=noise))
    outputs = [s.denoised for s in steps if s.denoised is not None]
    noises = [noise.normal((1, 2, 2), "step", k, dtype=torch.float64) for k in weights.draws]
    for k, step in enumerate(steps):
        made = weights.start[k] * 5.0 * draws(1)[0]
        made = made + sum(w * d for w, d in zip(weights.outputs[k], outputs, strict=True))
        made = made + sum(w * e for w, e in zip(weights.noises[k], noises, strict=True))
        assert float((made - step.point).abs().max()) < 1e-12 * max(1.0, float(step.point.abs().max()))
    assert [k for k, step in enumerate(steps) if step.denoised is not None] == weights.calls


def test_two_ways_to_write_a_sampler_are_one() -> None:
    split_noise, one_noise = Builder(4.0), Builder(4.0)
    split_noise.row(4.0, 2.0, {0: 0.2}, {0: 0.8}, {0: 0.6})
    split_noise.row(None, 2.0, {1: 1.0}, {}, {1: -0.8})
    split_noise.row(2.0, 0.0, {}, {2: 1.0})
    one_noise.row(4.0, 2.0, {0: 0.2}, {0: 0.8}, {0: 1.0})
    one_noise.row(2.0, 0.0, {}, {1: 1.0})
    found = compare(split_noise.build("a"), one_noise.build("b"))
    assert [row.where for row in found] == ["start", "call 0", "call 1", "end"]
    assert all(row.within(1e-15) for row in found)


def test_a_difference_is_where_it_arises() -> None:
    found = compare(build("dpmpp2m", GRID), build("dpmpp", GRID, order=2, exact=True))
    first = next(row for row in found if not row.within(1e-9))
    # The first step is the same; the point that the second makes is where call 2 is.
    assert (first.where, first.level_a, first.level_b) == ("call 2", 5.0, 5.0)
    weights = [dense(build("dpmpp", GRID, order=2, exact=e)).outputs[2] for e in (False, True)]
    assert first.weight == pytest.approx(float((weights[0] - weights[1]).abs().max()), rel=1e-12)


def test_samplers_of_other_lengths_differ_at_the_calls_that_one_lacks() -> None:
    found = compare(build("heun", GRID[:3]), build("euler", GRID[:3]))
    assert [row.where for row in found] == ["start", "call 0", "call 1", "call 2", "call 3", "end"]
    assert [row.level_b for row in found] == [12.0, 12.0, 9.0, None, None, 5.0]
    assert [math.isinf(row.weight) for row in found] == [False, False, False, True, True, False]
    assert not found[-1].within(1e-6)


def test_noise_counts_by_its_size() -> None:
    tables = [build("euler_ancestral", GRID, eta=eta) for eta in (0.5, 0.5 + 1e-5)]
    worst = max(row.weight for row in compare(*tables))
    assert 1e-6 < worst < 1e-3
    assert compare(tables[0], tables[0]) == compare(tables[0], Tableau.from_json(tables[0].to_json()))


# ---- refusals


def clipped(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    return plain_euler(lambda y, s: denoise(y, s).clamp(-1, 1), x, sigmas)


def thresholded(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    def shrunk(y: Tensor, s: Tensor) -> Tensor:
        out = denoise(y, s)
        size = torch.quantile(out.abs().flatten(1), 0.95, 1).clamp_min(1.0).reshape(-1, 1, 1, 1)
        return out.clamp(-size, size) / size

    return plain_euler(shrunk, x, sigmas)


def adaptive(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    level = 12.0
    while level > 0.5:
        out = denoise(x, level)
        lower = level * (0.5 if float((x - out).std()) < 0.5 * level else 0.8)
        x, level = lower / level * x + (1 - lower / level) * out, lower
    return x


def adaptive_by_tolerance(
    model: Denoise, x: Tensor, sigma_min: float, sigma_max: float, extra_args: Any = None, rtol: float = 0.05
) -> Tensor:
    raise AssertionError("it must be refused before it runs")


def single_precision(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    return plain_euler(denoise, x.float(), sigmas.float()).double()


def rounded(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    return plain_euler(lambda y, s: torch.round(denoise(y, s) * 2**20) / 2**20, x, sigmas)


OUTSIDE = np.random.default_rng(0)


def random_elsewhere(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    return plain_euler(denoise, x, sigmas) + 0.1 * torch.from_numpy(OUTSIDE.standard_normal(tuple(x.shape)))


def uniform_noise(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    return plain_euler(denoise, x, sigmas) + torch.rand_like(x)


def one_number_for_all(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    return plain_euler(denoise, x, sigmas) + torch.randn(len(x), 1, 1, 1, dtype=x.dtype)


def guided(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    return plain_euler(lambda y, s: denoise(torch.cat([y, y]), s).chunk(2)[0], x, sigmas)


def two_levels(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    return denoise(x, torch.tensor([1.0, 2.0]))


def until_it_is_small(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    while True:
        x = x + denoise(x, 1.0) * 0


def empty_step(model: Denoise, x: Tensor, sigmas: Tensor, extra_args: Any = None, noise_sampler: Any = None) -> Tensor:
    return model(x, sigmas[0]) + noise_sampler(sigmas[0], sigmas[0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (clipped, "clipped is not the table.*row 0 differs.*call 1, at sigma 9.*clips, thresholds or rescales"),
        (thresholded, "It is not linear"),
        (adaptive, "an adaptive sampler"),
        (adaptive_by_tolerance, "adaptive_by_tolerance chooses its steps by the values .it takes rtol"),
        (rounded, "is rounding: if it computes in float32, pass tolerance="),
        (random_elsewhere, "takes randomness from elsewhere"),
        (uniform_noise, "draws random numbers with rand_like"),
        (one_number_for_all, r"noise of shape \(2, 1, 1, 1\)"),
        (guided, r"call 0 of the denoiser has shape \(4, 2, 3, 4\).*do guidance inside the denoiser"),
        (two_levels, r"several levels at once, \[1.0, 2.0\]"),
        (until_it_is_small, "stopped after 10000 calls"),
        (empty_step, "the noise of an empty step"),
        (lambda denoise, x, sigmas: x, "<lambda> never calls the denoiser"),
        (lambda denoise, x, sigmas: denoise(x, sigmas[-1]), "at sigma 0, where"),
        (lambda denoise, x, sigmas: denoise(x / 0, 1.0), "at a point that is not finite"),
        (lambda denoise, x, sigmas: denoise(x, 1.0) / 0, "returns values that are not finite"),
        (lambda denoise, x, sigmas: [denoise(x, 1.0)], "returns list: a sampler returns the sample"),
        (lambda denoise, x, sigmas: denoise(x, 1.0)[:1], r"returns \(1, 2, 3, 4\)"),
        (lambda denoise, x: x, "cannot be called as f"),
        (build("euler", GRID), "is a table already"),
        (3, "takes a function f.*got int"),
    ],
)
def test_what_is_no_table_is_refused(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(function, GRID)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trace(plain_euler), r"trace\(f, sigmas\), for example karras"),
        (lambda: trace(plain_euler, GRID, steps=8), "steps=8 goes with a scheduler"),
        (lambda: trace(plain_euler, [1.0]), "at least two finite levels"),
        (lambda: trace(plain_euler, [math.inf, 1.0]), "pure noise of a flow is 1e8"),
        (lambda: trace(plain_euler, [[2.0, 1.0]]), "a list of at least two"),
        (lambda: trace(plain_euler, GRID, order=3), r"with the options \['order'\].*unexpected keyword"),
        (lambda: trace(k_range, GRID, n=3), "end the grid above 0"),
        (lambda: trace(single_precision, GRID), "pass tolerance="),
    ],
)
def test_bad_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_sampler_in_single_precision_is_traced_without_its_rounding() -> None:
    grid = GRID.float().double()
    found = compare(trace(single_precision, grid, tolerance=1e-5), build("euler", grid))
    assert max(row.weight for row in found) < 1e-5
    assert trace(single_precision, grid, check=False).meta["traced"].keys() == {"form", "sampler", "options"}


# ---- the command


def written(table: Tableau, path: Path) -> str:
    path.write_text(table.to_json())
    return str(path)


def test_the_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = written(trace(plain_2m, GRID), tmp_path / "a.json")
    b = written(build("dpmpp2m", GRID), tmp_path / "b.json")
    c = written(build("euler", GRID), tmp_path / "c.json")
    parse(CompareTableaux, "compare-tableaux", [a, b], None).run()
    assert "the same sampler to 1e-06: plain_2m and dpmpp-2m" in capsys.readouterr().out
    parse(CompareTableaux, "compare-tableaux", [a, c], None).run()
    said = " ".join(capsys.readouterr().out.split())
    assert "different samplers: plain_2m and euler part at call 2" in said
    parse(CompareTableaux, "compare-tableaux", [a, c, "--tolerance", "100"], None).run()
    assert "the same sampler to 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, [], "does not exist: compare-tableaux takes"),
        (b"\xff\xfe\x00", [], "is not text"),
        (b"[]", [], "expected an object with format"),
        (b"{}", ["--tolerance", "-1"], "--tolerance must be 0 or more"),
    ],
)
def test_the_command_refuses_bad_files(tmp_path: Path, content: bytes | None, more: list[str], message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    path = str(tmp_path / "a.json")
    with pytest.raises(InputError, match=message):
        parse(CompareTableaux, "compare-tableaux", [path, path, *more], None).run()
