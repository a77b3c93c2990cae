"""EM distillation: its chains and both of its steps against the closed forms of Gaussians, and what it covers."""

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
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW
from fewstep.core.role import Models, Role
from fewstep.distill.emd import EMD, SPREADS, Chain, langevin
from fewstep.distill.front import distill
from fewstep.distill.vsd import VSD
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.models import ResMLP, ResMLPConfig
from tiny_runs import STEADY, check_resume, tiny, tiny_data

METHODS: dict[str, Any] = {
    "EMD": EMD(sigma_init=2.5, chain=3, student=STEADY, fake=STEADY),
    "EMD of two steps": EMD(steps=2, chain=2, ratio=2, student=STEADY, fake=STEADY),
}
S, THETA, C = 1.3, 0.7, 0.6


class Linear(nn.Module):
    """The denoiser of one Gaussian, with its mean and spread as parameters."""

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
    """``theta + c z`` for an input ``sigma z``."""

    def __init__(self, theta: float = THETA, c: float = C) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor(c, dtype=torch.float64))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), 0.002, 80.0, 0.5

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        return self.theta + self.c * x.double() / sigma


class At:
    """A draw of one level."""

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, noise: Noise, sigma_data: float) -> tuple[Tensor, Tensor]:
        one = torch.ones(len(noise), dtype=torch.float64)
        return self.level * one, one


def gaussians(theta: float = THETA, c: float = C) -> Models:
    networks = {"teacher": Linear(0.0, S), "fake": Linear(theta, c), "student": Student(theta, c)}
    return build_models({name: Role(lambda net=net: net) for name, net in networks.items()}, "cpu")


def slopes(method: VSD, m: Models, n: int, seed: int = 1) -> tuple[float, float]:
    """The gradient of the student's loss in theta and c."""
    update = next(method.step(m, Batch(None, {}), 0, Noise.of(seed, n)))
    m.student.requires_grad_(True)
    m.student.zero_grad()
    update.loss()["loss"].backward()  # type: ignore[index]
    m.student.requires_grad_(False)
    return float(m.student.theta.grad), float(m.student.c.grad)


def at(level: float, **settings: Any) -> EMD:
    return EMD(sigma_init=2.0, draw=At(level), normaliser="none", latent_scaling=False, **settings)  # type: ignore[arg-type]


# ---- the chains


def chain_of(m: Models, n: int, level: float, **settings: Any) -> Chain:
    noise = Noise.of(3, n)
    z, e = noise.normal((1, 1, 1), "z", dtype=torch.float64), noise.normal((1, 1, 1), "e", dtype=torch.float64)
    sigma = torch.full((n,), level, dtype=torch.float64)
    estimates = lambda y: (m.fake(y, sigma), m.teacher(y, sigma))  # noqa: E731
    return langevin(lambda z: m.student(z, 1.0), estimates, z, e, sigma, noise, **settings)


@pytest.mark.parametrize("integrator", SPREADS)
def test_between_equal_scores_the_chain_keeps_the_prior(integrator: str) -> None:
    m, n, h = gaussians(), 10_000, 0.3
    m.networks["fake"] = m.teacher
    step = torch.full((n,), h, dtype=torch.float64)
    found = chain_of(m, n, 1.0, count=25, noise_step=h, latent_step=step, spread=SPREADS[integrator])
    variance = 1.0 if integrator == "exact" else 1 / (1 - h / 2)
    for part in (found.latent, found.noise):
        assert abs(float(part.mean())) < 0.04 and float(part.var()) == pytest.approx(variance, rel=0.05)
    assert abs(float((found.latent * found.noise).mean())) < 0.05
    assert float(found.drift.abs().max()) == 0 == float(found.fisher), "what is cancelled is all that there is"


@pytest.mark.parametrize("level", [0.7, 1.5])
def test_a_long_chain_ends_in_the_teachers_noised_pictures(level: float) -> None:
    m, n = gaussians(), 8_000
    step = torch.full((n,), 0.05, dtype=torch.float64)
    found = chain_of(m, n, level, count=120, noise_step=0.05, latent_step=step, spread=SPREADS["euler"])
    y = m.student(found.latent, 1.0) + level * found.noise
    assert abs(float(y.mean())) < 0.08 and float(y.var()) == pytest.approx(S**2 + level**2, rel=0.08)
    before = m.student(torch.zeros(1, 1, 1, 1), 1.0)
    assert abs(float(before)) > 0.5, "it did not start there"


def test_one_step_is_the_written_out_formula() -> None:
    m, n, a, b, s = gaussians(), 6, 0.1, 0.05, 0.8
    noise = Noise.of(3, n)
    z, e = noise.normal((1, 1, 1), "z", dtype=torch.float64), noise.normal((1, 1, 1), "e", dtype=torch.float64)
    step = torch.full((n,), b, dtype=torch.float64)
    found = chain_of(m, n, s, count=1, noise_step=a, latent_step=step, spread=SPREADS["euler"])
    y = THETA + C * z + s * e
    r = (m.teacher(y, s) - m.fake(y, s)) / s**2
    wanted_e = e + a * (s * r - e) + math.sqrt(2 * a) * noise.normal((1, 1, 1), "chain", 0)
    wanted_z = z + b * (C * r - z) + math.sqrt(2 * b) * noise.normal((1, 1, 1), "latent", 0)
    assert float((found.noise - wanted_e).abs().max()) < 1e-7
    assert float((found.latent - wanted_z).abs().max()) < 1e-7
    assert float((found.drift - a * s * r).abs().max()) < 1e-12
    assert torch.equal(found.sample, THETA + C * z)


# ---- the steps


@pytest.mark.parametrize("normaliser", ["none", "vp", "sample"])
def test_one_step_without_a_move_of_the_latent_is_vsd(normaliser: Any) -> None:
    m = gaussians()
    settings: dict[str, Any] = {"sigma_init": 2.0, "normaliser": normaliser}
    wanted = slopes(VSD(**settings), m, 500)
    got = slopes(EMD(chain=1, noise_step=0.25, latent_step=0.0, **settings), m, 500)
    assert got == pytest.approx([0.25 * w for w in wanted], rel=1e-6)
    # Without the cancellation the same direction is under noise that is much larger.
    loud = slopes(EMD(chain=1, noise_step=0.25, latent_step=0.0, cancel=False, **settings), m, 500)
    assert abs(loud[0] - got[0]) > 1e-3


@pytest.mark.parametrize("level", [0.7, 1.5])
def test_long_chains_have_the_gradient_of_the_forward_divergence(level: float) -> None:
    m, n = gaussians(), 15_000
    v1, v2 = S**2 + level**2, C**2 + level**2
    by_theta, by_c = level**2 * THETA / v2, level**2 * C / v2 * (1 - (v1 + THETA**2) / v2)
    method = at(level, chain=120, noise_step=0.05, latent_step=0.05, cancel=False, integrator="euler")
    got = slopes(method, m, n)
    assert got[0] == pytest.approx(by_theta, abs=0.05) and got[1] == pytest.approx(by_c, abs=0.08)
    reverse = slopes(VSD(sigma_init=2.0, draw=At(level), normaliser="none"), m, n)  # type: ignore[arg-type]
    assert abs(reverse[0] - by_theta) > 0.1 and abs(reverse[1] - by_c) > 0.1, "the divergences differ here"


def test_the_right_student_has_no_gradient() -> None:
    m = gaussians(0.0, S)
    for cancel in (True, False):
        settings = {"chain": 60, "noise_step": 0.1, "latent_step": 0.1, "cancel": cancel, "integrator": "exact"}
        got = slopes(at(1.0, **settings), m, 10_000)
        # To the last bit with the cancellation: the scores are the same.
        assert max(abs(g) for g in got) <= (0.0 if cancel else 0.05)


def test_cancelling_keeps_the_mean_and_takes_the_variance() -> None:
    m, found = gaussians(), {}
    for cancel in (True, False):
        method = at(1.0, chain=16, noise_step=0.1, latent_step=0.0, cancel=cancel)
        each = torch.tensor([slopes(method, m, 20_000)])
        update = next(method.step(m, Batch(None, {}), 0, Noise.of(1, 4000)))
        chain = chain_of(m, 4000, 1.0, count=16, noise_step=0.1, latent_step=None, spread=SPREADS["exact"])
        part = chain.drift if cancel else chain.noise
        found[cancel] = (each, float(part.var()))
        assert update.roles == ("student",)
    assert float((found[True][0] - found[False][0]).abs().max()) < 0.05
    assert found[True][1] < 0.2 * found[False][1]


def test_no_parameter_gets_a_gradient_from_the_e_step() -> None:
    method = EMD(sigma_init=2.5, chain=3)
    m = build_models(method.roles(tiny()), "cpu")
    for p in m.fake.parameters():
        # At the start the scores are the same, and nothing would move.
        p.data *= 1.1
    batch = tiny_data().take(torch.arange(8))
    updates = method.step(m, batch, 0, Noise.of(0, 8))
    update = next(updates)
    assert all(p.grad is None for net in m.networks.values() for p in net.parameters())
    m.student.requires_grad_(True)
    update.loss()["loss"].backward()  # type: ignore[index]
    assert all(p.grad is None for name in ("teacher", "fake") for p in m.networks[name].parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in m.student.parameters() if p.grad is not None)
    m.student.requires_grad_(False)
    assert next(updates).roles == ("fake",) and next(updates, None) is None


def test_the_fake_score_is_trained_on_latents_as_they_were_drawn() -> None:
    seen: list[Tensor] = []

    class Remembers(EMD):
        def fake_update(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> Any:
            seen.append(x)
            return super().fake_update(m, x, batch, noise)

    m, noise = gaussians(), Noise.of(1, 9)
    for i in (0, 1):
        list(Remembers(sigma_init=2.0, chain=4, latent_step=0.2, ratio=2).step(m, Batch(None, {}), i, noise))
    plain = m.student(2.0 * noise.normal((1, 1, 1), "start"), 2.0)
    assert torch.equal(seen[0], plain) and torch.equal(seen[1], plain) and not seen[0].requires_grad


# ---- what it covers


def forward_kl(teacher: Mixture, theta: float, c: float) -> float:
    """KL of the teacher's distribution from the student's, in one dimension, by quadrature."""
    y = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    total = teacher.variances.reshape(1, -1)
    p = (torch.exp(-((y - teacher.means.reshape(1, -1)) ** 2) / (2 * total)) / (2 * math.pi * total).sqrt()).mean(1)
    log_q = -((y[:, 0] - theta) ** 2) / (2 * c**2) - math.log(c * math.sqrt(2 * math.pi))
    return float((p * (p.clamp_min(1e-300).log() - log_q)).sum() * (y[1, 0] - y[0, 0]))


def fitted(method: VSD, teacher: Mixture) -> tuple[float, float]:
    """A Gaussian student of two modes, from beside one of them, with the exact score of its own samples."""
    networks = {"teacher": Holds(teacher), "fake": Linear(1.2, 0.4), "student": Student(1.2, 0.4)}
    m = build_models({name: Role(lambda net=net: net) for name, net in networks.items()}, "cpu")
    for i in range(70):
        slope = slopes(method, m, 256, seed=i)
        with torch.no_grad():
            for p, by in zip((m.student.theta, m.student.c), slope, strict=True):
                p -= 0.5 * max(-0.5, min(0.5, by))
            m.fake.mean.copy_(m.student.theta)
            m.fake.spread.copy_(m.student.c)
    return float(m.student.theta), abs(float(m.student.c))


class Holds(nn.Module):
    """An exact denoiser as a module."""

    def __init__(self, problem: Mixture) -> None:
        super().__init__()
        self.problem = problem
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), 0.002, 80.0, 0.5

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        return self.problem(x, sigma)


def test_it_covers_both_modes_where_vsd_sits_in_one() -> None:
    teacher = Mixture(torch.tensor([-1.5, 1.5]).reshape(2, 1, 1, 1), 0.09)
    settings: dict[str, Any] = {"sigma_init": 2.0, "draw": At(0.5), "normaliser": "none"}
    one = fitted(VSD(**settings), teacher)
    both = fitted(EMD(noise_step=0.2, **settings), teacher)
    assert abs(one[0]) > 1.2 and one[1] < 0.6
    assert abs(both[0]) < 0.6 and both[1] > 1.1
    assert forward_kl(teacher, *both) < 0.3 * forward_kl(teacher, *one)


# ---- runs


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    check_resume(name, METHODS[name], tmp_path)


def test_flow_and_guided_teachers(tmp_path: Path) -> None:
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    flow = Precond(net, (1, 4, 4), path=FLOW, predicts="velocity", sigma_max=1e8)
    start: Generator = guided(replace(tiny(), denoiser=flow.eval()), 2.0)
    made = distill(start, EMD(steps=2, chain=2), out=tmp_path, budget=3, batch=4, progress=False)
    assert made.sampler.nfe == 2 and made.sample(3, progress=False).isfinite().all()
    assert Generator.load(tmp_path).denoiser.describe() == flow.describe()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMD(chain=0), "chain >= 1"),
        (lambda: EMD(noise_step=0.0), "0 < noise_step < 1"),
        (lambda: EMD(noise_step=1.0), "0 < noise_step < 1"),
        (lambda: EMD(latent_step=-0.1), "0 <= latent_step < 1"),
        (lambda: EMD(integrator="heun"), "unknown integrator.*exact"),  # type: ignore[arg-type]
        (lambda: EMD(steps=0), "EMD needs steps >= 1"),
        (lambda: EMD(sigma_init=500.0).roles(tiny()), "outside of the teacher's"),
        (lambda: EMD().roles(replace(tiny(), denoiser=Mixture(torch.zeros(1, 1), 1.0))), "has no weights to train"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_it_is_data_free(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data-free"):
        distill(tiny(), EMD(), tiny_data(), out=tmp_path, budget=1)
