"""The timestep aligner, the Gaussian start and GITS: identities, exactness on Gaussian data, and gains on a mixture."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import DDPM, EDM, FLOW, VP, CountingDenoiser, InputError, Mixture, Precond, Tableau, edm, sample
from fewstep.core.noise import Noise
from fewstep.core.path import Path as NoisePath
from fewstep.core.path import to_x0
from fewstep.core.sample import Step
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.grid import karras
from fewstep.solve import build
from fewstep.solve.aligner import aligner, retime, retimed
from fewstep.solve.gaussian import Gaussian, GaussianStart, end_points, gaussian, gaussian_error
from fewstep.solve.gits import gits
from fewstep.solve.teacher import Clock, Fitted, Task, fine_levels, follow

TO_ZERO = karras(6, 0.01, 20.0)


@cache
def problem() -> Mixture:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    variances = 0.05 + 0.3 * torch.rand(5, 4, generator=generator, dtype=torch.float64)
    return Mixture(means, variances, [1, 2, 3, 2, 1], sigma_min=0.01, sigma_max=20.0)


def task(
    nfe: int,
    *,
    D: Any = None,
    grid: Tensor | None = None,
    n: int = 48,
    seed: int = 0,
    budget: float | None = None,
    cond: dict[str, Tensor] | None = None,
    **options: Any,
) -> Task:
    D = D or problem()
    levels = fine_levels(D, grid, count=48)
    teacher = follow(D, levels, Noise.of(seed, n), cond or {}, dtype=torch.float64, **options)
    return Task(D, nfe, grid, teacher, n // 4, seed, clock=Clock(budget))


def beats(found: Fitted, nfe: int) -> bool:
    fresh = task(nfe, seed=77, n=64).teacher
    assert found.sampler.nfe == nfe == found.start.nfe
    assert json.loads(json.dumps(found.facts)) == found.facts
    return fresh.error(problem(), found.sampler, 64) < fresh.error(problem(), found.start, 64)


# ---- the timestep aligner


class Net(nn.Module):
    """A smooth function of its input and time."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2)

    def forward(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        return torch.tanh(x @ self.w + 0.3 * time[:, None].double())


def network(path: NoisePath, predicts: str, top: float = 80.0) -> Precond:
    return Precond(Net(), (4,), path=path, predicts=predicts, sigma_max=top)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["euler", "dpmpp2m", "ipndm4", "heun"])
def test_told_its_own_levels_it_is_the_base(name: str) -> None:
    base = build(name, TO_ZERO)
    made = retime(base, base.sigmas.tolist())
    assert all(torch.equal(getattr(made, key), getattr(base, key)) for key in ("sigmas", "levels", "P", "W"))


@pytest.mark.parametrize(("path", "top"), [(VP, 80.0), (DDPM, 80.0)])
def test_euler_with_retimed_noise_is_ddim_in_its_own_coordinates(path: NoisePath, top: float) -> None:
    """The published recurrence: eps is read at the other time from the same input, and DDIM goes on with it."""
    D, grid = network(path, "noise", top), karras(4, 0.02, 60.0)
    told = [55.0, 9.0, 1.1, 0.03]
    x = 60 * Noise.of(0, 3).normal((4,), dtype=torch.float64)
    found = sample(D, x, retime(build("euler", grid), told, path=path, predicts="noise"))
    z = path.coeffs(path.at(60.0)).a * x
    for a, b, s in zip(grid[:-1].tolist(), grid[1:].tolist(), told, strict=True):
        here = path.coeffs(path.at(a))
        time = path.at(s).float().expand(3)
        eps = D.net(z, time, {})
        x0 = (z - here.b * eps) / here.a
        z = path.coeffs(path.at(b)).a * (x0 + b * eps) if b > 0 else x0
    assert torch.allclose(found, z, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("path", "predicts"), [(VP, "noise"), (VP, "v"), (FLOW, "velocity"), (EDM, "x0"), (DDPM, "noise"), (VP, "velocity")]
)
def test_the_networks_output_is_what_is_retimed(path: NoisePath, predicts: Any) -> None:
    """Whatever it predicts: the output for the same input at the other time, entered into x0 at the true one."""
    D, sigma, level = network(path, predicts), 3.0, torch.tensor(2.0, dtype=torch.float64)
    x = 3 * Noise.of(1, 5).normal((4,), dtype=torch.float64)
    how = retimed(sigma, level, path, predicts)
    found = how.keep * x + how.gain * D(how.scale * x, level)
    a = path.coeffs(path.at(sigma)).a
    out = D.net(a * x, path.at(level).float().expand(5), {})
    assert torch.allclose(found, to_x0(path, predicts, a * x, out, path.at(sigma)), rtol=1e-6, atol=1e-7)


def test_pure_noise_of_a_flow_keeps_its_digits() -> None:
    D, grid = network(FLOW, "velocity", 1e8), karras(4, 0.02, 80.0)
    grid = torch.cat([grid.new_tensor([1e8]), grid])
    x = 1e8 * Noise.of(2, 5).normal((4,), dtype=torch.float64)
    told = [20.0, *grid[1:-1].tolist()]
    found = sample(D, x, retime(build("euler", grid), told, path=FLOW, predicts="velocity"))
    # The first step by hand, in flow time: z is the noise, and x0 = z - v.
    z = x / 1e8
    first = z - D.net(z, FLOW.at(20.0).float().expand(5), {})
    b = float(grid[1])
    rest = build("euler", grid[1:])
    assert torch.allclose(found, sample(D, first + b * z, rest), rtol=1e-5, atol=1e-6)


def test_a_multistep_base_uses_the_retimed_outputs_later() -> None:
    D, grid = problem(), TO_ZERO[:4]
    told = [18.0, 6.0, 2.0]
    x = 20 * Noise.of(3, 6).normal((4,), dtype=torch.float64)
    base = build("dpmpp2m", grid)
    made = retime(base, told, path=VP, predicts="v")
    points, outputs = [x], []
    for k, row in enumerate(base.plan):
        how = retimed(float(grid[k]), torch.tensor(told[k], dtype=torch.float64), VP, "v")
        outputs.append(how.keep * points[k] + how.gain * D(how.scale * points[k], told[k]))
        points.append(sum(w * points[i] for i, w in row.points) + sum(w * outputs[i] for i, w in row.outputs))
    counted = CountingDenoiser(D)
    assert torch.allclose(sample(counted, x, made), points[-1], rtol=1e-11)
    assert counted.nfe == made.nfe == base.nfe and made.rows == 2 * base.rows


class ConstantNoise:
    """The denoiser that always sees the same noise, whatever it is told."""

    shape, sigma_min, sigma_max, sigma_data = (4,), 0.01, 20.0, 0.5

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Any = None) -> Tensor:
        return x - sigma * torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("target", ["trajectory", "straight"])
def test_constant_noise_has_nothing_to_align(target: Any) -> None:
    """Its gradient is 0: only what rounding leaves moves a ratio, which Adam would turn into full steps at worst."""
    level = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    how = retimed(4.0, level, VP, "noise")
    x = Noise.of(0, 2).normal((4,), dtype=torch.float64)
    with torch.enable_grad():
        out = how.keep * x + how.gain * ConstantNoise()(how.scale * x, level)
        (slope,) = torch.autograd.grad(out.square().sum(), level)
    assert abs(float(slope)) < 1e-12
    work = task(3, D=ConstantNoise(), n=8)
    found = aligner(work, iterations=3, target=target, predicts="noise")
    assert work.teacher.error(work.D, found.sampler, 8) == pytest.approx(
        work.teacher.error(work.D, found.start, 8), abs=1e-9
    )


@pytest.mark.parametrize("base", ["euler", "dpmpp2m"])
def test_aligning_beats_its_base_on_fresh_starts(base: str) -> None:
    found = aligner(task(5), base=base, iterations=20, lr=4e-2, pictures=16)
    assert beats(found, 5)
    assert found.start.nfe == 5 and len(found.facts["ratios"]) == 5
    again, twice = (aligner(task(2), base=base, iterations=2).facts for _ in range(2))
    assert again == twice
    assert isinstance(found.sampler, Tableau)
    assert Tableau.from_json(found.sampler.to_json()).meta["aligner"]["told"] == found.facts["told"]


def test_the_straight_loss_falls() -> None:
    """On the published loss, with the last evaluation left alone."""
    # A first level below the denoiser's highest one, so that its ratio may go both ways.
    work = task(4, grid=karras(4, 0.01, 8.0))
    found = aligner(work, target="straight", iterations=25, lr=2e-2)

    assert found.facts["ratios"][-1] == 1.0
    first = [found.facts["told"][0], *found.start.sigmas.tolist()[1:]]
    tuned = retime(found.start, first, path=VP, predicts="v")
    points: list[Step] = []
    sample(work.D, work.fit.start, tuned, on_step=points.append)
    after = next(s for s in points if s.level == float(found.start.levels[1]))
    plain: list[Step] = []
    sample(work.D, work.fit.start, found.start, on_step=plain.append)

    def loss(x: Tensor, level: float) -> float:
        start = (work.fit.start - work.D(work.fit.start, 8.0)) / 8.0
        return float(((x - work.D(x, level)) / level - start).square().mean())

    assert loss(after.point, after.level) < loss(plain[1].point, plain[1].level)


def test_the_parallel_form_uses_the_teachers_points() -> None:
    found = aligner(task(4), sequential=False, iterations=20)
    assert not found.facts["sequential"] and found.sampler.nfe == 4
    with pytest.raises(InputError, match="whole pictures"):
        aligner(task(3, D=Big(), n=8, memory=1), sequential=False)


def test_the_frame_is_the_denoisers_own() -> None:
    for D, kind in ((edm(Net(), (4,), sigma_min=0.01, sigma_max=20.0), "trig"), (network(FLOW, "velocity"), "flow")):
        found = aligner(task(2, D=D, n=8), iterations=1)
        assert found.facts["path"]["kind"] == kind and found.facts["predicts"] == "velocity"
        assert all(D.sigma_min * 0.999 <= s <= D.sigma_max * 1.001 for s in found.facts["told"])


def test_without_time_nothing_is_tuned() -> None:
    found = aligner(task(3, budget=0.0))
    assert found.facts["ratios"] == [1.0, 1.0, 1.0] and found.sampler.nfe == 3


def test_bad_alignment() -> None:
    base = build("euler", TO_ZERO)
    for told in ([1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0], [math.inf] * 6):
        with pytest.raises(InputError):
            retime(base, told)
    with pytest.raises(InputError):
        retime(build("ddim", TO_ZERO, eta=1.0), TO_ZERO[:-1].tolist())
    for bad in ({"target": "x"}, {"iterations": 0}, {"lr": 0.0}, {"pictures": 0}, {"base": "none"}):
        with pytest.raises(InputError):
            aligner(task(3, n=8), **bad)
    with pytest.raises(InputError, match="allow more"):
        aligner(task(3, n=8, grid=TO_ZERO))

    class Stepwise(ConstantNoise):
        def __call__(self, x: Tensor, sigma: Tensor | float, cond: Any = None) -> Tensor:
            return torch.zeros_like(x).detach()

    with pytest.raises(InputError, match="differentiated"):
        aligner(task(2, D=Stepwise(), n=8), predicts="x0")


# ---- the Gaussian start


class Big(Mixture):
    """One Gaussian of 100 dimensions, so that a teacher without memory keeps only 64 of them."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        mean, variance = (torch.rand(1, 100, generator=g, dtype=torch.float64) for _ in range(2))
        super().__init__(mean, variance, sigma_min=0.01, sigma_max=20.0)


class Correlated:
    """The exact denoiser of one Gaussian with a full covariance."""

    shape, sigma_min, sigma_max, sigma_data = (6,), 0.01, 20.0, 0.5

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(2)
        root = torch.randn(6, 6, generator=g, dtype=torch.float64)
        self.mean = torch.randn(6, generator=g, dtype=torch.float64)
        self.covariance = root @ root.T / 6
        values, vectors = torch.linalg.eigh(self.covariance)
        rows = vectors.T.flip(0)[None].contiguous()
        self.gaussian = Gaussian(self.mean[None], rows, values.flip(0)[None], torch.zeros(1, dtype=torch.float64))

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Any = None) -> Tensor:
        noise = float(sigma) ** 2 * torch.eye(6, dtype=torch.float64)
        gain = self.covariance @ torch.linalg.inv(self.covariance + noise)
        return self.mean + (x - self.mean) @ gain.T


def test_the_jump_is_exact_on_gaussian_data() -> None:
    D = Correlated()
    x = 20 * Noise.of(0, 7).normal((6,), dtype=torch.float64)
    fine = sample(D, x, build("dpmpp", karras(1000, 0.01, 20.0, to_zero=False), order=3, exact=True))
    for middle in (5.0, 0.4, 0.011):
        jumped = D.gaussian.flow(x, 20.0, middle)
        assert torch.allclose(D.gaussian.flow(jumped, middle, 0.01), fine, atol=1e-5)
        rest = build("dpmpp", karras(300, 0.01, middle, to_zero=False), order=3, exact=True)
        made = GaussianStart(D.gaussian, 20.0, rest)
        assert torch.allclose(made(D, x), fine, atol=1e-4)
    assert torch.allclose(
        D.gaussian.flow(D.gaussian.flow(x, 20.0, 3.0), 3.0, 0.1), D.gaussian.flow(x, 20.0, 0.1), rtol=1e-12
    )
    assert torch.allclose(D.gaussian.flow(x, 20.0, 20.0), x, rtol=1e-13)


def test_the_jump_keeps_mean_and_covariance() -> None:
    D, end = Correlated(), 0.5
    top = 1e5
    x = D.mean + top * Noise.of(4, 40000).normal((6,), dtype=torch.float64)
    found = D.gaussian.flow(x, top, end)
    wanted = D.covariance + end**2 * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(found.mean(0), D.mean, atol=0.03)
    assert torch.allclose(found.T.cov(), wanted, atol=0.03)


def test_full_rank_is_the_full_covariance() -> None:
    D = Correlated()
    pictures = D.mean + Noise.of(5, 50).normal((6,), dtype=torch.float64) @ torch.linalg.cholesky(D.covariance).T
    own, x = Gaussian.of(pictures, 6), 20 * Noise.of(6, 4).normal((6,), dtype=torch.float64)
    mean, covariance = pictures.mean(0), pictures.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    gain = vectors @ torch.diag(((values + 1) / (values + 400)).sqrt()) @ vectors.T
    assert torch.allclose(own.flow(x, 20.0, 1.0), mean + (x - mean) @ gain.T, rtol=1e-10)
    low = Gaussian.of(pictures, 2)
    kept = float(low.variances.sum() + 4 * low.remainder.sum())
    assert kept == pytest.approx(float(covariance.trace()), rel=1e-12)
    bare = Gaussian.of(pictures, 2, remainder="zero")
    assert float(bare.remainder) == 0 and torch.equal(bare.basis, low.basis)
    # Off the subspace a Gaussian without a remainder shrinks as a point does.
    off = vectors[:, 0] - low.basis[0].T @ (low.basis[0] @ vectors[:, 0])
    assert torch.allclose(bare.flow((mean + off)[None], 20.0, 1.0), (mean + off / 20)[None], rtol=1e-9)
    same = Gaussian.of(pictures, 0, remainder="isotropic")
    assert torch.allclose(
        same.flow(x, 20.0, 1.0), mean + (x - mean) * float(((same.remainder + 1) / (same.remainder + 400)).sqrt())
    )


def test_the_gaussian_start_beats_its_solver_on_fresh_starts() -> None:
    found = gaussian(task(4))
    assert beats(found, 4)
    assert isinstance(found.sampler, GaussianStart) and found.sampler.start == 20.0 and found.sampler.end == 0
    counted = CountingDenoiser(problem())
    found.sampler(counted, 20 * Noise.of(0, 3).normal((4,), dtype=torch.float64))
    assert counted.nfe == 4
    assert gaussian(task(4)).facts == found.facts


def test_it_is_stored_and_seen_step_by_step(tmp_path: Path) -> None:
    found = gaussian(task(3), jump=2.0, rank=2).sampler
    assert isinstance(found, GaussianStart) and found.rest.start == 2.0 and found.gaussian.basis.shape == (1, 2, 4)
    back = load_sampler(save_sampler(found, tmp_path / "g"))
    x = 20 * Noise.of(0, 3).normal((4,), dtype=torch.float64)
    steps: list[Step] = []
    assert torch.equal(back(problem(), x), found(problem(), x, on_step=steps.append))
    assert (back.start, back.end, back.nfe) == (20.0, 0.0, 3) and dict(back.meta) == dict(found.meta)
    assert [s.k for s in steps] == [0, 1, 2, 3, 4] and [s.level for s in steps] == [20.0, *found.rest.levels.tolist()]
    assert torch.equal(steps[0].point, x) and steps[0].denoised is None


def test_on_a_given_grid_it_jumps_to_one_of_its_levels() -> None:
    found = gaussian(task(6, grid=TO_ZERO))
    rest = found.sampler.rest  # type: ignore[union-attr]
    assert rest.start in TO_ZERO.tolist() and found.facts["nfe"] == rest.nfe < 6
    assert torch.equal(rest.levels, TO_ZERO[-len(rest.levels) :])
    fixed = gaussian(task(6, grid=TO_ZERO), jump=float(TO_ZERO[2]))
    assert fixed.sampler.nfe == 4


def test_each_class_can_have_its_own() -> None:
    label = torch.arange(400) % 5
    work = task(2, n=400, cond={"label": label})
    one, each = gaussian(work, jump=0.05), gaussian(work, jump=0.05, per_class=True)
    assert (one.facts["groups"], each.facts["groups"]) == (1, 6)
    # A class is one Gaussian here, so its own jump is nearly exact.
    errors = [work.choose.error(work.D, f.sampler, 64) for f in (one, each)]
    assert errors[1] < 0.5 * errors[0]
    sampler = each.sampler
    assert isinstance(sampler, GaussianStart)
    x = 20 * Noise.of(1, 2).normal((4,), dtype=torch.float64)
    free = sampler.gaussian.flow(x, 20.0, 1.0)
    assert torch.equal(sampler.gaussian.flow(x, 20.0, 1.0, torch.tensor([-1, -1])), free)
    assert not torch.allclose(sampler.gaussian.flow(x, 20.0, 1.0, torch.tensor([0, 1])), free)
    with pytest.raises(InputError, match="has no Gaussian"):
        sampler.gaussian.flow(x, 20.0, 1.0, torch.tensor([5, 0]))


def test_whole_end_points_are_made_when_the_teacher_keeps_some_pixels() -> None:
    work = task(3, D=Big(), n=16, memory=1)
    assert work.teacher.pixels is not None and work.teacher.points.shape[2] == 64
    whole = end_points(work)
    assert whole.shape == (12, 100)
    assert torch.allclose(work.fit.view(whole), work.fit.end, atol=2e-2)
    found = gaussian(work, data=work.D.draw(300), jump=2.0)
    assert found.facts["pictures"] == 300
    with pytest.raises(InputError, match="whole pictures"):
        gaussian_error(work.teacher)


def test_the_outline_is_predicted_and_the_details_are_not() -> None:
    work = task(3, n=64)
    levels, errors = gaussian_error(work.teacher)
    assert torch.equal(levels, work.teacher.levels) and float(errors[0]) < 1e-12
    assert float(errors[-1]) > 3 * float(errors[work.teacher.index(5.0)])
    D = Correlated()
    own = task(3, D=D, n=8).teacher
    some, exact = gaussian_error(own, D.gaussian, levels=[5.0, 0.5])
    assert some.tolist() == [5.0, 0.5] and float(exact.max()) < 2e-3


def test_bad_gaussians() -> None:
    pictures = Noise.of(0, 10).normal((4,), dtype=torch.float64)
    for args, options in (
        ((pictures[:3],), {}),
        ((pictures * math.nan,), {}),
        ((pictures, 5), {}),
        ((pictures, -1), {}),
        ((pictures,), {"remainder": "x"}),
    ):
        with pytest.raises(InputError):
            Gaussian.of(*args, **options)
    good = Gaussian.of(pictures)
    with pytest.raises(InputError):
        Gaussian(good.mean, good.basis, -good.variances, good.remainder)
    with pytest.raises(InputError):
        Gaussian(good.mean[:, :2], good.basis, good.variances, good.remainder)
    with pytest.raises(InputError, match="goes down"):
        GaussianStart(good, 1.0, build("euler", TO_ZERO))
    for bad in (
        {"jump": 30.0},
        {"jump": 0.0},
        {"rank": 99},
        {"solver": "none"},
        {"data": pictures[:, :2]},
        {"per_class": True},
    ):
        with pytest.raises(InputError):
            gaussian(task(3, n=16), **bad)
    with pytest.raises(InputError, match="one of its levels"):
        gaussian(task(6, n=16, grid=TO_ZERO), jump=3.0)


# ---- GITS


@pytest.mark.parametrize("metric", ["dev", "l2", "auto"])
def test_chosen_levels_beat_karras_on_fresh_starts(metric: str) -> None:
    # The cost of an edge is Euler's error, so that Euler is what must gain.
    found = gits(task(5), solver="euler", metric=metric)
    assert beats(found, 5)
    assert isinstance(found.sampler, Tableau)
    grid = found.sampler.levels.tolist()
    known = [*problem_levels(), 0.0]
    assert all(s in known for s in grid) and grid[0] == 20.0 and grid[-2:] == [0.01, 0.0]
    tried = found.facts["choose_rmse"]
    assert tried[f"{found.facts['metric']} {found.facts['coefficient']:g}"] == min(tried.values())


def problem_levels() -> list[float]:
    return fine_levels(problem(), None, count=48).tolist()


def test_a_straight_trajectory_leaves_the_choice_open() -> None:
    """With constant noise every grid is exact, and GITS does no harm."""
    work = task(4, D=ConstantNoise(), n=8)
    found = gits(work, coefficient=1.15)
    assert work.teacher.error(work.D, found.sampler, 8) < 1e-9


def test_gits_spends_two_evaluations_a_step_where_the_solver_does() -> None:
    found = gits(task(5), solver="heun", coefficient=1.0)
    assert found.sampler.nfe == 5 == found.start.nfe and len(found.facts["levels"]) == 4
    assert gits(task(3), order=2, coefficient=1.0).sampler.meta["options"] == {"order": 2}
    assert gits(task(1)).sampler.nfe == 1


def test_bad_gits() -> None:
    for bad in ({"metric": "x"}, {"coefficient": 0.0}, {"coefficient": math.inf}, {"solver": "none"}, {"order": 9}):
        with pytest.raises(InputError):
            gits(task(3, n=8), **bad)
    with pytest.raises(InputError, match="instead of a grid"):
        gits(task(6, n=8, grid=TO_ZERO))
    with pytest.raises(InputError, match="cannot be chosen"):
        gits(task(90, n=8))
