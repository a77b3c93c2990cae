"""AMED-Solver and AMED-Plugin: the published steps written out, what is learned, storage, and bad input."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import InputError, Mixture, Noise, Tableau
from fewstep.core.denoiser import CountingDenoiser, Wrapper
from fewstep.core.exact import bimodal
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.solve.amed import AMED, Predictor, amed, amed_table
from fewstep.solve.amed_plugin import PLUGINS, amed_plugin
from fewstep.solve.dpm import dpm2
from fewstep.solve.teacher import Clock, Task, fine_levels, follow
from tiny_runs import tiny

GRID = torch.tensor([20.0, 6.0, 1.5, 0.3], dtype=torch.float64)
R, C, ALPHA = (0.35, 0.5, 0.7), (0.99, 1.01, 1.02), (1.1, 0.9, 1.0)
AB = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@cache
def mixture() -> Mixture:
    means = torch.tensor([[-1.0, 0.4], [0.8, 0.6], [0.3, -1.1]])
    return Mixture(means, torch.tensor([[0.3, 0.4], [0.2, 0.3], [0.4, 0.2]]), [1, 2, 2])


@cache
def task(nfe: int, kind: str = "mixture", count: int = 64) -> Task:
    D: Any = {"mixture": mixture, "tiny": lambda: tiny().denoiser, "gauss": gauss}[kind]()
    noise = Noise.of(0, count).fold("test")
    dtype = torch.float32 if kind == "tiny" else torch.float64
    cond = {"label": torch.arange(count) % 3} if kind == "tiny" else {}
    with torch.no_grad():
        return Task(D, nfe, None, follow(D, fine_levels(D, None), noise, cond, dtype=dtype), count // 4)


def gauss() -> Mixture:
    return Mixture(torch.tensor([[0.3]]), 0.25)


def fresh(D: Any, n: int = 200) -> Tensor:
    return D.sigma_max * Noise.of(9, n).normal(D.shape, dtype=torch.float64)


def published(base: str, D: Mixture, x: Tensor, afs: bool = False, order: int = 4) -> Tensor:
    """The paper's steps, with slopes ``(x - D) / sigma``."""
    slopes: list[Tensor] = []
    outputs: list[tuple[float, Tensor]] = []

    def slope(y: Tensor, level: float, told: float) -> Tensor:
        outputs.append((level, D(y, told)))
        slopes.append((y - outputs[-1][1]) / level)
        return slopes[-1]

    def multistep(y: Tensor, s: float, t: float, scale: float) -> Tensor:
        if base == "dpmpp2m":
            (_, d), h = outputs[-1], math.log(s / t)
            if len(outputs) > 1:
                d = d + (d - outputs[-2][1]) * h / (2 * math.log(outputs[-2][0] / s))
            return t / s * y + scale * (1 - t / s) * d
        weights = AB[min(1 if base == "euler" else order, len(slopes))]
        return y + scale * (t - s) * sum(w * e for w, e in zip(weights, reversed(slopes), strict=False))

    for k, (a, b) in enumerate(itertools.pairwise(GRID.tolist())):
        r, c, m = R[k], C[k], b ** R[k] * a ** (1 - R[k])
        if afs and k == 0:
            first = x / math.sqrt(1 + a * a)
            slopes.append(first)
            outputs.append((a, x - a * first))
        else:
            first = slope(x, a, a)
        if base in ("amed", "dpm2"):
            late = slope(x + (m - a) * first, m, ALPHA[k] * m)
            share = 1.0 if base == "amed" else 1 / (2 * r)
            x = x + c * (b - a) * (share * late + (1 - share) * first)
        else:
            y = multistep(x, a, m, 1.0)
            slope(y, m, ALPHA[k] * m)
            x = multistep(y, m, b, c)
    return x


def test_the_untrained_step_is_dpm_solver_2() -> None:
    ours, theirs = amed_table(GRID), dpm2(GRID)
    x = fresh(mixture(), 40) / 4
    assert float((ours(mixture(), x) - theirs(mixture(), x)).abs().max()) < 1e-12
    assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-14)
    assert 1.9 < ours.order() < 2.1


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("base", ["amed", *PLUGINS])
def test_the_published_recurrences(base: str, afs: bool) -> None:
    table = amed_table(GRID, base=base, r=R, c=C, alpha=ALPHA, afs=afs)
    x = 20 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counted: Any = CountingDenoiser(mixture())
    found, wanted = table(counted, x), published(base, mixture(), x, afs)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-12
    assert counted.nfe == table.nfe == 6 - afs


@pytest.mark.parametrize("base", ["amed", *PLUGINS])
def test_pure_noise_keeps_the_digits(base: str) -> None:
    """From level 1e8 a point mass is reached as exactly as from level 80, with finite weights."""
    point, unit = Mixture(torch.full((1, 3), 0.7), 0.0), torch.randn(50, 3, dtype=torch.float64)
    grid = torch.tensor([1e8, 5.0, 0.6, 0.02], dtype=torch.float64)
    found = amed_table(grid, base=base, r=0.4)(point, 0.7 + 1e8 * unit)
    assert float((found - 0.7 - 0.02 * unit).abs().max()) < 1e-6


def test_numbers_of_the_predictor_stay_in_range() -> None:
    a, b = GRID[0], GRID[1]
    untrained = Predictor(5, 0.01, 0.2)(a, b, torch.randn(7, 5))
    assert [v.shape for v in untrained] == [(7,)] * 3
    assert all(bool((v == want).all()) for v, want in zip(untrained, (0.5, 1.0, 1.0), strict=True))
    made = Predictor(5, 0.01, 0.2, seed=3)
    with torch.no_grad():
        made.heads.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(20)
        r, c, alpha = made(a, b, 10 * torch.randn(500, 5, generator=torch.Generator().manual_seed(1)))
    assert float(r.min()) >= 0 and float(r.max()) <= 1 and float(r.std()) > 0.1
    assert float((c - 1).abs().max()) <= 0.01 + 1e-12 and float((c - 1).abs().max()) > 0.005
    assert float((alpha - 1).abs().max()) <= 0.2 + 1e-12 and float((alpha - 1).abs().max()) > 0.1


def test_a_gaussian_is_learned_exactly() -> None:
    fitted = amed(task(4, "gauss"), iterations=150, minibatch=24, lr=2e-2, grid="karras")
    assert fitted.facts["loss_last"] < 1e-8 < fitted.facts["loss_first"]
    assert isinstance(fitted.sampler, Tableau)
    x = fresh(gauss())
    goal = gauss().flow(x, 80.0, 0.002)
    assert float((fitted.sampler(gauss(), x) - goal).abs().max()) < 1e-3
    assert float((fitted.start(gauss(), x) - goal).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (amed, {}),
        (amed, {"teacher": "refined"}),
        (amed_plugin, {}),
        (amed_plugin, {"teacher": "refined"}),
        *((amed_plugin, {"base": base}) for base in PLUGINS if base != "ipndm"),
    ],
)
def test_learning_beats_the_solver_it_starts_from(method: Any, options: dict[str, Any]) -> None:
    x = fresh(mixture())
    goal = mixture().flow(x, 80.0, 0.002, 200)
    for nfe in (5, 6) if not options else (6,):
        fitted = method(task(nfe), iterations=32, minibatch=24, lr=2e-2, **options)
        errors = [float((s(mixture(), x) - goal).norm(dim=1).mean()) for s in (fitted.sampler, fitted.start)]
        assert errors[0] < 0.95 * errors[1]
        assert fitted.sampler.nfe == fitted.start.nfe == nfe
        assert fitted.facts["features"] is None


def test_budgets_and_grids() -> None:
    short = {"iterations": 1, "minibatch": 4}
    with_afs = amed(task(3), afs=True, **short)
    assert (with_afs.sampler.nfe, with_afs.facts["steps"]) == (3, 2)
    odd = amed(task(3), **short)
    assert (odd.sampler.nfe, odd.facts["steps"]) == (3, 2)
    given = Task(mixture(), 9, torch.tensor([80.0, 2.0, 0.1, 0.0]), task(4).teacher, task(4).held)
    own = amed_plugin(given, **short)
    assert own.sampler.nfe == own.start.nfe == 5
    assert own.sampler.end == 0


def test_a_task_repeats_and_time_ends_it() -> None:
    one, two = (amed(task(4), iterations=4, minibatch=8) for _ in range(2))
    assert torch.equal(one.sampler.W, two.sampler.W)
    assert not torch.equal(one.sampler.W, one.start.W)
    late = Task(mixture(), 4, None, task(4).teacher, task(4).held, clock=Clock(1e-9))
    stopped = amed(late)
    assert stopped.facts["iterations"] == 0
    assert torch.allclose(stopped.sampler.W, stopped.start.W, rtol=1e-12)


def test_more_rounds_are_further_trajectories() -> None:
    two, one = (amed(task(4), iterations=2, rounds=n, minibatch=1000) for n in (2, 1))
    assert two.facts["loss_first"] != one.facts["loss_first"]


@pytest.mark.parametrize(("method", "nfe", "afs"), [(amed, 4, False), (amed, 3, True), (amed_plugin, 5, False)])
def test_features_are_read_and_the_sampler_is_stored(method: Any, nfe: int, afs: bool, tmp_path: Path) -> None:
    work = task(nfe, "tiny", 32)
    before = [p.detach().clone() for p in work.D.parameters()]  # type: ignore[attr-defined]
    fitted = method(work, iterations=12, minibatch=8, lr=2e-2, afs=afs)
    made = fitted.sampler
    assert isinstance(made, AMED)
    assert (made.tap, made.nfe, made.predictor.width) == ("bottleneck", nfe, 16)
    assert fitted.facts["held_rmse"] < fitted.facts["held_rmse_untrained"]
    for p, old in zip(work.D.parameters(), before, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(p, old)
        assert p.grad is None
    again = load_sampler(save_sampler(made, tmp_path / "sampler"))
    x, cond = work.teacher.start, work.teacher.cond
    seen: list[float] = []
    counted = CountingDenoiser(work.D)
    out = again(counted, x, cond, on_step=lambda s: seen.append(s.level))
    assert torch.equal(out, made(work.D, x, cond))
    assert counted.nfe == nfe
    assert seen == made.levels.tolist()
    # Each picture has its own numbers, so that it does not depend on its batch.
    alone = made(work.D, x[:1], {k: v[:1] for k, v in cond.items()})
    assert float((alone - out[:1]).abs().max()) < 1e-4
    with pytest.raises(InputError, match=r"reads the features 'bottleneck'.*hides"):
        made(Wrapper(work.D), x, cond)


def test_without_features_table_and_sampler_agree() -> None:
    levels = task(4).teacher.levels[[0, 40, 80]]
    predictor = Predictor(0, 0.05, 0.2, seed=1)
    with torch.no_grad():
        predictor.heads.weight.normal_(generator=torch.Generator().manual_seed(2))
    x = fresh(mixture(), 20)
    for base in ("amed", *PLUGINS):
        for afs in (False, True):
            made = AMED(levels, (1, 1), predictor, base=base, afs=afs)
            one, other = made(mixture(), x), made.sampler()(mixture(), x)
            assert float((one - other).abs().max()) < 1e-11


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: amed(task(1)), "at least 2, got 1"),
        (lambda: amed(task(4), afs=True), "odd with afs, got 4"),
        (lambda: amed(task(4), lr=-1.0), "lr > 0, got -1.0"),
        (lambda: amed(task(4), minibatch=0), "minibatch >= 1"),
        (lambda: amed(task(4), scale_dir=1.5), r"scale_dir must be in \[0, 1\).*1.5"),
        (lambda: amed(task(4), teacher="coarse"), "unknown teacher 'coarse'"),
        (lambda: amed(task(4), tap="bottleneck"), "declares no features"),
        (lambda: amed(task(4, "tiny", 32), tap="botleneck"), "did you mean 'bottleneck'"),
        (lambda: amed(task(4), grid="karass"), "did you mean 'karras'"),
        (lambda: amed_plugin(task(4), base="heun"), "unknown base 'heun'"),
        (lambda: amed_plugin(task(4), order=5), "orders 1, 2, 3 and 4, got 5"),
        (lambda: amed_table(GRID, r=(0.5, 0.5)), "one or 3 of them"),
        (lambda: amed_table(GRID, r=1.0), "0 < r < 1"),
        (lambda: amed_table(GRID[1:], afs=True), "starts at 10 or above, got 6"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_loss_that_is_not_finite_is_reported() -> None:
    def broken(x: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        return bimodal()(x, sigma) * (math.nan if float(torch.as_tensor(sigma).detach()) == 80.0 else 1.0)

    good = bimodal()
    with torch.no_grad():
        teacher = follow(good, fine_levels(good, None), Noise.of(0, 16), {}, dtype=torch.float64)
    for name in ("shape", "sigma_min", "sigma_max", "sigma_data"):
        setattr(broken, name, getattr(good, name))
    with pytest.raises(InputError, match="not finite in step 0, from sigma 80"):
        amed(Task(broken, 4, None, teacher, 4), iterations=1)  # type: ignore[arg-type]
