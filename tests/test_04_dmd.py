"""DMD with its regression on pairs: parts in isolation, against VSD, and as runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Models
from fewstep.data import OnlinePairs
from fewstep.distill.dmd import DMD
from fewstep.distill.front import distill
from fewstep.distill.vsd import VSD
from fewstep.errors import InputError
from fewstep.loss.perceptual import PIXELS, TapDistance
from fewstep.solve.euler import euler
from fewstep.train.run import train
from tiny_runs import STEADY, StopsAfter, bits, check_restart, differing, run, tiny, tiny_data

OPTIONS: dict[str, Any] = {"batch": 8, "micro": 2, "log_every": 2, "save_every": 3, "progress": False}
SETTINGS: dict[str, Any] = {"student": STEADY, "fake": STEADY}


def teacher() -> Generator:
    return tiny().with_sampler(euler(torch.tensor([80.0, 2.0, 0.0], dtype=torch.float64)))


def models(method: DMD, of: Generator) -> Models:
    """The fake score is moved away from the teacher, which it starts as."""
    m = build_models(method.roles(of), "cpu")
    g = torch.Generator().manual_seed(3)
    for p in m.fake.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return m


def gradients(method: Any, m: Models, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Of the student in its first update, and what the loss tells."""
    update = next(method.step(m, batch, 0, Noise.of(1, 6)))
    assert update.roles == ("student",)
    m.student.requires_grad_(True).zero_grad()
    losses = update.loss()
    losses["loss"].backward()
    m.student.requires_grad_(False)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in m.student.parameters()], losses


@pytest.mark.parametrize(("distance", "features"), [("l2", "own"), ("lpips", "teacher")])
def test_the_gradient_is_that_of_matching_and_of_the_pairs(distance: Any, features: str) -> None:
    of = teacher()
    batch = OnlinePairs(of, size=64).take(torch.arange(6))
    method = DMD(regression=0.7, distance=distance, features=features, **SETTINGS)
    m = models(method, of)
    both, losses = gradients(method, m, batch)
    alone, _ = gradients(VSD(draw=method.draw, **SETTINGS), m, batch)
    m.student.requires_grad_(True).zero_grad()
    assert batch.x is not None and batch.noise is not None
    own = m.student(80.0 * batch.noise, 80.0, batch.cond)
    apart: Any = PIXELS["l2"] if distance == "l2" else TapDistance(copy.deepcopy(of.denoiser))  # type: ignore[arg-type]
    value = apart(own, batch.x).mean()
    (0.7 * value).backward()
    pairs = [torch.zeros_like(p) if p.grad is None else p.grad for p in m.student.parameters()]
    assert float(losses["regression"]) == pytest.approx(float(value.detach()), rel=1e-5)
    assert max(float(p.abs().max()) for p in pairs) > 1e-4
    for whole, one, other in zip(both, alone, pairs, strict=True):
        assert float((whole - one - other).abs().max()) < 1e-5
    assert all(p.grad is None for name in ("teacher", "fake") for p in m.networks[name].parameters())


def test_without_regression_it_is_vsd_in_every_bit(tmp_path: Path) -> None:
    run("DMD", tmp_path / "a", method=DMD(regression=0.0, **SETTINGS))
    run("VSD", tmp_path / "b", method=VSD(**SETTINGS))
    assert differing(bits(tmp_path / "a"), bits(tmp_path / "b")) == []


def test_samples_of_pairs_can_be_matched_too() -> None:
    of = teacher()
    batch = OnlinePairs(of, size=64).take(torch.arange(6))
    method = DMD(distance="l2", joined=True, **SETTINGS)
    m = models(method, of)
    joined, _ = gradients(method, m, batch)
    apart, _ = gradients(DMD(distance="l2", **SETTINGS), m, batch)
    assert max(float((a - b).abs().max()) for a, b in zip(joined, apart, strict=True)) > 1e-6
    # With the teacher for a fake score nothing is matched, and what is left is the regression.
    m.networks["fake"] = m.networks["teacher"]
    joined, _ = gradients(method, m, batch)
    apart, _ = gradients(DMD(distance="l2", **SETTINGS), m, batch)
    assert max(float((a - b).abs().max()) for a, b in zip(joined, apart, strict=True)) < 1e-7


def test_the_pairs_are_learned(tmp_path: Path) -> None:
    of = teacher()
    pairs = OnlinePairs(of, size=8)
    batch = pairs.take(torch.arange(8))
    assert batch.x is not None and batch.noise is not None
    with torch.no_grad():
        before = float((of.denoiser(80.0 * batch.noise, 80.0, batch.cond) - batch.x).square().mean())
    method = DMD(regression=50.0, distance="l2", **SETTINGS)
    made = distill(of, method, pairs, out=tmp_path, budget=60, batch=8, progress=False)
    assert made.sampler.nfe == 1 and made.sample(3, progress=False).isfinite().all()
    with torch.no_grad():
        after = float((made.denoiser(80.0 * batch.noise, 80.0, batch.cond) - batch.x).square().mean())
    assert after < 0.5 * before


def test_a_resumed_run_and_micro_batches(tmp_path: Path) -> None:
    of = teacher()
    method, source = DMD(joined=True, **SETTINGS), OnlinePairs(of, size=64)

    def go(out: Path, stop: int | None = None, **options: Any) -> None:
        given: Any = source if stop is None else StopsAfter(source, stop * OPTIONS["micro"])
        train(of, method, given, out=out, budget=6, **(OPTIONS | options))

    check_restart(tmp_path, go, far=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DMD(steps=2), "one step"),
        (lambda: DMD(regression=-1.0), "regression >= 0"),
        (lambda: DMD(regression=float("inf")), "regression >= 0"),
        (lambda: DMD(distance="cosine"), "unknown distance"),  # type: ignore[arg-type]
        (lambda: DMD(regression=0.0, joined=True), "without regression"),
        (lambda: DMD(features="own").roles(tiny()), "no packaged features"),
        (lambda: DMD(sigma_init=500.0).roles(tiny()), "outside of the teacher's"),
        (
            lambda: next(DMD().step(models(DMD(), tiny()), tiny_data().take(torch.arange(4)), 0, Noise.of(0, 4))),
            "pairs",
        ),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_pairs_are_asked_for_where_they_are_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fewstep pairs"):
        distill(tiny(), DMD(), tiny_data(), out=tmp_path / "a", budget=1)
    with pytest.raises(InputError, match="learns from data"):
        distill(tiny(), DMD(), out=tmp_path / "b", budget=1)
    with pytest.raises(InputError, match="data-free"):
        distill(tiny(), DMD(regression=0.0), tiny_data(), out=tmp_path / "c", budget=1)
