"""SFD's analytical step, its student of several counts, its second stage, and the teachers that it takes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import CountingDenoiser, Precond
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models, fit
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions
from fewstep.core.path import FLOW
from fewstep.core.role import Models, Optim, Role
from fewstep.data import Images
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill import distill
from fewstep.distill.sfd import SFD, SFDOne, SFDv, stride
from fewstep.errors import InputError
from fewstep.guide import CFG
from fewstep.models.flow_map import Told
from fewstep.solve.euler import euler
from fewstep.train import untrained
from tiny_runs import STEADY, check_restart, run, tiny

LOW, TOP = 0.006, 80.0
CLASSES: dict[str, Any] = {
    "SFD": SFD(steps=2, between=1, optim=STEADY, afs=True, distance="l2"),
    "SFDv": SFDv(steps=2, between=1, counts=(1, 2, 3), optim=STEADY),
}


class Line(nn.Module):
    """The exact denoiser of N(0, 1) times a slope for each level; remembers what it is told."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1,), 0.002, float(levels[0]), 1.0
        self.levels = levels
        self.slopes = nn.Parameter((1 / (1 + levels[:-1] ** 2)).float())
        self.told: list[float | None] = []

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        self.told.append(float(cond["steps"][0]) if cond and "steps" in cond else None)
        return self.slopes[int((self.levels - float(sigma)).abs().argmin())] * x


def models_of(method: SFD, top: float = TOP) -> Models:
    levels = method.levels(LOW, top)
    roles = {"teacher": Role(lambda: Line(levels[1])), "student": Role(lambda: Line(levels[0]), method.optim)}
    return build_models(roles, "cpu")


def flow_teacher() -> Generator:
    start = tiny()
    inner = start.denoiser
    assert isinstance(inner, Precond)
    D = Precond(inner.net, inner.shape, path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    return replace(start, denoiser=D)


# ---- the analytical first step


@pytest.mark.parametrize(("top", "low"), [(80.0, 0.5), (1e8, 11.0), (14.6, 0.03)])
def test_the_analytical_step_is_eulers_for_data_of_variance_one_up_to_its_slope(top: float, low: float) -> None:
    table = stride(torch.tensor([top, low, 0.0], dtype=torch.float64), afs=True)
    x = top * Noise.of(0, 4).normal((3,), "x", dtype=torch.float64)
    step = table[0:1](None, x)  # type: ignore[arg-type]
    root = math.hypot(1, top)
    assert float((step / x - (1 / (root + top) + low) / root).abs().max()) <= 1e-15
    if top < 1e3:
        assert float((step - (x + (low - top) * x / root)).abs().max()) < 1e-11
    assert table.nfe == 1 and table.rows == 2 and bool(table.sigmas[0].isnan())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_analytical_step_costs_nothing_and_trains_nothing(steps: int) -> None:
    method = SFD(steps=steps, between=1, afs=True)
    m = models_of(method)
    coarse, fine = method.levels(LOW, TOP)
    assert len(coarse) == steps + 2 and len(fine) == 2 * (steps + 1) + 1
    reached = torch.zeros(steps + 1, dtype=torch.bool)
    for update in method.step(m, Batch(None, {}), 0, Noise.of(0, 8)):
        m.student.requires_grad_(True)
        update.loss().backward()
        reached |= m.student.slopes.grad != 0
        m.student.slopes.grad = None
        m.student.requires_grad_(False)
    assert reached.tolist() == [False] + [True] * steps
    start = tiny()
    table = method.sampler(start)
    counting = CountingDenoiser(start.denoiser)
    with torch.no_grad():
        table(counting, TOP * torch.randn(2, 1, 4, 4), {"label": torch.tensor([0, 1])})
    assert table.nfe == counting.nfe == steps and table.start == TOP and table.end == LOW


def test_without_levels_between_the_euler_teacher_leaves_nothing_to_learn() -> None:
    for solver, between, zero in (("euler", 0, True), ("euler", 2, False), ("dpmpp2m", 0, False)):
        method = SFD(steps=3, between=between, solver=solver)
        m = models_of(method)
        loss = max(float(u.loss()) for u in method.step(m, Batch(None, {}), 0, Noise.of(0, 32)))
        assert (loss < 2e-5) == zero, (solver, between, loss)


# ---- one student for several numbers of evaluations


def test_a_new_student_of_several_counts_is_the_teacher_whatever_it_is_told() -> None:
    start, method = tiny(), CLASSES["SFDv"]
    student = build_models(method.roles(start), "cpu").student
    x, cond = torch.randn(4, 1, 4, 4), {"label": torch.tensor([0, 1, 2, -1])}
    with torch.no_grad():
        for count in (1.0, 2.0, 5.0):
            told = {**cond, "steps": torch.full((4,), count)}
            assert torch.equal(student(x, 2.0, told), start.denoiser(x, 2.0, cond))
    assert isinstance(method.ships(student), Told)
    again = replace(method, steps=3).ships(student)
    assert again.values == [3.0] and replace(method, steps=3).sampler(start).nfe == 3


def test_the_counts_are_drawn_alike_by_the_iteration_alone_and_told_to_the_student_only() -> None:
    method = SFDv(steps=2, between=0, counts=(1, 2, 4))
    run = Models({}, {}, {})
    drawn = [method.drawn(run, i) for i in range(900)]
    assert {c: drawn.count(c) > 250 for c in method.counts} == {1: True, 2: True, 4: True}
    assert SFDv(steps=4, between=0, counts=(1, 2, 4)).drawn(run, 17) == drawn[17], "whatever is shipped"
    run.seed = 1
    assert [method.drawn(run, i) for i in range(900)] != drawn, "another run draws others"
    for i in range(6):
        m = models_of(replace(method, steps=drawn[i], afs=True))
        for seed in (0, 1):
            updates = list(method.step(m, Batch(None, {}), i, Noise.of(seed, 3)))
            assert len(updates) == drawn[i]
        updates[0].loss()
        assert set(m.student.told) == {float(drawn[i])} and set(m.teacher.told) == {None}


# ---- the second stage


def test_the_second_stage_has_the_first_students_levels_and_sampler() -> None:
    method = SFDOne()
    first, second = method.stages()
    assert second.sampler(tiny()).nfe == 1 and second.steps == 1 and second.afs and first.afs
    coarse, fine = second.levels(LOW, TOP)
    own = first.levels(LOW, TOP)[0]
    assert len(own) == 7, "7 levels, as in the paper"
    assert float((fine / own - 1).abs().max()) < 1e-12 and float((coarse / own[::3] - 1).abs().max()) < 1e-12
    table, sampler = second.teacher_table(fine), first.sampler(tiny())
    assert torch.equal(table.P, sampler.P) and torch.equal(table.W, sampler.W) and table.nfe == 5


def test_a_part_of_a_budget_is_counted_whole() -> None:
    parts = [
        Budget(10).part(0.25),
        Budget(30).part(0.1),
        Budget(5, "images").part(0.01),
        Budget(90, "seconds").part(0.25),
    ]
    assert parts == [Budget(3), Budget(3), Budget(1, "images"), Budget(22.5, "seconds")]


def test_two_stages_resume_where_they_were(tmp_path: Path) -> None:
    start = tiny()
    method = SFDOne(first_steps=3, between=0, share=0.5, first_optim=STEADY, optim=STEADY)
    options = {"budget": 4, "batch": 4, "micro": 1, "save_every": 1, "log_every": 1, "progress": False}
    whole = method.run(start, None, out=tmp_path / "whole", **options)
    assert whole.sampler.nfe == 1 and len(whole.card["stages"]) == 2
    assert not torch.equal(_vector(whole), _vector(Generator.load(tmp_path / "whole" / "stages" / "1")))
    again = method.run(start, None, out=tmp_path / "whole", resume=True, **options)
    assert torch.equal(_vector(again), _vector(whole)) and torch.equal(_vector(whole), _vector(_load(tmp_path)))
    x = whole.sample(3, seed=1, progress=False)
    assert torch.equal(x, _load(tmp_path).sample(3, seed=1, progress=False))
    with pytest.raises(InputError, match="another recipe"):
        replace(method, share=0.25).run(start, None, out=tmp_path / "whole", resume=True, **options)


def test_lpips_is_added_to_the_last_step_of_the_second_stage_alone(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    data = Images("eight", torch.rand(16, 1, 8, 8, generator=g) * 2 - 1, torch.arange(16) % 3)
    start = untrained(data, "resmlp", width=16, embedding=8, blocks=1)
    method = SFDOne(first_steps=3, between=0, perceptual=0.5, first_optim=STEADY, optim=STEADY)
    (first, second), cond = method.stages(), {"label": torch.arange(4) % 3}
    assert "distance" not in first.roles(start) and second.solver == "student" and type(second) is SFD
    for k, steps in ((0, 1), (1, 2)):
        own = replace(second, steps=steps, afs=False)
        m = build_models(own.roles(start), "cpu")
        losses: list[Any] = [u.loss() for u in own.step(m, Batch(None, cond), 0, Noise.of(0, 4))]
        assert [isinstance(made, dict) for made in losses] == [False] * k + [True]
        made = losses[-1]
        assert float(made["lpips"]) > 0
        want = made["plain"] + 0.5 * made["lpips"]
        assert float((made["loss"] - want).detach().abs()) < 1e-6 * float(want)
        plain = replace(own, perceptual=0.0)
        bare = [u.loss() for u in plain.step(m, Batch(None, cond), 0, Noise.of(0, 4))]
        assert torch.equal(bare[-1].detach(), made["plain"])  # type: ignore[union-attr]
    out = distill(start, method, out=tmp_path, budget=4, batch=4, progress=False)
    assert out.sampler.nfe == 1 and "student/lpips" in out.card["stages"][1] and not list(tmp_path.rglob("*distance*"))
    assert json.loads((tmp_path / "stages/2/recipe.json").read_text())["method"] == "SFD"


def _load(place: Path) -> Generator:
    return Generator.load(place / "whole")


def _vector(generator: Generator) -> Tensor:
    return torch.cat([p.flatten() for p in generator.denoiser.parameters()])  # type: ignore[attr-defined]


# ---- teachers


def test_guidance_is_folded_in() -> None:
    start = tiny()
    guided = replace(start, denoiser=CFG(start.denoiser, 3.0))
    found = {}
    for name, teacher in (("plain", start), ("guided", guided)):
        method = SFD(steps=2, between=0, solver="euler")
        m = build_models(method.roles(teacher), "cpu")
        assert isinstance(m.student, Precond) and not any(p.requires_grad for p in m.teacher.parameters())
        cond = {"label": torch.arange(8) % 3}
        found[name] = [float(u.loss()) for u in method.step(m, Batch(None, cond), 0, Noise.of(1, 8))]
    assert max(found["plain"]) < 1e-4 < 1e-3 < min(found["guided"]), found


@pytest.mark.parametrize("afs", [False, True])
def test_a_flow_teacher_is_followed_from_pure_noise_on_its_own_grid(afs: bool) -> None:
    teacher = flow_teacher()
    method = SFD(steps=2, between=1, grid="native", afs=afs)
    table = method.sampler(teacher)
    u = FLOW.at(table.levels)
    assert float((u.diff() - u.diff()[0]).abs().max()) < 1e-6 and table.start == 1e8
    m = build_models(method.roles(teacher), "cpu")
    losses = [u.loss() for u in method.step(m, Batch(None, {"label": torch.zeros(4).long()}), 0, Noise.of(0, 4))]
    assert all(0 < float(v) < 1 for v in losses), losses
    with pytest.raises(InputError, match="choose the grid native"):
        SFD().roles(teacher)


def test_a_student_with_an_analytical_step_learns_gaussian_data_exactly() -> None:
    # The data's variance is 1, so that from a high level the analytical step is nearly exact itself.
    method = SFD(steps=1, between=5, sigma_min=0.1, afs=True, optim=Optim(lr=0.03, decay="linear"))
    levels = method.levels(0.1, 5.0)
    student = Line(levels[0])
    roles = {"teacher": Role(lambda: Line(levels[1])), "student": Role(lambda: student, method.optim)}
    m = build_models(roles, "cpu")
    list(fit(method, m, ConditionsOnly(None), FitOptions(Budget(100), batch=16), None))
    x = 5.0 * Noise.of(1, 200).normal((1,), "x")
    table = stride(levels[0], afs=True)
    exact = Mixture(torch.zeros(1, 1), 1.0).flow(x.double(), 5.0, 0.1, 64)
    assert float((table(m.student, x) - exact).abs().max()) < 0.02 * float(exact.abs().max())
    assert float((euler(levels[0])(Line(levels[0]), x).detach() - exact).abs().max()) > 0.2 * float(exact.abs().max())


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFD(steps=0), "steps >= 1"),
        (lambda: SFD(grid="time"), "unknown grid"),  # type: ignore[arg-type]
        (lambda: SFD(solver="heun"), "unknown solver"),  # type: ignore[arg-type]
        (lambda: SFD(distance="lpips"), "unknown distance"),  # type: ignore[arg-type]
        (lambda: SFD(grid="native").levels(LOW, TOP), "no native grid"),
        (lambda: SFD(sigma_min=1e-4).roles(tiny()), "outside of the teacher's levels"),
        (lambda: SFD(rho=0), "finite rho > 0"),
        (lambda: SFD(rho=-1.0), "finite rho > 0"),
        (lambda: SFD(rho=math.nan), "finite rho > 0"),
        (lambda: SFD(sigma_min=math.nan), "finite sigma_min > 0"),
        (lambda: SFD(perceptual=math.nan), "perceptual >= 0"),
        (lambda: SFDOne(perceptual=-1.0), "perceptual >= 0"),
        (lambda: SFDOne(perceptual=1.0).stages()[1].roles(tiny()), "no packaged features for pictures .1, 4, 4."),
        (lambda: SFDv(counts=()), "different counts"),
        (lambda: SFDv(counts=(1, 1)), "different counts"),
        (lambda: SFDv(steps=6), "choose steps among"),
        (lambda: SFDOne(steps=2), "use SFD for more"),
        (lambda: SFDOne(first_steps=4), "odd first_steps"),
        (lambda: SFDOne(share=1.0), "share in"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


# ---- runs


@pytest.mark.parametrize("name", CLASSES)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    method = CLASSES[name]
    check_restart(tmp_path, lambda out, **more: run(name, out, method=method, **more), stop=4, far=1e-5)
    loaded = Generator.load(tmp_path / "one")
    assert torch.isfinite(loaded.sample(2, progress=False)).all() and loaded.sampler.nfe == 2
