"""Conditional diffusion distillation against exact flows, by hand, and as runs."""

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
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW
from fewstep.core.role import Ema, Models, Role, Update
from fewstep.data import Images
from fewstep.data.conditions import ImageConditions
from fewstep.data.sr import SuperResolution
from fewstep.distill.codi import CoDi, estimate
from fewstep.distill.consistency import falling_levels
from fewstep.distill.front import distill
from fewstep.errors import InputError
from fewstep.models.consistency import anchored
from fewstep.models.control import Controlled, controlled
from fewstep.models.lora import LoRA
from tiny_runs import STEADY, StopsAfter, check_restart, of_roles, tiny, tiny_data

LOW, TOP, S = 0.002, 80.0, 0.6


def data() -> SuperResolution:
    return SuperResolution(tiny_data())


def teacher(**changes: Any) -> Generator:
    """A tiny U-Net of 4x4 pictures that knows no pictures."""
    made = tiny("unet", channels=8, multipliers=(1, 2), blocks=1, attention=(), **changes)
    return replace(made, conds=ImageConditions(data()))


class Exact(nn.Module):
    """A mixture's denoiser as a role, which remembers what it was told."""

    def __init__(self, problem: Mixture) -> None:
        super().__init__()
        self.problem, self.shape, self.sigma_data = problem, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = problem.sigma_min, problem.sigma_max
        self.told: list[set[str]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        self.told.append(set(cond or {}))
        return self.problem(x, sigma, cond)


class Flow(nn.Module):
    """The exact consistency function of Gaussian data, plus a weight times the picture's mean."""

    def __init__(self, problem: Mixture) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.mean, self.variance = problem.means[0], problem.variances[0]
        self.shape, self.sigma_data, self.sigma_min, self.sigma_max = problem.shape, problem.sigma_data, LOW, TOP
        self.seen: list[tuple[Tensor, Tensor, set[str], bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        self.seen.append((x.detach(), sigma.detach(), set(cond or {}), torch.is_grad_enabled()))
        level = sigma.reshape(-1, 1, 1, 1)
        gain = ((self.variance + self.sigma_min**2) / (self.variance + level**2)).sqrt()
        steer = cond["image"].mean((1, 2, 3), keepdim=True) if cond and "image" in cond else 0.0
        return self.mean + gain * (x - self.mean) + self.weight * (level - LOW) * (1 + steer)


def gaussian() -> Mixture:
    return Mixture(torch.full((1, 1, 1, 1), 0.2), S**2)


def models(weight: float = 0.0) -> Models:
    student = Flow(gaussian())
    student.weight.data.fill_(weight)
    parts = {"teacher": Exact(gaussian()), "student": student}
    m = build_models({n: Role(lambda net=net: net) for n, net in parts.items()}, "cpu")  # type: ignore[misc]
    m.averages["student.target"] = copy.deepcopy(student)
    m.averages["student.target"].weight.data.add_(0.01)
    return m


def first(method: CoDi, m: Models, n: int = 64, seed: int = 3) -> tuple[Update, Tensor, Tensor]:
    x0 = gaussian().draw(n)
    image = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(5)).double()
    (update,) = method.step(m, Batch(x0, {"image": image}), 0, Noise.of(seed, n))
    return update, x0, image


def column(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1)


# ---- the loss


def test_an_exact_flow_has_next_to_no_disagreement_and_less_on_finer_grids() -> None:
    found: dict[str, list[float]] = {"x0": [], "noise": []}
    for form, losses in found.items():
        for intervals in (20, 40, 80):
            m = models()
            m.averages.clear()
            method = CoDi(intervals=intervals, form=form, data_weight=0.0)  # type: ignore[arg-type]
            losses.append(float(first(method, m, 1024)[0].loss()["loss"].detach()))  # type: ignore[call-overload, index]
        # DDIM's error in a step is of second order, the loss its square. The mean noise to the end of the trajectory
        # changes along it in first order unless the trajectory is straight.
        least, most = (6, 20) if form == "x0" else (3, 5)
        assert all(least < a / b < most for a, b in itertools.pairwise(losses)), (form, losses)
    wrong = models(0.3)
    wrong.averages.clear()
    off = float(first(CoDi(intervals=80, data_weight=0.0), wrong, 1024)[0].loss()["loss"].detach())  # type: ignore[call-overload, index]
    assert off > 100 * found["x0"][2]


@pytest.mark.parametrize("form", ["x0", "noise"])
@pytest.mark.parametrize("move", ["free", "controlled"])
def test_the_loss_is_the_papers_by_hand(form: Any, move: Any) -> None:
    m, method = models(0.05), CoDi(intervals=6, form=form, move=move, data_weight=0.7)
    update, x0, image = first(method, m)
    m.student.requires_grad_(True)
    losses: Any = update.loss()
    losses["loss"].backward()
    (x_a, a, told, grad), other = m.student.seen[-1], m.target("student")
    x_b, b = other.seen[-1][:2]
    assert told == {"image"} and grad and not other.seen[-1][3] and other.weight.grad is None
    grid = falling_levels(6, LOW, TOP, 7.0)
    place = torch.searchsorted(-grid, -a)
    assert torch.equal(grid[place], a) and torch.equal(grid[place + 1], b) and len(place.unique()) == 6
    # The step: DDIM with the frozen teacher, which is told of no picture, or with the target, which is.
    D = gaussian()(x_a, column(a)) if move == "free" else other(x_a, a, {"image": image})
    assert float((column(b / a) * x_a + column(1 - b / a) * D - x_b).abs().max()) < 1e-9
    assert m.teacher.told == ([set()] if move == "free" else [])
    f, aim = m.student(x_a, a, {"image": image}), other(x_b, b, {"image": image})
    if form == "x0":
        agree = (f - aim).square()
    else:
        last = column(b) == LOW
        noise = torch.where(last, (x_a - x_b) / column(a - b), (x_b - aim) / column(b - LOW))
        agree = ((x_a - f) / column(a - LOW) - noise).square()
        assert bool(last.any()) and bool((~last).any())
    wanted = agree.mean() + 0.7 * (f - x0).square().mean()
    assert float(losses["loss"]) == pytest.approx(float(wanted), rel=1e-9)
    assert float(losses["agreement"]) == pytest.approx(float(agree.mean()), rel=1e-9)
    (by_hand,) = torch.autograd.grad(wanted, [m.student.weight])
    assert float(m.student.weight.grad) == pytest.approx(float(by_hand), rel=1e-7)


def test_the_target_may_be_the_student_itself() -> None:
    roles = CoDi(target="self").roles(teacher())
    assert roles["student"].target is None and CoDi().roles(teacher())["student"].target == Ema(rate=0.95)
    assert CoDi(target_ema=Ema(rate=0.99995)).roles(teacher())["student"].target == Ema(rate=0.99995)


def test_guidance_moves_away_from_the_estimate_without_the_picture() -> None:
    D = Flow(gaussian())
    D.weight.data.fill_(0.5)
    x, s = torch.zeros(4, 1, 1, 1).double(), torch.full((4,), 2.0).double()
    cond = {"image": torch.ones(4, 1, 1, 1).double(), "label": torch.zeros(4).long()}
    own, free = D(x, s, cond), D(x, s, {"label": cond["label"]})
    assert bool((own > free).all())
    scale = torch.tensor([0.0, 1.0, 2.0, 5.0]).double()
    found = estimate(D, x, s, cond, scale)
    assert torch.allclose(found, free + column(scale) * (own - free), atol=1e-12)
    assert torch.allclose(found[0], free[0]) and torch.allclose(found[1], own[1])
    assert bool((found[2:] > own[2:]).all()), "away from the estimate without the picture, not towards it"
    m, method = models(0.05), CoDi(guidance=(2, 4), data_weight=0.0)
    update, _, image = first(method, m, 400)
    losses: Any = update.loss()
    scale = Noise.of(3, 400).integers(2, 5, (), "scale")
    assert set(scale.tolist()) == {2, 3, 4}
    x_a, a = m.student.seen[-1][:2]
    x_b, b = m.target("student").seen[-1][:2]
    sides = [
        estimate(net, at, level, {"image": image}, scale)
        for net, at, level in ((m.student, x_a, a), (m.target("student"), x_b, b))
    ]
    assert float(losses["loss"]) == pytest.approx(float((sides[0] - sides[1]).square().mean()), rel=1e-9)
    assert not m.student.seen[-1][3] or m.student.seen[-1][2] == set(), "no gradient where there is no picture"


# ---- the student


def test_the_student_starts_as_the_teacher_and_is_the_identity_at_the_lowest_level() -> None:
    start = teacher()
    m = build_models(CoDi().roles(start), "cpu")
    form = anchored(start.denoiser, LOW)  # type: ignore[arg-type]
    x, cond = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)), data().take(torch.arange(5)).cond
    assert torch.equal(m.student(x, 3.0, cond), form(x, 3.0, {}))
    for p in m.student.parameters():
        p.data += 0.1
    assert float((m.student(x, LOW, cond) - x).abs().max()) < 1e-5
    assert float((m.student(x, 3.0, cond) - form(x, 3.0, {})).abs().max()) > 1e-2
    assert isinstance(m.student.net, Controlled) and m.student.net.base is start.denoiser.net  # type: ignore[attr-defined]
    own = {id(p) for p in start.network.parameters()}
    assert not own & {id(p) for p in m.student.parameters()}
    assert m.target("student").net.base is start.denoiser.net, "one network in memory"  # type: ignore[attr-defined]


def test_gradients_are_those_of_the_branch_alone() -> None:
    start, batch = teacher(), data().take(torch.arange(8))
    m = build_models(CoDi().roles(start), "cpu")
    for p in m.student.parameters():
        p.data += 0.02
    (update,) = CoDi().step(m, batch, 0, Noise.of(1, 8))
    m.student.requires_grad_(True)
    update.loss()["loss"].backward()  # type: ignore[call-overload, index]
    assert all(p.grad is not None for p in m.student.parameters())
    assert all(p.grad is None for p in start.network.parameters())
    assert all(p.grad is None for p in m.target("student").parameters())


# ---- runs


def trained(out: Path, method: CoDi | None = None, stop: int | None = None, **options: Any) -> Generator:
    method = method or CoDi(optim=STEADY, target_ema=Ema(rate=0.9))
    options = {"batch": 8, "micro": 2, "log_every": 2, "save_every": 3, "progress": False} | options
    source: Any = data() if stop is None else Stopping(data(), stop * options["micro"])
    start = options.pop("start", None) or replace(teacher(), conds=None)
    return distill(start, method, source, out=out, budget=6, **options)


class Stopping(StopsAfter):
    """Pictures that stop coming, which say what they are all the same."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["data"], name)


@pytest.mark.parametrize("method", [CoDi(optim=STEADY), CoDi(optim=STEADY, form="noise", guidance=(1, 3))])
def test_a_resumed_run_and_micro_batches(method: CoDi, tmp_path: Path) -> None:
    # Noise at low levels is a difference over a small number, whose rounding is larger.
    far = 1e-5 if method.form == "x0" else 1e-4
    made = check_restart(tmp_path, lambda out, **more: trained(out, method, **more), far=far)
    # What ships opens by itself, its network is the teacher's bit for bit, and it reads pictures.
    again, before = Generator.load(tmp_path / "whole"), teacher().network.state_dict()
    held = {k.removeprefix("net."): v for k, v in again.network.state_dict().items()}
    assert all(torch.equal(held[k.replace("net.", "net.", 1)], v) for k, v in before.items())
    assert {k for k in held if not k.startswith("net.")} and again.sampler.nfe == 2  # type: ignore[attr-defined]
    cond = data().take(torch.arange(3)).cond
    pictures = again.sample(3, cond, seed=1, progress=False)
    assert torch.equal(pictures, made.sample(3, cond, seed=1, progress=False))
    assert all("student.branch" not in k for k in held) and isinstance(again.conds, ImageConditions)
    checkpoint = [k for k in of_roles(tmp_path / "one") if "roles/student" in k]
    assert checkpoint and all(":net.branch." in k for k in checkpoint), "checkpoints hold the branch alone"


def test_a_flow_teacher_needs_a_highest_level(tmp_path: Path) -> None:
    start = teacher()
    flow = replace(start, denoiser=_flow(start))
    with pytest.raises(InputError, match="set sigma_max, such as 80"):
        trained(tmp_path, CoDi(), start=flow)
    made = trained(tmp_path, CoDi(sigma_max=80.0, optim=STEADY), start=flow)
    assert made.sampler.start == 80.0  # type: ignore[attr-defined]


def _flow(start: Generator) -> Any:
    from fewstep.core.denoiser import Precond

    net = start.denoiser.net  # type: ignore[attr-defined]
    return Precond(net, (1, 4, 4), path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)


def larger() -> SuperResolution:
    return SuperResolution(Images("large", torch.zeros(4, 1, 8, 8)))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: CoDi(intervals=0), "CoDi needs intervals >= 1"),
    (lambda: CoDi(data_weight=-1), "data_weight >= 0"),
    (lambda: CoDi(data_weight=math.nan), "data_weight >= 0"),
    (lambda: CoDi(guidance=(0,)), r"0 <= least <= greatest, got \(0,\): give two"),  # type: ignore[arg-type]
    (lambda: CoDi(guidance=(1, math.nan)), "whole numbers"),  # type: ignore[arg-type]
    (lambda: next(CoDi().step(models(), Batch(None, {}), 0, Noise.of(0, 2))), "CoDi needs pictures of .*got None"),
    (lambda: CoDi(move="guided"), "unknown move 'guided'"),  # type: ignore[arg-type]
    (lambda: CoDi(form="v"), "unknown form 'v'"),  # type: ignore[arg-type]
    (lambda: CoDi(guidance=(3, 1)), r"0 <= least <= greatest, got \(3, 1\)"),
    (lambda: CoDi().roles(tiny("unet", channels=8)), r"replace\(teacher, conds=ImageConditions\(data\)\)"),
    (lambda: CoDi().roles(replace(tiny(), conds=ImageConditions(data()))), "a ResMLP has no control branch"),
    (
        lambda: CoDi().roles(replace(teacher(), denoiser=controlled(teacher().denoiser, (1, 2, 2)))),  # type: ignore[arg-type]
        "a Controlled has no control branch",
    ),
    (lambda: trained(Path("/nowhere"), lora=LoRA(rank=2)), "leave LoRA out"),
    (lambda: CoDi(sigma_max=90.0).roles(teacher()), "outside of the teacher's levels"),
    (lambda: distill(teacher(), CoDi(), tiny_data(), out="/nowhere", budget=1), "'tiny' has no pictures as conditions"),
    (lambda: distill(teacher(), CoDi(), out="/nowhere", budget=1), "CoDi learns from data and got none"),
    (
        lambda: distill(teacher(), CoDi(), larger(), out="/nowhere", budget=1),
        r"CoDi: the data hold \(1, 8, 8\) and the teacher takes \(1, 4, 4\)",
    ),
    (
        lambda: distill(teacher(), CoDi(), SuperResolution(tiny_data(), 4), out="/nowhere", budget=1),
        r"image conditions of wrong size: the teacher's are \(1, 2, 2\), those of the data \(1, 1, 1\)",
    ),
    (
        lambda: next(CoDi().step(models(), Batch(torch.zeros(2, 1, 1, 1), {}), 0, Noise.of(0, 2))),
        "data with the condition 'image'",
    ),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
