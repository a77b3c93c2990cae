"""Stochastic and consistency samplers: exact laws, churn, evaluations, memory, files, bad input."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep import VP, CountingDenoiser, InputError, Mixture, Noise, Tableau, sample
from fewstep.core.path import DDPM
from fewstep.core.solver import SOLVERS, build
from fewstep.grid import karras, logsnr
from fewstep.solve.consistency import consistency, tcd
from fewstep.solve.dpmpp_sde import dpmpp2m_sde, dpmpp3m_sde, dpmpp_sde
from fewstep.solve.euler import ancestral_split, ddim
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


class Units:
    """In place of noise: the noise of row k is 1 in sample k + 1 and 0 elsewhere.

    With the start in sample 0 and a linear denoiser, sample i of the result is the weight of the i-th unit normal.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows + 1

    def normal(self, shape: tuple[int, ...], what: str, k: int, dtype: torch.dtype) -> Tensor:
        assert (tuple(shape), what) == ((1,), "step")
        unit = torch.zeros(len(self), 1, dtype=dtype)
        unit[k + 1] = 1
        return unit


def variances(table: Tableau, variance: float) -> list[float]:
    """The exact variance of every point, for x0 ~ N(0, variance) and its own denoiser."""
    D = Mixture(torch.zeros(1, 1), variance)
    x = torch.zeros(table.rows + 1, 1, dtype=torch.float64)
    x[0] = math.sqrt(variance + table.start**2)
    seen: list[float] = []
    noise: Any = Units(table.rows)
    sample(D, x, table, noise=noise, on_step=lambda s: seen.append(float(s.point.square().sum())))
    return seen


# ---- laws


@settings(max_examples=60, deadline=None)
@given(st.floats(-6, 8), st.floats(1e-9, 20), st.floats(0, 3))
def test_the_split_keeps_the_level(log_a: float, drop: float, eta: float) -> None:
    a = 10**log_a
    b = a * math.exp(-drop)
    down, up = ancestral_split(a, b, eta)
    assert math.hypot(down, up) == pytest.approx(b, rel=1e-12)
    assert 0 <= down <= b * (1 + 1e-15)
    assert 0 <= up <= b


def test_the_split_keeps_its_digits_at_huge_levels() -> None:
    for a, b in ((1e8, 80.0), (1e8, 0.002), (3.0, 1.2)):
        assert ancestral_split(a, b, 1.0)[0] == pytest.approx(b * b / a, rel=1e-14)
    assert ancestral_split(3.0, 1.2, 0.0) == (1.2, 0.0)
    assert ancestral_split(3.0, 1.2, 5.0) == (0.0, 1.2)
    assert ancestral_split(3.0, 0.0, 1.0) == (0.0, 0.0)


@pytest.mark.parametrize("solver", [lambda s: ddim(s, eta=1.0), euler_ancestral, dpmpp2m_sde, dpmpp3m_sde])
def test_one_step_is_the_posterior_of_ddpm(solver: Solver) -> None:
    """The product of N(x; x0, a^2) through b, derived from the forward process x_a = x_b + sqrt(a^2 - b^2) n."""
    for a, b in ((3.0, 1.2), (80.0, 0.5), (1e8, 80.0), (1.01, 1.0)):
        table = solver(torch.tensor([a, b], dtype=torch.float64))
        precision = 1 / b**2 + 1 / ((a - b) * (a + b))
        assert float(table.P[0, 0]) == pytest.approx(1 / ((a - b) * (a + b)) / precision, rel=1e-9)
        assert float(table.W[0, 0]) == pytest.approx(1 / b**2 / precision, rel=1e-9)
        assert float(table.Z[0, 0]) ** 2 == pytest.approx(1 / precision, rel=1e-9)


NOISY: dict[str, Solver] = {
    "ddim-1": lambda s: ddim(s, eta=1.0),
    "ddim-3": lambda s: ddim(s, eta=3.0),
    "euler-a": euler_ancestral,
    "dpm2-a": dpm2_ancestral,
    "dpm2-a-clipped": lambda s: dpm2_ancestral(s, eta=4.0),
    "2s-a": dpmpp2s_ancestral,
    "2s-a-clipped": lambda s: dpmpp2s_ancestral(s, eta=4.0),
    "sde": dpmpp_sde,
    "sde-2": lambda s: dpmpp_sde(s, eta=2.0, r=0.8),
    "2m-sde": dpmpp2m_sde,
    "2m-sde-heun": lambda s: dpmpp2m_sde(s, eta=0.5, midpoint=False),
    "3m-sde": dpmpp3m_sde,
    "3m-sde-exact": lambda s: dpmpp3m_sde(s, exact=True),
    "edm": lambda s: edm_stochastic(s, s_max=1e9, s_noise=1.0),
    "consistency": consistency,
    "tcd": tcd,
    "tcd-ddpm": lambda s: tcd(s, gamma=0.8, frame=DDPM),
}


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("top", [20.0, 1e8])
@pytest.mark.parametrize("to_zero", [True, False])
def test_on_a_point_mass_every_point_has_its_level(name: str, top: float, to_zero: bool) -> None:
    """D is the point whatever it is given: weights of x0 sum to 1, those of the unit normals to the level squared."""
    table = NOISY[name](karras(9, 0.02, top, to_zero=to_zero))
    assert table.noisy
    mean = [1.0]
    for k in range(table.rows):
        points = sum(w * mean[k - j] for j, w in enumerate(table.P[k].tolist()) if w)
        mean.append(points + float(table.W[k].sum()))
    assert mean == pytest.approx([1.0] * (table.rows + 1), abs=1e-9)
    found = [math.sqrt(v) for v in variances(table, 0.0)]
    # Heun's two slopes cancel from huge levels.
    assert found == pytest.approx(table.levels.tolist(), rel=1e-7 if name == "edm" else 1e-9)


def law_error(solver: Solver, steps: int) -> float:
    table = solver(logsnr(steps, 0.05, 10.0, to_zero=False))
    return variances(table, 0.49)[-1] / (0.49 + 0.05**2) - 1


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("ddim-1", 1),
        ("euler-a", 1),
        ("dpm2-a", 2),
        ("2s-a", 2),
        ("sde", 2),
        ("2m-sde", 2),
        ("2m-sde-heun", 2),
        ("3m-sde", 2),
        ("3m-sde-exact", 2),
    ],
)
def test_the_variance_of_a_gaussian_comes_right(name: str, order: int) -> None:
    errors = [abs(law_error(NOISY[name], n)) for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    assert errors[1] < (0.04 if order == 1 else 1e-3)


def test_one_brownian_path_is_what_makes_the_sde_solver_second_order() -> None:
    def independent(sigmas: Tensor) -> Tableau:
        table = dpmpp_sde(sigmas)
        return replace(table, Z=table.Z.norm(dim=1, keepdim=True))

    errors = [abs(law_error(independent, n)) for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)
    assert errors[1] > 50 * abs(law_error(dpmpp_sde, 160))


@pytest.mark.parametrize("r", [0.3, 0.5])
def test_the_noises_of_a_step_are_increments_of_one_path(r: float) -> None:
    table = dpmpp_sde(TO_MIN, r=r)
    for i, (a, b) in enumerate(pairwise(TO_MIN.tolist())):
        m = float(table.levels[2 * i + 1])
        assert math.log(a / m) == pytest.approx(r * math.log(a / b), rel=1e-12)
        late, early = table.Z[2 * i + 1].tolist()
        assert early / math.hypot(early, late) == pytest.approx(math.sqrt((a - m) / (a - b)), rel=1e-12)
        assert math.hypot(early, late) == pytest.approx(ancestral_split(a, b, 1.0)[1], rel=1e-12)
        assert float(table.Z[2 * i, 0]) == pytest.approx(ancestral_split(a, m, 1.0)[1], rel=1e-12)


def test_one_ancestral_step_on_a_gaussian_is_too_narrow() -> None:
    table = ddim(torch.tensor([3.0, 1.0], dtype=torch.float64), eta=1.0)
    shrink = 1 / 9 + (1 - 1 / 9) * 0.49 / 9.49
    assert variances(table, 0.49)[-1] == pytest.approx(shrink**2 * 9.49 + 8 / 9, rel=1e-12)
    assert variances(table, 0.49)[-1] == pytest.approx(1.123, abs=1e-3)


# ---- churn


def test_churn_raises_the_level_and_nothing_else() -> None:
    table = edm_stochastic(karras(18, 0.002, 80.0), s_noise=1.0)
    silent = table.sigmas.isnan().nonzero()[:, 0].tolist()
    assert silent
    before, after = table.levels[silent], table.levels[[k + 1 for k in silent]]
    assert torch.allclose(after / before, torch.full_like(after, math.sqrt(2)), rtol=1e-12)
    assert torch.allclose(table.Z[silent, 0] ** 2, after**2 - before**2, rtol=1e-12)
    assert torch.equal(table.sigmas[[k + 1 for k in silent]], after)
    x = torch.zeros(2, 1, dtype=torch.float64)
    for k in silent:
        s, hat = float(table.levels[k]), float(table.levels[k + 1])
        row = table[k : k + 1]
        x[0] = math.sqrt(0.49 + s**2)
        noise: Any = Units(1)
        assert row.nfe == 0
        raised = sample(problem(), x, row, noise=noise)
        assert float(raised.square().sum()) == pytest.approx(0.49 + hat**2, rel=1e-12)


def test_only_levels_in_the_window_are_churned_by_their_share() -> None:
    grid = torch.tensor([60.0, 40.0, 10.0, 1.0, 0.05, 0.04, 0.0], dtype=torch.float64)
    table = edm_stochastic(grid, churn=1.2)
    silent = table.sigmas.isnan().nonzero()[:, 0].tolist()
    # Level 40 is churned although 48 is nearly out, 60 and 0.04 are not; the share is 1.2 / 6 steps.
    assert table.levels[silent].tolist() == [40.0, 10.0, 1.0, 0.05]
    assert table.levels[[k + 1 for k in silent]].tolist() == pytest.approx([48.0, 12.0, 1.2, 0.06], rel=1e-12)
    assert table.nfe == heun(grid).nfe == 11
    assert table.Z[silent, 0].tolist() == pytest.approx([1.003 * s * math.sqrt(0.44) for s in (40, 10, 1, 0.05)])


def test_churn_keeps_the_law_of_a_gaussian() -> None:
    errors = [abs(law_error(NOISY["edm"], n)) for n in (10, 40, 160)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 5e-3


# ---- evaluations, memory, files


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("to_zero", [True, False])
def test_counted_evaluations(name: str, steps: int, to_zero: bool) -> None:
    table = NOISY[name](karras(steps, 0.02, 20.0, to_zero=to_zero))
    counted = CountingDenoiser(problem())
    out = sample(counted, 2 * start(), table, noise=Noise.of(1, 6))
    assert out.isfinite().all()
    assert counted.nfe == table.nfe
    assert (table.start, float(table.levels[-1])) == (20.0, 0.0 if to_zero else 0.02)
    if name.endswith("-clipped"):
        assert steps <= table.nfe <= 2 * steps
    elif name in ("dpm2-a", "2s-a", "sde", "sde-2", "edm"):
        assert table.nfe == (2 * steps - 1 if to_zero else 2 * steps)
    else:
        assert table.nfe == steps


@pytest.mark.parametrize("name", NOISY)
def test_one_step_to_zero_is_the_denoised_start(name: str) -> None:
    table, noise, x, level = NOISY[name](torch.tensor([20.0, 0.0])), Noise.of(1, 6), 2 * start(), 20.0
    if name == "edm":
        level = 20.0 * math.sqrt(2)
        x = x + 20.0 * noise.normal((4,), "step", 0, dtype=torch.float64)
    assert float((sample(problem(), 2 * start(), table, noise=noise) - problem()(x, level)).abs().max()) < 1e-12
    assert float(table.Z[-1].abs().max()) == 0


def test_memory_does_not_grow_with_the_steps() -> None:
    long = logsnr(1000, 0.01, 10.0)
    assert euler_ancestral(long).live <= 3
    assert dpmpp2m_sde(long).live <= 4
    assert dpmpp3m_sde(long).live <= 5
    assert dpmpp_sde(long).live <= 5
    assert edm_stochastic(long).live <= 4


def test_tables_remember_how_they_were_made() -> None:
    made = [
        ddim(TO_MIN, eta=0.3),
        edm_stochastic(TO_ZERO, churn=3.0, s_max=4.0),
        euler_ancestral(TO_MIN, s_noise=1.1),
        dpm2_ancestral(TO_MIN),
        dpmpp2s_ancestral(TO_MIN, eta=0.5),
        dpmpp_sde(TO_MIN, r=0.4),
        dpmpp2m_sde(TO_MIN, midpoint=False),
        dpmpp3m_sde(TO_MIN, exact=True),
        consistency(TO_MIN, sigma_min=0.1),
        tcd(TO_MIN, gamma=0.2, frame=VP(9.0)),
    ]
    assert len({t.meta["solver"] for t in made}) == len(made)
    for table in made:
        assert table.meta["solver"] in SOLVERS
        again = Tableau.from_json(table.to_json())
        meta = json.loads(json.dumps(dict(again.meta)))
        grid = TO_ZERO if float(table.levels[-1]) == 0 else TO_MIN
        rebuilt = build(meta["solver"], grid, **meta["options"])
        assert rebuilt.name == table.name
        for key in ("P", "W", "Z", "levels"):
            assert torch.equal(getattr(rebuilt, key), getattr(table, key))


def test_float32_from_pure_noise_is_finite_and_close() -> None:
    grid, noise = torch.cat([torch.tensor([1e8], dtype=torch.float64), karras(8, 0.02, 80.0)]), Noise.of(4, 6)
    unit = Noise.of(3, 6).normal((4,), "start", dtype=torch.float64)
    for name in ("ddim-1", "2s-a", "sde", "2m-sde", "2m-sde-heun", "consistency", "tcd"):
        table = NOISY[name](grid)
        wide = sample(problem(), 1e8 * unit, table, noise=noise)
        narrow = sample(problem(), (1e8 * unit).float(), table, noise=noise)
        assert float((wide - narrow.double()).abs().max()) < 1e-3, name


def test_samples_spread_as_the_data_do() -> None:
    n = 4000
    D = Mixture(torch.tensor([[-1.0], [1.5]]), torch.tensor([[0.5], [0.8]]), [0.4, 0.6])
    x = 20.0 * Noise.of(1, n).normal((1,), "start", dtype=torch.float64)
    mean, square = 0.4 * -1.0 + 0.6 * 1.5, 0.4 * (1.0 + 0.5) + 0.6 * (2.25 + 0.8)
    for solver in (dpmpp_sde, dpmpp2m_sde):
        out = sample(D, x, solver(karras(40, 0.01, 20.0)), noise=Noise.of(2, n))
        assert float(out.mean()) == pytest.approx(mean, abs=5 * math.sqrt((square - mean**2) / n))
        assert float(out.square().mean()) == pytest.approx(square, rel=0.1)


# ---- bad input

ANCESTRAL: tuple[Callable[..., Tableau], ...] = (
    euler_ancestral,
    dpm2_ancestral,
    dpmpp2s_ancestral,
    dpmpp_sde,
    dpmpp2m_sde,
    dpmpp3m_sde,
)


@pytest.mark.parametrize("solver", ANCESTRAL, ids=lambda s: s.__name__)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -0.1}, "eta must be a finite number >= 0, got -0.1"),
        ({"eta": math.inf}, "eta must be a finite number >= 0, got inf"),
        ({"eta": math.nan}, "eta must be a finite number >= 0, got nan"),
        ({"s_noise": 0.0}, "s_noise must be a finite number > 0, got 0.0"),
        ({"s_noise": -1.0}, "s_noise must be a finite number > 0, got -1.0"),
        ({"s_noise": math.nan}, "s_noise must be a finite number > 0, got nan"),
    ],
)
def test_bad_noise_is_refused(solver: Callable[..., Tableau], options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        solver(TO_MIN, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddim(TO_MIN, eta=-1.0), "eta must be a finite number >= 0, got -1.0"),
        (lambda: dpmpp_sde(TO_MIN, r=0.0), "0 < r < 1, got r=0.0"),
        (lambda: dpmpp_sde(TO_MIN, r=1.0), "0 < r < 1, got r=1.0"),
        (lambda: edm_stochastic(TO_MIN, churn=-1.0), "churn >= 0, got -1.0"),
        (lambda: edm_stochastic(TO_MIN, churn=math.inf), "churn >= 0, got inf"),
        (lambda: edm_stochastic(TO_MIN, s_noise=0.0), "s_noise > 0, got 0.0"),
        (lambda: edm_stochastic(TO_MIN, s_min=2.0, s_max=1.0), "s_min=2.0 and s_max=1.0"),
        (lambda: edm_stochastic(TO_MIN, s_min=-1.0), "s_min=-1.0"),
        (lambda: consistency(TO_MIN, sigma_min=-0.1), "got sigma_min=-0.1"),
        (lambda: consistency(TO_ZERO, sigma_min=0.3), "lowest positive level 0.2, got sigma_min=0.3"),
        (lambda: tcd(TO_MIN, gamma=-0.1), "0 <= gamma <= 1, got -0.1"),
        (lambda: tcd(TO_MIN, gamma=1.1), "0 <= gamma <= 1, got 1.1"),
        (lambda: tcd(TO_MIN, gamma=math.nan), "0 <= gamma <= 1, got nan"),
        (lambda: euler_ancestral(TO_MIN.flip(0)), "must decrease"),
        (lambda: build("euler_ancestrall", TO_MIN), "did you mean 'euler_ancestral'"),
        (lambda: build("tcd", TO_MIN, eta=0.3), "cannot take the options"),
        (lambda: sample(problem(), start(), euler_ancestral(TO_MIN)), "adds noise: pass noise="),
    ],
)
def test_bad_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_every_grid_of_two_levels_has_a_table() -> None:
    for (a, b), name in itertools.product(((5.0, 4.999999), (1e8, 1e-8), (1e-3, 1e-4)), NOISY):
        table = NOISY[name](torch.tensor([a, b], dtype=torch.float64))
        assert float(table.levels[-1]) == b
