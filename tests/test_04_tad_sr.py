"""TAD-SR: its three terms in isolation, heads that hear the level, and runs on small pictures."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW
from fewstep.core.role import Models, Role
from fewstep.data.conditions import ImageConditions
from fewstep.data.sr import SuperResolution
from fewstep.distill.front import distill
from fewstep.distill.tad_sr import TADSR, TimeAware, told
from fewstep.errors import InputError
from fewstep.grid.own import own_levels
from fewstep.models.discriminator import Discriminator, DiscriminatorConfig
from fewstep.models.image_conditioned import image_conditioned
from fewstep.train.run import train
from tiny_runs import STEADY, StopsAfter, check_restart, tiny, tiny_data

OPTIONS: dict[str, Any] = {"batch": 8, "micro": 2, "log_every": 2, "save_every": 3, "progress": False}
METHOD = TADSR(teacher_steps=2, hidden=8, student=STEADY, critic=STEADY)


def data() -> SuperResolution:
    return SuperResolution(tiny_data())


def teacher() -> Generator:
    """A tiny network that reads pictures; what it makes depends on them."""
    made = tiny()
    D = image_conditioned(made.denoiser, data().image_shape)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(7)
    for p in D.net.extra.parameters():  # type: ignore[union-attr]
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return replace(made, denoiser=D, conds=ImageConditions(data()))


def models(method: TADSR) -> Models:
    """The student is moved away from the teacher."""
    m = build_models(method.roles(teacher()), "cpu")
    g = torch.Generator().manual_seed(3)
    for p in m.student.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return m


def gradients(method: TADSR, m: Models, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Of the student, and what its loss tells."""
    update = next(method.step(m, batch, 0, Noise.of(1, 6)))
    assert update.roles == ("student",)
    m.student.requires_grad_(True).zero_grad()
    losses: Any = update.loss()
    losses["loss"].backward()
    m.student.requires_grad_(False)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in m.student.parameters()], losses


def far(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def some() -> Batch:
    return data().take(torch.arange(6))


def test_the_loss_is_the_sum_of_its_terms() -> None:
    batch, m = some(), models(METHOD)
    whole, losses = gradients(METHOD, m, batch)
    assert set(losses) == {"loss", "regression", "score", "adversarial"}
    parts = [
        gradients(replace(METHOD, score="none", adversarial=0.0), m, batch)[0],
        gradients(replace(METHOD, regression=0.0, adversarial=0.0), m, batch)[0],
        gradients(replace(METHOD, regression=0.0, score="none"), m, batch)[0],
    ]
    assert all(max(float(g.abs().max()) for g in part) > 1e-6 for part in parts)
    assert far(whole, [a + b + c for a, b, c in zip(*parts, strict=True)]) < 1e-6
    assert all(p.grad is None for name in ("teacher", "heads") for p in m.networks[name].parameters())


def test_the_regression_is_to_where_the_teacher_ends() -> None:
    batch, method = some(), replace(METHOD, score="none", adversarial=0.0, regression=2.0)
    m = models(method)
    own, _ = gradients(method, m, batch)
    x = 80.0 * Noise.of(1, 6).normal((1, 4, 4), "start")
    start = x
    with torch.no_grad():
        # Two steps of DDIM on Karras' grid, by hand.
        levels = [80.0, 0.002, 0.0]
        for a, b in itertools.pairwise(levels):
            x = (b / a) * x + (1 - b / a) * m.teacher(x, a, batch.cond)
    m.student.requires_grad_(True).zero_grad()
    (2.0 * (m.student(start, 80.0, batch.cond) - x).square().mean()).backward()
    assert far(own, [torch.zeros_like(p) if p.grad is None else p.grad for p in m.student.parameters()]) < 1e-5


def test_the_score_term_is_a_difference_of_noise_estimates_at_the_same_noise() -> None:
    batch, m = some(), models(METHOD)
    x0, noise = batch.x, Noise.of(2, 6)
    assert x0 is not None
    x = x0 + 0.3
    g = METHOD.direction(m, x, x0, batch.cond, noise)
    sigma = own_levels(m.teacher, 0.2 * noise.uniform((), "level", dtype=torch.float64))
    assert float(sigma.max()) <= float(own_levels(m.teacher, torch.tensor(0.2)))
    s, n = sigma.float().reshape(-1, 1, 1, 1), noise.normal((1, 4, 4), "n")
    with torch.no_grad():
        own, aim = (((t + s * n) - m.teacher(t + s * n, sigma, batch.cond)) / s for t in (x, x0))
    assert float((g - (own - aim)).abs().max()) < 1e-3 * float(g.abs().max())
    # A student at its aim is left alone; SDS goes on pulling.
    assert float(METHOD.direction(m, x0, x0, batch.cond, noise).abs().max()) == 0
    sds = replace(METHOD, score="sds").direction(m, x0, x0, batch.cond, noise)
    assert float((sds - (aim - n)).abs().max()) < 1e-3 * float(sds.abs().max())


class Gaussian(nn.Module):
    """The exact denoiser of N(0, S^2)."""

    shape, sigma_min, sigma_max, sigma_data = (1, 1, 1), 0.002, 80.0, 0.5

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, x: Tensor, sigma: Any, cond: Cond | None = None) -> Tensor:
        s2 = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1) ** 2
        return self.spread**2 / (self.spread**2 + s2) * x


def test_the_score_term_has_no_noise_where_the_teacher_is_a_gaussian() -> None:
    S = 0.7
    m = build_models({"teacher": Role(lambda: Gaussian(S))}, "cpu")
    noise = Noise.of(4, 5)
    x, aim = (noise.normal((1, 1, 1), key, dtype=torch.float64) for key in ("x", "aim"))
    g = METHOD.direction(m, x, aim, {}, noise)
    sigma = own_levels(m.teacher, 0.2 * noise.uniform((), "level", dtype=torch.float64)).reshape(-1, 1, 1, 1)
    assert float((g - sigma / (S**2 + sigma**2) * (x - aim)).abs().max()) < 1e-12


def test_heads_hear_the_level() -> None:
    config = DiscriminatorConfig(("a", "b", "c"), (4, 6, 5), (4, 2, 3), 8)
    torch.manual_seed(0)
    heads = TimeAware(config)
    found = {"a": torch.randn(3, 4, 2, 2), "b": torch.randn(3, 6), "c": torch.randn(3, 7, 5)}
    low, high = (told(heads, torch.full((3,), s, dtype=torch.float64))(found) for s in (0.1, 10.0))
    assert low.shape == (3, 4 + 1 + 7) and float((low - high).detach().abs().min()) > 0
    mixed = told(heads, torch.tensor([0.1, 10.0, 0.1], dtype=torch.float64))(found)
    assert float((mixed - torch.stack([low[0], high[1], low[2]])).detach().abs().max()) < 1e-5
    deaf = Discriminator(config)
    assert told(deaf, torch.ones(3)) is deaf


@pytest.mark.parametrize("time_aware", [True, False])
def test_the_heads_learn_to_tell_and_change_nothing_else(time_aware: bool) -> None:
    method, batch = replace(METHOD, time_aware=time_aware), some()
    m = models(method)
    first, second = (u for u in looped(method, m, batch))
    assert first == ("student",) and second == ("heads",)
    assert type(m.heads) is (TimeAware if time_aware else Discriminator)


def looped(method: TADSR, m: Models, batch: Batch) -> list[tuple[str, ...]]:
    """Runs every loss of a step; returns whose they are. Only the role of the moment may get a gradient."""
    seen = []
    for update in method.step(m, batch, 0, Noise.of(1, 6)):
        for name in update.roles:
            m.networks[name].requires_grad_(True).zero_grad()
        losses: Any = update.loss()
        losses["loss"].backward()
        for name, net in m.networks.items():
            has = any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in net.parameters())
            assert has == (name in update.roles)
            net.requires_grad_(False).zero_grad()
        seen.append(update.roles)
    return seen


def test_the_student_comes_near_the_teacher_in_one_step(tmp_path: Path) -> None:
    of = teacher()
    for p in of.denoiser.net.net.leave.parameters():  # type: ignore[attr-defined]
        # So that what the teacher says depends on the level, and several steps end elsewhere than one.
        p.data *= 8
    method = replace(METHOD, teacher_steps=4, score="none", adversarial=0.0, regression=20.0)
    made = distill(of, method, data(), out=tmp_path, budget=60, batch=8, progress=False)
    cond = {"image": some().cond["image"]}
    wanted = of.sample(6, cond, sampler=method.table(of.denoiser), progress=False)
    before = of.sample(6, cond, sampler=method.sampler(of), progress=False)
    after = made.sample(6, cond, progress=False)
    assert made.sampler.nfe == 1
    assert float((before - wanted).square().mean()) > 0.1
    assert float((after - wanted).square().mean()) < 0.7 * float((before - wanted).square().mean())


def test_flow_teachers_and_data_as_target(tmp_path: Path) -> None:
    of = teacher()
    D: Any = of.denoiser
    flow = replace(of, denoiser=type(D)(D.net, D.shape, path=FLOW, predicts="velocity", sigma_max=1e8).eval())
    method = replace(METHOD, target="data", regression=0.0)
    assert not method.solves and METHOD.solves
    made = distill(flow, method, data(), out=tmp_path, budget=2, batch=4, progress=False)
    assert made.sample(3, {"image": some().cond["image"][:3]}, progress=False).isfinite().all()
    assert METHOD.table(flow.denoiser).levels.tolist() == pytest.approx([1e8, 1.0, 0.0], rel=0.01)


def test_a_resumed_run_and_micro_batches(tmp_path: Path) -> None:
    of, source = teacher(), data()

    def go(out: Path, stop: int | None = None, **options: Any) -> None:
        given: Any = source if stop is None else StopsAfter(source, stop * OPTIONS["micro"])
        train(of, METHOD, given, out=out, budget=6, **(OPTIONS | options))

    check_restart(tmp_path, go, far=2e-3)


def unseen(batch: Batch) -> Any:
    """The first update on a batch."""
    return next(METHOD.step(models(METHOD), batch, 0, Noise.of(0, 6)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TADSR(steps=2), "one step"),
        (lambda: TADSR(teacher_steps=0), "teacher_steps >= 1"),
        (lambda: TADSR(score="vsd"), "unknown score term"),  # type: ignore[arg-type]
        (lambda: TADSR(target="student"), "unknown target"),  # type: ignore[arg-type]
        (lambda: TADSR(small=0.0), "shares small"),
        (lambda: TADSR(judged=1.5), "judged in"),
        (lambda: TADSR(adversarial=-1.0), "adversarial >= 0"),
        (lambda: TADSR(game="wgan"), "unknown adversarial loss"),  # type: ignore[arg-type]
        (lambda: TADSR(regression=0.0, score="none", adversarial=0.0), "one of its terms"),
        (lambda: TADSR().roles(tiny()), "reads small pictures"),
        (lambda: TADSR(taps=("nowhere",)).roles(teacher()), "unknown feature tap"),
        (lambda: TADSR().check(teacher(), tiny_data()), "has none"),
        (lambda: TADSR().check(teacher(), SuperResolution(tiny_data(), 4)), "the teacher reads"),
        (lambda: unseen(tiny_data().take(torch.arange(6))), "condition 'image'"),
        (lambda: unseen(Batch(None, {})), "needs pictures"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
