"""Target-driven distillation: where it aims, what its loss is on exact trajectories, guidance that stays tunable."""

from __future__ import annotations

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
from fewstep.core.path import DDPM, EDM, FLOW, TRIG, VP
from fewstep.core.role import Models, Role, Update
from fewstep.distill.tdd import TDD, guided_for, own_scale, visited
from fewstep.errors import InputError
from fewstep.grid import own_levels
from fewstep.guide import CFG, guided
from fewstep.models import ResMLP, ResMLPConfig
from fewstep.models.flow_map import Clipped
from fewstep.models.lora import LoRA
from fewstep.solve.euler import euler
from tiny_runs import STEADY, check_restart, run, tiny

BASE = TDD(optim=STEADY, grid=20)


class Exact(nn.Module):
    """A mixture's denoiser on the VP path, as a role that remembers what it was asked."""

    def __init__(self, problem: Mixture, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.problem, self.shape, self.sigma_data, self.path = problem, problem.shape, problem.sigma_data, VP
        self.sigma_min, self.sigma_max, self.seen = problem.sigma_min, problem.sigma_max, []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        self.seen.append((x.detach(), sigma.detach(), {k: v.clone() for k, v in (cond or {}).items()}))
        return self.problem(x, sigma, cond) + self.slope


def mixture() -> Mixture:
    return Mixture(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), 0.09, sigma_min=0.01, sigma_max=50.0)


def models_of(slope: float = 0.0) -> Models:
    return build_models(
        {"teacher": Role(lambda: Exact(mixture())), "student": Role(lambda: Exact(mixture(), slope))}, "cpu"
    )


def first(method: TDD, m: Models, cond: Cond | None = None, count: int = 256, x0: Tensor | None = None) -> Update:
    x0 = mixture().draw(count, 3) if x0 is None else x0
    (update,) = method.step(m, Batch(x0, dict(cond or {})), 0, Noise.of(1, count))
    return update


# ---- targets


@pytest.mark.parametrize("s_ratio", [0.0, 0.3])
def test_aims_are_moved_down_from_visited_times_in_the_window(s_ratio: float) -> None:
    method = TDD(s_ratio=s_ratio)
    below = torch.linspace(0, 1, 251, dtype=torch.float64)[:-1].repeat(40)
    aims = method.aims(below, Noise.of(0, len(below)))
    known = visited(method.schedules)
    cap = known[torch.searchsorted(known, below + 1e-9, right=True) - 1]
    assert bool((aims <= below).all()) and bool((aims >= (cap - 0.26 - 1e-9) * (1 - s_ratio)).all())
    if not s_ratio:
        assert float((aims[:, None] - known).abs().min(1).values.max()) < 1e-12, "exactly the visited times"
        # Uniform among those in the window: of the times visited near 0.8 these are 7.
        near = aims[(below > 0.8001) & (below < 0.8331)]
        inside = known[(known <= 0.8 + 1e-9) & (known >= 0.54 - 1e-9)]
        share = torch.tensor([float((near == v).double().mean()) for v in inside])
        assert float(share.sum()) == pytest.approx(1) and float((share - 1 / len(inside)).abs().max()) < 0.07
    assert float(visited((4, 5))[1]) == 0.2 and visited((4, 5)).tolist() == sorted(
        {0, 0.2, 0.25, 0.4, 0.5, 0.6, 0.75, 0.8, 1}
    )


def test_the_other_aims() -> None:
    below = torch.full((4000,), 0.6, dtype=torch.float64)
    assert not TDD(target="end").aims(below, Noise.of(0, 4000)).any()
    anywhere = TDD(target="any").aims(below, Noise.of(0, 4000))
    assert float(anywhere.max()) < 0.6 and float(anywhere.mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("path", [VP, DDPM, FLOW, EDM])
def test_the_grid_is_even_in_the_teachers_own_time(path: Any) -> None:
    ends = {"sigma_min": float(path.sigma(path.at(0.0101))), "sigma_max": 1e8 if path is FLOW else 100.0}
    D = Precond(ResMLP(ResMLPConfig((1, 4, 4), 0, 8, 8, 1)), (1, 4, 4), path=path, predicts="v", **ends)
    shares = torch.linspace(0, 1, 9, dtype=torch.float64)
    # The time of EDM's path is the noise level, in which even levels would leave none where pictures form.
    u = (TRIG(0.5) if path is EDM else path).at(own_levels(D, shares))
    assert float((u.diff() / u.diff()[0] - 1).abs().max()) < 1e-6
    assert own_levels(D, shares)[0] == ends["sigma_min"] and own_levels(D, shares)[-1] == ends["sigma_max"]
    assert own_levels(D, shares, 20.0)[-1] == 20.0
    made = TDD(steps=4).sampler(replace(tiny(), denoiser=D)).levels
    assert float((made[:-1].flip(0) / own_levels(D, torch.tensor([0.25, 0.5, 0.75, 1.0])) - 1).abs().max()) < 1e-12
    assert path is not EDM or 0.1 < float(made[-2]) < 0.3


# ---- the loss


def test_where_the_teacher_lands_on_the_aim_its_point_is_the_target() -> None:
    # One step of two: the teacher's point is the lower visited time, 1/2 or 0.
    method = TDD(grid=2, schedules=(2,), window=0.0, s_ratio=0.0, null_share=0.0)
    m = models_of(slope=5.0)
    first(method, m)
    x_a, a, _ = m.teacher.seen[0]
    x_b, b, _ = m.student.seen[0]
    want = x_a + (b - a).reshape(-1, 1, 1, 1) / a.reshape(-1, 1, 1, 1) * (x_a - mixture()(x_a, a))
    assert float((x_b - want).abs().max()) < 1e-12
    # A student that is far off has the same target there, so its loss is that of its own jump alone.
    off = models_of(slope=5.0)
    exact = models_of()
    assert float(first(method, exact).loss().detach()) < 1e-9 < float(first(method, off).loss().detach())  # type: ignore[union-attr]


@pytest.mark.parametrize(("weight", "rate"), [("landing", 3.0), ("edm", 2.0)])
def test_the_loss_of_the_exact_denoiser_falls_with_the_step(weight: Any, rate: float) -> None:
    methods = [TDD(grid=n, huber=10.0, weight=weight) for n in (25, 50, 100)]
    sizes = [float(first(method, models_of()).loss().detach()) for method in methods]  # type: ignore[union-attr]
    # The difference of the two jumps is of second order in the step, and far below c the loss is its square; EDM's
    # weight takes a factor out of it that is small at low noise.
    assert sizes[0] > rate * sizes[1] > rate**2 * sizes[2] and sizes[2] < 1e-4, sizes


@pytest.mark.parametrize("weight", ["landing", "edm"])
def test_the_loss_is_that_of_the_two_landings(weight: Any) -> None:
    method, m = TDD(grid=10, huber=0.1, weight=weight, null_share=0.0), models_of(slope=0.5)
    found = float(first(method, m).loss().detach())  # type: ignore[union-attr]
    (x_b, b, _), (x_a, a, _) = m.student.seen
    noise = Noise.of(1, len(x_a))
    j = noise.integers(1, 11, (), "level")
    c = own_levels(m.student, method.aims((j - 1).double() / 10, noise))
    wide = [level.reshape(-1, 1, 1, 1) for level in (a, b, c)]
    landed = [
        x + (wide[2] / level - 1) * (x - mixture()(x, level) - 0.5) for x, level in zip((x_a, x_b), wide, strict=False)
    ]
    if weight == "landing":
        d = (landed[0] - landed[1]) * VP.coeffs(VP.at(wide[2])).a
    else:
        sd = mixture().sigma_data
        d = (landed[0] - landed[1]) / (1 - wide[2] / wide[0]) * (wide[0] ** 2 + sd**2).sqrt() / (wide[0] * sd)
    assert found == pytest.approx(float(((d**2 + 0.01).sqrt() - 0.1).mean()), rel=1e-6)


def test_landings_are_compared_in_the_networks_own_state() -> None:
    level = torch.tensor([0.0, 0.02, 20.0], dtype=torch.float64)
    found = own_scale(models_of().student, level)
    assert float((found - (1 + level.clamp(min=0.01) ** 2).rsqrt()).abs().max()) < 1e-12
    # On EDM's path, whose state is x itself, by the part of the picture in unit variance.
    D = Precond(ResMLP(ResMLPConfig((1, 4, 4), 0, 8, 8, 1)), (1, 4, 4), path=EDM, predicts="x0")
    assert float((own_scale(D, level) - 0.5 * (0.25 + level.clamp(min=0.002) ** 2).rsqrt()).abs().max()) < 1e-12


def test_the_gradient_is_the_students_alone() -> None:
    m = models_of(slope=0.1)
    m.student.requires_grad_(True)
    first(BASE, m).loss().backward()  # type: ignore[union-attr]
    assert float(m.student.slope.grad.abs()) > 1e-6 and m.teacher.slope.grad is None
    assert len(m.teacher.seen) == 1 and len(m.student.seen) == 2


# ---- guidance


def test_hidden_conditions_leave_the_teacher_unguided() -> None:
    start, method = tiny(), replace(BASE, guidance=4.0, null_share=0.5)
    m = build_models(method.roles(start), "cpu")
    assert isinstance(m.teacher.wrapper, CFG) and m.teacher.wrapper.scale == 4.0
    x0, label = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 3
    seen: list[tuple[Tensor, ...]] = []
    m.teacher.register_forward_hook(lambda module, args, out: seen.append((*args[:2], args[2]["label"], out)))
    list(method.step(m, Batch(x0, {"label": label}), 0, Noise.of(0, 400)))
    x, a, told, made = seen[0]
    hidden = told == -1
    assert 150 < int(hidden.sum()) < 250 and torch.equal(told[~hidden], label[~hidden])
    with torch.no_grad():
        plain = start.denoiser(x, a, {"label": told})
    scale = plain.abs().flatten(1).amax(1)
    far = (made - plain).abs().flatten(1).amax(1) / scale
    assert float(far[hidden].max()) < 1e-5 and float(far[~hidden].median()) > 1e-3


def test_guidance_is_the_students_own_to_tune(tmp_path: Path) -> None:
    made = run("tdd", tmp_path, method=replace(BASE, guidance=3.0), budget=3)
    one, other = (guided(made, s).sample(4, {"label": [0, 1, 2, 0]}, progress=False) for s in (1.0, 2.5))
    assert float((one - other).abs().max()) > 1e-3
    assert guided_for(tiny(), 1.0, "TDD").scale == 1.0, "kept for its null values"  # type: ignore[attr-defined]


# ---- sampling


def test_the_sampler_visits_the_schedule_and_adds_the_noise_of_eta() -> None:
    start = tiny()
    even, table = TDD(steps=4).sampler(start), TDD(steps=5, schedule="uneven", eta=0.3).sampler(start)
    u = start.network.path.at(even.levels[:-1])  # type: ignore[union-attr,operator]
    low = float(start.network.path.at(0.002))  # type: ignore[union-attr,operator]
    assert float(((u - low) / (u[0] - low) - torch.tensor([1, 0.75, 0.5, 0.25])).abs().max()) < 1e-9
    assert torch.equal(even.P, euler(even.levels).P) and even.end == 0
    down = table.P[:, 0] * table.sigmas
    assert (
        float((down**2 + table.Z[:, 0] ** 2 - table.levels[1:] ** 2).abs().max()) < 1e-6 * float(table.levels[1]) ** 2
    )
    assert table.nfe == 5 and table.noisy and float(table.Z[-1].abs().max()) == 0
    clipped = TDD(clip=0.5).ships(start.denoiser)
    assert isinstance(clipped, Clipped) and clipped.limit == 0.5 and TDD().ships(start.denoiser) is start.denoiser


@pytest.mark.parametrize("method", [BASE, replace(BASE, target="end", guidance=2.0, clip=1.0)], ids=["drawn", "end"])
def test_a_resumed_run_and_micro_batches(method: TDD, tmp_path: Path) -> None:
    check_restart(tmp_path, lambda out, **more: run("tdd", out, method=method, **more), far=1e-5)
    made = Generator.load(tmp_path / "whole")
    assert made.sampler.nfe == 4 and made.sample(2, progress=False).shape == (2, 1, 4, 4)


def test_flow_ddpm_and_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    start = tiny()
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    flow = Precond(net, (1, 4, 4), path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    ddpm = Precond(net, (1, 4, 4), path=DDPM, predicts="noise", sigma_min=0.0101, sigma_max=157.0)
    for k, D in enumerate((flow, ddpm)):
        made = run("tdd", tmp_path / str(k), method=BASE, start=replace(start, denoiser=D), budget=2)
        assert made.sample(2, progress=False).isfinite().all()
    made = run("tdd", tmp_path / "lora", method=replace(BASE, guidance=2.0), lora=LoRA(rank=2), budget=2)
    assert Generator.load(tmp_path / "lora").fingerprint() == made.fingerprint()
    noisy = Precond(net, (1, 4, 4), path=FLOW, predicts="noise", sigma_min=1e-3, sigma_max=1e8)
    with pytest.raises(InputError, match="says nothing of x0 at sigma 1e\\+08, pure noise: set sigma_max,"):
        BASE.roles(replace(start, denoiser=noisy))


def blank() -> Generator:
    return replace(tiny(), conds=None)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: TDD(steps=0), "steps >= 1"),
    (lambda: TDD(grid=1), "grid >= 2"),
    (lambda: TDD(schedules=()), "schedules of steps >= 1"),
    (lambda: TDD(s_ratio=1.5), r"s_ratio within \[0, 1\], got 1.5"),
    (lambda: TDD(null_share=-1), "null_share within"),
    (lambda: TDD(eta=2), "eta within"),
    (lambda: TDD(huber=0), "huber > 0"),
    (lambda: TDD(huber=float("nan")), "huber > 0"),
    (lambda: TDD(window=float("nan")), "window >= 0"),
    (lambda: TDD(guidance=-1.0), "a scale of guidance >= 0 .*, got -1.0"),
    (lambda: TDD(guidance=float("nan")), "a scale of guidance >= 0 .*, got nan"),
    (lambda: TDD(sigma_max=float("nan")).roles(tiny()), "sigma_max=nan is outside"),
    (lambda: TDD(clip=0), "clip > 0"),
    (lambda: TDD(target="start"), "unknown target 'start'"),  # type: ignore[arg-type]
    (lambda: TDD(weight="snr"), "unknown weight 'snr'"),  # type: ignore[arg-type]
    (lambda: TDD(schedule="odd"), "unknown schedule 'odd'"),  # type: ignore[arg-type]
    (lambda: TDD(schedule="uneven"), "the uneven schedule has 5, 6, 7 steps, got steps=4"),
    (lambda: TDD(sigma_max=90.0).roles(tiny()), "sigma_max=90 is outside of the teacher's levels, 0.002 to 80"),
    (lambda: TDD(guidance=3.0).roles(blank()), r"TDD\(guidance=3\) needs a teacher with classes or prompts"),
    (lambda: TDD(guidance=3.0).roles(guided(tiny(), 2.0)), "the teacher is a CFG already: leave guidance out"),
    (lambda: TDD().roles(replace(blank(), denoiser=mixture())), "Mixture has no weights to train"),
    (
        lambda: first(BASE, models_of(), count=2, x0=torch.zeros(2, 3, 4, 4)),
        r"TDD needs pictures of \(1, 1, 1\), as the network takes them, got \(3, 4, 4\)",
    ),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
