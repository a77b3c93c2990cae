"""Continuous-time consistency models against exact flows, differences and closed-form gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Precond, edm
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models, fit
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions
from fewstep.core.path import DDPM, FLOW, VP
from fewstep.core.role import Models, Optim, Role
from fewstep.distill.scm import SCM
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.loss.tangent import directional
from fewstep.models import ResMLP, ResMLPConfig
from fewstep.models.consistency import JumpPrecond
from fewstep.models.lora import LoRA
from fewstep.models.trigflow import LogVariance, trigflow
from fewstep.solve.consistency import consistency
from tiny_runs import STEADY, Stop, bits, differing, furthest, log_of, run, tiny

S = 0.6
RUNS = {
    "SCM": SCM(optim=STEADY, variance=STEADY),
    "data": SCM(source="data", adaptive=False, tame="clip", optim=STEADY),
}


def gaussian(mean: float = 0.0) -> Mixture:
    return Mixture(torch.full((1, 1, 1, 1), mean), S**2)


class Exact(nn.Module):
    """A mixture's denoiser as a role."""

    def __init__(self, problem: Mixture) -> None:
        super().__init__()
        self.problem, self.shape, self.sigma_data = problem, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = problem.sigma_min, problem.sigma_max

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        return self.problem(x, sigma, cond)


class Power(nn.Module):
    """``mean + (x - mean) (S^2 / (S^2 + sigma^2))^power``: 1 is the denoiser, 1/2 the exact consistency function."""

    def __init__(self, power: float, mean: float = 0.0) -> None:
        super().__init__()
        self.power, self.mean = nn.Parameter(torch.tensor(power, dtype=torch.float64)), mean
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), 0.002, 80.0, S

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        gain = (S**2 / (S**2 + sigma.reshape(-1, 1, 1, 1) ** 2)) ** self.power
        return self.mean + gain * (x - self.mean)


class Draws:
    """Pictures of one pixel."""

    def __init__(self, problem: Mixture) -> None:
        self.x = problem.draw(4096)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, ids: Tensor) -> Batch:
        return Batch(self.x[ids], {})


def models(method: SCM, student: nn.Module, problem: Mixture) -> Models:
    roles = {"teacher": Role(lambda: Exact(problem)), "student": Role(lambda: student, method.optim, ships=True)}
    return build_models(roles | ({"variance": Role(LogVariance, method.variance)} if method.adaptive else {}), "cpu")


def points(n: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(0.01, 1.55, n, dtype=torch.float64)
    return S * torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64), t


# ---- the tangent


def test_the_exact_consistency_function_has_no_tangent_and_the_denoiser_has_one() -> None:
    problem, (xh, t) = gaussian(0.25), points()
    slope = trigflow(Exact(problem))(xh, t)
    method = SCM()
    exact = method.direction(Power(0.5, 0.25), xh, t, slope, {}, 1.0)
    assert float(exact.abs().max()) < 1e-10
    assert float(method.direction(Power(1.0, 0.25), xh, t, slope, {}, 1.0).abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["edm", "vp", "flow"])
def test_the_tangent_is_the_total_derivative_of_the_consistency_function(kind: str) -> None:
    torch.manual_seed(0)
    net = ResMLP(ResMLPConfig((1, 2, 2), 0, width=16, embedding=8, blocks=1))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    paths: dict[str, Any] = {"vp": (VP, "noise"), "flow": (FLOW, "velocity")}
    made = {name: Precond(net, (1, 2, 2), path=path, predicts=p) for name, (path, p) in paths.items()}
    D: Any = ({"edm": edm(net, (1, 2, 2))} | made)[kind].double()
    x, slope = torch.randn(6, 1, 2, 2, dtype=torch.float64), torch.randn(6, 1, 2, 2, dtype=torch.float64)
    t = torch.linspace(0.2, 1.4, 6, dtype=torch.float64)
    view, method = trigflow(D), SCM()
    found = method.direction(D, x, t, slope, {}, 1.0)

    def f(e: float) -> Tensor:
        at = x + e * slope
        return view.x0(at, view(at, t + e), t + e)

    # The network rounds its time to float32, so the difference cannot be a small one.
    want = t.cos().reshape(-1, 1, 1, 1) * (8 * (f(1e-2) - f(-1e-2)) - (f(2e-2) - f(-2e-2))) / 0.12
    assert float((found - want).detach().abs().max()) < 2e-3 * float(want.detach().abs().max())


def test_the_warm_up_leaves_the_stable_half() -> None:
    problem, (xh, t) = gaussian(), points()
    slope, method, student = trigflow(Exact(problem))(xh, t), SCM(), Power(0.8)
    none, half, full = (method.direction(student, xh, t, slope, {}, r) for r in (0.0, 0.5, 1.0))
    want = -(t.cos() ** 2).reshape(-1, 1, 1, 1) * (trigflow(student)(xh, t) - slope)
    assert float((none - want).detach().abs().max()) < 1e-12
    assert float((half - (none + full) / 2).abs().max()) < 1e-12
    m = models(method, student, problem)
    seen = []
    for progress in (0.0, 0.05, 0.1, 1.0):
        m.progress = progress
        seen.append(float(SCM(adaptive=False, tame="none").loss(m, xh, t, slope, {})))  # type: ignore[arg-type]
    assert seen[0] != seen[1] != seen[2] == seen[3]
    m.progress = 0.0
    assert float(SCM(adaptive=False, tame="none", warmup=0).loss(m, xh, t, slope, {})) == seen[3]  # type: ignore[arg-type]


def test_the_gradient_is_that_of_the_equation() -> None:
    problem, (xh, t) = gaussian(), points(16)
    slope, student = trigflow(Exact(problem))(xh, t), Power(0.8)
    for prior in (True, False):
        method = SCM(adaptive=False, tame="norm", warmup=0, prior=prior)
        m = models(method, student, problem)
        student.requires_grad_(True)
        loss = method.loss(m, xh, t, slope, {})
        assert isinstance(loss, Tensor)
        (found,) = torch.autograd.grad(loss, [student.power])
        F = trigflow(student)(xh, t) / S
        g = method.direction(student, xh, t, slope, {}, 1.0)
        g = g / (g.abs() + 0.1)
        weight = 1 / (S * t.tan()) if prior else torch.ones_like(t)
        (want,) = torch.autograd.grad(-2 * (weight.reshape(-1, 1, 1, 1) * g * F).mean(), [student.power])
        assert float(found) == pytest.approx(float(want), rel=1e-9)
        assert float(loss.detach()) == pytest.approx(float((weight.reshape(-1, 1, 1, 1) * g**2).mean()), rel=1e-9)


def test_in_expectation_data_and_teacher_give_one_gradient() -> None:
    # Four points with the moments of two independent unit Gaussians: means of quadratics over them are expectations.
    Z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    N = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    problem, method = gaussian(), SCM(adaptive=False, tame="none", warmup=0)
    for angle in (0.3, 1.2):
        t = torch.full((4,), angle, dtype=torch.float64)
        xh = S * (math.cos(angle) * Z + math.sin(angle) * N)
        found = []
        for slope in (trigflow(Exact(problem))(xh, t), S * (math.cos(angle) * N - math.sin(angle) * Z)):
            m = models(method, Power(0.8), problem)
            m.student.requires_grad_(True)
            loss: Any = method.loss(m, xh, t, slope, {})
            found.append(float(torch.autograd.grad(loss, [m.student.power])[0]))
        assert found[0] == pytest.approx(found[1], rel=1e-9) and abs(found[0]) > 1e-3


def test_the_learned_variance_divides_the_loss_and_is_not_part_of_the_student() -> None:
    method, problem = SCM(warmup=0), gaussian()
    (xh, t), student = points(), Power(0.8)
    m = models(method, student, problem)
    slope = m.teacher and trigflow(m.teacher)(xh, t)
    m.variance.leave.bias.data += 2.0
    loss: Any = method.loss(m, xh, t, slope, {})
    plain: Any = replace(method, adaptive=False).loss(m, xh, t, slope, {})
    assert float(loss["loss"]) == pytest.approx(float(plain) * math.exp(-2) + 2, rel=1e-6)
    roles = SCM().roles(tiny())
    assert {n: r.ships for n, r in roles.items()} == {"teacher": False, "student": True, "variance": False}
    assert set(SCM(source="data", adaptive=False).roles(tiny())) == {"student"}


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_training_ends_at_the_exact_consistency_function(source: Any) -> None:
    problem = gaussian()
    method = SCM(source=source, optim=Optim(lr=0.04, decay="cosine"), variance=Optim(lr=0.01))
    m = models(method, Power(1.0), problem)
    list(fit(method, m, Draws(problem), FitOptions(Budget(80), batch=128), None))
    assert float(m.student.power) == pytest.approx(0.5, abs=0.01 if source == "teacher" else 0.06)
    x = 80.0 * Noise.of(1, 4000).normal((1, 1, 1), "x", dtype=torch.float64)
    table = consistency(torch.tensor([80.0, S * math.tan(1.1), 0.0], dtype=torch.float64))
    with torch.no_grad():
        assert float(table(m.student, x, noise=Noise.of(2, 4000)).std()) == pytest.approx(S, rel=0.1)


def test_levels_are_log_normal_and_points_are_on_the_circle() -> None:
    method, problem = SCM(), gaussian()
    levels = method.levels(Noise.of(0, 40000), 1e-9, 1e9).log()
    assert float(levels.mean()) == pytest.approx(-1.0, abs=0.03) and float(levels.std()) == pytest.approx(1.4, abs=0.03)
    x0 = problem.draw(4000)
    m = models(replace(method, source="data"), Power(0.8), problem)
    xh, t, slope = replace(method, source="data").point(m, Batch(x0, {}), Noise.of(0, 4000))
    assert float(t.min()) >= math.atan(0.002 / S) - 1e-12 and t.dtype == torch.float64
    cos, sin = (f(t).reshape(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    z = (xh - cos * x0) / sin
    assert float((slope - (cos * z - sin * x0)).abs().max()) < 1e-9 and float(z.std()) == pytest.approx(S, rel=0.05)


# ---- teachers


def with_path(path: Any, predicts: Any, top: float = 80.0, **more: Any) -> Generator:
    torch.manual_seed(0)
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    low = 1e-3 if path == FLOW else 0.02
    return replace(tiny(), denoiser=Precond(net, (1, 4, 4), path=path, predicts=predicts, sigma_min=low, sigma_max=top))


@pytest.mark.parametrize("kind", ["vp v", "flow velocity", "flow x0"])
def test_every_teacher_starts_as_it_is(kind: str, tmp_path: Path) -> None:
    start = {
        "vp v": lambda: with_path(VP, "v"),
        "flow velocity": lambda: with_path(FLOW, "velocity", 1e8),
        "flow x0": lambda: with_path(FLOW, "x0", 80.0),
    }[kind]()
    made = run("SCM", tmp_path, method=replace(RUNS["SCM"], steps=2), start=start)
    x, cond = torch.randn(3, 1, 4, 4), {"label": torch.arange(3)}
    held = 1e-3 if kind == "flow x0" else 0.0
    assert (
        isinstance(made.denoiser, JumpPrecond) == (kind == "flow x0") and made.sampler.start == start.denoiser.sigma_max
    )
    low = made.denoiser(x, max(held, 1e-6), cond)
    assert float((low - x).detach().abs().max()) < 1e-4
    again = Generator.load(tmp_path).sample(4, progress=False)
    assert again.shape == (4, 1, 4, 4) and bool(again.isfinite().all())
    student = SCM().roles(start)["student"].start()
    if kind != "flow x0":
        assert torch.equal(student(x, 0.7, cond), start.denoiser(x, 0.7, cond))


def test_guidance_around_the_teacher_is_distilled_and_data_refuses_it() -> None:
    start, batch = tiny(), Batch(torch.randn(8, 1, 4, 4), {"label": torch.arange(8) % 3})
    seen = []
    for teacher in (start, guided(start, 3.0)):
        m = build_models(SCM().roles(teacher), "cpu")
        xh, t, slope = SCM().point(m, batch, Noise.of(1, 8))
        d = m.student.sigma_data
        direct = teacher.denoiser(xh / t.cos().reshape(-1, 1, 1, 1).float(), d * t.tan(), batch.cond)
        # D = cos x_t - sin dx_t/dt
        back = t.cos().reshape(-1, 1, 1, 1) * xh - t.sin().reshape(-1, 1, 1, 1) * slope
        assert float((back - direct).detach().abs().max()) < 1e-5
        seen.append(slope)
    assert float((seen[0] - seen[1]).abs().max()) > 1e-3
    with pytest.raises(InputError, match="its guidance would be lost: use source='teacher'"):
        SCM(source="data").roles(guided(start, 3.0))


# ---- sampler


def test_the_sampler_passes_the_published_angle() -> None:
    start = tiny()
    d = start.denoiser.sigma_data
    two = SCM(sigma_data=0.5).sampler(start).levels.tolist()
    assert two == [80.0, pytest.approx(0.5 * math.tan(1.1)), 0.0] and two[1] == pytest.approx(0.98, abs=0.01)
    assert SCM(steps=1).sampler(start).levels.tolist() == [80.0, 0.0]
    four = SCM(steps=4).sampler(start)
    angles = (four.levels / d).atan()
    assert four.nfe == 4 and float((angles.diff() + angles[0] / 4).abs().max()) < 1e-9
    assert SCM(steps=3, middle=(1.2, 0.4)).sampler(start).levels[1:3].tolist() == pytest.approx(
        [d * math.tan(1.2), d * math.tan(0.4)]
    )


# ---- runs


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    method = RUNS[name]
    start = {"width": 16, "embedding": 8, "blocks": 1, "dropout": 0.3}
    size: Any = start if name == "data" else {}
    run(name, tmp_path / "whole", method=method, start=tiny(**size))
    with pytest.raises(Stop):
        run(name, tmp_path / "cut", method=method, start=tiny(**size), stop=5)
    torch.manual_seed(1)
    run(name, tmp_path / "cut", method=method, start=tiny(**size), resume=True)
    assert differing(bits(tmp_path / "whole"), bits(tmp_path / "cut")) == []
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    before = tiny(**size).denoiser.state_dict()
    made = Generator.load(tmp_path / "whole")
    assert max(float((before[k] - v).abs().max()) for k, v in made.denoiser.state_dict().items()) > 1e-4
    if not size:
        run(name, tmp_path / "one", method=method, micro=1)
        tensors = [bits(tmp_path / f) for f in ("one", "whole")]
        far, where = furthest(
            *({k: v for k, v in t.items() if k.startswith("checkpoints") and "roles/" in k} for t in tensors)
        )
        assert far < 1e-4, where


def test_lora_and_checkpointing_work(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = run("SCM", tmp_path / "lora", method=RUNS["SCM"], lora=LoRA(rank=2), budget=2)
    assert Generator.load(tmp_path / "lora").fingerprint() == made.fingerprint()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run("SCM", tmp_path / "plain", method=RUNS["SCM"], budget=2)
        run("SCM", tmp_path / "checkpointed", method=RUNS["SCM"], budget=2, checkpointing=True)
    assert differing(bits(tmp_path / "plain"), bits(tmp_path / "checkpointed")) == []


def bare(time: Any) -> Generator:
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=8, embedding=8, blocks=1))
    return replace(tiny(), denoiser=Precond(net, (1, 4, 4), path=DDPM, predicts="noise", time=time, sigma_min=0.02))


def test_sums_products_and_attention_have_torchs_own_derivatives() -> None:
    c = torch.tensor([0.3, 2.0, -1.5, 0.7, 1.1], dtype=torch.float64)
    cases: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, u: (2 * x + 1) * c - 3,
        lambda x, u: (1 - x) / c + x / 4,
        lambda x, u: 1 / (x * x + 2) - c / (u * u + 1),
        lambda x, u: c - x * u + (c + u) / (c * c + u * u),
        lambda x, u: torch.addcmul(x, x, 1 + u),
        lambda x, u: torch.addcmul(c, x, u) + torch.addcmul(x, c, u),
        # The derivative has the type and the shape of a result that is wider than its operand.
        lambda x, u: (x[0, 0, 0].float() + c) * 2 - x,
        lambda x, u: torch.nn.functional.scaled_dot_product_attention(x, u * x, x + u),
        lambda x, u: torch.nn.functional.scaled_dot_product_attention(x, c.expand(2, 2, 3, 5), x * u),
    ]
    g = torch.Generator().manual_seed(0)
    x, u, dx, du = (torch.randn(2, 2, 3, 5, generator=g, dtype=torch.float64) for _ in range(4))
    for case, f in enumerate(cases):
        value, slope = directional(f, (x, u), (dx, du))
        # The fused kernels of attention have no such derivative.
        with sdpa_kernel(SDPBackend.MATH):
            want = torch.func.jvp(f, (x, u), (dx, du))
        assert float((value - want[0]).abs().max()) < 1e-10, case
        assert float((slope - want[1]).abs().max()) < 1e-10 and slope.dtype == value.dtype, case


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: SCM(steps=0), "SCM needs steps >= 1"),
    (lambda: SCM(std=0), "std > 0"),
    (lambda: SCM(mean=math.nan), "SCM needs a finite mean, std and constant, got nan"),
    (lambda: SCM(mean=-math.inf), "SCM needs a finite mean"),
    (lambda: SCM(std=math.inf), "SCM needs a finite mean, std"),
    (lambda: next(SCM().step(models(SCM(), Power(1.0), gaussian()), Batch(None, {}), 0, Noise.of(0, 2))), "got None"),
    (lambda: SCM(warmup=1.5), "0 <= warmup <= 1"),
    (lambda: SCM(constant=0), "constant > 0"),
    (lambda: SCM(steps=3, middle=(1.0,)), "has 2 angles in the middle"),
    (lambda: SCM(sigma_data=0.0), "finite sigma_data > 0"),
    (lambda: SCM(source="both"), "unknown source 'both'"),  # type: ignore[arg-type]
    (lambda: SCM(tame="l2"), "unknown way to tame a tangent 'l2'"),  # type: ignore[arg-type]
    (lambda: SCM(tangent="reverse"), "unknown mode of differentiation 'reverse'"),  # type: ignore[arg-type]
    (lambda: SCM(sigma_max=90.0).roles(tiny()), "outside of the teacher's levels, 0.002 to 80"),
    (lambda: SCM(steps=3, middle=(0.4, 1.2)).roles(tiny()), "must fall between 1.5"),
    (lambda: SCM(steps=2, middle=(1.7,)).sampler(tiny()), "must fall between 1.5"),
    (lambda: SCM().roles(bare("nearest")), "cannot be differentiated in time: make its Precond with time='native'"),
    (lambda: SCM().roles(replace(tiny(), denoiser=gaussian())), "has no weights to train"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
