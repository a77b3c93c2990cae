"""BOOT against the flow that it bootstraps along, and what it needs and refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import CountingDenoiser, Precond
from fewstep.core.exact import Mixture, bimodal
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import DDPM, EDM, FLOW
from fewstep.core.role import Ema, Models, Role
from fewstep.distill.boot import BOOT, bootstrap
from fewstep.distill.front import distill
from fewstep.errors import InputError
from fewstep.guide import CFG
from fewstep.models.flow_map import UNTIL, Told
from fewstep.solve.euler import euler
from tiny_runs import STEADY, check_restart, run, tiny, tiny_data

TOP = 20.0
METHOD = BOOT(intervals=8, optim=STEADY, order=1)


class Student(nn.Module):
    """The exact signal of N(mean, variance) from a properly noised start, times a scale."""

    def __init__(self, problem: Mixture, scale: float = 1.0) -> None:
        super().__init__()
        self.problem, self.scale = problem, nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1,), 0.01, TOP, 1.0

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond) -> Tensor:
        n, s = x / TOP, cond[UNTIL].reshape(-1, 1)
        mean, variance = self.problem.means[0], self.problem.variances[0]
        begin = self.problem(x, torch.tensor(TOP)) + x
        gain = ((variance + s**2) / (variance + TOP**2)).sqrt()
        return self.scale * (mean + gain * (begin - mean) - s * n)


class Exact(nn.Module):
    """A mixture's denoiser as a role."""

    def __init__(self, problem: Mixture) -> None:
        super().__init__()
        self.problem, self.shape, self.sigma_data = problem, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = 0.01, TOP

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        level = torch.as_tensor(sigma)
        return self.problem(x, level[:, None] if level.ndim else level, cond)


def gaussian() -> Mixture:
    return Mixture(torch.full((1, 1), 0.3), 0.5)


def models_of(problem: Mixture, scale: float = 1.0) -> Models:
    return build_models(
        {"teacher": Role(lambda: Exact(problem)), "student": Role(lambda: Student(problem, scale))}, "cpu"
    )


# ---- the recursion


def test_the_recursion_is_ddim_from_the_properly_noised_start_less_its_noise() -> None:
    problem = bimodal()
    n = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    start = problem(TOP * n, torch.tensor(TOP))
    grid = torch.tensor([TOP, 7.0, 2.0, 0.8, 0.3, 0.05], dtype=torch.float64)
    x, y = start + TOP * n, start
    for k in range(5):
        x = euler(grid[k : k + 2])(problem, x)
        s, t = grid[k].expand(9), grid[k + 1].expand(9)
        y = bootstrap(lambda z, level, c: problem(z, level[:, None]), y, n, s, t)
        assert float((y - (x - grid[k + 1] * n)).abs().max()) < 1e-12
    # With fine steps it is the flow itself, whose signal at level 0 is the picture.
    assert float((y - x).abs().max()) == pytest.approx(0.05 * 2, rel=1e-9)


@pytest.mark.parametrize(("order", "power"), [(1, 2), (2, 3)])
def test_a_step_has_its_order(order: int, power: int) -> None:
    problem, errors = bimodal(), []
    n = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    x = problem.flow(TOP * n, TOP, 1.2, 200)
    for ratio in (1.1, 1.05):
        s, t = torch.full((9,), 1.2, dtype=torch.float64), torch.full((9,), 1.2 / ratio, dtype=torch.float64)
        y = bootstrap(lambda z, level, c: problem(z, level[:, None]), x - 1.2 * n, n, s, t, order=order)
        errors.append(float((y + (1.2 / ratio) * n - problem.flow(x, 1.2, 1.2 / ratio, 20)).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2**power, rel=0.25), errors


def test_the_exact_signal_has_next_to_no_loss_and_a_wrong_one_has_some() -> None:
    found = {}
    for name, scale, intervals in (("exact", 1.0, 64), ("finer", 1.0, 128), ("wrong", 1.2, 128)):
        method = BOOT(intervals=intervals, anneal=0.0, weight="constant", order=2)
        (update,) = method.step(models_of(gaussian(), scale), Batch(None, {}), 0, Noise.of(0, 256))
        found[name] = {k: float(v) for k, v in update.loss().items()}  # type: ignore[union-attr]
    assert found["exact"]["boundary"] < 1e-12 and found["finer"]["bootstrap"] < found["exact"]["bootstrap"] / 8
    assert found["exact"]["bootstrap"] < 1e-6 and found["wrong"]["loss"] > 1e-4 and found["wrong"]["boundary"] > 1e-4


def test_the_target_has_no_gradient_and_the_weight_is_that_of_the_slope() -> None:
    losses = {}
    for weight in ("constant", "slope"):
        m = models_of(gaussian(), 0.8)
        method = BOOT(intervals=8, anneal=0.0, boundary=0.0, weight=weight)  # type: ignore[arg-type]
        noise = Noise.of(0, 16)
        (update,) = method.step(m, Batch(None, {}), 0, noise)
        m.student.requires_grad_(True)
        made = update.loss()
        made["loss"].backward()  # type: ignore[index]
        n, (s, t) = noise.normal((1,), "n"), method.drawn(m.teacher, noise, 0.0)
        y = m.student(TOP * n, TOP, {UNTIL: s}).detach()
        aim = bootstrap(m.teacher, y, n, s, t)
        factor = torch.ones_like(s) if weight == "constant" else (1 - t / s) ** -2
        again = (factor[:, None] * (m.student(TOP * n, TOP, {UNTIL: t}) - aim) ** 2).mean()
        (by_hand,) = torch.autograd.grad(again, [m.student.scale])
        assert float(m.student.scale.grad) == pytest.approx(float(by_hand), rel=1e-9)
        assert "boundary" not in made  # type: ignore[operator]
        losses[weight] = float(again)
    assert losses["slope"] > 1.5 * losses["constant"]


# ---- levels


@pytest.mark.parametrize("grid", ["cosine", "karras", "native"])
def test_levels_open_from_the_noisy_end_and_reach_both_ends(grid: Any) -> None:
    D = tiny().denoiser
    method = BOOT(grid=grid, intervals=10, anneal=0.5)
    lowest = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        s, t = method.drawn(D, Noise.of(3, 4000), progress)
        assert bool((t < s).all()) and float(s.max()) <= 80.0 and float(t.min()) >= 0.002
        lowest.append(float(t.min()))
        assert float(s.max()) > 0.97 * 80 or progress > 0
    assert lowest[0] > lowest[1] > lowest[2] == lowest[3]
    s, t = method.drawn(D, Noise.of(3, 4), 0.0)
    assert bool((s == 80.0).all()), "at first only the first step is trained"
    u = torch.tensor([0.0, 0.1, 0.5, 1.0])
    found = method.level(D, u)
    assert float(found[0]) == 0.002 and float(found[-1]) == 80.0 and bool((found.diff() > 0).all())


def test_the_native_grid_of_a_teacher_whose_time_is_its_noise_level_is_that_of_arctan() -> None:
    inner: Any = tiny().denoiser
    D = Precond(inner.net, (1, 4, 4), path=EDM, predicts="x0", sigma_data=0.7)
    u = torch.linspace(0, 1, 9)
    even = (BOOT(grid="native").level(D, u), BOOT(grid="cosine", scale=0.7).level(D, u))
    assert torch.equal(*even) and float(even[0][4]) < 1


def test_two_neighbours_are_one_interval_apart() -> None:
    D = tiny().denoiser
    s, t = BOOT(intervals=16, anneal=0.0).drawn(D, Noise.of(0, 500), 0.0)
    width = (torch.atan(s) - torch.atan(t)) * 16
    assert float((width - float(torch.atan(torch.tensor(80.0)) - 0.002)).abs().max()) < 1e-4


# ---- the student


def test_the_student_starts_as_the_teachers_own_one_step_estimate() -> None:
    start = tiny()
    m = build_models(METHOD.roles(start), "cpu")
    x, cond = 80 * torch.randn(4, 1, 4, 4), {"label": torch.tensor([0, 1, 2, -1])}
    with torch.no_grad():
        for level in (80.0, 1.0, 0.002):
            told = {**cond, UNTIL: torch.full((4,), level)}
            assert torch.equal(m.student(x, 80.0, told), start.denoiser(x, 80.0, cond))
    (update,) = METHOD.step(m, Batch(None, cond), 0, Noise.of(0, 4))
    assert float(update.loss()["boundary"]) == 0  # type: ignore[index]
    assert len(list(METHOD.step(m, Batch(None, cond), 0, Noise.of(0, 4)))) == 1


def test_the_evaluations_of_the_teacher() -> None:
    for order, boundary, calls in ((1, 1.0, 2), (2, 1.0, 3), (1, 0.0, 1)):
        counted = CountingDenoiser(Exact(gaussian()))
        m = models_of(gaussian())
        m.networks["teacher"] = counted  # type: ignore[assignment]
        (update,) = replace(METHOD, order=order, boundary=boundary).step(m, Batch(None, {}), 0, Noise.of(0, 4))
        update.loss()
        assert counted.nfe == calls


def test_guidance_is_folded_in_and_flow_teachers_start_at_pure_noise() -> None:
    start = tiny()
    cond = {"label": torch.arange(8) % 3}
    found = {}
    for name, D in (("plain", start.denoiser), ("guided", CFG(start.denoiser, 3.0))):
        m = build_models(METHOD.roles(replace(start, denoiser=D)), "cpu")
        assert isinstance(m.student, Precond)
        (update,) = METHOD.step(m, Batch(None, cond), 0, Noise.of(0, 8))
        found[name] = float(update.loss()["boundary"])  # type: ignore[index]
    assert found["plain"] == 0 and found["guided"] > 1e-7
    inner: Any = start.denoiser
    flow = Precond(inner.net, inner.shape, path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    for grid in ("cosine", "native"):
        method = replace(METHOD, grid=grid, anneal=0.0)
        m = build_models(method.roles(replace(start, denoiser=flow)), "cpu")
        (update,) = method.step(m, Batch(None, cond), 0, Noise.of(0, 8))
        assert 0 < float(update.loss()["loss"]) < 10  # type: ignore[index]


def test_an_average_can_make_the_targets() -> None:
    method = replace(METHOD, target=Ema(rate=0.5))
    assert method.roles(tiny())["student"].target == Ema(rate=0.5)
    m = models_of(gaussian())
    m.averages["student.target"] = Student(gaussian(), 3.0)
    (own,) = METHOD.step(models_of(gaussian()), Batch(None, {}), 0, Noise.of(0, 8))
    (other,) = METHOD.step(m, Batch(None, {}), 0, Noise.of(0, 8))
    assert float(other.loss()["loss"]) > 4 * float(own.loss()["loss"])  # type: ignore[index]


# ---- what is refused, and runs


def test_no_data_are_loaded_or_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("BOOT read pictures")

    teacher = tiny()
    monkeypatch.setattr("fewstep.data.base.Images.take", fail)
    monkeypatch.setattr("fewstep.data.load_data", fail)
    assert BOOT.needs_data is False
    student = distill(teacher, METHOD, out=tmp_path, budget=2, batch=4, progress=False)
    assert isinstance(student.denoiser, Told) and student.sampler.nfe == 1
    with pytest.raises(InputError, match="data-free"):
        distill(teacher, METHOD, tiny_data(), out=tmp_path / "no", budget=2)


def noise_at_pure_noise() -> Generator:
    inner: Any = tiny().denoiser
    D = Precond(inner.net, inner.shape, path=DDPM, predicts="noise", time="native", sigma_min=0.03, sigma_max=1e8)
    return replace(tiny(), denoiser=D)


def flow() -> Generator:
    inner: Any = tiny().denoiser
    D = Precond(inner.net, inner.shape, path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    return replace(tiny(), denoiser=D)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BOOT(steps=2), "one-step students"),
        (lambda: BOOT(intervals=0), "intervals >= 1"),
        (lambda: BOOT(anneal=1.5), "anneal in"),
        (lambda: BOOT(boundary=-1.0), "boundary >= 0"),
        (lambda: BOOT(grid="time"), "unknown grid"),  # type: ignore[arg-type]
        (lambda: BOOT(weight="snr"), "unknown weight"),  # type: ignore[arg-type]
        (lambda: BOOT(order=3), "order 1 or 2"),  # type: ignore[arg-type]
        (lambda: BOOT(sigma_min=1e-4).roles(tiny()), "outside of the teacher's levels"),
        (lambda: BOOT(grid="karras").roles(flow()), "use grid cosine or native"),
        (lambda: BOOT().roles(noise_at_pure_noise()), "predicts noise says nothing"),
        (lambda: BOOT(scale=float("inf")), "scale > 0 and boundary >= 0, both finite"),
        (lambda: BOOT(boundary=float("nan")), "boundary >= 0, both finite"),
        (lambda: BOOT(sigma_min=float("nan")).roles(tiny()), "outside of the teacher's levels"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, order=2, weight="slope", target=Ema(rate=0.9))])
def test_a_resumed_run_and_micro_batches(method: BOOT, tmp_path: Path) -> None:
    check_restart(tmp_path, lambda out, **more: run("BOOT", out, method=method, **more), stop=4, far=1e-4)
    made = Generator.load(tmp_path / "whole")
    assert isinstance(made.denoiser, Told) and made.denoiser.values == [0.002] and made.sampler.nfe == 1
    assert torch.isfinite(made.sample(3, progress=False)).all()
