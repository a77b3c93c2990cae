"""Grids: their ends, the coordinate each is uniform in, refinement, and the choice of levels from trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import FLOW, InputError, Mixture, calibrate, sample, trajectory
from fewstep.grid import GRIDS, flow_shift, gits, grid, karras, logsnr, refine, vp_time
from fewstep.grid.gits import METRICS, jump_costs, shortest_path
from fewstep.solve import check_grid, euler

RANGES = [(0.002, 80.0), (0.03, 14.6), (0.002, 1e8)]
# Grids whose levels come from the range alone; the other two bring a table with them.
FREE = sorted(set(GRIDS) - {"ays", "discrete"})


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_grid_ends_and_falls(name: str, low: float, high: float, steps: int) -> None:
    open_end, to_zero = grid(name, steps, low, high, to_zero=False), grid(name, steps, low, high)
    for levels in (open_end, to_zero):
        assert levels.dtype == torch.float64
        assert len(levels) == steps + 1
        assert (levels.diff() < 0).all()
        assert float(levels[0]) == pytest.approx(high, rel=1e-12)
    assert float(open_end[-1]) == pytest.approx(low, rel=1e-12)
    assert float(to_zero[-1]) == 0
    assert steps == 1 or float(to_zero[-2]) == pytest.approx(low, rel=1e-12)


@pytest.mark.parametrize("low", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("high", [3.0, 700.0, 1e8])
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_every_grid_falls_to_its_end_whatever_the_range(name: str, low: float, high: float) -> None:
    for steps in (1, 2, 3, 17, 100):
        for to_zero in (True, False):
            options = {"rescale": True} if name == "ays" else {}
            levels = grid(name, steps, low, high, to_zero=to_zero, **options)
            assert levels.dtype == torch.float64
            assert len(levels) == steps + 1
            assert (levels.diff() < 0).all()
            assert 0.99 * low <= float(levels[steps - 1]) <= float(levels[0]) <= 1.01 * high
            assert (float(levels[-1]) == 0) == to_zero


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize(("low", "high"), RANGES[:2])
@pytest.mark.parametrize("extra", [1, 2, 5])
def test_refining_keeps_the_points(name: str, low: float, high: float, extra: int) -> None:
    coarse, fine = (grid(name, n, low, high, to_zero=False) for n in (6, 6 * (extra + 1)))
    assert float((fine[:: extra + 1] / coarse - 1).abs().max()) < 1e-9
    assert torch.equal(grid(name, 7, low, high)[:-1], coarse)


@pytest.mark.parametrize(("name", "coordinate"), [("karras", "rho7"), ("logsnr", "log"), ("flow_shift", "flow")])
@pytest.mark.parametrize("to_zero", [True, False])
def test_refine_is_building_with_more_steps(name: str, coordinate: str, to_zero: bool) -> None:
    levels = grid(name, 6, 0.002, 80.0, to_zero=to_zero)
    fine = refine(levels, 4, coordinate=FLOW(shift=3.0) if coordinate == "flow" else coordinate)
    built = grid(name, 4 * 5 + 1 if to_zero else 4 * 6, 0.002, 80.0, to_zero=to_zero)
    inner = fine[:-1] if to_zero else fine
    assert fine.shape == built.shape
    assert float((inner / built[: len(inner)] - 1).abs().max()) < 1e-9
    assert torch.equal(inner[::4], levels[:-1] if to_zero else levels)


def test_each_grid_is_uniform_in_its_own_coordinate() -> None:
    low, high, steps = 0.002, 80.0, 12

    def even(values: Tensor, tolerance: float = 1e-9) -> bool:
        gaps = values.diff()
        return float((gaps / gaps.mean() - 1).abs().max()) < tolerance

    assert even(karras(steps, low, high, to_zero=False) ** (1 / 7))
    assert even(karras(steps, low, high, rho=3.0, to_zero=False) ** (1 / 3))
    assert even(logsnr(steps, low, high, to_zero=False).log())
    for top in (high, 1e8):
        flow = flow_shift(steps, low, top, shift=1.0, to_zero=False)
        assert even(flow / (1 + flow), 1e-6)
        moved = flow_shift(steps, low, top, shift=3.0, to_zero=False) / 3
        assert even(moved / (1 + moved), 1e-6)
        # sigma^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) through (1, top) and (1/1000, low).
        y0, y1 = math.log(1 + low**2), math.log(1 + top**2)
        beta_d = 2 * (y0 / 1e-3 - y1) / (1e-3 - 1)
        beta_min = y1 - beta_d / 2
        y = torch.log1p(vp_time(steps, low, top, to_zero=False) ** 2)
        times = 2 * y / (beta_min + (beta_min**2 + 2 * beta_d * y).sqrt())
        assert even(times, 1e-6)
        assert float(times[0]) == pytest.approx(1, rel=1e-9)
        assert float(times[-1]) == pytest.approx(1e-3, rel=1e-6)


def test_karras_tends_to_logsnr() -> None:
    many, limit = karras(9, 0.002, 80.0, rho=1e6), logsnr(9, 0.002, 80.0)
    assert float((many[:-1] / limit[:-1] - 1).abs().max()) < 1e-4
    assert float((karras(9, 0.002, 80.0)[:-1] / limit[:-1] - 1).abs().max()) > 0.1


def test_a_list_of_levels_keeps_its_digits() -> None:
    levels = [80.0, 1.1, 0.7]
    assert check_grid(levels).tolist() == levels  # type: ignore[arg-type]
    assert euler(levels).levels.tolist() == levels  # type: ignore[arg-type]
    fitted = calibrate(two_modes(), sigmas=levels, trajectories=8)
    assert fitted.levels.tolist() == levels


def two_modes() -> Mixture:
    return Mixture(torch.tensor([[0.5, -0.5, 1.0], [0.1, 0.9, 0.0]]), 0.1, sigma_min=0.5)


@pytest.mark.parametrize("levels", [[80.0, 2.0, 0.5], [80.0, 2.0, 0.5, 0.0], [80.0, 4.0, 2.0, 0.7]])
def test_a_calibrated_table_steps_through_the_given_levels(levels: list[float]) -> None:
    """Also where they end above 0, or have the denoiser's lowest level before 0."""
    D = two_modes()
    # Row by row only: steps that look at the end alone may leave the trajectory on their way.
    table = calibrate(D, sigmas=levels, trajectories=64, ridge=1e-6, refinements=0)
    assert table.levels.tolist() == levels
    assert table.nfe == len(levels) - 1
    x = 80 * torch.randn(64, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    last = [step for step in trajectory(D, x, table) if step.level > 0][-1]
    true = D.flow(x, 80.0, last.level, 200)
    assert float((last.point - true).square().mean().sqrt()) < 0.1
    assert float((D(true, last.level) - true).square().mean().sqrt()) > 0.2


# ---- levels chosen from a teacher's trajectories


Recorded = tuple[Tensor, Tensor, Tensor]


@cache
def recorded(count: int = 10) -> Recorded:
    """Points, outputs and levels (count,) of true trajectories."""
    D, levels = two_modes(), karras(count - 1, 0.05, 20.0, to_zero=False)
    x = 20 * torch.randn(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    points = [x]
    for a, b in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        points.append(D.flow(points[-1], a, b, 8))
    outputs = [D(p, s) for p, s in zip(points, levels.tolist(), strict=True)]
    return torch.stack(points), torch.stack(outputs), levels


def straight(count: int = 8) -> Recorded:
    """x = m + sigma n: the output is m everywhere, and Euler makes no error at all."""
    levels = karras(count - 1, 0.05, 20.0, to_zero=False)
    m, n = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return m + levels[:, None, None] * n, m.expand(count, 5, 4), levels


def written_out(metric: str, data: Recorded) -> Tensor:
    """The cost matrix by its definition, one trajectory and one jump at a time."""
    points, outputs, levels = data
    count = len(levels)
    cost = torch.full((count, count), math.inf, dtype=torch.float64)

    def deviation(p: Tensor, r: int) -> Tensor:
        away, along = points[-1, r] - p, points[-1, r] - points[0, r]
        along = along / along.norm()
        return (away - (away @ along) * along).norm()

    for i, j in combinations(range(count), 2):
        total = 0.0
        for r in range(points.shape[1]):
            slope = (points[i, r] - outputs[i, r]) / levels[i]
            end = points[i, r] + (levels[j] - levels[i]) * slope
            if metric == "dev":
                total += float(deviation(end, r) - deviation(points[j, r], r))
            else:
                total += float((end - points[j, r]).norm(p=1 if metric == "l1" else 2))
        cost[i, j] = total / points.shape[1]
    return cost


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_costs_are_their_definition(metric: str) -> None:
    found, wanted = jump_costs(*recorded(), metric=metric), written_out(metric, recorded())
    upper = torch.ones(10, 10).triu(1).bool()
    assert torch.equal(found.isfinite(), upper)
    # A Gram matrix of numbers near 20 knows squared distances to 1e-13 or so.
    assert float((found - wanted)[upper].abs().max()) < (1e-5 if metric == "l2" else 1e-12)
    assert float(wanted[upper].abs().max()) > 0.1


def test_the_cost_grows_with_the_length_of_the_jump() -> None:
    one = Mixture(torch.zeros(1, 1), 0.25)
    levels = karras(9, 0.05, 20.0, to_zero=False)
    points = torch.stack([one.flow(torch.full((1, 1), 20.0, dtype=torch.float64), 20.0, s) for s in levels.tolist()])
    outputs = torch.stack([one(p, s) for p, s in zip(points, levels.tolist(), strict=True)])
    cost = jump_costs(points, outputs, levels)
    for i in range(8):
        assert (cost[i, i + 1 :].diff() > 0).all()


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_straight_trajectories_cost_nothing(metric: str) -> None:
    cost = jump_costs(*straight(), metric=metric)
    assert float(cost[cost.isfinite()].abs().max()) < (1e-5 if metric == "l2" else 1e-12)


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("coefficient", [1.0, 1.15])
@pytest.mark.parametrize("steps", [2, 4, 7])
def test_the_chosen_path_is_the_best_of_all(metric: str, coefficient: float, steps: int) -> None:
    cost = jump_costs(*recorded(), metric=metric)
    paths = [(0, *inner, 9) for inner in combinations(range(1, 9), steps - 1)]

    def total(path: tuple[int, ...]) -> float:
        return sum(coefficient**e * float(cost[i, j]) for e, (i, j) in enumerate(pairwise(path)))

    best = min(paths, key=total)
    assert tuple(shortest_path(cost, steps, coefficient)) == best
    levels = recorded()[2]
    chosen = gits(*recorded(), steps, coefficient=coefficient, metric=metric, to_zero=False)
    assert chosen.tolist() == levels[list(best)].tolist()
    with_zero = gits(*recorded(), steps + 1, coefficient=coefficient, metric=metric)
    assert with_zero.tolist() == [*chosen.tolist(), 0.0]


def test_as_many_steps_as_the_teacher_are_the_teacher() -> None:
    levels = recorded()[2]
    assert torch.equal(gits(*recorded(), 9, to_zero=False), levels)
    assert gits(*recorded(), 10).tolist() == [*levels.tolist(), 0.0]
    assert gits(*recorded(), 1).tolist() == [20.0, 0.0]


def test_a_trajectory_to_zero_also_chooses_its_last_positive_level() -> None:
    """There D is where the trajectory ends, and what the teacher said at level 0 plays no part."""
    points, outputs, levels = recorded()
    ends = two_modes()(points[-1], 0.05)[None]
    data = torch.cat([points, ends]), torch.cat([outputs, 1e3 * ends]), torch.cat([levels, levels.new_zeros(1)])
    found = gits(*data, 4, metric="l2", coefficient=1.0)
    cost = written_out("l2", data)
    best = min(
        ((0, *inner, 10) for inner in combinations(range(1, 10), 3)),
        key=lambda p: sum(float(cost[i, j]) for i, j in pairwise(p)),
    )
    assert found.tolist() == data[2][list(best)].tolist()


def test_a_chosen_grid_is_better_than_the_one_it_was_chosen_from() -> None:
    D, (points, _, _) = two_modes(), recorded(40)
    errors = {
        name: float((sample(D, points[0], euler(levels)) - points[-1]).square().mean())
        for name, levels in {
            "karras": karras(5, 0.05, 20.0, to_zero=False),
            "gits": gits(*recorded(40), 5, to_zero=False),
        }.items()
    }
    assert errors["gits"] < 0.7 * errors["karras"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid("karas", 5, 0.1, 1.0), "did you mean 'karras'"),
        (lambda: karras(0, 0.1, 1.0), "at least 1 step"),
        (lambda: logsnr(2.5, 0.1, 1.0), "at least 1 step"),  # type: ignore[arg-type]
        (lambda: logsnr(5, 1.0, 0.1), "0 < sigma_min < sigma_max"),
        (lambda: vp_time(5, 0.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: flow_shift(5, 0.1, math.inf), "< inf"),
        (lambda: karras(5, 0.1, 1.0, rho=0), "rho > 0"),
        (lambda: flow_shift(5, 0.1, 1.0, shift=-1), "shift > 0"),
        (lambda: vp_time(5, 0.1, 1.0, epsilon=1.0), "epsilon < 1"),
        (lambda: grid("logsnr", 5, 0.1, 1.0, rho=3.0), "'logsnr' has no option 'rho'"),
        (lambda: karras(5, 0.1, 1.0, rho=1e40), "which must be lower"),
        (lambda: gits(*recorded(), 5, metric="deviation"), "did you mean 'dev'"),
        (lambda: gits(*recorded(), 0), "at least 1 step"),
        (lambda: gits(*recorded(), 12), "12 steps cannot be chosen from a trajectory of 10 levels"),
        (lambda: gits(*recorded(), 3, coefficient=0.0), "0 < coefficient"),
        (lambda: gits(recorded()[0], recorded()[1][1:], recorded()[2], 3), "must be \\(M, n, ...\\)"),
        (lambda: gits(*recorded()[:2], recorded()[2].flip(0), 3), "must decrease"),
        (lambda: gits(*recorded()[:2], recorded()[2] - 0.05, 3, to_zero=False), "leave out its last point"),
    ],
)
def test_bad_grids(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
