"""SwiftBrush: equal guidance on both scores, levels even in the teacher's time, and no picture anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.cond import Batch, null
from fewstep.core.fit import build_models
from fewstep.core.noise import Noise
from fewstep.core.path import DDPM, EDM, FLOW, VP
from fewstep.core.role import Models
from fewstep.data.array import Images
from fewstep.distill import VSD
from fewstep.distill.front import distill
from fewstep.distill.swiftbrush import SwiftBrush, own_time
from fewstep.errors import InputError
from fewstep.guide import CFG, guided
from fewstep.models.lora import Adapted, LoRA
from fewstep.train.run import train
from tiny_runs import STEADY, bits, check_resume, differing, run, tiny, tiny_data

METHODS: dict[str, SwiftBrush] = {
    "own time, guided": SwiftBrush(sigma_init=2.5, guidance=3.0, student=STEADY, fake=STEADY),
    "draws, unguided": SwiftBrush(sigma_init=2.5, times=(), student=STEADY, fake=STEADY),
}


def models(method: Any, teacher: Any) -> Models:
    """The fake score is moved away from the teacher, which it starts as."""
    m = build_models(method.roles(teacher), "cpu")
    g = torch.Generator().manual_seed(3)
    for p in m.fake.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return m


def point(n: int = 6) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 4, 4, generator=g), torch.linspace(0.1, 3.0, n), {"label": torch.arange(n) % 3}


def test_both_scores_have_the_same_guidance() -> None:
    y, sigma, cond = point()
    method = SwiftBrush(guidance=3.0)
    m = models(method, tiny())
    d_fake, d_teacher = method.estimates(m, y, sigma, cond, Noise.of(0, 6))
    for net, found in ((m.fake, d_fake), (m.teacher.network, d_teacher)):
        free, own = net(y, sigma, null(cond)), net(y, sigma, cond)
        assert float((found - (free + 3.0 * (own - free))).abs().max()) < 1e-5
        assert float((found - own).abs().max()) > 1e-3


def test_a_teachers_own_guidance_is_on_the_fake_score_too() -> None:
    y, sigma, cond = point()
    asked, own = SwiftBrush(guidance=3.0), SwiftBrush()
    pairs = [
        method.estimates(models(method, teacher), y, sigma, cond, Noise.of(0, 6))
        for method, teacher in ((asked, tiny()), (own, guided(tiny(), 3.0)))
    ]
    for a, b in zip(*pairs, strict=True):
        assert float((a - b).abs().max()) < 1e-6


def test_equal_scores_move_nothing_under_guidance() -> None:
    for method, teacher in ((SwiftBrush(guidance=4.5), tiny()), (SwiftBrush(), guided(tiny(), 4.5))):
        m = build_models(method.roles(teacher), "cpu")
        update = next(method.step(m, Batch(None, point()[2]), 0, Noise.of(1, 6)))
        m.student.requires_grad_(True)
        update.loss()["loss"].backward()  # type: ignore[index]
        assert all(p.grad is None or float(p.grad.abs().max()) < 1e-9 for p in m.student.parameters())


def test_the_direction_is_the_papers_in_noise_predictions() -> None:
    y, _, cond = point()
    method = SwiftBrush(guidance=4.5)
    m = models(method, tiny())
    noise = Noise.of(5, 6)
    x = y.clone().requires_grad_()
    method.student_losses(m, x, Batch(None, cond), noise)["loss"].backward()
    level = own_time(m.student, 0.02 + 0.96 * noise.uniform((), "sigma", dtype=torch.float64)).reshape(-1, 1, 1, 1)
    at = y + level * noise.normal(y.shape[1:], "n")
    d_fake, d_teacher = method.estimates(m, at, level.flatten(), cond, noise)
    # b^2 (eps_teacher - eps_fake), with eps = (y - D) / sigma and b^2 = sigma^2 / (1 + sigma^2).
    eps = ((at - d_teacher) - (at - d_fake)) / level
    wanted = level**2 / (1 + level**2) * eps
    assert float((x.grad * x.numel() - wanted).abs().max()) < 1e-5  # type: ignore[operator]


def test_levels_are_even_in_the_teachers_time() -> None:
    share = torch.linspace(0, 1, 11, dtype=torch.float64)
    D: Any = tiny().denoiser
    for path in (VP, FLOW, DDPM, D.path):
        D.path, D.sigma_min, D.sigma_max = path, 0.02, 20.0
        levels = own_time(D, share)
        steps = path.at(levels.double()).diff()
        assert float((steps - steps.mean()).abs().max()) < 1e-4 * float(steps.mean())
        assert levels[0] == pytest.approx(0.02, rel=1e-5) and levels[-1] == pytest.approx(20.0, rel=1e-5)
    D.path = EDM
    assert float((VP.at(own_time(D, share).double()).diff().diff()).abs().max()) < 1e-5


def test_the_fake_score_learns_the_papers_noise_error() -> None:
    method = SwiftBrush()
    m = models(method, tiny())
    x, _, cond = point()
    noise = Noise.of(2, 6)
    loss = method.fake_update(m, x, Batch(None, cond), noise).loss()
    level = own_time(m.fake, noise.uniform((), "sigma", dtype=torch.float64)).reshape(-1, 1, 1, 1)
    n = noise.normal(x.shape[1:], "n")
    y = x + level * n
    eps = (y - m.fake(y, level.flatten(), cond)) / level
    # |a eps - a n|^2 with a^2 = 1 / (1 + sigma^2).
    wanted = ((eps - n).square() / (1 + level**2)).mean()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-3)  # type: ignore[arg-type]
    assert float(replace(method, fake_weight="edm").fake_update(m, x, Batch(None, cond), noise).loss()) != float(loss)  # type: ignore[arg-type]


def test_without_guidance_and_times_it_is_vsd(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"sigma_init": 2.5, "normaliser": "vp", "student": STEADY, "fake": STEADY}
    run("a", tmp_path / "a", method=VSD(**shared))
    run("b", tmp_path / "b", method=SwiftBrush(times=(), **shared))
    assert differing(bits(tmp_path / "a"), bits(tmp_path / "b")) == []


def test_no_picture_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []

    def refuse(*args: Any) -> Any:
        raise AssertionError("a picture was read")

    teacher = tiny()
    monkeypatch.setattr(Images, "take", refuse)
    step = SwiftBrush.step

    def watched(self: Any, m: Any, batch: Batch, *rest: Any) -> Any:
        seen.append(batch)
        yield from step(self, m, batch, *rest)

    monkeypatch.setattr(SwiftBrush, "step", watched)
    method = SwiftBrush(sigma_init=2.5, guidance=2.0)
    made = distill(teacher, method, out=tmp_path / "run", budget=2, batch=4, progress=False)
    assert made.sampler.nfe == 1 and made.sample(3, progress=False).isfinite().all()
    assert len(seen) == 2 and all(b.x is None and b.noise is None and set(b.cond) == {"label"} for b in seen)
    with pytest.raises(InputError, match="data-free"):
        distill(teacher, method, tiny_data(), out=tmp_path / "b", budget=1)


def test_prompts_alone(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from fewstep.sources.diffusers import load_diffusers
    from tiny_models import stable_diffusion

    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "pipe")
    prompts = ["a red cat", "small house on a tree"]
    teacher = load_diffusers(tmp_path / "pipe", steps=2, prompts=prompts)
    teacher.pipeline = None
    method = SwiftBrush(guidance=4.5)
    m = models(method, teacher)
    batch = Batch(None, teacher.conds.draw(Noise.of(0, 2)))  # type: ignore[union-attr]
    names = []
    for update in method.step(m, batch, 0, Noise.of(0, 2)):
        m.networks[update.roles[0]].requires_grad_(True)
        losses: Any = update.loss()
        loss = losses if isinstance(losses, Tensor) else losses["loss"]
        loss.backward()
        names.append(update.roles)
        assert loss.isfinite() and any(p.grad is not None for p in m.networks[update.roles[0]].parameters())
        m.networks[update.roles[0]].requires_grad_(False)
    assert names == [("student",), ("fake",)] and m.teacher.wrapper.scale == 4.5


def test_the_fake_score_as_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    method = METHODS["own time, guided"]
    start = tiny()
    before = {k: v.clone() for k, v in start.denoiser.state_dict().items()}  # type: ignore[attr-defined]
    options: dict[str, Any] = {"lora": LoRA(2), "lora_roles": ("fake",)}
    made = run("lora", tmp_path, method=method, start=start, **options)
    tensors = bits(tmp_path)
    fake = [k for k in tensors if "roles/fake" in k]
    assert fake and all("lora_" in k for k in fake)
    assert any("lora_B" in k and float(tensors[k].abs().max()) > 0 for k in fake)
    assert not any("lora_" in k for k in tensors if "roles/student" in k)
    # Neither the student's training nor the fake score's moves the teacher.
    assert all(torch.equal(before[k], v) for k, v in start.denoiser.state_dict().items())  # type: ignore[attr-defined]
    assert not isinstance(made.denoiser, Adapted) and made.sampler.nfe == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    check_resume(name, METHODS[name], tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwiftBrush(guidance=-1.0), "guidance >= 0"),
        (lambda: SwiftBrush(times=(0.9, 0.1)), "0 <= from < to <= 1"),
        (lambda: SwiftBrush(times=(0.5,)), "0 <= from < to <= 1"),
        (lambda: SwiftBrush(fake_weight="snr"), "unknown weight"),  # type: ignore[arg-type]
        (lambda: SwiftBrush(steps=0), "steps >= 1"),
        (lambda: SwiftBrush(guidance=2.0).roles(guided(tiny(), 3.0)), "a CFG already"),
        (lambda: SwiftBrush(guidance=2.0).roles(replace(tiny(), conds=None)), "unconditional"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_an_unconditional_teacher_without_guidance(tmp_path: Path) -> None:
    method = SwiftBrush(sigma_init=2.5, guidance=1.0)
    roles = method.roles(replace(tiny(), conds=None))
    assert set(roles) == {"teacher", "fake", "student"} and not isinstance(roles["teacher"].start(), CFG)
    start = replace(tiny(), conds=None)
    made = train(start, method, Labelless(), out=tmp_path, budget=1, batch=4, progress=False)
    assert made.sampler.nfe == 1


class Labelless:
    """Batches without anything."""

    def __len__(self) -> int:
        return 8

    def take(self, ids: Tensor) -> Batch:
        return Batch(None, {})
