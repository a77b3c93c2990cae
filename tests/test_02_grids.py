"""Grids: their ends, the coordinate each is uniform in, and refinement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import InputError, Mixture, calibrate, trajectory
from fewstep.grid import GRIDS, flow_shift, grid, karras, logsnr, vp_time
from fewstep.solve import check_grid, euler

RANGES = [(0.002, 80.0), (0.03, 14.6), (0.002, 1e8)]


@pytest.mark.parametrize("name", sorted(GRIDS))
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


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize(("low", "high"), RANGES[:2])
@pytest.mark.parametrize("extra", [1, 2, 5])
def test_refining_keeps_the_points(name: str, low: float, high: float, extra: int) -> None:
    coarse, fine = (grid(name, n, low, high, to_zero=False) for n in (6, 6 * (extra + 1)))
    assert float((fine[:: extra + 1] / coarse - 1).abs().max()) < 1e-9
    assert torch.equal(grid(name, 7, low, high)[:-1], coarse)


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
    table = calibrate(D, sigmas=levels, trajectories=64, ridge=1e-6)
    assert table.levels.tolist() == levels
    assert table.nfe == len(levels) - 1
    x = 80 * torch.randn(64, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    last = [step for step in trajectory(D, x, table) if step.level > 0][-1]
    true = D.flow(x, 80.0, last.level, 200)
    assert float((last.point - true).square().mean().sqrt()) < 0.1
    assert float((D(true, last.level) - true).square().mean().sqrt()) > 0.2


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
    ],
)
def test_bad_grids(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
