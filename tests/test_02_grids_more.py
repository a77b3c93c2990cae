"""Grids against their published formulas and other libraries' schedulers; tables of levels; refining and truncating."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import COSINE, DDPM, EDM, FLOW, TRIG, VP, InputError, Path
from fewstep.grid import (
    ays,
    beta,
    cosine,
    discrete,
    dynamic_shift,
    exponential,
    flow_shift,
    iddpm_levels,
    karras,
    logsnr,
    polyexponential,
    refine,
    sd_levels,
    time,
    truncate,
    vp_time,
)
from fewstep.grid.beta import beta_quantile, incomplete_beta

LOW, HIGH = 0.02, 20.0
# A range that holds the whole of every table.
WIDE = (0.002, 1e8)


def close(found: Tensor, wanted: Any, tolerance: float) -> bool:
    """Whether the levels agree, each to a relative ``tolerance``; a last 0 must be 0."""
    expected = torch.tensor([float(w) for w in wanted], dtype=torch.float64)
    return found.shape == expected.shape and bool(((found - expected).abs() <= tolerance * expected).all())


# ---- spacing by a formula


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_polyexponential_is_its_formula(rho: float) -> None:
    ramp = np.linspace(1, 0, 9) ** rho
    wanted = np.exp(ramp * (math.log(HIGH) - math.log(LOW)) + math.log(LOW))
    assert close(polyexponential(9, LOW, HIGH, rho=rho), [*wanted, 0.0], 1e-12)
    assert close(polyexponential(8, LOW, HIGH, rho=rho, to_zero=False), wanted, 1e-12)


def test_names_of_the_geometric_grid() -> None:
    assert torch.equal(exponential(7, LOW, HIGH), logsnr(7, LOW, HIGH))
    assert close(polyexponential(7, LOW, HIGH), logsnr(7, LOW, HIGH), 1e-12)


def test_cosine_is_the_clipped_cosine_log_snr() -> None:
    least, most = -20.0, 20.0
    b = math.atan(math.exp(-most / 2))
    a = math.atan(math.exp(-least / 2)) - b
    wanted = [math.exp(math.log(math.tan(a * u + b))) for u in np.linspace(1, 0, 11)]
    found = cosine(10, math.exp(-10), math.exp(10), to_zero=False)
    assert close(found, wanted, 1e-9)
    assert float((COSINE.at(found) - torch.linspace(1, 0, 11, dtype=torch.float64)).abs().max()) < 1e-12


@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_cosine_is_the_best_grid_of_euler_for_gaussian_data(deviation: float) -> None:
    """Moving any inner level carries the final standard deviation away from the true one."""

    def error(levels: list[float]) -> float:
        gain = 1.0
        for s, t in pairwise(levels):
            gain *= 1 + (t - s) * s / (s * s + deviation**2)
        true = math.sqrt((levels[-1] ** 2 + deviation**2) / (levels[0] ** 2 + deviation**2))
        return abs(math.log(gain / true))

    levels = cosine(6, LOW, HIGH, scale=deviation, to_zero=False).tolist()
    best = error(levels)
    for k in range(1, 6):
        for factor in (0.97, 1.03):
            assert error([*levels[:k], levels[k] * factor, *levels[k + 1 :]]) > best * (1 + 1e-6)


@pytest.mark.parametrize(
    "path", [EDM, VP, VP(9.0), COSINE, FLOW, FLOW(shift=3.0), TRIG, TRIG(0.5), DDPM], ids=lambda p: str(p)[:24]
)
def test_time_is_even_in_the_time_of_its_path(path: Path) -> None:
    levels = time(9, LOW, HIGH, path=path, to_zero=False)
    gaps = path.at(levels).diff()
    assert float((gaps / gaps.mean() - 1).abs().max()) < 1e-9
    assert (float(levels[0]), float(levels[-1])) == (HIGH, LOW)
    assert time(10, LOW, HIGH, path=path).tolist() == [*levels.tolist(), 0.0]


def test_time_agrees_with_the_grids_of_their_own_paths() -> None:
    assert close(time(8, LOW, HIGH, path=FLOW(shift=3.0)), flow_shift(8, LOW, HIGH), 1e-12)
    assert close(time(8, LOW, HIGH, path=TRIG(0.5)), cosine(8, LOW, HIGH, scale=0.5), 1e-12)
    # The levels of VP(19.9, 0.1) at times 1 and 1/1000.
    low, high = float(VP.sigma(1e-3)), float(VP.sigma(1.0))
    assert close(time(8, low, high, path=VP), vp_time(8, low, high), 1e-9)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096])
def test_dynamic_shift_is_the_shift_of_flux(tokens: int) -> None:
    flow = pytest.importorskip("diffusers.schedulers").FlowMatchEulerDiscreteScheduler
    scheduler = flow(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=mu)
    # Evenly spaced from pure noise to t = 1/8 before the shift, whose odds t / (1 - t) the shift multiplies.
    levels = dynamic_shift(8, math.exp(mu) / 7, 1e8, tokens=tokens)
    assert close(levels / (1 + levels), scheduler.sigmas, 1e-6)


# ---- beta


@pytest.mark.parametrize("a", [0.05, 0.6, 1.0, 2.5, 30.0, 100.0])
@pytest.mark.parametrize("b", [0.05, 0.6, 1.0, 2.5, 30.0, 100.0])
def test_the_beta_distribution_agrees_with_scipy(a: float, b: float) -> None:
    special = pytest.importorskip("scipy.special")
    for x in np.linspace(0, 1, 41):
        assert incomplete_beta(float(x), a, b) == pytest.approx(special.betainc(a, b, x), abs=1e-12)
        assert beta_quantile(float(x), a, b) == pytest.approx(special.betaincinv(a, b, x), abs=1e-12)


def test_beta_of_ones_is_even_in_its_coordinate() -> None:
    assert close(beta(8, LOW, HIGH, alpha=1.0, beta=1.0), logsnr(8, LOW, HIGH), 1e-12)
    assert close(beta(8, LOW, HIGH, alpha=1.0, beta=1.0, coordinate="rho7"), karras(8, LOW, HIGH), 1e-12)
    assert close(beta(8, LOW, HIGH, alpha=1.0, beta=1.0, coordinate=VP), time(8, LOW, HIGH, path=VP), 1e-12)


def test_beta_below_one_crowds_the_ends() -> None:
    even, crowded = (beta(9, LOW, HIGH, alpha=p, beta=p, to_zero=False).log() for p in (1.0, 0.6))
    assert (crowded[1:5] > even[1:5]).all()
    assert (crowded[5:9] < even[5:9]).all()
    # Equal parameters make it symmetric about the middle of the coordinate.
    assert float((crowded + crowded.flip(0)).diff().abs().max()) < 1e-12


def test_beta_in_sigma_is_that_of_diffusers() -> None:
    euler = pytest.importorskip("diffusers.schedulers").EulerDiscreteScheduler
    scheduler = euler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_beta_sigmas=True)
    scheduler.set_timesteps(9)
    low, high = (float(sd_levels()[i]) for i in (0, -1))
    assert close(beta(9, low, high, coordinate="sigma"), scheduler.sigmas, 1e-4)


def test_beta_over_a_table_is_that_of_its_indices() -> None:
    stats = pytest.importorskip("scipy.stats")
    table = DDPM.levels
    wanted = stats.beta.ppf(1 - np.linspace(0, 1, 10, endpoint=False), 0.6, 0.6) * 999
    found = beta(10, float(table[0]), float(table[-1]), coordinate=DDPM, to_zero=False)
    assert float((DDPM.at(found)[:-1] - torch.as_tensor(wanted)).abs().max()) < 1e-8


# ---- tables


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [2, 3, 7, 30, 333, 1000])
def test_discrete_levels_are_those_of_diffusers(spacing: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers.schedulers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    offset = 1 if spacing == "leading" and steps < 1000 else 0
    scheduler = diffusers.EulerDiscreteScheduler(**betas, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    # Its cumulative product is in float32.
    assert close(discrete(steps, *WIDE, spacing=spacing, offset=offset), scheduler.sigmas, 2e-4)
    if spacing != "linspace":
        ddim = diffusers.DDIMScheduler(**betas, timestep_spacing=spacing, steps_offset=offset)
        ddim.set_timesteps(steps)
        found = discrete(steps, *WIDE, spacing=spacing, offset=offset)[:-1]
        assert torch.equal(found, sd_levels()[ddim.timesteps])


def test_sgm_is_linspace_with_one_step_more_and_without_its_last_level() -> None:
    logs = np.log(sd_levels().numpy())
    wanted = np.exp(np.interp(np.linspace(999, 0, 8)[:-1], np.arange(1000), logs))
    assert close(discrete(7, *WIDE, spacing="sgm", interpolate="log"), [*wanted, 0.0], 1e-12)
    longer = discrete(8, *WIDE, spacing="linspace")
    assert torch.equal(discrete(7, *WIDE, spacing="sgm")[:-1], longer[:-2])


def test_a_fractional_index_is_interpolated_as_asked() -> None:
    table = [8.0, 2.0, 0.5]
    assert close(discrete(4, 0.1, 9.0, table=table, spacing="sgm"), [8, 5, 2, 1.25, 0], 1e-14)
    logs = discrete(4, 0.1, 9.0, table=table, spacing="sgm", interpolate="log")
    assert close(logs, [8, 4, 2, 1, 0], 1e-14)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "sgm"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_discrete_can_end_at_the_lowest_level_once(spacing: str, steps: int) -> None:
    levels = discrete(steps, *WIDE, spacing=spacing, to_zero=False)
    assert len(levels) == steps + 1
    assert float(levels[-1]) == float(sd_levels()[0])
    assert (levels.diff() < 0).all()
    if spacing in ("trailing", "sgm"):
        assert torch.equal(levels[:-1], discrete(steps, *WIDE, spacing=spacing)[:-1])


def test_discrete_keeps_within_the_range_and_takes_a_falling_table() -> None:
    table = sd_levels()
    part = table[(table >= 0.99 * 0.1) & (table <= 1.01 * 10)]
    found = discrete(6, 0.1, 10.0)
    assert torch.equal(found, discrete(6, *WIDE, table=part))
    assert torch.equal(found, discrete(6, *WIDE, table=part.flip(0)))
    assert torch.equal(found, discrete(6, *WIDE, table=part.tolist()))
    # A range that is the table's to three digits leaves nothing out.
    assert torch.equal(discrete(6, 0.0292, 14.61), discrete(6, *WIDE))
    assert discrete(1, *WIDE).tolist() == [float(table[-1]), 0.0]


def test_tables_of_known_models() -> None:
    assert (float(sd_levels()[0]), float(sd_levels()[-1])) == pytest.approx((0.029167, 14.6146), rel=1e-5)
    # The recursion of arXiv 2206.00364, table 1, with C1 = 0.001 and C2 = 0.008, from level 0 upwards.
    levels, u = [], 0.0
    for j in range(1000, 0, -1):
        after, before = (math.sin(math.pi / 2 * i / (1000 * 1.008)) ** 2 for i in (j, j - 1))
        u = math.sqrt((u * u + 1) / max(before / after, 0.001) - 1)
        levels.append(u)
    assert close(iddpm_levels(), levels, 1e-9)
    diffusers = pytest.importorskip("diffusers.schedulers")
    kept = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    assert close(iddpm_levels()[:900], ((1 - kept) / kept).sqrt()[:900], 1e-3)


# ---- Align Your Steps

AYS = {
    "sd15": "StableDiffusionTimesteps",
    "sdxl": "StableDiffusionXLTimesteps",
}


def test_align_your_steps_agrees_with_the_levels_that_diffusers_holds() -> None:
    held = pytest.importorskip("diffusers.schedulers").AysSchedules
    assert close(ays(10, 0.0292, 14.6146), held["StableDiffusionSigmas"], 1e-12)
    assert close(ays(10, 0.0292, 14.6146, model="sdxl"), held["StableDiffusionXLSigmas"], 1e-12)
    assert close(ays(10, 0.002, 700.0, model="svd"), held["StableDiffusionVideoSigmas"], 1e-12)


@pytest.mark.parametrize("model", sorted(AYS))
def test_align_your_steps_are_levels_of_the_table_of_its_model(model: str) -> None:
    held = pytest.importorskip("diffusers.schedulers").AysSchedules
    indices = torch.tensor(held[AYS[model]])
    assert close(ays(10, 0.0292, 14.6146, model=model)[:-1], sd_levels()[indices], 0.02)


@pytest.mark.parametrize("steps", [1, 4, 10, 25])
def test_align_your_steps_are_interpolated_in_the_logarithm(steps: int) -> None:
    table = ays(10, 0.029, 14.615, to_zero=False).numpy()
    wanted = np.exp(np.interp(np.linspace(0, 10, steps + 1), np.arange(11), np.log(table)))
    assert close(ays(steps, 0.029, 14.615, to_zero=False), wanted, 1e-12)
    assert close(ays(steps, 0.029, 14.615), [*wanted[:-1], 0.0], 1e-12)


def test_align_your_steps_are_stretched_in_the_logarithm() -> None:
    own, other = ays(10, 0.029, 14.615, to_zero=False), ays(10, 0.002, 80.0, rescale=True, to_zero=False)
    assert (float(other[0]), float(other[-1])) == (80.0, 0.002)
    ratio = other.log().diff() / own.log().diff()
    assert float((ratio / ratio.mean() - 1).abs().max()) < 1e-9
    assert close(ays(7, 0.029, 14.615, rescale=True), ays(7, 0.029, 14.615), 1e-12)


# ---- refining and truncating

UNEVEN = torch.tensor([12.0, 9.0, 5.0, 3.2, 1.7, 0.5, 0.02], dtype=torch.float64)


@pytest.mark.parametrize("coordinate", ["log", "sigma", "rho7", "rho2.5", VP, FLOW, TRIG, COSINE, DDPM], ids=str)
@pytest.mark.parametrize("factor", [1, 2, 5])
def test_refine_divides_every_interval_evenly(coordinate: Any, factor: int) -> None:
    fine = refine(UNEVEN, factor, coordinate=coordinate)
    assert torch.equal(fine[::factor], UNEVEN)
    maps: dict[Any, Callable[[Tensor], Tensor]] = {
        "log": torch.log,
        "sigma": lambda s: s,
        "rho7": lambda s: s ** (1 / 7),
        "rho2.5": lambda s: s**0.4,
    }
    at = maps[coordinate](fine) if isinstance(coordinate, str) else coordinate.at(fine)
    gaps = at.diff().reshape(6, factor)
    assert float((gaps / gaps.mean(1, keepdim=True) - 1).abs().max()) < 1e-9


def test_refine_leaves_the_step_to_zero_whole() -> None:
    fine = refine(karras(5, LOW, HIGH), 3)
    assert len(fine) == 3 * 4 + 2
    assert torch.equal(fine[-2:], torch.tensor([LOW, 0.0], dtype=torch.float64))
    assert refine(torch.tensor([3.0, 0.0]), 4).tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    ("steps", "strength", "kept"),
    [(50, 0.8, 40), (50, 1.0, 50), (10, 0.75, 7), (3, 0.5, 1), (4, 0.01, 1), (30, 0.29, 8), (1, 1.0, 1)],
)
def test_truncate_keeps_the_end(steps: int, strength: float, kept: int) -> None:
    for levels in (karras(steps, LOW, HIGH), karras(steps, LOW, HIGH, to_zero=False)):
        assert torch.equal(truncate(levels, strength), levels[steps - kept :])


# ---- bad calls


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: polyexponential(5, LOW, HIGH, rho=0.0), "0 < rho < inf"),
        (lambda: cosine(5, LOW, HIGH, scale=-1.0), "0 < scale < inf"),
        (lambda: time(5, LOW, HIGH, path="flow"), "needs a path"),  # type: ignore[arg-type]
        (lambda: dynamic_shift(5, LOW, HIGH, tokens=0), "tokens >= 1"),
        (lambda: dynamic_shift(5, LOW, HIGH, tokens=10**8), "number of tokens of a picture"),
        (lambda: dynamic_shift(5, LOW, HIGH, tokens=9, base_tokens=9, max_tokens=9), "base_tokens < max_tokens"),
        (lambda: beta(0, LOW, HIGH), "at least 1 step"),
        (lambda: beta(5, LOW, HIGH, alpha=0.0), "alpha and beta in"),
        (lambda: beta(40, LOW, HIGH, alpha=0.01, beta=0.01), "which must be lower"),
        (lambda: beta(5, LOW, HIGH, coordinate="lgo"), "did you mean 'log'"),
        (lambda: beta(5, LOW, HIGH, coordinate="rho0"), "a positive number, such as 'rho7'"),
        (lambda: beta(5, LOW, HIGH, coordinate="rhoxy"), "a positive number, such as 'rho7'"),
        (lambda: ays(0, 0.029, 14.615), "at least 1 step"),
        (lambda: ays(5, 0.029, 14.615, model="sd51"), "did you mean 'sd15'"),
        (lambda: ays(5, 0.002, 80.0), "from 14.615 to 0.029, not from 80 to 0.002.*rescale=True"),
        (lambda: ays(5, 0.029, 14.8), "rescale=True"),
        (lambda: discrete(0, *WIDE), "at least 1 step"),
        (lambda: discrete(5, HIGH, LOW), "0 < sigma_min < sigma_max"),
        (lambda: discrete(5, *WIDE, spacing="trailling"), "did you mean 'trailing'"),
        (lambda: discrete(5, *WIDE, interpolate="cubic"), "unknown interpolation"),
        (lambda: discrete(5, *WIDE, offset=1), "unless the spacing is 'leading'"),
        (lambda: discrete(5, *WIDE, offset=-1, spacing="leading"), "it is >= 0"),
        (lambda: discrete(1000, *WIDE, offset=1, spacing="leading"), "beyond 999"),
        (lambda: discrete(1001, *WIDE), "1001 whole indices cannot be chosen from 1000 levels"),
        (lambda: discrete(1000, *WIDE, to_zero=False), "1001 whole indices cannot"),
        (lambda: discrete(2, *WIDE, table=[1.0, 2.0, 2.0, 3.0]), "rise or fall strictly: 2 is next to 2"),
        (lambda: discrete(2, *WIDE, table=[1.0, 3.0, 2.0, 4.0]), "rise or fall strictly: 3 is next to 2"),
        (lambda: discrete(2, *WIDE, table=[0.0, 1.0, 2.0]), "positive and finite"),
        (lambda: discrete(2, *WIDE, table=[1.0, math.inf]), "positive and finite"),
        (lambda: discrete(2, *WIDE, table=[1.0]), "at least two numbers"),
        (lambda: discrete(2, 20.0, 80.0), "0 of the table's levels, 0.0291672 .. 14.6146, lie between 20 and 80"),
        (lambda: iddpm_levels(1), "count >= 2"),
        (lambda: refine(UNEVEN, 0), "whole factor >= 1"),
        (lambda: refine(UNEVEN, 2, coordinate="sgima"), "did you mean 'sigma'"),
        (lambda: refine(UNEVEN.flip(0), 2), "must decrease"),
        (lambda: refine(torch.tensor([2.0, math.nextafter(2.0, 1.0)], dtype=torch.float64), 4), "which must be lower"),
        (lambda: truncate(UNEVEN, 0.0), "in \\(0, 1\\], got 0.0"),
        (lambda: truncate(UNEVEN, 1.2), "in \\(0, 1\\], got 1.2"),
        (lambda: truncate(UNEVEN.flip(0), 0.5), "must decrease"),
    ],
)
def test_bad_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
