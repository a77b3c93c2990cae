"""Calibration by least squares, and its front door: better than fixed solvers, honest, streamed, clear when wrong."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import CFG, CountingDenoiser, InputError, Mixture, Noise, Tableau, calibrate, sample
from fewstep.core.denoiser import Wrapper
from fewstep.grid import grid
from fewstep.solve import build
from fewstep.solve.calibrate import CALIBRATIONS, report_of
from fewstep.solve.gauss_newton import Table, _equations
from fewstep.solve.teacher import Clock, Task, fine_levels, follow, rmse


@cache
def problem() -> Mixture:
    """Four modes in six dimensions: trajectories bend, and a few start near a fork."""
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.02 + 0.2 * torch.rand(4, 6, generator=generator, dtype=torch.float64))


@cache
def starts() -> tuple[Tensor, Tensor]:
    x = 80 * torch.randn(128, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x, problem()(problem().flow(x, 80.0, 0.002, 400), 0.002)


def error(table: Tableau) -> float:
    x, end = starts()
    return float(rmse(sample(problem(), x, table), end).mean())


@cache
def fitted(nfe: int, **options: Any) -> Tableau:
    return calibrate(problem(), nfe=nfe, trajectories=64, searches=12, **options)


@pytest.mark.parametrize("nfe", [1, 2, 3, 5])
def test_fitted_tables_beat_every_fixed_solver_on_every_grid(nfe: int) -> None:
    others = [
        error(build(name, grid(kind, nfe, 0.002, 80.0)))
        for name in ("euler", "dpmpp2m", "dpmpp3m", "ipndm3", "unipc", "deis")
        for kind in ("karras", "logsnr", "vp_time")
    ]
    assert error(fitted(nfe)) < (0.6 if nfe > 2 else 1.0) * min(others)
    assert fitted(nfe).nfe == nfe


def test_all_rows_together_beat_row_by_row() -> None:
    assert error(fitted(3)) < 0.9 * error(fitted(3, refinements=0))
    assert error(fitted(5)) < 0.95 * error(fitted(5, refinements=0))


def test_the_report_is_true_and_made_on_trajectories_that_nothing_else_saw() -> None:
    table = fitted(4)
    facts = report_of(table)
    assert facts["kept"] == "fitted" and facts["check_rmse_fitted"] < facts["check_rmse_start"]
    # Trajectories 64.. of the same seed are those of the check.
    x = Noise.of(0, 80).fold("calibrate").normal((6,), dtype=torch.float32)[64:].double() * 80
    end = problem()(problem().flow(x, 80.0, 0.002, 400), 0.002)
    found = float(rmse(sample(problem(), x, table), end).mean())
    assert facts["check_rmse_fitted"] == pytest.approx(found, rel=0.05)


def test_the_same_call_gives_the_same_table() -> None:
    again = calibrate(problem(), nfe=3, trajectories=64, searches=12)
    assert again.to_json() == fitted(3).to_json()


def test_batches_do_not_matter() -> None:
    small = calibrate(problem(), nfe=3, trajectories=64, searches=12, batch=10)
    assert torch.allclose(small.W, fitted(3).W, rtol=1e-3, atol=1e-3)


def test_never_worse_than_the_start() -> None:
    """A ridge so strong that nothing is fitted, and no refinement: the known solver comes back."""
    table = calibrate(problem(), nfe=3, trajectories=16, searches=0, ridge=1e12, refinements=0)
    facts = report_of(table)
    assert facts["check_rmse_fitted"] == pytest.approx(facts["check_rmse_start"], rel=1e-6)


def test_a_history_bound_is_kept() -> None:
    table = fitted(5, history=2)
    assert table.W.shape[1] <= 2
    assert error(table) < error(build("dpmpp2m", grid("karras", 5, 0.002, 80.0)))


def test_weights_per_sigma_keep_inner_points_on_the_trajectory() -> None:
    def inner(table: Tableau) -> float:
        x, _ = starts()
        found: list[Tensor] = []
        sample(problem(), x, table, on_step=lambda step: found.append(step.point))
        true = problem().flow(x, 80.0, float(table.levels[2]), 400)
        return float(rmse(found[2], true).mean())

    levels = grid("karras", 4, 0.05, 80.0)
    free = calibrate(problem(), sigmas=levels, trajectories=64)
    held = calibrate(problem(), sigmas=levels, trajectories=64, weights=lambda sigma: 10.0)
    assert inner(held) < 0.7 * inner(free)
    assert error(held) > 0.9 * error(free)


def test_a_part_of_the_pixels_is_enough() -> None:
    """Sixteen pictures of 4096 pixels: with memory for a part of them, the table is nearly as good."""
    generator = torch.Generator().manual_seed(0)
    big = Mixture(torch.randn(3, 1, 64, 64, generator=generator).double(), 0.1)
    x = 80 * torch.randn(8, 1, 64, 64, generator=generator, dtype=torch.float64)
    end = big(big.flow(x, 80.0, 0.002, 200), 0.002)
    found = {}
    for memory in (1 << 30, 1 << 20):
        table = calibrate(big, nfe=3, trajectories=16, searches=4, refinements=2, memory=memory)
        found[memory] = float(rmse(sample(big, x, table), end).mean())
    assert found[1 << 20] < 1.3 * found[1 << 30] + 1e-4


def test_memory_bounds_what_is_stored() -> None:
    big = Mixture(torch.zeros(1, 3, 64, 64), 1.0)
    kept = follow(big, fine_levels(big, None, 16), Noise.of(0, 8), {}, memory=1 << 18)
    assert kept.pixels is not None and kept.points.shape == (17, 8, len(kept.pixels))
    assert kept.points.nbytes + kept.outputs.nbytes <= 1 << 18
    assert len(set(kept.pixels.tolist())) == len(kept.pixels) and int(kept.pixels.max()) < 3 * 64 * 64
    assert torch.equal(kept.view(kept.start), kept.points[0])


def test_the_teacher_can_be_asked_at_any_level() -> None:
    D = problem()
    made = follow(D, fine_levels(D, None), Noise.of(1, 16), {}, dtype=torch.float64)
    for sigma in (60.0, 3.3, 0.4, 0.01):
        assert float(rmse(made.at(sigma), D.flow(made.start, 80.0, sigma, 400)).max()) < 2e-3
    assert torch.equal(made.at(0.0), made.end)


def test_the_jacobian_is_the_derivative() -> None:
    """The normal equations' right side is the gradient of half the weighted squared error, by finite differences."""
    D = problem()
    made = follow(D, fine_levels(D, None, 24), Noise.of(1, 16), {}, dtype=torch.float64)
    task = Task(D, 3, None, made, 4)
    table = Table.of(build("dpmpp2m", torch.tensor([80.0, 3.0, 0.5, 0.0])))
    columns, _, right = _equations(task, table, True, None, None)
    fit = task.fit

    def ends(moved: Table) -> Tensor:
        return sample(D, fit.start, moved.tableau())

    residual = fit.end - ends(table)
    own = residual.square().mean(1).sqrt()
    weight = (own.mean() / own).clamp_max(20.0)
    for i in range(len(columns)):
        step = [0.0] * len(columns)
        step[i] = 1e-6
        moved = table.moved(columns, step, None)
        assert moved is not None
        slope = (ends(moved) - ends(table)) / 1e-6
        found = float((slope * residual * weight[:, None]).sum())
        assert float(right[i]) == pytest.approx(found, rel=2e-2, abs=2e-2 * float(right.abs().max()) / 10)


def test_guidance_is_fitted_with_its_condition() -> None:
    guided = CFG(problem(), 2.0)
    label = torch.arange(4)
    table = calibrate(guided, nfe=3, trajectories=32, searches=4, cond={"label": label})
    x, _ = starts()
    cond = {"label": torch.arange(len(x)) % 4}
    fine = build("dpmpp3m_exact", grid("karras", 96, 0.002, 80.0))
    end = sample(guided, x, fine, cond)
    plain = sample(guided, x, build("dpmpp2m", grid("karras", 3, 0.002, 80.0)), cond)
    assert float(rmse(sample(guided, x, table, cond), end).mean()) < 0.5 * float(rmse(plain, end).mean())


def test_classifier_free_guidance_is_the_published_mix_in_one_call() -> None:
    D, x = CountingDenoiser(problem()), torch.randn(4, 6, dtype=torch.float64)
    own, free = {"label": torch.arange(4)}, {"label": torch.full((4,), -1)}
    guided = CFG(D, 2.5)(x, torch.full((4,), 0.7), own)
    assert D.nfe == 1
    plain = problem()
    expected = plain(x, 0.7, free) + 2.5 * (plain(x, 0.7, own) - plain(x, 0.7, free))
    assert torch.allclose(guided, expected, atol=1e-12)
    assert torch.equal(CFG(D, 1.0)(x, 0.7, own), plain(x, 0.7, own))
    with pytest.raises(InputError, match="scale >= 0"):
        CFG(D, math.nan)


def test_a_budget_ends_the_search_and_the_result_is_whole() -> None:
    quick = calibrate(problem(), nfe=4, trajectories=64, budget=1e-3)
    assert report_of(quick)["kept"] in ("fitted", "start") and error(quick).__class__ is float
    assert Clock(None).allows(1e9) and not Clock(1.0).allows(2.0)


class _Broken(Wrapper):
    def __call__(self, x: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        out = super().__call__(x, sigma, cond)
        return out * torch.nan if float(sigma) < 1.0 else out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 3, "method": "least-square"}, "unknown calibration method 'least-square'.*'least-squares'"),
        ({"nfe": 3, "ridges": 1}, "unknown option of least-squares 'ridges'.*'ridge'"),
        ({"nfe": 3, "budget": 0}, "budget is in seconds"),
        ({"nfe": 3, "history": 0}, "history >= 1"),
        ({"nfe": 3, "refinements": -1}, "refinements >= 0"),
        ({"nfe": 3, "memory": 0}, "memory must be at least 1"),
        ({"nfe": 49}, "from 1 to 48"),
        ({}, "either nfe .* or sigmas"),
        ({"sigmas": [80.0, 3.0, 3.0, 0.0]}, "level 1 is 3 and level 2 is 3"),
        ({"sigmas": [80.0, 3.0, 5.0]}, "must decrease"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(problem(), trajectories=8, **options)


def test_non_finite_output_names_row_and_level() -> None:
    with pytest.raises(InputError, match=r"not finite at row \d+ of its 96 steps, sigma 0\.\d+"):
        calibrate(_Broken(problem()), nfe=3, trajectories=8)


def test_every_method_can_be_asked_for() -> None:
    for name in CALIBRATIONS:
        with pytest.raises(InputError, match=f"unknown option of {name} 'nonsense'"):
            calibrate(problem(), nfe=4, trajectories=8, method=name, nonsense=1)
