"""EPD-Solver: the published step written out, its symmetries, parallel evaluation, learning, storage and bad input."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import InputError, Mixture, Noise, Tableau, sample
from fewstep.core.denoiser import CountingDenoiser
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.solve.amed import amed_table
from fewstep.solve.epd import epd, epd_table
from fewstep.solve.teacher import Task, Teacher, fine_levels, follow

GRID = torch.tensor([20.0, 6.0, 1.5, 0.3], dtype=torch.float64)
NUMBERS: dict[str, Any] = {"r": (0.2, 0.6, 0.85), "w": (0.5, 0.3, 0.2), "o": (0.99, 1.01, 1.02), "d": (1.1, 0.9, 1.0)}


@cache
def mixture() -> Mixture:
    means = torch.tensor([[-1.0, 0.4], [0.8, 0.6], [0.3, -1.1]])
    return Mixture(means, torch.tensor([[0.3, 0.4], [0.2, 0.3], [0.4, 0.2]]), [1, 2, 2])


@cache
def gauss() -> Mixture:
    return Mixture(torch.tensor([[0.3]]), 0.25)


@cache
def teacher(D: Mixture) -> Teacher:
    with torch.no_grad():
        return follow(D, fine_levels(D, None), Noise.of(0, 64).fold("test"), {}, dtype=torch.float64)


def task(nfe: int, D: Mixture | None = None, **changes: Any) -> Task:
    D = D or mixture()
    return Task(D, nfe, **{"grid": None, "teacher": teacher(D), "held": 16, **changes})


def start(n: int = 40, level: float = 20.0) -> Tensor:
    return level * Noise.of(9, n).normal((2,), dtype=torch.float64)


def run(table: Tableau, x: Tensor | None = None, **how: Any) -> Tensor:
    return sample(mixture(), start() if x is None else x, table, **how)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("afs", [False, True])
def test_the_published_step(afs: bool) -> None:
    D, x = mixture(), start()
    for k, (a, b) in enumerate(itertools.pairwise(GRID.tolist())):
        slope = x / math.sqrt(1 + a * a) if afs and k == 0 else (x - D(x, a)) / a
        total = torch.zeros_like(x)
        for r, w, o, d in zip(*NUMBERS.values(), strict=True):
            m = b**r * a ** (1 - r)
            y = x + (m - a) * slope
            total += w * o * (y - D(y, d * m)) / m
        x = x + (b - a) * total
    table = epd_table(GRID, **NUMBERS, afs=afs)
    counted: Any = CountingDenoiser(mixture())
    assert far(sample(counted, start(), table), x) < 1e-12
    assert counted.nfe == table.nfe == 12 - afs


def test_one_point_is_amed() -> None:
    ours = epd_table(GRID, r=[[0.3], [0.4], [0.6]], o=[[1.0]] * 3, d=[[1.1]] * 3)
    assert far(run(ours), run(amed_table(GRID, r=(0.3, 0.4, 0.6), alpha=1.1))) < 1e-13


def test_weights_do_not_matter_where_the_points_coincide() -> None:
    one, two = (epd_table(GRID, r=(0.4, 0.4, 0.4), w=w) for w in ((0.2, 0.3, 0.5), (0.9, 0.1, 0.0)))
    assert far(run(one), run(two)) < 1e-12
    assert far(run(epd_table(GRID, r=(0.4, 0.5, 0.3), w=(0.2, 0.3, 0.5))), run(two)) > 1e-4


def test_the_order_of_the_points_does_not_matter() -> None:
    whole = run(epd_table(GRID, **NUMBERS))
    for order in itertools.permutations(range(3)):
        moved = {name: [values[i] for i in order] for name, values in NUMBERS.items()}
        assert far(run(epd_table(GRID, **moved)), whole) < 1e-12


@pytest.mark.parametrize("afs", [False, True])
def test_the_points_of_a_step_are_one_wave(afs: bool) -> None:
    table = epd_table(GRID, **NUMBERS, afs=afs)
    # A row that makes no call joins the wave after it.
    assert table.waves == ((4, 0, 0, 0) if afs else (1, 3, 0, 0)) + (1, 3, 0, 0) * 2
    assert table.latency == 6 - afs
    counted: Any = CountingDenoiser(mixture())
    together = sample(counted, start(), table, parallel=True)
    assert counted.nfe == table.latency
    assert counted.images == table.nfe * 40
    assert far(together, run(table)) < 1e-12


def test_order_and_a_constant_slope() -> None:
    assert 1.9 < epd_table(GRID, r=(1 / 3, 2 / 3)).order() < 2.1
    assert 0.9 < epd_table(GRID, r=(0.2, 0.4)).order() < 1.1
    point, unit = Mixture(torch.full((1, 3), 0.7), 0.0), torch.randn(50, 3, dtype=torch.float64)
    grid = torch.tensor([1e8, 5.0, 0.6, 0.02], dtype=torch.float64)
    found = epd_table(grid, r=(0.3, 0.8), w=(0.9, 0.1))(point, 0.7 + 1e8 * unit)
    assert float((found - 0.7 - 0.02 * unit).abs().max()) < 1e-6


def test_steps_without_points_and_to_zero_are_euler() -> None:
    grid = torch.cat([GRID, torch.zeros(1, dtype=torch.float64)])
    table = epd_table(grid, r=[[], [0.5], [0.3, 0.6], [0.5]])
    assert table.nfe == 1 + 2 + 3 + 1
    x = start()
    found: dict[float, Tensor] = {}
    table(mixture(), x, on_step=lambda s: found.setdefault(s.level, s.point))
    out = mixture()(x, 20.0)
    assert far(found[6.0], out + 0.3 * (x - out)) < 1e-13
    assert far(found[0.0], mixture()(found[0.3], 0.3)) < 1e-13


@pytest.mark.parametrize(("nfe", "points"), [(2, [1]), (4, [1, 1]), (5, [1, 2]), (6, [2, 2]), (7, [1, 1, 2])])
def test_the_budget_is_spent_exactly(nfe: int, points: list[int]) -> None:
    fitted = epd(task(nfe), iterations=1, minibatch=4)
    assert fitted.facts["points"] == points
    assert fitted.sampler.nfe == fitted.start.nfe == nfe
    assert fitted.facts["latency"] == 2 * len(points)


def test_afs_saves_the_first_evaluation_and_a_grid_decides_the_steps() -> None:
    assert epd(task(5), iterations=1, afs=True).facts["points"] == [2, 2]
    given = task(6, grid=torch.tensor([80.0, 2.0, 0.1, 0.0]))
    fitted = epd(given, iterations=1)
    assert fitted.sampler.nfe == 3 + 3 + 1


def test_a_gaussian_is_learned_exactly() -> None:
    fitted = epd(task(6, gauss()), iterations=160, minibatch=24, grid="karras")
    assert fitted.facts["loss_last"] < 1e-6 < 1 < fitted.facts["loss_first"]
    x = 80 * Noise.of(9, 40).normal((1,), dtype=torch.float64)
    assert float((fitted.sampler(gauss(), x) - gauss().flow(x, 80.0, 0.002)).abs().max()) < 1e-3


@pytest.mark.parametrize("options", [{}, {"own": True}, {"teacher": "refined"}, {"scale_time": 0.1}])
def test_learning_beats_the_untrained_table(options: dict[str, Any], tmp_path: Path) -> None:
    fitted = epd(task(6), iterations=24, minibatch=24, **options)
    x = start(200, 80.0)
    goal = mixture().flow(x, 80.0, 0.002, 200)
    errors = [float((run(s, x) - goal).norm(dim=1).mean()) for s in (fitted.sampler, fitted.start)]
    assert errors[0] < 0.7 * errors[1]
    made = fitted.sampler
    again = load_sampler(save_sampler(made, tmp_path / "sampler"))
    assert torch.equal(run(again, x), run(made, x))
    rebuilt = epd_table(made.levels[[0, 3, 6]], **{name: fitted.facts[name] for name in "rwod"})
    assert far(run(rebuilt, x), run(made, x)) < 1e-12
    for name, scale in (("o", 0.01), ("d", options.get("scale_time", 0.0))):
        assert all(abs(v - 1) <= scale + 1e-12 for row in fitted.facts[name] for v in row)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epd(task(1)), "at least 2 evaluations, got 1"),
        (lambda: epd(task(4), points=0), "at least 1 parallel point a step, got points=0"),
        (lambda: epd(task(4), lr=0.0), "lr > 0, got 0.0"),
        (lambda: epd(task(4), scale_time=-0.1), "scale_time must be in"),
        (lambda: epd(task(4), teacher="coarse"), "unknown teacher 'coarse'"),
        (lambda: epd(task(4), grid="karas"), "did you mean 'karras'"),
        (lambda: epd_table(GRID, r=(0.5, 1.0)), "0 < r < 1"),
        (lambda: epd_table(GRID, r=(0.5, 0.4), w=(0.5, 0.4)), "of sum 1"),
        (lambda: epd_table(GRID, r=(0.5, 0.4), o=(1.0,)), "as many of each"),
        (lambda: epd_table(GRID, r=(0.5, 0.4), d=(1.0, 0.0)), "d > 0"),
        (lambda: epd_table(GRID, r=[[0.5], [0.4]]), "a row for each of 3 steps"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
