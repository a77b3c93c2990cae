"""What published code scores on an exact 64-dimensional problem, and that ours scores the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fewstep import Mixture, Tableau, sample
from fewstep.grid import grid, logsnr
from fewstep.solve import build
from fewstep.solve.deis import deis
from fewstep.solve.dpm import dpm2, dpm_multistep, dpm_single, fast_orders
from fewstep.solve.dpmpp_single import dpmpp2s
from fewstep.solve.ipndm import ipndm_v
from fewstep.solve.lms import lms
from fewstep.solve.unipc import unipc

# What diff-sampler scores: (solver, grid, evaluations, mean over 256 samples of the RMSE to the true trajectory at
# level 0.002). The grids "polynomial", "logsnr" and "time_uniform" of that code end at 0.002; its DPM-Solver++ was run
# without dynamic thresholding and with its falling order at the end.
SCORES = [
    ("euler", "karras", 10, 0.12885),
    ("euler", "logsnr", 5, 0.223805),
    ("euler", "vp_time", 8, 0.132434),
    ("dpmpp2m", "karras", 6, 0.079674),
    ("dpmpp2m", "logsnr", 8, 0.0519695),
    ("dpmpp3m", "karras", 5, 0.123869),
    ("dpmpp3m", "logsnr", 10, 0.0466532),
    ("ipndm2", "karras", 6, 0.0920657),
    ("ipndm2", "vp_time", 5, 0.131725),
    ("ipndm3", "karras", 8, 0.0329843),
    ("ipndm3", "logsnr", 6, 0.0480284),
    ("ipndm3", "vp_time", 10, 0.0350914),
    ("ipndm4", "karras", 10, 0.0294737),
    ("ipndm4", "logsnr", 5, 0.0870595),
    ("heun", "karras", 10, 0.368605),
    ("heun", "logsnr", 8, 1.12084),
]

falling = partial(unipc, lower_order_final=True)
noisy = partial(falling, predict="noise")
classic = partial(ipndm_v, compat="diff-sampler")


def singles(sigmas: Tensor) -> Tableau:
    """diffusers' DPMSolverSinglestep of order 2: steps over two levels of a geometric grid, the last ones over one."""
    last = 1 + len(sigmas) % 2
    index = [*range(0, len(sigmas) - last, 2), *range(len(sigmas) - last, len(sigmas))]
    return dpm_single(sigmas[index], [b - a for a, b in pairwise(index)])


# The same for further solvers of diff-sampler (ds), k-diffusion (kd) and diffusers (df), whose names differ:
# (their name, our solver, grid, evaluations, whether it ends at 0, score). UniPC was run without dynamic thresholding.
PEERS: list[tuple[str, Callable[[Tensor], Tableau], str, int, bool, float]] = [
    ("ds dpm_2", dpm2, "karras", 6, False, 0.530262),
    ("ds dpm_2", dpm2, "vp_time", 8, False, 0.469833),
    ("kd dpm_2", dpm2, "logsnr", 7, True, 0.779323),
    ("df DPMSolverSinglestep", singles, "logsnr", 6, False, 0.758581),
    ("df DPMSolverSinglestep", singles, "logsnr", 5, False, 0.602437),
    ("kd dpmpp_2s", dpmpp2s, "karras", 8, False, 0.12622),
    ("kd dpmpp_2s", dpmpp2s, "logsnr", 9, True, 0.129068),
    ("ds dpmpp eps 2", partial(dpm_multistep, lower_order_final=True), "karras", 8, False, 0.0493489),
    ("ds dpmpp eps 3", partial(dpm_multistep, order=3, lower_order_final=True), "logsnr", 6, False, 0.0838649),
    ("df dpmsolver 3", partial(dpm_multistep, order=3), "karras", 6, False, 0.0625913),
    ("df heun", partial(dpm_multistep, exact=True, lower_order_final=True), "logsnr", 8, False, 0.0800438),
    ("kd lms 4", lms, "karras", 6, False, 0.162125),
    ("kd lms 4", lms, "logsnr", 5, True, 0.271429),
    ("kd lms 3", partial(lms, order=3), "karras", 8, True, 0.137867),
    ("ds deis rhoab 3", partial(deis, order=3, basis="rho"), "vp_time", 6, False, 0.113823),
    ("ds deis rhoab 4", partial(deis, order=4, basis="rho"), "karras", 10, False, 0.0760644),
    ("df DEIS 2", partial(deis, order=2, basis="lambda"), "logsnr", 6, False, 0.123241),
    ("df DEIS 3", partial(deis, order=3, basis="lambda"), "karras", 8, False, 0.0325918),
    ("ds ipndm_v 3", partial(classic, order=3), "karras", 6, False, 0.077824),
    ("ds ipndm_v 4", partial(classic, order=4), "karras", 8, False, 0.0449019),
    ("ds ipndm_v 4", partial(classic, order=4), "vp_time", 5, False, 0.11902),
    ("ds unipc 1 bh1", partial(falling, order=1, variant="bh1"), "karras", 5, False, 0.204136),
    ("ds unipc 2 bh1", partial(falling, order=2, variant="bh1"), "logsnr", 6, False, 0.344024),
    ("ds unipc 2 bh2", partial(falling, order=2), "vp_time", 8, False, 0.0956303),
    ("ds unipc 3 bh1", partial(falling, order=3, variant="bh1"), "karras", 8, False, 0.336501),
    ("ds unipc 3 bh2", partial(falling, order=3), "karras", 6, False, 0.117454),
    ("ds unipc 3 bh2 level", partial(unipc, order=3), "logsnr", 8, False, 0.0463344),
    ("ds unipc 2 bh1 eps", partial(noisy, order=2, variant="bh1"), "karras", 5, False, 0.198082),
    ("ds unipc 3 bh2 eps", partial(noisy, order=3), "logsnr", 10, False, 0.0261671),
    ("df unipc 3 eps", partial(noisy, order=3), "karras", 6, False, 0.0862364),
]
# diff-sampler's DEIS in time: (order, grid, evaluations, score).
TAB = [
    (2, "karras", 5, 0.16419),
    (3, "karras", 3, 0.239629),
    (3, "vp_time", 6, 0.0916536),
    (4, "logsnr", 8, 0.0552956),
    (4, "vp_time", 10, 0.0379393),
]


@cache
def digits() -> Mixture:
    """One Gaussian with diagonal covariance per class of scikit-learn's digits."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels) / 8 - 1, torch.from_numpy(labels)
    groups = [x[y == c] for c in range(10)]
    means = torch.stack([g.mean(0) for g in groups])
    variances = torch.stack([g.var(0, correction=0) + 1e-3 for g in groups])
    return Mixture(means, variances, [len(g) for g in groups])


@cache
def start() -> Tensor:
    return 80 * torch.randn(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@cache
def truth() -> Tensor:
    # Below 0.2 hardly anything bends, so that long steps do.
    return digits().flow(digits().flow(start(), 80.0, 0.2, steps=150), 0.2, 0.002, steps=30)


def test_the_truth_is_converged() -> None:
    finer = digits().flow(start()[:12], 80.0, 0.002, steps=600)
    assert float((truth()[:12] - finer).abs().max()) < 1e-6 * float(finer.abs().max())


@pytest.mark.parametrize(("solver", "spacing", "nfe", "score"), SCORES)
def test_scores_agree_with_published_code(solver: str, spacing: str, nfe: int, score: float) -> None:
    steps = nfe // 2 if solver == "heun" else nfe
    options = {"lower_order_final": True} if solver.startswith("dpmpp") else {}
    table = build(solver, grid(spacing, steps, 0.002, 80.0, to_zero=False), **options)
    assert table.nfe == nfe
    error = (sample(digits(), start(), table) - truth()).square().mean(1).sqrt().mean()
    assert float(error) == pytest.approx(score, rel=1e-4)


def score(table: Tableau, to_zero: bool = False) -> float:
    wanted = digits()(truth(), 0.002) if to_zero else truth()
    return rmse(sample(digits(), start(), table), wanted)


def rmse(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean(1).sqrt().mean())


@pytest.mark.parametrize(("name", "solver", "spacing", "nfe", "to_zero", "wanted"), PEERS)
def test_further_scores_agree_with_published_code(
    name: str, solver: Callable[[Tensor], Tableau], spacing: str, nfe: int, to_zero: bool, wanted: float
) -> None:
    stages = 2 if solver in (dpm2, dpmpp2s) else 1
    table = solver(grid(spacing, -(-nfe // stages), 0.002, 80.0, to_zero=to_zero))
    assert table.nfe == nfe
    assert score(table, to_zero) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("nfe", "wanted"), [(6, 0.740453), (10, 0.103079)])
def test_dpm_fast_scores_as_in_k_diffusion(nfe: int, wanted: float) -> None:
    orders = fast_orders(nfe)
    table = dpm_single(logsnr(len(orders), 0.002, 80.0, to_zero=False), orders)
    assert score(table) == pytest.approx(wanted, rel=1e-4)


def rectangles(order: int, sigmas: Tensor) -> Tensor:
    """DEIS in time with that code's integrals: 10000 rectangles whose places include both ends of the step."""
    low, high = math.log1p(0.002**2), math.log1p(80.0**2)
    rate = 2 * (high - low / 1e-3) / (1 - 1e-3)
    least = high - rate / 2
    times = ((least**2 + 2 * rate * torch.log1p(sigmas**2)).sqrt() - least) / rate
    x, slopes = start(), list[Tensor]()
    for i, (a, b) in enumerate(pairwise(sigmas.tolist())):
        slopes.append((x - digits()(x, a)) / a)
        use = min(order, i + 1)
        if use == 1:
            x = x + (b - a) * slopes[-1]
            continue
        t = torch.linspace(float(times[i]), float(times[i + 1]), 10000, dtype=torch.float64)
        level = torch.expm1(rate * t**2 / 2 + least * t).sqrt()
        speed = (rate * t + least) * (level + 1 / level) / 2
        for j in range(use):
            nodes = [times[i - m] for m in range(use) if m != j]
            part = math.prod((t - node) / (times[i - j] - node) for node in nodes)
            x = x + float((speed * part).sum() * (times[i + 1] - times[i]) / 10000) * slopes[-1 - j]
    return x


@pytest.mark.parametrize(("order", "spacing", "nfe", "wanted"), TAB)
def test_deis_differs_from_published_code_by_its_quadrature(order: int, spacing: str, nfe: int, wanted: float) -> None:
    sigmas = grid(spacing, nfe, 0.002, 80.0, to_zero=False)
    assert rmse(rectangles(order, sigmas), truth()) == pytest.approx(wanted, rel=1e-5)
    assert score(deis(sigmas, order)) == pytest.approx(wanted, rel=2e-3)
