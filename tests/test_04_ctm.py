"""Consistency trajectory models against exact trajectories, and every part of them switched on and off."""

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
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW, widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.distill.ctm import CTM, gamma_sampling, last_weight
from fewstep.errors import InputError
from fewstep.guide import CFG
from fewstep.models import ADM, ADMConfig, EDM2Config, EDM2UNet, ResMLP, ResMLPConfig, SongUNet, SongUNetConfig
from fewstep.models.discriminator import usual_taps
from fewstep.models.flow_map import UNTIL, Told, flow_map
from fewstep.models.lora import LoRA
from fewstep.solve.consistency import consistency
from fewstep.solve.euler import euler
from fewstep.train.run import train
from tiny_runs import STEADY, Stop, bits, check_restart, differing, log_of, run, tiny, tiny_data

S = 0.6
BASE = CTM(optim=STEADY, heads=STEADY, levels=5, span=3, adaptive=False, ema=Ema(rate=0.9))


class FlowMap(nn.Module):
    """The exact ``g`` of Gaussian data plus ``weight``; the denoiser where it lands at its own level."""

    def __init__(self, problem: Mixture, weight: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), weight, dtype=torch.float64))
        self.problem, self.shape, self.sigma_data = problem, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = problem.sigma_min, problem.sigma_max
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        t, s = sigma.double(), cond[UNTIL].double()
        self.seen.append((t, s, torch.is_grad_enabled()))
        mean, v = self.problem.means[0], self.problem.variances[0]
        there = mean + ((v + widen(s, x) ** 2) / (v + widen(t, x) ** 2)).sqrt() * (x - mean)
        k = widen(s / t, x)
        at_once = self.problem(x, t)
        g = torch.where(k > 1 - 1e-9, at_once, (there - k * x) / (1 - k).clamp(min=1e-9))
        return g + self.weight.reshape(())


class Exact(nn.Module):
    """A denoiser as a role that counts its calls."""

    def __init__(self, problem: Mixture) -> None:
        super().__init__()
        self.problem, self.shape, self.sigma_data = problem, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max, self.calls = problem.sigma_min, problem.sigma_max, 0

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        self.calls += 1
        return self.problem(x, sigma, cond)


def gaussian() -> Mixture:
    return Mixture(torch.full((1, 1, 1, 1), 0.2), S**2)


def models_of(method: CTM, weight: float = 0.0) -> Models:
    roles = {
        "teacher": Role(lambda: Exact(gaussian())),
        "student": Role(lambda: FlowMap(gaussian(), weight), method.optim, method.ema, method.target_ema, ships=True),
    }
    return build_models(roles, "cpu")


def first(method: CTM, m: Models, i: int = 0, count: int = 512) -> Update:
    x0 = gaussian().draw(count, 3)
    (update,) = method.step(m, Batch(x0, {}), i, Noise.of(1, count))
    return update


def test_the_exact_trajectories_have_next_to_no_loss_and_less_with_finer_steps_of_the_teacher() -> None:
    sizes = []
    for levels in (20, 40, 80):
        method = CTM(levels=levels, span=4, distance="l1", dsm=0.0)
        m = models_of(method)
        losses = [first(method, m, i).loss() for i in range(3)]
        sizes.append(max(float(made["ctm"].detach()) for made in losses))  # type: ignore[index]
    assert sizes[-1] < 1e-3 and sizes[0] > 3 * sizes[1] > 9 * sizes[2], sizes
    wrong = models_of(method, 0.3)
    for average in wrong.averages.values():
        average.weight.data.zero_()
    assert float(first(method, wrong).loss()["ctm"].detach()) > 10 * sizes[-1], "a wrong student has a loss"  # type: ignore[index]


def test_the_gradient_reaches_the_student_alone_through_the_frozen_average() -> None:
    method = replace(BASE, distance="l2", dsm=0.0, levels=12)
    m = models_of(method, 0.1)
    m.student.requires_grad_(True)
    made = first(method, m).loss()
    made["loss"].backward()  # type: ignore[index]
    assert float(m.student.weight.grad.abs()) > 1e-6
    assert all(p.grad is None for a in m.averages.values() for p in a.parameters())
    assert all(p.grad is None for p in m.teacher.parameters())


@pytest.mark.parametrize("reach", ["soft", "local", "global"])
def test_levels_fall_from_start_over_the_teachers_end_to_the_landing(reach: Any) -> None:
    method = replace(BASE, reach=reach, levels=10, span=9, dsm=0.0)
    m = models_of(method)
    counts, grid, reached = set(), set(), []
    for i in range(30):
        m.teacher.calls, m.student.seen = 0, []
        update = first(method, m, i, 64)
        (u, s, graph), *_ = m.student.seen
        assert not graph, "the target has no gradient"
        update.loss()
        t, again, graph = m.student.seen[1]
        assert graph and torch.equal(again, s) and bool((t > u).all()) and bool((u >= s - 1e-12).all())
        reached.append(bool((s == u).all()))
        counts.add(m.teacher.calls // 2)
        grid |= set(t.tolist()) | set(s.tolist())
    assert counts == ({1} if reach == "local" else set(range(1, 10)))
    assert all(reached) == (reach == "global")
    assert len(grid) == 10 and min(grid) == pytest.approx(0.002) and max(grid) == pytest.approx(80)


def test_the_denoising_term_is_least_at_the_denoiser_and_lands_where_it_starts() -> None:
    method = replace(BASE, dsm=1.0)
    values = []
    for weight in (-0.2, 0.0, 0.2):
        m = models_of(method, weight)
        update = first(method, m, count=20000)
        m.student.seen = []
        values.append(float(update.loss()["dsm"]))  # type: ignore[index]
        assert any(torch.equal(t, s) for t, s, _ in m.student.seen)
    assert values[1] < values[0] and values[1] < values[2]


def test_further_terms_are_scaled_to_the_gradient_of_the_first_at_the_last_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    out = net(torch.randn(5, 3))
    parts = {"ctm": out.square().mean(), "dsm": 1e3 * (out - 1).square().mean(), "gan": 1e-3 * out.sum()}
    last = net[1].weight
    norm = {k: torch.autograd.grad(v, last, retain_graph=True)[0].norm() for k, v in parts.items()}
    made = CTM(dsm=2.0, gan=0.5).balanced(net, dict(parts))
    want = parts["ctm"] + sum(
        w * float((norm["ctm"] / (norm[k] + 1e-4)).clamp(max=1e4)) * parts[k] for k, w in (("dsm", 2.0), ("gan", 0.5))
    )
    assert float((made["loss"] - want).detach().abs()) < 1e-5 * float(want.detach())
    plain = CTM(dsm=2.0, gan=0.5, adaptive=False).balanced(net, dict(parts))["loss"]
    summed = parts["ctm"] + 2 * parts["dsm"] + 0.5 * parts["gan"]
    assert float((plain - summed).detach().abs()) < 1e-6 * float(plain.detach())


@pytest.mark.parametrize(
    "net",
    [
        lambda: ResMLP(ResMLPConfig((3, 8, 8), 3, 16, 8, 1)),
        lambda: SongUNet(SongUNetConfig((3, 8, 8), 3, channels=8, multipliers=(1, 2), blocks=1, attention=())),
        lambda: ADM(ADMConfig((3, 8, 8), 3, channels=8, multipliers=(1, 2), blocks=1, attention=(), head_channels=8)),
        lambda: EDM2UNet(EDM2Config((3, 8, 8), 3, channels=8, multipliers=(1, 2), blocks=1, attention=())),
    ],
)
def test_the_last_weight_is_that_of_the_layer_that_runs_last(net: Callable[[], nn.Module]) -> None:
    D = flow_map(Precond(net(), (3, 8, 8)))
    ran: list[nn.Module] = []
    for module in D.modules():
        if any(p.ndim > 1 for p in module.parameters(recurse=False)):
            module.register_forward_hook(lambda module, args, out: ran.append(module))
    D(torch.randn(2, 3, 8, 8), 1.0, {UNTIL: torch.zeros(2)})
    assert any(p is last_weight(D) for p in ran[-1].parameters(recurse=False))


def test_the_game_starts_late_and_both_sides_learn(tmp_path: Path) -> None:
    method = replace(BASE, gan=1.0, gan_start=0.5, adaptive=True)
    start = tiny("unet", channels=8, multipliers=(1, 2), blocks=1, attention=())
    made = run("ctm", tmp_path, method=method, start=start, budget=6, log_every=1)
    logs = log_of(tmp_path)
    assert ["heads/loss" in e for e in logs] == [False] * 3 + [True] * 3
    assert ["student/gan" in e for e in logs] == [False] * 3 + [True] * 3
    assert all(math.isfinite(v) for e in logs for v in e.values()) and isinstance(made.denoiser, Told)


def test_the_count_of_the_teachers_steps_is_a_function_of_the_iteration() -> None:
    method, m = CTM(), Models({}, {}, {})
    counts = [method.heun_steps(m, i) for i in range(400)]
    assert counts == [method.heun_steps(m, i) for i in range(400)] and set(counts) == set(range(1, 18))
    assert abs(sum(counts) / 400 - 9) < 0.8
    m.seed = 1
    assert counts != [method.heun_steps(m, i) for i in range(400)], "another run draws others"


@pytest.mark.parametrize("bottleneck", [True, False])
def test_the_usual_taps_suit_every_network_and_roles_draw_nothing(bottleneck: bool) -> None:
    start = tiny("unet", channels=8, multipliers=(1, 2), blocks=1, attention=())
    D: Any = start.denoiser
    # Transformers declare their blocks and no bottleneck.
    D.taps = {name: place for name, place in D.taps.items() if bottleneck or name != "bottleneck"}
    before = torch.get_rng_state()
    roles = replace(BASE, gan=1.0).roles(start)
    assert torch.equal(torch.get_rng_state(), before)
    heads: Any = roles["heads"].start()
    assert heads.config.taps == usual_taps(D) and ("bottleneck" in heads.config.taps) == bottleneck


def test_both_sides_of_the_game_see_pictures_at_the_same_levels() -> None:
    method = replace(BASE, gan=1.0, gan_start=0.0)
    m = build_models(method.roles(tiny("unet", channels=8, multipliers=(1,), blocks=1, attention=())), "cpu")
    x = torch.zeros(64, 1, 4, 4)
    (real, a), (fake, b) = (method.noised(m, x, Noise.of(0, 64), part) for part in ("real", "fake"))
    assert torch.equal(a, b) and not torch.equal(real, fake)
    batch = tiny_data().take(torch.arange(8))
    student, duel = ((u.role, u.loss()) for u in method.step(m, batch, 0, Noise.of(0, 8)))
    assert student[0] == "student" and duel[0] == "heads" and set(duel[1]) == {"loss", "real", "fake"}


# ---- sampling


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
def test_gamma_sampling_keeps_every_level_and_draws_the_data(gamma: float) -> None:
    method = CTM(steps=3, gamma=gamma)
    student = FlowMap(gaussian())
    start = replace(tiny(), denoiser=student)  # type: ignore[arg-type]
    table, told = method.sampler(start), method.ships(student)  # type: ignore[arg-type]
    down = torch.tensor([float(table.P[k, 0] * table.sigmas[k]) for k in range(3)], dtype=torch.float64)
    assert float((down**2 + table.Z[:, 0] ** 2 - table.levels[1:] ** 2).abs().max()) < 1e-9
    n = Noise.of(0, 8000)
    x = 80 * n.normal((1, 1, 1), "start", dtype=torch.float64)
    made = table(told, x, noise=n.fold("sampler")) if table.noisy else table(told, x)
    assert float(made.mean()) == pytest.approx(0.2, abs=0.03) and float(made.std()) == pytest.approx(S, abs=0.02)
    assert table.nfe == 3
    if gamma == 0:
        assert torch.equal(table.P, euler(table.levels).P)
    if gamma == 1:
        assert torch.equal(table.Z, consistency(table.levels).Z) and not table.P.any()


def test_levels_of_the_sampler_and_its_given_middle() -> None:
    start = tiny()
    assert CTM(steps=1).sampler(start).levels.tolist() == [80.0, 0.0]
    assert CTM(steps=2, middle=(1.3,)).sampler(start).levels.tolist() == [80.0, 1.3, 0.0]
    assert gamma_sampling([3.0, 1.0, 0.0], 0.5).nfe == 2


# ---- runs


@pytest.mark.parametrize("method", [BASE, replace(BASE, target="ema", reach="local", dsm=0.0)], ids=["soft", "local"])
def test_a_resumed_run_and_micro_batches(method: CTM, tmp_path: Path) -> None:
    check_restart(tmp_path, lambda out, **more: run("ctm", out, method=method, **more), far=1e-5)
    assert any(k.endswith("student.target.safetensors:net.net.leave.weight") for k in bits(tmp_path / "one"))
    made = Generator.load(tmp_path / "whole")
    assert isinstance(made.denoiser, Told) and made.sampler.nfe == 1
    assert made.sample(2, progress=False).shape == (2, 1, 4, 4)
    terms = {k: v for k, v in made.denoiser.inner.state_dict().items() if "terms" in k}  # type: ignore[attr-defined]
    assert max(float(v.abs().max()) for k, v in terms.items() if ".2." in k) > 1e-5, "the terms have learned"


def test_a_resumed_game_with_adaptive_weights(tmp_path: Path) -> None:
    method = replace(BASE, gan=1.0, gan_start=0.0, adaptive=True)
    start = {"channels": 8, "multipliers": (1,), "blocks": 1, "attention": ()}
    run("ctm", tmp_path / "whole", method=method, start=tiny("unet", **start))
    with pytest.raises(Stop):
        run("ctm", tmp_path / "cut", method=method, start=tiny("unet", **start), stop=5)
    run("ctm", tmp_path / "cut", method=method, start=tiny("unet", **start), resume=True)
    assert differing(bits(tmp_path / "whole"), bits(tmp_path / "cut")) == []


def test_lora_and_guidance_and_flow_teachers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = run("ctm", tmp_path / "lora", method=replace(BASE, adaptive=True), lora=LoRA(rank=2), budget=3)
    assert Generator.load(tmp_path / "lora").fingerprint() == made.fingerprint()
    start = tiny()
    train(
        replace(start, denoiser=CFG(start.denoiser, 2.0)), BASE, tiny_data(),
        out=tmp_path / "cfg", budget=2, batch=4, progress=False,
    )  # fmt: skip
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    flow = replace(
        start, denoiser=Precond(net, (1, 4, 4), path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    )
    with pytest.raises(InputError, match=r"CTM cannot start at sigma 1e\+08.*set sigma_max, such as 80"):
        BASE.roles(flow)
    assert run("ctm", tmp_path / "flow", method=replace(BASE, sigma_max=80.0), start=flow, budget=2).sampler.nfe == 1


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: CTM(reach="near"), "unknown reach of the teacher 'near'"),  # type: ignore[arg-type]
    (lambda: CTM(levels=1), "levels >= 2 and span >= 1"),
    (lambda: CTM(span=0), "levels >= 2 and span >= 1"),
    (lambda: CTM(dsm=-1), "dsm >= 0"),
    (lambda: CTM(gan=math.inf), "gan >= 0"),
    (lambda: CTM(gan=math.nan), "gan >= 0"),
    (lambda: CTM(rho=math.nan), "rho > 0"),
    (lambda: CTM(gamma=1.5), r"gamma within \[0, 1\]"),
    (lambda: CTM(gan_start=2), "gan_start"),
    (lambda: CTM(distance="ssim"), "unknown distance 'ssim'"),  # type: ignore[arg-type]
    (lambda: CTM(sigma_max=90.0).roles(tiny()), "outside of the teacher's levels, 0.002 to 80"),
    (lambda: CTM(gan=1.0, taps=("nowhere",)).roles(tiny("unet", channels=8)), "unknown feature tap 'nowhere'"),
    (lambda: CTM().roles(replace(tiny(), denoiser=gaussian())), "Mixture has no weights to train"),
    (
        lambda: next(BASE.step(models_of(BASE), Batch(torch.zeros(2, 3, 4, 4), {}), 0, Noise.of(0, 2))),
        r"CTM needs pictures of \(1, 1, 1\), as the network takes them, got \(3, 4, 4\)",
    ),
    (lambda: next(BASE.step(models_of(BASE), Batch(None, {}), 0, Noise.of(0, 2))), "got None"),
    (lambda: last_weight(nn.LayerNorm(3)), "has no weight matrix: set adaptive=False"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_ships_and_what_is_averaged() -> None:
    role = CTM(target_ema=Ema(rate=0.99), optim=Optim(lr=1e-3)).roles(tiny())["student"]
    assert role.ships and role.target == Ema(rate=0.99) and CTM.any_steps and CTM.needs_data
