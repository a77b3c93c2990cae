"""USF: the table of a schedule against the solvers it contains, the integrals it stands on, and the search."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import CountingDenoiser, InputError, Mixture, Tableau, sample
from fewstep.core.noise import Noise
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.grid import karras
from fewstep.solve import build
from fewstep.solve.teacher import Clock, Task, fine_levels, follow
from fewstep.solve.usf import Decision, Runner, Schedule, compile_schedule
from fewstep.solve.usf_search import _adams, _Ranker, usf

TO_ZERO = karras(7, 0.01, 20.0)
TO_MIN = TO_ZERO[:-1]


@cache
def problem() -> Mixture:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    variances = 0.05 + 0.3 * torch.rand(5, 4, generator=generator, dtype=torch.float64)
    return Mixture(means, variances, [1, 2, 3, 2, 1], sigma_min=0.01, sigma_max=20.0)


def task(nfe: int, *, grid: Tensor | None = None, n: int = 48, seed: int = 0, budget: float | None = None) -> Task:
    D = problem()
    levels = fine_levels(D, grid, count=48)
    teacher = follow(D, levels, Noise.of(seed, n), {}, dtype=torch.float64)
    return Task(D, nfe, grid, teacher, n // 4, seed, clock=Clock(budget))


def schedule(grid: Tensor, **options: Any) -> Schedule:
    return Schedule(float(grid[0]), tuple(Decision(level, **options) for level in grid.tolist()[1:]))


def dense(table: Tableau) -> Tensor:
    """(K, 2 K + 1) weights of all points and outputs by absolute index."""
    found = torch.zeros(table.rows, 2 * table.rows + 1, dtype=torch.float64)
    for k, row in enumerate(table.plan):
        for i, w in row.points:
            found[k, i] = w
        for i, w in row.outputs:
            found[k, table.rows + 1 + i] = w
    return found


def same(one: Tableau, other: Tableau, tolerance: float = 1e-12) -> None:
    assert torch.equal(one.sigmas.nan_to_num(-1), other.sigmas.nan_to_num(-1))
    assert torch.equal(one.levels, other.levels)
    a, b = dense(one), dense(other)
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("grid", [TO_ZERO, TO_MIN, karras(6, 0.01, 1e8)])
@pytest.mark.parametrize(
    ("decisions", "solver", "options"),
    [
        ({"order": 1}, "euler", {}),
        ({"order": 1, "form": "noise"}, "euler", {}),
        ({"order": 2}, "dpmpp", {"order": 2, "exact": True}),
        ({"order": 2, "relax": "bh2"}, "dpmpp2m", {}),
        ({"order": 3}, "dpmpp3m_exact", {}),
        (
            {"order": 2, "form": "noise", "relax": "bh1"},
            "unipc",
            {"predict": "noise", "variant": "bh1", "corrector": 0},
        ),
    ],
)
def test_decisions_reproduce_known_solvers(
    grid: Tensor, decisions: dict[str, Any], solver: str, options: dict[str, Any]
) -> None:
    same(compile_schedule(schedule(grid, **decisions)), build(solver, grid, **options))


@pytest.mark.parametrize("form", ["x0", "noise"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_pseudo_corrector_is_that_of_unipc(order: int, variant: str, form: str) -> None:
    # UniPC fixes the weight 1/2 in the predictor of order 2 and in the corrector of order 1: that is the relaxation.
    steps = []
    for k, level in enumerate(TO_ZERO.tolist()[1:]):
        use = min(order, k + 1)
        relax = {"relax": variant if use == 2 else "none", "relax_corrector": variant if use == 1 else "none"}
        steps.append(Decision(level, use, form, corrector="pseudo", **relax))
    made = compile_schedule(Schedule(float(TO_ZERO[0]), tuple(steps)))
    same(made, build("unipc", TO_ZERO, order=order, variant=variant, predict=form), 1e-11)


@pytest.mark.parametrize("form", ["x0", "noise"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_step_integrates_polynomials_in_log_sigma(order: int, form: str) -> None:
    """The weights of the last step against the integral of the interpolating polynomial, by Gauss's rule."""
    levels = [9.0, 6.0, 4.0, 2.5, 0.7]
    table = compile_schedule(schedule(torch.tensor(levels, dtype=torch.float64), order=order, form=form))
    a, b = levels[-2:]
    node, weight = (torch.from_numpy(v) for v in __import__("numpy").polynomial.legendre.leggauss(40))
    h = math.log(a / b)
    tau = 0.5 * h * (node + 1)
    kernel = torch.exp(tau - h) if form == "x0" else -b * torch.exp(h - tau)
    for degree in range(order):
        # D = tau^degree, respectively eps = tau^degree, with tau = ln(a / sigma).
        exact = float((0.5 * h * weight * kernel * tau**degree).sum())
        at = [math.log(a / s) ** degree if degree else 1.0 for s in levels[:-1]]
        row = table.plan[-1]
        if form == "x0":
            found = sum(w * at[i] for i, w in row.outputs)
        else:
            # x = 0 at the start and x_i - D_i = sigma_i eps_i; take D = -sigma eps, x = 0.
            found = sum(-w * levels[i] * at[i] for i, w in row.outputs)
        assert found == pytest.approx(exact, rel=1e-11, abs=1e-13)


def test_relaxations_are_factors_of_the_first_derivative() -> None:
    levels = torch.tensor([9.0, 5.0, 2.0], dtype=torch.float64)
    h = math.log(5 / 2)
    for form, z in (("x0", -h), ("noise", h)):
        plain = compile_schedule(schedule(levels, order=2, form=form)).plan[-1]
        older = dict(plain.outputs)[0]
        factors = {
            "bh1": z**2 / 2 / (math.exp(z) - 1 - z),
            "bh2": 0.5 * z * math.expm1(z) / (math.expm1(z) - z),
            "plus": 1 + 0.5 * math.expm1(z),
            "minus": 1 - 0.5 * math.expm1(z),
            "linear": 1 + 0.3 * z,
        }
        for relax, factor in factors.items():
            made = compile_schedule(schedule(levels, order=2, form=form, relax=relax, slope=0.3)).plan[-1]
            assert dict(made.outputs)[0] == pytest.approx(factor * older, rel=1e-12)


@pytest.mark.parametrize("form", ["x0", "noise"])
def test_free_choices_stay_consistent(form: str) -> None:
    """Any start and any outputs: constant x0 and constant noise are carried exactly."""
    g = TO_ZERO.tolist()
    steps = [
        Decision(g[1], form=form),
        Decision(g[2], 2, form, start=1, relax="plus"),
        Decision(g[3], 3, form, active=((1, 2), (2, 1)), corrector="implicit"),
        Decision(g[4], 3, form, start=1, active=((0,), (0, 2)), corrector="pseudo", relax_corrector="bh1"),
        Decision(g[5], 4, form, active=((), (1, 3), (1, 2, 4))),
        Decision(g[6], 2, form),
    ]
    made = compile_schedule(Schedule(g[0], tuple(steps)))
    assert made.nfe == 7 == Schedule(g[0], tuple(steps)).nfe
    noise = Noise.of(0, 3).normal((4,), dtype=torch.float64)
    point = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64).expand(3, 4)

    class Point:
        shape, sigma_min, sigma_max, sigma_data = (4,), 0.01, 20.0, 0.5

        def __call__(self, x: Tensor, sigma: Tensor | float, cond: Any = None) -> Tensor:
            return point

    counted = CountingDenoiser(Point())
    end = sample(counted, point + g[0] * noise, made)
    assert counted.nfe == made.nfe
    assert torch.allclose(end, point + g[6] * noise, rtol=1e-10, atol=1e-10)


def test_the_implicit_corrector_evaluates_the_corrected_point() -> None:
    D, g = problem(), TO_MIN.tolist()[:3]
    steps = (Decision(g[1], corrector="implicit"), Decision(g[2]))
    x = g[0] * Noise.of(1, 5).normal((4,), dtype=torch.float64)
    found = sample(D, x, compile_schedule(Schedule(g[0], steps)))
    h, d0 = math.log(g[0] / g[1]), D(x, g[0])
    predicted = g[1] / g[0] * x + (1 - g[1] / g[0]) * d0
    # The trapezoid of exponential integrators: phi_2 on the difference of the outputs.
    corrected = predicted + (h - 1 + math.exp(-h)) / h * (D(predicted, g[1]) - d0)
    again = D(corrected, g[1])
    assert torch.allclose(found, g[2] / g[1] * corrected + (1 - g[2] / g[1]) * again, rtol=1e-12)


@pytest.mark.parametrize("first", ["zero", "unit"])
def test_a_first_evaluation_can_be_spared(first: str) -> None:
    D, made = problem(), compile_schedule(replace(schedule(TO_ZERO, order=2), first=first))
    assert made.nfe == 6

    class First:
        shape, sigma_min, sigma_max, sigma_data = D.shape, D.sigma_min, D.sigma_max, D.sigma_data

        def __call__(self, x: Tensor, sigma: Tensor | float, cond: Any = None) -> Tensor:
            s = float(sigma)
            if s < 20:
                return D(x, sigma)
            return torch.zeros_like(x) if first == "zero" else x * (1 - s / math.sqrt(1 + s * s))

    x = 20 * Noise.of(2, 5).normal((4,), dtype=torch.float64)
    expected = sample(First(), x, build("dpmpp", TO_ZERO, order=2, exact=True))
    assert torch.allclose(sample(D, x, made), expected, rtol=1e-9, atol=1e-11)


def test_ipndm_of_order_two_is_a_linear_relaxation() -> None:
    same(compile_schedule(_adams(TO_MIN)), build("ipndm", TO_MIN, order=2), 1e-11)


def test_decisions_round_trip_through_files(tmp_path: Path) -> None:
    steps = tuple(
        Decision(b, min(k + 1, 3), "noise", relax="linear", slope=0.1 * k) for k, b in enumerate(TO_ZERO[1:].tolist())
    )
    made = replace(Schedule(float(TO_ZERO[0]), steps), first="unit")
    table = compile_schedule(made)
    back = load_sampler(save_sampler(table, tmp_path))
    assert isinstance(back, Tableau)
    same(back, table, 0.0)
    read = Schedule.from_meta(json.loads(json.dumps(back.meta["usf"])))
    assert read == made and read.nfe == table.nfe
    same(compile_schedule(read), table, 0.0)


def test_shared_prefixes_are_evaluated_once_and_scores_are_those_of_the_sampler() -> None:
    work = task(6)
    runner = Runner(work.D, work.fit, work.batch)
    one = schedule(TO_ZERO, order=2)
    changed = Schedule(one.sigma, (*one.steps[:4], replace(one.steps[4], order=1), *one.steps[5:]))
    for made in (one, changed):
        table = compile_schedule(made)
        assert runner(table) == pytest.approx(work.fit.error(work.D, table, work.batch), rel=1e-9)
    # Rows 0 to 4 agree, and row 4 makes the first point that differs.
    assert runner.calls == len(work.fit) * (7 + 2)
    small = Runner(work.D, work.fit, work.batch, room=1)
    assert small(compile_schedule(changed)) == runner(compile_schedule(changed)) and len(small.kept) == 1


def test_the_predictor_learns_to_rank() -> None:
    codes = Noise.of(0, 160).normal((12,), "codes")
    values = (codes[:, 0] - 2 * codes[:, 3] + 0.5 * codes[:, 5] ** 2) * 0.3
    ranker = _Ranker(0, 1)
    ranker.fit(codes[:120], values[:120])
    ranks = torch.stack([ranker(codes[120:]), values[120:]]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.7


@cache
def searched() -> tuple[Task, Any]:
    work = task(5)
    return work, usf(work, population=12, stages=3, pictures=36)


def test_the_search_beats_the_best_fixed_solver_on_fresh_starts() -> None:
    work, found = searched()
    fresh = task(5, seed=77, n=64).teacher
    assert found.sampler.nfe == found.start.nfe == 5 and found.sampler.end == 0
    assert fresh.error(work.D, found.sampler, 64) < fresh.error(work.D, found.start, 64)
    best = found.facts["best_score_by_stage"]
    assert all(a >= b for a, b in pairwise(best)) and best[-1] < best[0]
    assert json.loads(json.dumps(found.facts)) == found.facts
    same(compile_schedule(Schedule.from_meta(found.facts["decisions"])), found.sampler, 0.0)


def test_the_search_is_reproducible() -> None:
    _, found = searched()
    again = usf(task(5), population=12, stages=3, pictures=36)
    same(again.sampler, found.sampler, 0.0)


def test_a_given_grid_stays_and_a_given_score_is_used() -> None:
    asked = []

    def score(table: Tableau) -> float:
        asked.append(table)
        return float(table.W.abs().sum())

    found = usf(task(7, grid=TO_ZERO), population=8, stages=1, pictures=4, score=score)
    assert torch.equal(found.sampler.levels, TO_ZERO) and found.sampler.nfe == 7
    assert found.facts["score"] == "score" and found.facts["pictures_evaluated"] == 0
    assert score(found.sampler) == min(score(t) for t in asked[:-1])


def test_without_time_there_is_a_result() -> None:
    found = usf(task(4, budget=0.0), population=8, stages=3)
    assert found.facts["schedules"] == 1 and found.sampler.nfe == 4


@pytest.mark.parametrize("nfe", [1, 2])
def test_the_fewest_evaluations(nfe: int) -> None:
    assert usf(task(nfe), population=8, stages=1, pictures=8).sampler.nfe == nfe


@pytest.mark.parametrize(
    "bad",
    [
        {"order": 5},
        {"order": True},
        {"form": "velocity"},
        {"relax": "bh3"},
        {"relax_corrector": "x"},
        {"corrector": "full"},
        {"level": -1.0},
        {"level": math.inf},
        {"slope": math.nan},
        {"start": -1},
        {"active": ((0,),)},
        {"active": ((1,), (1,))},
        {"active": ((1, 1),)},
    ],
)
def test_bad_decisions(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Decision(**{"level": 1.0, **bad})


def test_bad_schedules() -> None:
    good = schedule(TO_ZERO)
    for change in ({"steps": ()}, {"sigma": 1.0}, {"sigma": math.inf}, {"first": "ones"}):
        with pytest.raises(InputError):
            replace(good, **change)
    with pytest.raises(InputError, match="looks 2 points back"):
        Schedule(3.0, (Decision(2.0), Decision(1.0, start=2)))
    meta = good.to_meta()
    for wrong in (
        {},
        {**meta, "extra": 1},
        {**meta, "steps": [{"order": 2}]},
        {**meta, "steps": [{"lvl": 2}]},
        {**meta, "sigma": "x"},
    ):
        with pytest.raises(InputError):
            Schedule.from_meta(wrong)


def test_bad_searches() -> None:
    for bad in ({"population": 7}, {"stages": -1}, {"proposals": 1}, {"pictures": 1}):
        with pytest.raises(InputError):
            usf(task(3, n=8), **bad)
    with pytest.raises(InputError, match="one evaluation a step"):
        usf(task(3, grid=TO_ZERO, n=8))
