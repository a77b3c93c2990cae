"""Distribution matching against the closed forms of Gaussians: VSD, DMD2 and every f-divergence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Precond
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW
from fewstep.core.role import Models, Role
from fewstep.distill.dmd2 import DMD2
from fewstep.distill.f_distill import FDistill, per_bin
from fewstep.distill.front import distill
from fewstep.distill.vsd import VSD, rollout
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.loss.draw import KarrasUniform
from fewstep.loss.matching import DIVERGENCES, density_ratio, directed, direction
from fewstep.models import ResMLP, ResMLPConfig
from tiny_runs import STEADY, Stop, bits, differing, furthest, log_of, run, tiny, tiny_data

METHODS: dict[str, Any] = {
    "VSD": VSD(sigma_init=2.5, student=STEADY, fake=STEADY),
    "VSD of two steps": VSD(steps=2, student=STEADY, fake=STEADY),
    "DMD2": DMD2(sigma_init=2.5, ratio=2, student=STEADY, fake=STEADY),
    "DMD2 on teacher features": DMD2(sigma_init=2.5, features="teacher", ratio=2, student=STEADY, fake=STEADY),
    "FDistill": FDistill(sigma_init=2.5, ratio=2, student=STEADY, fake=STEADY),
}
S, THETA, C = 1.3, 0.7, 0.6


class Linear(nn.Module):
    """``gain(sigma) x + offset(sigma)``: the denoiser of one Gaussian, with its spread and mean as parameters."""

    def __init__(self, mean: float, spread: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.spread = nn.Parameter(torch.tensor(spread, dtype=torch.float64))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), 0.002, 80.0, 0.5

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1)
        gain = self.spread**2 / (self.spread**2 + level**2)
        return gain * x.double() + (1 - gain) * self.mean


class Student(nn.Module):
    """``theta + c z`` for a start ``sigma z``."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(THETA, dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor(C, dtype=torch.float64))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), 0.002, 80.0, 0.5

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        return self.theta + self.c * x.double() / sigma


def gaussians() -> Models:
    networks = {"teacher": Linear(0.0, S), "fake": Linear(THETA, C), "student": Student()}
    return build_models({name: Role(lambda net=net: net) for name, net in networks.items()}, "cpu")


class At:
    """A draw of one level."""

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, noise: Noise, sigma_data: float) -> tuple[Tensor, Tensor]:
        one = torch.ones(len(noise), dtype=torch.float64)
        return self.level * one, one


@pytest.mark.parametrize("level", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("normaliser", ["none", "vp"])
def test_the_mean_update_is_the_gradient_of_the_divergence(level: float, normaliser: Any) -> None:
    m, n = gaussians(), 200_000
    method = VSD(sigma_init=2.0, draw=At(level), normaliser=normaliser)  # type: ignore[arg-type]
    update = next(method.step(m, Batch(None, {}), 0, Noise.of(1, n)))
    m.student.requires_grad_(True)
    update.loss()["loss"].backward()  # type: ignore[index]
    s2 = level**2
    scale = 1.0 if normaliser == "none" else level / (1 + s2)
    expected = (s2 * THETA / (S**2 + s2), s2 * C * (1 / (S**2 + s2) - 1 / (C**2 + s2)))
    for parameter, value in zip((m.student.theta, m.student.c), expected, strict=True):
        assert float(parameter.grad) == pytest.approx(scale * value, abs=0.012 * scale)
    assert all(p.grad is None for name in ("teacher", "fake") for p in m.networks[name].parameters())


def test_equal_scores_move_nothing() -> None:
    m = gaussians()
    m.networks["fake"] = m.teacher
    for method in (VSD(sigma_init=2.0), VSD(sigma_init=2.0, normaliser="vp")):
        update = next(method.step(m, Batch(None, {}), 0, Noise.of(1, 50)))
        m.student.requires_grad_(True)
        m.student.zero_grad()
        update.loss()["loss"].backward()  # type: ignore[index]
        assert float(m.student.theta.grad) == 0 and float(m.student.c.grad) == 0


def test_a_directed_loss_has_the_direction_for_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    x, way = torch.randn(3, 1, 4, 4, generator=g).requires_grad_(), torch.randn(3, 1, 4, 4, generator=g)
    loss = directed(x, way)
    loss.backward()
    assert float((x.grad - way / x.numel()).abs().max()) < 1e-8  # type: ignore[operator]
    assert float(loss) == pytest.approx(float(0.5 * way.square().mean()), rel=1e-6)


def test_the_normaliser_makes_the_direction_free_of_scale() -> None:
    g = torch.Generator().manual_seed(0)
    x, fake, teacher = (torch.randn(5, 2, 3, 3, generator=g) for _ in range(3))
    sigma = torch.ones(5)
    one = direction(x, fake, teacher, sigma)
    assert float((direction(7 * x, 7 * fake, 7 * teacher, sigma) - one).abs().max()) < 1e-5
    assert float((direction(x, fake, teacher, sigma, "none") - (fake - teacher)).abs().max()) == 0


def normal(y: Tensor, mean: float, variance: float) -> Tensor:
    return (-((y - mean) ** 2) / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)


F_OF: dict[str, Any] = {
    "reverse-kl": lambda r: -r.log(),
    "forward-kl": lambda r: r * r.log(),
    "jensen-shannon": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "hellinger": lambda r: 4 * (1 - r.sqrt()),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 0.5 * (1 - r) ** 2 / r,
}


@pytest.mark.parametrize("name", ["reverse-kl", "forward-kl", "jensen-shannon", "hellinger", "jeffreys", "neyman"])
def test_weighted_scores_are_the_gradient_of_every_divergence(name: str) -> None:
    y = torch.linspace(-14, 14, 40_001, dtype=torch.float64)
    step, p = float(y[1] - y[0]), normal(y, 0.0, 1.7)

    def divergence(mean: float) -> float:
        q = normal(y, mean, 1.1)
        return float((q * F_OF[name](p / q)).sum() * step)

    mean, h = 0.4, 1e-4
    q = normal(y, mean, 1.1)
    difference = -y / 1.7 + (y - mean) / 1.1
    weighted = float(-(q * DIVERGENCES[name](p / q) * difference).sum() * step)
    slope = (divergence(mean + h) - divergence(mean - h)) / (2 * h)
    assert weighted == pytest.approx(slope, rel=1e-5)


def test_weights_of_the_divergences() -> None:
    r = torch.tensor([0.2, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    for name in ("forward-kl", "jensen-shannon", "jeffreys", "hellinger"):
        assert (DIVERGENCES[name](r).diff() > 0).all()
    for name in ("softened-reverse-kl", "neyman"):
        assert (DIVERGENCES[name](r).diff() < 0).all()
    # h = r^2 f'' of (1 + r) ln((1 + r) / 2) - r ln r, by differences.
    at = torch.stack([r - 1e-4, r, r + 1e-4])
    value = (1 + at) * ((1 + at) / 2).log() - at * at.log()
    second = (value[2] - 2 * value[1] + value[0]) / 1e-8
    assert float((-(r**2) * second - DIVERGENCES["jensen-shannon"](r)).abs().max()) < 1e-5


def test_density_ratios_are_held_and_have_no_gradient() -> None:
    logits = torch.tensor([[-50.0, -50.0], [0.0, 2.0], [80.0, 90.0]], requires_grad=True)
    r = density_ratio(logits)
    assert r.tolist() == pytest.approx([0.1, math.e, 20.0]) and not r.requires_grad


def test_ratios_are_divided_by_the_mean_of_their_bin() -> None:
    sigma = torch.tensor([0.01, 0.011, 5.0, 5.1, 80.0])
    ratio = torch.tensor([1.0, 3.0, 2.0, 6.0, 9.0])
    assert per_bin(ratio, sigma, 4).tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5, 1.0])
    assert per_bin(ratio, sigma, 1).tolist() == pytest.approx((ratio / ratio.mean()).tolist())


def test_reverse_kl_is_dmd2_in_every_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sigma_init": 2.5, "ratio": 2, "student": STEADY, "fake": STEADY}
    run("DMD2", tmp_path / "a", method=DMD2(**options))
    run("DMD2", tmp_path / "b", method=FDistill(divergence="reverse-kl", **options))
    a, b = bits(tmp_path / "a"), bits(tmp_path / "b")
    assert differing(a, b) == []
    run("DMD2", tmp_path / "c", method=FDistill(divergence="forward-kl", **options))
    assert differing(a, bits(tmp_path / "c"))


class Watching(nn.Module):
    """Half of what it is given; remembers that."""

    shape, sigma_min, sigma_max, sigma_data = (1, 2, 2), 0.002, 80.0, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, float]] = []

    def forward(self, x: Tensor, sigma: Any, cond: Cond | None = None) -> Tensor:
        self.seen.append((x, float(sigma)))
        return x / 2


def test_a_later_step_is_given_the_students_own_samples() -> None:
    student, noise = Watching(), Noise.of(3, 5)
    at = rollout(student, [80.0, 4.0, 1.0], noise, {})
    start = 80 * noise.normal((1, 2, 2), "start")
    first = start / 2 + 4 * noise.normal((1, 2, 2), "again", 0)
    assert [s for _, s in student.seen] == [80.0, 4.0]
    assert torch.equal(student.seen[0][0], start) and torch.equal(student.seen[1][0], first)
    assert torch.equal(at, first / 2 + noise.normal((1, 2, 2), "again", 1))
    assert torch.equal(rollout(student, [80.0], noise, {}), start)


def test_one_update_of_each_changes_its_own_roles_alone() -> None:
    start = tiny()
    method = DMD2(sigma_init=2.5, ratio=2)
    m = build_models(method.roles(start), "cpu")
    batch = tiny_data().take(torch.arange(8))
    names = [[u.roles for u in method.step(m, batch, i, Noise.of(0, 8))] for i in (0, 1, 2)]
    assert names == [[("student",), ("fake", "heads")], [("fake", "heads")], [("student",), ("fake", "heads")]]
    update = next(method.step(m, batch, 0, Noise.of(0, 8)))
    m.student.requires_grad_(True)
    update.loss()["loss"].backward()  # type: ignore[index]
    assert all(p.grad is None for name in ("teacher", "fake", "heads") for p in m.networks[name].parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in m.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    run(name, tmp_path / "whole", method=method)
    with pytest.raises(Stop):
        run(name, tmp_path / "cut", method=method, stop=5)
    run(name, tmp_path / "cut", method=method, resume=True)
    whole = bits(tmp_path / "whole")
    assert differing(whole, bits(tmp_path / "cut")) == []
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    if name != "FDistill":
        # Its weights are relative to the micro-batch that they are computed on.
        run(name, tmp_path / "one", method=method, micro=1)
        assert furthest(whole, bits(tmp_path / "one"))[0] < 2e-3


def test_flow_and_guided_teachers(tmp_path: Path) -> None:
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    flow = Precond(net, (1, 4, 4), path=FLOW, predicts="velocity", sigma_max=1e8)
    assert VSD(steps=4).grid(flow) == pytest.approx([1e8, 3.0, 1.0, 1 / 3])
    start = replace(tiny(), denoiser=flow.eval())
    guide: Generator = guided(start, 2.0)
    made = distill(guide, VSD(steps=2), out=tmp_path / "a", budget=2, batch=4, progress=False)
    assert made.sampler.nfe == 2 and made.sample(3, progress=False).isfinite().all()
    assert Generator.load(tmp_path / "a").denoiser.describe() == flow.describe()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VSD(steps=0), "steps >= 1"),
        (lambda: VSD(ratio=0), "ratio >= 1"),
        (lambda: VSD(steps=2, levels=(1.0,)), "as many falling levels"),
        (lambda: VSD(steps=2, levels=(1.0, 2.0)), "as many falling levels"),
        (lambda: VSD(levels=(1.0,), sigma_init=2.0), "leave levels out"),
        (lambda: VSD(normaliser="max"), "unknown normaliser"),  # type: ignore[arg-type]
        (lambda: VSD(sigma_init=500.0).roles(tiny()), "outside of the teacher's"),
        (lambda: DMD2(gan=-1), "gan >= 0"),
        (lambda: DMD2(features="data"), "unknown features"),  # type: ignore[arg-type]
        (lambda: DMD2(taps=("nowhere",)).roles(tiny()), "unknown feature tap"),
        (lambda: FDistill(divergence="kl"), "unknown divergence"),
        (lambda: FDistill(gan=0.0), "needs the discriminator's density ratio"),
        (lambda: KarrasUniform(bottom=0.9, top=0.8), "bottom < top"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_data_are_asked_for_where_they_are_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="learns from data"):
        distill(tiny(), DMD2(), out=tmp_path / "a", budget=1)
    with pytest.raises(InputError, match="data-free"):
        distill(tiny(), DMD2(gan=0.0), tiny_data(), out=tmp_path / "b", budget=1)
    with pytest.raises(InputError, match="data-free"):
        distill(tiny(), VSD(), tiny_data(), out=tmp_path / "c", budget=1)
