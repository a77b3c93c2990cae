"""What the published code of diff-sampler scores on an exact 64-dimensional problem, and that ours scores the same."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fewstep import Mixture, sample
from fewstep.grid import grid
from fewstep.solve import build

# (solver, grid, evaluations, mean over 256 samples of the RMSE to the true trajectory at level 0.002).
# The grids "polynomial", "logsnr" and "time_uniform" of that code end at 0.002; its DPM-Solver++ was run without
# dynamic thresholding and with its falling order at the end.
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
