"""SANA-Sprint: both losses, each alone, the judged pictures, and runs from flow-matching teachers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.denoiser import Precond
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW
from fewstep.core.role import Models, added
from fewstep.distill.sana_sprint import SanaSprint
from fewstep.distill.scm import SCM
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.models import ResMLP, ResMLPConfig
from tiny_runs import STEADY, check_restart, run, tiny

TRAINED: dict[str, Any] = {"optim": STEADY, "variance": STEADY, "heads": STEADY, "hidden": 8}
RUNS = {
    "hybrid": SanaSprint(**TRAINED),
    "adversarial": SanaSprint(consistency=0.0, **TRAINED),
    "consistency": SanaSprint(adversarial=0.0, **TRAINED),
}
BATCH = Batch(torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(3)), {"label": torch.arange(8) % 3})


def flow() -> Generator:
    torch.manual_seed(0)
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    D = Precond(net, (1, 4, 4), path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    return replace(tiny(), denoiser=D)


def opened(method: SanaSprint, teacher: Generator) -> tuple[Models, list[Any]]:
    m = build_models(method.roles(teacher), "cpu")
    m.progress = 0.5
    if method.adversarial:
        # The same heads whatever other roles were made before them.
        g = torch.Generator().manual_seed(0)
        for p in m.heads.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    return m, list(method.step(m, BATCH, 0, Noise.of(1, 8)))


def test_each_loss_can_be_had_alone_and_the_whole_is_their_weighted_sum() -> None:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, method in RUNS.items():
        m, updates = opened(method, flow())
        parts[name] = updates[0].loss()
        assert [u.role for u in updates] == {
            "hybrid": [("student", "variance"), "heads"],
            "adversarial": ["student", "heads"],
            "consistency": [("student", "variance")],
        }[name]
        assert (
            set(m.networks)
            == {
                "hybrid": {"teacher", "student", "variance", "heads"},
                "adversarial": {"teacher", "student", "heads"},
                "consistency": {"teacher", "student", "variance"},
            }[name]
        )
    both = parts["hybrid"]
    assert float(both["loss"]) == pytest.approx(float(both["consistency"] + both["adversarial"]), rel=1e-6)
    assert torch.equal(both["consistency"], parts["consistency"]["loss"])
    assert torch.equal(both["adversarial"], parts["adversarial"]["loss"])
    m, (doubled, _) = opened(replace(RUNS["hybrid"], consistency=2.0, adversarial=1.5), flow())
    weighed = doubled.loss()
    assert float(weighed["consistency"]) == pytest.approx(2 * float(both["consistency"]), rel=1e-6)
    assert float(weighed["adversarial"]) == pytest.approx(3 * float(both["adversarial"]), rel=1e-6)


@pytest.mark.parametrize("lean", [True, False])
def test_in_parts_losses_and_gradients_are_the_same(lean: bool) -> None:
    found: list[tuple[dict[str, float], list[Tensor]]] = []
    for whole in (True, False):
        m, updates = opened(replace(RUNS["hybrid"], lean=lean), flow())
        m.student.requires_grad_(True)
        losses = []
        for part in (updates[0].loss,) if whole else updates[0].parts:
            losses.append(part())
            losses[-1]["loss"].backward()
        told = {name: float(value.detach()) for name, value in added(losses).items()}
        found.append((told, [p.grad for p in m.student.parameters() if p.grad is not None]))
    (one, a), (parts, b) = found
    assert len(updates[0].parts) == 2 and one == pytest.approx(parts, rel=1e-6)
    far = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    assert far < 1e-6 * max(float(x.abs().max()) for x in a)


def test_without_the_adversarial_loss_it_is_continuous_time_consistency() -> None:
    start, own = flow(), RUNS["consistency"]
    plain = SCM(mean=own.mean, std=own.std, variance=STEADY)
    losses = []
    for method in (own, plain):
        m = build_models(method.roles(start), "cpu")
        m.progress = 0.5
        (update,) = method.step(m, BATCH, 0, Noise.of(1, 8))
        losses.append(update.loss()["loss"])  # type: ignore[index]
    assert torch.equal(*losses)


def test_the_adversarial_gradient_reaches_the_student_through_the_frozen_teacher_alone() -> None:
    m, updates = opened(RUNS["adversarial"], flow())
    m.student.requires_grad_(True)
    updates[0].loss()["loss"].backward()
    assert max(float(p.grad.abs().max()) for p in m.student.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for name in ("teacher", "heads") for p in m.networks[name].parameters())
    m.student.zero_grad(set_to_none=True)
    m.student.requires_grad_(False)
    m.heads.requires_grad_(True)
    made = updates[1].loss()
    made["loss"].backward()
    assert all(p.grad is None for name in ("teacher", "student") for p in m.networks[name].parameters())
    assert max(float(p.grad.abs().max()) for p in m.heads.parameters()) > 0 and not made["real"].requires_grad


def test_a_share_of_the_judged_pictures_comes_from_the_highest_level() -> None:
    seen: list[Tensor] = []
    method = SanaSprint(top=0.3, sigma_max=40.0, **TRAINED)
    m = build_models(method.roles(tiny()), "cpu")
    many = Batch(torch.zeros(4000, 1, 4, 4), {})
    m.student.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        m.student(*method.asked(m, many, Noise.of(0, 4000)))
        m.student(*replace(method, top=0.0).asked(m, many, Noise.of(0, 4000)))
    assert float((seen[0] == 40.0).double().mean()) == pytest.approx(0.3, abs=0.03)
    # exp(0.2 + 1.6 z) is above 40 for z > 2.18.
    assert float((seen[1] == 40.0).double().mean()) == pytest.approx(0.0146, abs=0.006)
    kept = seen[0] != 40.0
    assert torch.equal(seen[0][kept], seen[1][kept]) and float(seen[1].max()) == 40.0


def test_judges_see_pictures_at_their_own_levels() -> None:
    method = RUNS["hybrid"]
    m = build_models(method.roles(tiny()), "cpu")
    with torch.no_grad():
        seen, sigma = method.noised(m, torch.zeros(8000, 1, 4, 4), Noise.of(0, 8000))
    log = sigma.log()
    assert float((seen / sigma.reshape(-1, 1, 1, 1)).std()) == pytest.approx(1.0, abs=0.01)
    assert float(log.mean()) == pytest.approx(-0.6, abs=0.04) and float(log.std()) == pytest.approx(1.0, abs=0.04)


def test_heads_learn_to_tell_and_the_student_is_pushed_towards_the_pictures() -> None:
    method = replace(RUNS["adversarial"], game="non-saturating", top=1.0)
    m = build_models(method.roles(flow()), "cpu")
    head = torch.optim.Adam(m.heads.parameters(), 1e-2)
    m.heads.requires_grad_(True)
    fake = torch.full_like(BATCH.x, 0.9)
    losses = []
    for i in range(40):
        made = method.verdict(m, Batch(-fake, BATCH.cond), fake, Noise.of(i, 8))
        head.zero_grad()
        made["loss"].backward()
        head.step()
        losses.append(float(made["loss"].detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    method = RUNS[name]
    check_restart(tmp_path, lambda out, **more: run(name, out, method=method, start=flow(), **more), far=1e-4)
    before, made = flow().denoiser.state_dict(), Generator.load(tmp_path / "whole")  # type: ignore[attr-defined]
    assert max(float((before[k] - v).abs().max()) for k, v in made.denoiser.state_dict().items()) > 1e-4
    assert not any("heads" in k or "variance" in k for k in made.denoiser.state_dict())
    # One student serves every number of evaluations, from pure noise.
    for steps in (1, 2, 4):
        pictures = made.sample(4, sampler=replace(method, steps=steps).sampler(flow()), progress=False)
        assert pictures.shape == (4, 1, 4, 4) and bool(pictures.isfinite().all())


def test_edm_and_guided_teachers_serve_too(tmp_path: Path) -> None:
    made = run("edm", tmp_path, method=RUNS["hybrid"], start=guided(tiny(), 2.0))
    d = made.denoiser.sigma_data
    assert made.sampler.levels.tolist() == [80.0, pytest.approx(d * math.tan(1.3)), 0.0]


def no_pictures() -> None:
    method = RUNS["adversarial"]
    next(method.step(build_models(method.roles(tiny()), "cpu"), Batch(None, {}), 0, Noise.of(0, 2))).loss()


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: SanaSprint(consistency=0, adversarial=0), "weights >= 0 that are not both 0"),
    (lambda: SanaSprint(adversarial=-1), "weights >= 0 that are not both 0"),
    (lambda: SanaSprint(adversarial=math.inf), "weights >= 0 that are not both 0"),
    (lambda: SanaSprint(consistency=math.nan), "weights >= 0 that are not both 0"),
    (lambda: SanaSprint(judge_mean=math.nan), "a finite judge_mean"),
    (no_pictures, "SanaSprint needs pictures of .1, 4, 4., as the network takes them, got None"),
    (lambda: SanaSprint(top=1.2), "0 <= top <= 1"),
    (lambda: SanaSprint(judge_std=0), "judge_std > 0"),
    (lambda: SanaSprint(game="wgan"), "unknown adversarial loss 'wgan'"),
    (lambda: SanaSprint(steps=0), "SanaSprint needs steps >= 1"),
    (lambda: SanaSprint(taps=("top",)).roles(tiny()), "unknown feature tap 'top'"),
    (lambda: SanaSprint(sigma_max=90.0).roles(tiny()), "SanaSprint.sigma_max=90. is outside"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
