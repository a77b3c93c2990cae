"""MeanFlow against exact average velocities, its identity, built-in guidance, and runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Precond
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models, fit
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions
from fewstep.core.path import DDPM, FLOW
from fewstep.core.role import Models, Optim, Role
from fewstep.distill.mean_flow import MeanFlow, velocity
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.models import ResMLP, ResMLPConfig
from fewstep.models.flow_map import Told
from fewstep.models.lora import LoRA
from fewstep.models.trigflow import View
from tiny_runs import STEADY, check_restart, run, tiny

S = 0.6
RUNS = {
    "data": MeanFlow(ratio=0.75, optim=STEADY),
    "guided": MeanFlow(guidance=2.0, mix=0.3, drop=0.3, ratio=0.75, power=0.75, optim=STEADY),
    "teacher": MeanFlow(source="teacher", steps=2, ratio=0.75, optim=STEADY),
}


class Exact(nn.Module):
    """A mixture's denoiser as a role."""

    def __init__(self, problem: Mixture) -> None:
        super().__init__()
        self.problem, self.shape, self.sigma_data = problem, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = 0.01, 1e6

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        return self.problem(x, sigma, cond)


class Jump(nn.Module):
    """Between the denoiser of a Gaussian (share 0) and its exact flow map (share 1)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share, dtype=torch.float64))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), 0.01, 1e6, S

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        t, s = (level.reshape(-1, 1, 1, 1).double() for level in (sigma, (cond or {}).get("until", sigma)))
        plain = x * S**2 / (S**2 + t**2)
        near = (t - s) < 1e-6 * t
        s = torch.where(near, t / 2, s)
        end = x * ((S**2 + s**2) / (S**2 + t**2)).sqrt()
        exact = (end - s / t * x) / (1 - s / t)
        return torch.where(near, plain, plain + self.share * (exact - plain))


class Draws:
    """Pictures of one pixel."""

    def __init__(self) -> None:
        self.x = gaussian().draw(4096)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, ids: Tensor) -> Batch:
        return Batch(self.x[ids], {})


def gaussian() -> Mixture:
    return Mixture(torch.zeros(1, 1, 1, 1), S**2)


def flow(top: float = 1e8, predicts: Any = "velocity") -> Generator:
    torch.manual_seed(0)
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    D = Precond(net, (1, 4, 4), path=FLOW, predicts=predicts, sigma_min=1e-3, sigma_max=top)
    return replace(tiny(), denoiser=D)


def models(method: MeanFlow, student: nn.Module) -> Models:
    roles = {"teacher": Role(lambda: Exact(gaussian())), "student": Role(lambda: student, method.optim, ships=True)}
    return build_models(roles, "cpu")


def points(n: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    t, share = torch.linspace(0.1, 0.99, n, dtype=torch.float64), torch.rand(n, generator=g, dtype=torch.float64)
    return torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64), t, 0.9 * t * share


# ---- the identity


def test_the_exact_average_velocity_is_a_fixed_point_and_others_are_not() -> None:
    (z, t, r), method = points(), MeanFlow()
    v = View(Exact(gaussian()), FLOW)(z, t)
    for share, least, most in ((1.0, 0.0, 1e-8), (0.0, 0.05, 9.0)):
        student = Jump(share)
        off = float((velocity(student, z, t, r, {}) - method.aim(student, z, t, r, v, {})).detach().abs().max())
        assert least <= off < most, (share, off)


def test_the_average_velocity_moves_along_the_flow_and_adds_up() -> None:
    z, t, r = points()
    q, exact = (t + r) / 2, Jump(1.0)
    wide = [a.reshape(-1, 1, 1, 1) for a in (t, q, r)]
    middle = z - (wide[0] - wide[1]) * velocity(exact, z, t, q, {})
    end = middle - (wide[1] - wide[2]) * velocity(exact, middle, q, r, {})
    assert float((end - (z - (wide[0] - wide[2]) * velocity(exact, z, t, r, {}))).detach().abs().max()) < 1e-9
    # In the library's coordinates x = z / (1 - t) that is the probability flow.
    for k in (3, 17, 30):
        want = gaussian().flow(z[k : k + 1] / (1 - t[k]), float(t[k] / (1 - t[k])), float(r[k] / (1 - r[k])))
        assert float((end[k] / (1 - r[k]) - want[0]).detach().abs().max()) < 1e-9


def test_with_equal_times_the_loss_is_flow_matching() -> None:
    z, t, _ = points()
    n = torch.randn_like(z)
    for power in (0.0, 0.75, 1.0):
        method = MeanFlow(power=power)
        m = models(method, Jump(0.3))
        found: Any = method.loss(m, z, t, t, n, {})
        square = (View(m.teacher, FLOW)(z, t) - n).square().flatten(1).sum(1)
        assert float(found["loss"]) == pytest.approx(float(((square + 1e-3) ** -power * square).mean()), rel=1e-9)
        assert float(found["square"]) == pytest.approx(float(square.mean()), rel=1e-9)


def test_the_target_has_no_gradient_and_the_weight_has_none() -> None:
    z, t, r = points()
    method, v = MeanFlow(), View(Exact(gaussian()), FLOW)(z, t)
    m = models(method, Jump(0.3))
    m.student.requires_grad_(True)
    (found,) = torch.autograd.grad(method.loss(m, z, t, r, v, {})["loss"], [m.student.share])  # type: ignore[index]
    aim, u = method.aim(m.student, z, t, r, v, {}), velocity(m.student, z, t, r, {})
    weight = 1 / ((u - aim).detach() ** 2 + 1e-3)
    (want,) = torch.autograd.grad((weight * (u - aim) ** 2).mean(), [m.student.share])
    assert float(found) == pytest.approx(float(want), rel=1e-9) and not aim.requires_grad


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_training_ends_at_the_exact_flow_map(source: Any) -> None:
    method = MeanFlow(source=source, ratio=1.0, power=0.5, optim=Optim(lr=0.05, decay="cosine"))
    m = models(method, Jump(0.0))
    list(fit(method, m, Draws(), FitOptions(Budget(80), batch=128), None))
    assert float(m.student.share) == pytest.approx(1.0, abs=0.02 if source == "teacher" else 0.3)


# ---- times


def test_times_are_sorted_pairs_of_which_a_share_is_apart() -> None:
    t, r = MeanFlow(ratio=0.25).times(Noise.of(0, 40000), 1e-9, 1 - 1e-9)
    assert bool((r <= t).all()) and t.dtype == torch.float64
    assert float((r < t).double().mean()) == pytest.approx(0.25, abs=0.01)
    # The larger of two N(-0.4, 1): mean -0.4 + 1 / sqrt(pi).
    assert float(t.logit().mean()) == pytest.approx(-0.4 + math.pi**-0.5, abs=0.02)
    t, r = MeanFlow(ratio=1.0, mean=-0.6, std=1.6, mean_r=-4.0, std_r=1.6).times(Noise.of(0, 40000), 1e-9, 1 - 1e-9)
    assert float((t.logit() + r.logit()).mean()) == pytest.approx(-4.6, abs=0.04)
    held, _ = MeanFlow().times(Noise.of(0, 1000), 0.3, 0.5)
    assert (float(held.min()), float(held.max())) == (0.3, 0.5)


# ---- student, guidance and sampler


@pytest.mark.parametrize("kind", ["edm", "velocity", "x0"])
def test_the_student_starts_as_the_teacher_for_every_second_time(kind: str) -> None:
    start = tiny() if kind == "edm" else flow(predicts=kind)
    m = build_models(MeanFlow().roles(start), "cpu")
    z, cond = torch.randn(4, 1, 4, 4), {"label": torch.arange(4) % 3}
    t = torch.tensor([0.1, 0.5, 0.9, 0.98], dtype=torch.float64)
    for r in (t, t / 3, torch.zeros(4, dtype=torch.float64)):
        u = velocity(m.student, z, t, r, cond)
        x0 = start.denoiser(z / (1 - t).reshape(-1, 1, 1, 1).float(), t / (1 - t), cond)
        assert float((z - t.reshape(-1, 1, 1, 1) * u - x0).detach().abs().max()) < 2e-5


def test_built_in_guidance_mixes_as_published_and_spares_dropped_labels() -> None:
    method = MeanFlow(guidance=2.0, mix=0.3, drop=0.5)
    m = build_models(method.roles(flow()), "cpu")
    z, v = torch.randn(2, 64, 1, 4, 4)
    t, cond = torch.full((64,), 0.6, dtype=torch.float64), {"label": torch.arange(64) % 3}
    with torch.no_grad():
        aim, told = method.guided(m, z, t, v, cond, Noise.of(0, 64))
        own, free = (velocity(m.student, z, t, t, c) for c in (cond, {"label": torch.full((64,), -1)}))
    gone = told["label"] == -1
    assert 16 < int(gone.sum()) < 48 and torch.equal(told["label"][~gone], cond["label"][~gone])
    assert torch.equal(aim[gone], v[gone])
    want = 2.0 * v + 0.3 * own - 1.3 * free
    assert float((aim - want)[~gone].abs().max()) < 1e-5
    plain, kept = MeanFlow().guided(m, z, t, v, cond, Noise.of(0, 64))
    assert plain is v and kept is cond


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_sampler_lands_where_each_step_ends(steps: int) -> None:
    method, start = MeanFlow(steps=steps), flow()
    table = method.sampler(start)
    times = table.levels / (1 + table.levels)
    assert table.nfe == steps and float((times.diff() + times[0] / steps).abs().max()) < 1e-9
    assert table.start == pytest.approx(1e8) and table.end == 0
    # The exact flow map of a Gaussian is exact in any number of steps.
    told = method.ships(Jump(1.0))  # type: ignore[arg-type]
    assert isinstance(told, Told)
    table = method.table(Jump(1.0))
    x = 1e6 * torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
    assert float((table(told, x) - S / math.hypot(1e6, S) * x).detach().abs().max()) < 1e-6


# ---- runs


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    method, make = RUNS[name], tiny if name == "data" else flow
    check_restart(tmp_path, lambda out, **more: run(name, out, method=method, start=make(), **more), far=1e-4)
    made = Generator.load(tmp_path / "whole")
    assert isinstance(made.denoiser, Told) and made.sampler.nfe == method.steps
    pictures = made.sample(4, progress=False)
    assert pictures.shape == (4, 1, 4, 4) and bool(pictures.isfinite().all())
    terms = [v for k, v in made.denoiser.inner.state_dict().items() if "terms" in k]  # type: ignore[attr-defined]
    assert max(float(v.abs().max()) for v in terms if v.ndim == 1) > 1e-4, "the second time is learned"


def test_guided_teachers_are_distilled_and_lora_trains(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = run("lora", tmp_path, method=RUNS["teacher"], start=guided(tiny(), 2.0), budget=2)
    assert made.sampler.nfe == 2
    made = run("lora", tmp_path / "lora", method=RUNS["teacher"], lora=LoRA(rank=2), budget=2)
    assert Generator.load(tmp_path / "lora").fingerprint() == made.fingerprint()


def nearest() -> Generator:
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=8, embedding=8, blocks=1))
    D = Precond(net, (1, 4, 4), path=DDPM, predicts="noise", time="nearest", sigma_min=0.02)
    return replace(tiny(), denoiser=D)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: MeanFlow(steps=0), "MeanFlow needs steps >= 1"),
    (lambda: MeanFlow(std_r=0), "std_r > 0"),
    (lambda: MeanFlow(mean=math.nan), "finite settings"),
    (lambda: MeanFlow(mean_r=math.inf), "finite settings"),
    (lambda: MeanFlow(power=math.nan), "finite settings"),
    (lambda: next(MeanFlow().step(models(MeanFlow(), Jump(0.0)), Batch(None, {}), 0, Noise.of(0, 2))), "got None"),
    (lambda: MeanFlow(ratio=1.5), "0 <= ratio <= 1"),
    (lambda: MeanFlow(drop=1.0), "0 <= drop < 1"),
    (lambda: MeanFlow(constant=0), "constant > 0"),
    (lambda: MeanFlow(guidance=-1), "guidance >= 0"),
    (lambda: MeanFlow(mix=1.0), "0 <= mix < 1"),
    (lambda: MeanFlow(source="both"), "unknown source 'both'"),  # type: ignore[arg-type]
    (lambda: MeanFlow(tangent="reverse"), "unknown mode of differentiation 'reverse'"),  # type: ignore[arg-type]
    (lambda: MeanFlow(source="teacher", guidance=2.0), "belongs to source='data'"),
    (lambda: MeanFlow(guidance=2.0).roles(replace(tiny(), conds=None)), "this one has no conditions"),
    (lambda: MeanFlow().roles(guided(tiny(), 2.0)), "its guidance would be lost"),
    (lambda: MeanFlow(sigma_max=90.0).roles(tiny()), "outside of the teacher's levels, 0.002 to 80"),
    (lambda: MeanFlow().roles(nearest()), "cannot be differentiated in time"),
    (lambda: MeanFlow().roles(replace(tiny(), denoiser=gaussian())), "has no weights to train"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
