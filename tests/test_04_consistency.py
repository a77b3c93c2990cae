"""Consistency distillation, training and tuning against exact flows, closed-form gradients and published tables."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import CountingDenoiser, Precond, build_denoiser, edm
from fewstep.core.exact import Mixture, bimodal
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import DDPM, FLOW, VP
from fewstep.core.path import Path as NoisePath
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.data import Images
from fewstep.distill import distill
from fewstep.distill.consistency import CD, Consistency, falling_levels, ode_step
from fewstep.distill.consistency_training import CT, ECT, Rising, chances
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.guide import CFG
from fewstep.loss.huber import pseudo_huber
from fewstep.loss.perceptual import PIXELS
from fewstep.models import ResMLP, ResMLPConfig
from fewstep.models.consistency import ConsistencyPrecond, JumpPrecond, anchored
from fewstep.models.lora import LoRA
from fewstep.solve.euler import euler
from fewstep.train import untrained
from tiny_runs import STEADY, Stop, bits, check_restart, differing, run, tiny, tiny_data

LOW, TOP, S = 0.002, 80.0, 0.6
METHODS: dict[str, Consistency] = {
    "CD": CD.original(optim=STEADY, target_ema=Ema(rate=0.9)),
    "CD weighted": CD(optim=STEADY),
    "CT": CT(optim=STEADY, last=40),
    "CT original": CT.original(optim=STEADY),
    "ECT": ECT(optim=STEADY),
}


class Flow(nn.Module):
    """The exact consistency function of Gaussian data: the whole trajectory down to ``low``, per sample."""

    def __init__(self, problem: Mixture, low: float = LOW, top: float = TOP) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.mean, self.variance = problem.means[0], problem.variances[0]
        self.shape, self.sigma_data = problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = low, top

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        level = sigma.reshape(-1, 1, 1, 1)
        gain = ((self.variance + self.sigma_min**2) / (self.variance + level**2)).sqrt()
        return self.mean + gain * (x - self.mean) + self.weight


class Line(nn.Module):
    """``x + theta (sigma - low) x``: the identity at ``low``, one parameter; watches what it is called with."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), LOW, TOP, S
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        self.seen.append((x.detach(), sigma.detach(), torch.is_grad_enabled()))
        return x + self.theta * (sigma.reshape(-1, 1, 1, 1) - LOW) * x


class Exact(nn.Module):
    """A mixture's denoiser as a role."""

    def __init__(self, problem: Mixture) -> None:
        super().__init__()
        self.problem, self.shape, self.sigma_data = problem, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = problem.sigma_min, problem.sigma_max

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        return self.problem(x, sigma, cond)


def gaussian(mean: float = 0.0, spread: float = S) -> Mixture:
    return Mixture(torch.full((1, 1, 1, 1), mean), spread**2)


def models_of(**networks: nn.Module) -> Models:
    return build_models({n: Role(lambda net=net: net) for n, net in networks.items()}, "cpu")


def first(method: Consistency, m: Models, x0: Tensor, i: int = 0, seed: int = 3) -> Update:
    (update,) = method.step(m, Batch(x0, {}), i, Noise.of(seed, len(x0)))
    return update


# Four points with the moments of two independent unit Gaussians: means of quadratics over them are expectations.
Z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
N = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(4, 1, 1, 1)


def level(value: float) -> Tensor:
    return torch.full((4,), value, dtype=torch.float64)


# ---- the student's form


def teachers() -> dict[str, Precond]:
    def net() -> ResMLP:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
        g = torch.Generator().manual_seed(1)
        for p in made.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=g)
        return made

    paths: list[tuple[str, NoisePath, Any]] = [
        ("vp noise", VP, "noise"),
        ("ddpm v", DDPM, "v"),
        ("flow velocity", FLOW, "velocity"),
        ("flow x0", FLOW, "x0"),
    ]
    made = {name: Precond(net(), (1, 4, 4), path=path, predicts=kind) for name, path, kind in paths}
    return {"edm": edm(net(), (1, 4, 4), sigma_data=0.4)} | made


@pytest.mark.parametrize("name", teachers())
@pytest.mark.parametrize("low", [0.002, 0.03])
def test_the_student_is_the_identity_at_the_lowest_level_only(name: str, low: float) -> None:
    teacher = teachers()[name]
    student = anchored(teacher, low)
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = {"label": torch.tensor([0, 1, 2, -1, 0])}
    with torch.no_grad():
        assert float((student(x, low, cond) - x).abs().max()) < 1e-6
        assert float((student(x.float(), torch.full((5,), low), cond) - x.float()).abs().max()) < 1e-6
        assert float((student(x, 1.0, cond) - x).abs().max()) > 0.1
        # Far above the lowest level it is the teacher, whose weights it starts from.
        y = 40 * x
        assert float((student(y, 40.0, cond) - teacher(y, 40.0, cond)).abs().max()) < 3 * low * float(x.abs().max())
    assert student.sigma_min == low and student.net is teacher.net
    again = build_denoiser(student.describe())
    again.load_state_dict(student.state_dict())  # type: ignore[attr-defined]
    assert type(again) is type(student) and torch.equal(again(x, 0.7, cond), student(x, 0.7, cond))


def test_the_form_is_the_papers_for_edm_and_a_euler_step_for_the_rest() -> None:
    made = {name: anchored(teacher, 0.01) for name, teacher in teachers().items()}
    assert type(made.pop("edm")) is ConsistencyPrecond and {type(d) for d in made.values()} == {JumpPrecond}
    s, m, d = torch.tensor([0.01, 0.3, 5.0, 80.0], dtype=torch.float64), 0.01, 0.4
    on_x, on_out = anchored(teachers()["edm"], m).weights(s, s)
    assert float((on_x - d**2 / ((s - m) ** 2 + d**2)).abs().max()) < 1e-12
    assert float((on_out - d * (s - m) / (d**2 + s**2).sqrt()).abs().max()) < 1e-12
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in made:
        step = euler(torch.tensor([3.0, 0.01], dtype=torch.float64))
        assert float((made[name](x, 3.0) - step(teachers()[name], x)).detach().abs().max()) < 1e-9, name


def test_an_anchored_student_keeps_its_own_kind_and_strangers_are_refused() -> None:
    once = anchored(teachers()["vp noise"], 0.002)
    twice = anchored(once, 0.02)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert type(twice) is JumpPrecond and torch.allclose(twice(x, 0.02), x, atol=1e-6)
    with pytest.raises(InputError, match="can be made of a Linear"):
        anchored(nn.Linear(2, 2), 0.1)


# ---- distances


def test_pseudo_huber_is_the_norm_far_out_and_a_square_close_by() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    norm = (x - y).flatten(1).norm(dim=1)
    for c in (1e-3, 0.3, 10.0):
        assert float((pseudo_huber(x, y, c) - ((norm**2 + c**2).sqrt() - c)).abs().max()) < 1e-12
    assert float((pseudo_huber(x, y, 1e-9) - norm).abs().max()) < 1e-8
    assert float((pseudo_huber(x, y, 1e5) - norm**2 / 2e5).abs().max()) < 1e-9
    assert float((pseudo_huber(x, y) - pseudo_huber(x, y, 0.00054 * math.sqrt(48))).abs().max()) == 0
    x.requires_grad_(True)
    slope = torch.autograd.grad(pseudo_huber(x, y).sum(), x)[0].flatten(1).norm(dim=1)
    assert float(slope.min()) > 0.99 and float(slope.max()) < 1
    # In float32 the plain formula would be 0 here, and its gradient noise.
    close = torch.full((1, 4), 1e-7)
    assert float(pseudo_huber(close, torch.zeros(1, 4), 1e-2)) == pytest.approx(2e-12, rel=1e-4)
    same = x[:1].detach().requires_grad_(True)
    assert float(torch.autograd.grad(pseudo_huber(same, same.detach()).sum(), same)[0].abs().max()) == 0


def test_the_other_distances_are_means_over_pixels() -> None:
    x, y = torch.tensor([[1.0, -3.0]]), torch.zeros(1, 2)
    assert float(PIXELS["l2"](x, y)) == 5 and float(PIXELS["l1"](x, y)) == 2
    assert PIXELS["huber"] is pseudo_huber


# ---- distillation


@pytest.mark.parametrize(("order", "power"), [(1, 2), (2, 3)])
def test_the_teachers_step_has_its_order(order: int, power: int) -> None:
    problem, errors = bimodal(), []
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for ratio in (1.2, 1.1):
        a, b = torch.full((9,), ratio, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
        step = ode_step(lambda y, s, c: problem(y, s[:, None]), x, a, b, order=order)
        errors.append(float((step - problem.flow(x, ratio, 1.0, 20)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(power, abs=0.35)


def test_the_exact_consistency_function_has_next_to_no_loss_and_less_on_finer_grids() -> None:
    problem, losses = gaussian(0.2), []
    x0 = problem.draw(512)
    for levels in (18, 36, 72):
        m = models_of(teacher=Exact(problem), student=Flow(problem))
        losses.append(float(first(CD(levels=levels, distance="l2", weighted=False), m, x0).loss().detach()))
    # The step's error is of third order, the loss its square.
    assert losses[0] < 2e-3 and losses[1] < losses[0] / 20 and losses[2] < losses[1] / 30, losses
    wrong = models_of(teacher=Exact(problem), student=Flow(gaussian(0.2, 2 * S)))
    assert float(first(CD(levels=72, distance="l2", weighted=False), wrong, x0).loss().detach()) > 1e3 * losses[2]


def test_the_exact_flow_of_a_mixture_is_a_fixed_point_too() -> None:
    problem, found = bimodal(), []
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for levels in (20, 40):
        grid, worst = karras(levels - 1, 0.05, 20.0, to_zero=False).tolist(), 0.0
        for a, b in list(itertools.pairwise(grid))[1 : -1 : levels // 10]:
            y = x * math.hypot(a, 1)
            ahead = ode_step(lambda z, s, c: problem(z, s[:, None]), y, torch.full((9,), a), torch.full((9,), b))
            gap = problem.flow(y, a, 0.05, 40) - problem.flow(ahead, b, 0.05, 40)
            worst = max(worst, float(gap.abs().max()))
        found.append(worst)
    assert found[1] < found[0] / 4 and found[1] < 0.02, found


def continuous_gradient(theta: float, a: float) -> float:
    """``2 E[df/dtheta (df along the trajectory)/dsigma]`` of :class:`Line`: the limit over the gap."""
    along = theta * (S**2 + a**2) + (1 + theta * (a - LOW)) * a
    return 2 * (a - LOW) * along


def slope_of(m: Models, x_a: Tensor, a: float, x_b: Tensor, b: float) -> float:
    student = m.student
    student.requires_grad_(True)
    loss = CD(distance="l2").compare(m, x_a, level(a), x_b, level(b), {}, torch.ones(4))
    (found,) = torch.autograd.grad(loss, [student.theta])
    return float(found) / (a - b)


@pytest.mark.parametrize(("theta", "a"), [(-0.3, 0.5), (0.1, 2.0), (-0.8, 1.0)])
def test_on_fine_grids_the_gradients_of_distillation_and_training_are_the_continuous_one(
    theta: float, a: float
) -> None:
    problem, exact = gaussian(), continuous_gradient(theta, a)
    off: dict[str, list[float]] = {"CD": [], "CT": []}
    for gap in (1e-2, 1e-3, 1e-4):
        x_a, b = S * Z + a * N, a - gap
        m = models_of(student=Line(theta))
        x_b = ode_step(problem, x_a, level(a), level(b))
        off["CD"].append(abs(slope_of(m, x_a, a, x_b, b) - exact))
        # Of one trajectory CT's target is wrong by a noise of order gap; over the data it is right.
        off["CT"].append(abs(slope_of(m, x_a, a, S * Z + b * N, b) - exact))
        assert float((S * Z + b * N - x_b).abs().max()) > 0.05 * gap
    for name, errors in off.items():
        assert errors[2] < 1e-3 * max(1.0, abs(exact)), (name, errors, exact)
        assert errors[0] > 5 * errors[1] > 25 * errors[2], (name, errors)


@pytest.mark.parametrize("target", ["self", "ema"])
@pytest.mark.parametrize("make", [CD, CT, ECT])
def test_the_target_has_no_gradient_and_comes_from_the_weights_that_are_asked_for(make: Any, target: str) -> None:
    m = models_of(teacher=Exact(gaussian()), student=Line(-0.2))
    # As a run builds them: the target's average is there only if it is asked for; the shipped one never is a target.
    if target == "ema":
        m.averages["student.target"] = copy.deepcopy(m.student)
    m.averages["student"] = copy.deepcopy(m.student)
    m.averages["student"].theta.data += 7.0
    average = m.target("student")
    average.theta.data += 0.1
    update = first(make(target=target, distance="l2"), m, gaussian().draw(64))
    m.student.requires_grad_(True)
    average.requires_grad_(True)
    update.loss().backward()
    assert update.role == "student" and (average is m.student or average.theta.grad is None)
    assert not m.averages["student"].seen
    source = average if target == "ema" else m.student
    assert not source.seen[0][2] and m.student.seen[-1][2], "the target first, without a gradient"
    (x_b, b, _), (x_a, a, _) = source.seen[0], m.student.seen[-1]
    aim = source(x_b, b).detach()
    weight = 1 / (a - b)
    want = (weight * PIXELS["l2"](m.student(x_a, a), aim)).mean()
    (by_hand,) = torch.autograd.grad(want, [m.student.theta])
    assert float(m.student.theta.grad) == pytest.approx(float(by_hand), rel=1e-9)
    assert bool((b < a).all()) and float(b.min()) >= LOW - 1e-12 and float(a.max()) <= TOP


def test_distillation_asks_the_teacher_twice_a_step_and_draws_all_levels_alike() -> None:
    for solver, calls in (("heun", 2), ("euler", 1)):
        counted = CountingDenoiser(gaussian())
        m = models_of(student=Line(-0.2))
        m.networks["teacher"] = counted  # type: ignore[assignment]
        method = CD(levels=10, solver=solver)
        first(method, m, gaussian().draw(9000)).loss()
        assert counted.nfe == calls
        drawn = m.student.seen[-1][1]
        grid = falling_levels(9, LOW, TOP, 7.0)
        share = (drawn[:, None] == grid[:-1]).double().mean(0)
        assert float((share - 1 / 9).abs().max()) < 0.02 and float(share.sum()) == 1


def test_dropout_is_the_same_in_student_and_target() -> None:
    class Dropping(Line):
        def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
            self.mask = torch.rand(x.shape)
            self.seen.append((self.mask, sigma, True))
            return super().forward(x, sigma)

    m = models_of(student=Dropping(0.1))
    first(CT(), m, gaussian().draw(8)).loss()
    masks = [seen for seen, _, _ in m.student.seen if seen.dtype == torch.float32]
    assert len(masks) == 2 and torch.equal(masks[0], masks[1])


def test_guidance_around_the_teacher_is_folded_in() -> None:
    start = tiny()
    guided = replace(start, denoiser=CFG(start.denoiser, 3.0))
    batch = Batch(tiny_data().pixels[:8], {"label": torch.arange(8) % 3})
    seen: dict[str, Any] = {}
    for name, teacher in (("plain", start), ("guided", guided)):
        m = build_models(CD(levels=4).roles(teacher), "cpu")
        assert isinstance(m.student, ConsistencyPrecond)
        (update,) = CD(levels=4).step(m, batch, 0, Noise.of(1, 8))
        seen[name] = float(update.loss())
        x = batch.x + torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(m.teacher(x, 1.0, batch.cond), teacher.denoiser(x, 1.0, batch.cond))
        assert not any(p.requires_grad for p in m.teacher.parameters())
        seen[name + " x0"] = m.teacher(x, 1.0, batch.cond)
    assert float((seen["plain x0"] - seen["guided x0"]).abs().max()) > 1e-3 and seen["plain"] != seen["guided"]


# ---- schedules


def test_the_published_curricula() -> None:
    method = CT()
    assert [method.count(k / 8) for k in range(9)] == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert method.count(0.124) == 11
    old = CT.original()
    assert old.count(0) == 2 and old.count(1) == 151 and old.count(0.25) == math.ceil(math.sqrt(5699.25 + 3) - 1) + 1
    average = old.roles(tiny())["student"].target
    assert isinstance(average, Rising)
    assert average.decay(0, 0.0) == pytest.approx(0.81) and average.decay(7, 1.0) == pytest.approx(0.9 ** (2 / 150))
    other = CT.original(mu=0.95, last=200).roles(tiny())["student"].target
    assert other is not None and other.decay(0) == pytest.approx(0.9025)
    assert CT.original(steps=3).steps == 3 and CT().roles(tiny())["student"].target is None


def test_curricula_follow_the_share_of_the_budget() -> None:
    """Of any unit: the same loop with a budget of pictures or of steps sees the same grids."""
    seen: dict[float, list[int]] = {}
    for progress in (0.0, 0.3, 1.0):
        m = models_of(student=Line(-0.2))
        m.progress = progress
        first(CT(), m, gaussian().draw(400), i=10**6).loss()
        levels = m.student.seen[1][1]
        grid = falling_levels(CT().count(progress) - 1, LOW, TOP, 7.0)
        assert bool(torch.isin(levels, grid).all())
        first(ECT(), m, gaussian().draw(64), i=10**6).loss()
        (_, r, _), (_, t, _) = m.student.seen[2:]
        assert torch.equal(r, ECT().partner(t, progress, LOW))
        seen[progress] = [len(levels.unique())]
    assert seen[0.0] < seen[0.3] < seen[1.0]
    assert all(method.any_steps for method in METHODS.values())


def test_levels_are_drawn_with_the_published_chances() -> None:
    low, top = LOW, TOP
    for steps in (10, 1280):
        p = chances(steps, low, top, 7.0, -1.1, 2.0)
        grid = falling_levels(steps, low, top, 7.0)
        edges = [math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2.0)) for s in grid.tolist()]
        want = torch.tensor([edges[i] - edges[i + 1] for i in range(steps)], dtype=torch.float64)
        assert float((p - want / want.sum()).abs().max()) < 1e-12 and float(p.sum()) == pytest.approx(1, abs=1e-12)
        assert float(p.min()) > 0
    m = models_of(student=Line(-0.2))
    first(CT(), m, gaussian().draw(20000)).loss()
    (_, b, _), (_, a, _) = m.student.seen
    grid = falling_levels(10, low, top, 7.0)
    share = (a[:, None] == grid[:-1]).double().mean(0)
    assert float((share - chances(10, low, top, 7.0, -1.1, 2.0)).abs().max()) < 0.015
    assert torch.equal(torch.searchsorted(-grid, -a) + 1, torch.searchsorted(-grid, -b)), "neighbours"
    assert float(chances(5, low, top, 7.0, None, 2.0).sub(0.2).abs().max()) < 1e-15


def test_both_points_of_training_share_picture_and_noise() -> None:
    x0 = gaussian().draw(32)
    for method in (CT(), ECT()):
        m = models_of(student=Line(-0.2))
        first(method, m, x0).loss()
        (x_b, b, _), (x_a, a, _) = m.student.seen
        n = (x_a - x0) / a.reshape(-1, 1, 1, 1)
        assert float((x0 + b.reshape(-1, 1, 1, 1) * n - x_b).abs().max()) < 1e-9
        assert 0.7 < float(n.std()) < 1.3


def test_the_partners_of_tuning_close_in() -> None:
    method = ECT()
    t = torch.tensor([LOW * 1.01, 0.1, 1.0, 10.0, 79.0], dtype=torch.float64)
    gaps = torch.stack([t - method.partner(t, i / 8, LOW) for i in range(9)])
    assert bool((gaps > 0).all()) and bool((gaps[1:] <= gaps[:-1]).all()) and bool((gaps[7] < gaps[0])[1:].all())
    assert torch.equal(gaps[7], gaps[8]), "the last stage stays"
    # 1 + 8 sigmoid(-t) is 1.0 to five digits at t = 79 and 5 at t = 0.
    assert float(gaps[0][-1]) == pytest.approx(39.5, rel=1e-6) and float(gaps[7][-1]) == pytest.approx(79 / 256)
    assert float(method.partner(t, 0, LOW)[1]) == LOW, "at first low levels are paired with the picture itself"
    sigmoid = 1 / (1 + math.exp(1))
    assert float(gaps[4][2]) == pytest.approx((1 + 8 * sigmoid) / 32)


def test_tuning_draws_levels_log_normally_within_the_ends() -> None:
    t = ECT().draw(Noise.of(0, 40000), LOW, TOP).log()
    assert float(t.min()) > math.log(LOW) and float(t.max()) < math.log(TOP)
    wide = ECT().draw(Noise.of(0, 40000), 1e-12, 1e12).log()
    assert float(wide.mean()) == pytest.approx(-1.1, abs=0.04) and float(wide.std()) == pytest.approx(2.0, abs=0.03)


# ---- the shipped sampler


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_sampler_has_as_many_evaluations_as_asked_for(steps: int) -> None:
    start = tiny()
    table = CD(steps=steps).sampler(start)
    assert table.nfe == steps and table.start == 80 and table.end == 0 and table.noisy == (steps > 1)
    # One step of the exact flow, and any number, end at the data's distribution.
    problem = gaussian(0.3)
    x = 80.0 * Noise.of(5, 20000).normal((1, 1, 1), "start", dtype=torch.float64)
    end = table(Flow(problem), x, noise=Noise.of(6, 20000)).detach()
    assert float(end.mean()) == pytest.approx(0.3, abs=0.02) and float(end.std()) == pytest.approx(S, rel=0.02)


def test_middle_levels_may_be_given() -> None:
    table = CD(steps=2, middle=(0.821,)).sampler(tiny())
    assert table.levels.tolist() == [80.0, 0.821, 0.0]
    two = CD().sampler(tiny()).levels.tolist()
    assert two == [80.0, float(karras(39, LOW, TOP, to_zero=False)[22]), 0.0] and two[1] == pytest.approx(
        1.383, abs=1e-3
    )
    even = karras(4, LOW, TOP, to_zero=False)
    assert CD(steps=4).sampler(tiny()).levels.tolist() == [*even[:4].tolist(), 0.0]


# ---- runs


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    check_restart(tmp_path, lambda out, **more: run(name, out, method=method, **more), far=1e-5)
    made = Generator.load(tmp_path / "whole")
    assert isinstance(made.denoiser, ConsistencyPrecond) and made.sampler.nfe == 2
    before = tiny().denoiser.state_dict()
    assert max(float((before[k] - v).abs().max()) for k, v in made.denoiser.state_dict().items()) > 1e-4


def test_dropout_resumes(tmp_path: Path) -> None:
    start = {"width": 16, "embedding": 8, "blocks": 1, "dropout": 0.3}
    run("CT", tmp_path / "whole", method=METHODS["CT"], start=tiny(**start))
    with pytest.raises(Stop):
        run("CT", tmp_path / "cut", method=METHODS["CT"], start=tiny(**start), stop=5)
    run("CT", tmp_path / "cut", method=METHODS["CT"], start=tiny(**start), resume=True)
    assert differing(bits(tmp_path / "whole"), bits(tmp_path / "cut")) == []


def test_lora_trains_a_consistency_function_on_the_teachers_weights(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = run("CD", tmp_path, method=METHODS["CD"], lora=LoRA(rank=2))
    assert type(made.denoiser) is ConsistencyPrecond
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(made.denoiser(x, LOW, {"label": torch.zeros(3, dtype=torch.int64)}), x, atol=1e-6)
    assert Generator.load(tmp_path).fingerprint() == made.fingerprint()


def test_a_flow_teacher_is_distilled_below_its_pure_noise(tmp_path: Path) -> None:
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    flow = Precond(net, (1, 4, 4), path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    start = replace(tiny(), denoiser=flow)
    with pytest.raises(InputError, match=r"cannot start at sigma 1e\+08.*set sigma_max, such as 80"):
        run("CD", tmp_path, method=CD(), start=start)
    made = run("CD", tmp_path, method=CD(sigma_max=80.0, optim=STEADY), start=start)
    assert type(made.denoiser) is JumpPrecond and made.sampler.start == 80.0
    assert Generator.load(tmp_path).sample(2, progress=False).shape == (2, 1, 4, 4)


def stepped(method: Any, x: Tensor | None) -> None:
    next(method.step(build_models(method.roles(tiny()), "cpu"), Batch(x, {}), 0, Noise.of(0, 2)))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: CD(steps=0), "CD needs steps >= 1 and rho > 0, got steps=0"),
    (lambda: CT(rho=0), "CT needs steps >= 1 and rho > 0"),
    (lambda: CD(rho=math.nan), "CD needs steps >= 1 and rho > 0"),
    (lambda: CD(rho=math.inf), "CD needs steps >= 1 and rho > 0"),
    (lambda: CT(mean=math.nan), "CT needs std > 0 and a finite mean"),
    (lambda: ECT(mean=math.inf), "std > 0 and a finite mean"),
    (lambda: ECT(b=math.nan), "finite q > 1, k >= 0 and b"),
    (lambda: ECT(k=math.nan), "finite q > 1, k >= 0 and b"),
    (lambda: stepped(CD(), None), r"CD needs pictures of \(1, 4, 4\), as the network takes them, got None"),
    (lambda: stepped(CT(), torch.zeros(2, 3, 4, 4)), r"CT needs pictures of \(1, 4, 4\).*got \(3, 4, 4\)"),
    (lambda: stepped(ECT(), None), "ECT needs pictures"),
    (lambda: CD(steps=3, middle=(1.0,)), "has 2 levels in the middle"),
    (lambda: CD(distance="ssim"), "unknown distance 'ssim'"),  # type: ignore[arg-type]
    (lambda: CD(target="teacher"), "unknown target 'teacher'"),  # type: ignore[arg-type]
    (lambda: CD(levels=1), "at least 2 levels, got 1"),
    (lambda: CD(solver="rk4"), "unknown solver 'rk4'"),  # type: ignore[arg-type]
    (lambda: CT(curriculum="halving"), "unknown curriculum 'halving'"),  # type: ignore[arg-type]
    (lambda: CT(first=20, last=10), "1 <= first <= last, got 20 and 10"),
    (lambda: CT(std=0), "CT needs std > 0"),
    (lambda: CT(mu=0.9), "with target 'ema' only"),
    (lambda: CT(mu=1.0, target="ema"), r"mu within \(0, 1\)"),
    (lambda: ECT(q=1.0), "q > 1"),
    (lambda: ECT(q=math.inf), "q > 1"),
    (lambda: ECT(stages=0), "stages >= 1"),
    (lambda: CD(sigma_max=90.0).roles(tiny()), "outside of the teacher's levels, 0.002 to 80"),
    (lambda: CD(sigma_min=0.001).roles(tiny()), "outside of the teacher's levels"),
    (lambda: CT(sigma_min=3.0, sigma_max=2.0).sampler(tiny()), "outside of the teacher's levels"),
    (lambda: CD(steps=3, middle=(1.0, 2.0)).roles(tiny()), "must fall between 80 and 0.002"),
    (lambda: CD(steps=2, middle=(0.001,)).sampler(tiny()), "must fall between 80 and 0.002"),
    (lambda: CD().roles(replace(tiny(), denoiser=bimodal())), "Mixture has no weights to train"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_one_average_ships_and_another_is_the_target() -> None:
    role = CD.original(optim=Optim(lr=1e-3)).roles(tiny())["student"]
    assert role.ships and role.ema == Ema(power=0.05) and role.optim is not None
    assert role.target == Ema(rate=0.95) and CD(target="self").roles(tiny())["student"].target is None
    m = build_models({"student": role}, "cpu")
    assert m.target("student") is not m.ema("student") and m.target("student") is not m.student


def test_distillation_with_a_perceptual_distance_trains(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    data = Images("eight", torch.rand(16, 1, 8, 8, generator=g) * 2 - 1, torch.arange(16) % 3)
    start = untrained(data, "resmlp", width=16, embedding=8, blocks=1)
    made = distill(start, CD(distance="lpips", optim=STEADY), data, out=tmp_path, budget=3, batch=8, progress=False)
    before = start.denoiser.state_dict()  # type: ignore[attr-defined]
    moved = max(float((before[k] - v).abs().max()) for k, v in made.denoiser.state_dict().items())  # type: ignore[attr-defined]
    assert moved > 1e-4 and not list(tmp_path.rglob("*distance*")), "its network is not part of a run's files"
