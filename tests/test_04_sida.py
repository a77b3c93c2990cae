"""SiDA: the encoder as discriminator, the weights of its terms; SiD under guidance, on flows, and at its limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.core.cond import Batch
from fewstep.core.denoiser import Precond
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW, widen
from fewstep.core.role import Models
from fewstep.distill.front import distill
from fewstep.distill.sid import SiD, distances, sid_loss, within
from fewstep.distill.sida import SiDA, patch_logits
from fewstep.errors import InputError
from fewstep.guide import CFG, guided
from fewstep.loss.draw import KarrasUniform, LogNormal
from fewstep.models import ResMLP, ResMLPConfig
from fewstep.models.frozen import Frozen, network_under
from fewstep.train import untrained
from tiny_runs import STEADY, bits, check_resume, differing, run, tiny, tiny_data

LOUD = {"gan": 0.1, "critic": 10.0}
METHODS: dict[str, Any] = {
    "SiDA": SiDA(student=STEADY, fake=STEADY, **LOUD),
    "SiDA after SiD": SiDA(student=STEADY, fake=STEADY, gan_after=0.5, **LOUD),
    "SiD with guidance": SiD(student=STEADY, fake=STEADY, kappa_train=1.5, kappa_fake=1.5, kappa_teacher=1.5),
}


def unet() -> Generator:
    made = tiny("unet", channels=8, multipliers=(1, 2), blocks=1, attention=())
    return made


def models(method: Any, start: Generator | None = None) -> Models:
    """Student, fake score and teacher, each with weights of its own."""
    m = build_models(method.roles(start or tiny()), "cpu")
    for k, name in enumerate(("fake", "student")):
        g = torch.Generator().manual_seed(k)
        for p in m.networks[name].parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=g)
    return m


def batch() -> Batch:
    return tiny_data().take(torch.arange(12))


# ---- the encoder as discriminator


def test_logits_are_means_over_the_channels() -> None:
    g = torch.Generator().manual_seed(0)
    for shape, dim in (((3, 5), 1), ((3, 7, 5), 2), ((3, 5, 2, 4), 1)):
        feature = torch.randn(shape, generator=g)
        found = patch_logits({"tap": feature})
        assert found.shape == (3, feature[0].numel() // 5)
        assert torch.equal(found, feature.mean(dim).reshape(3, -1))
    with pytest.raises(InputError, match="expected"):
        patch_logits({"tap": torch.zeros(3, 1, 1, 1, 1)})


def test_the_encoders_lowest_resolution_is_judged() -> None:
    assert SiDA().tap_of(network_under(unet().denoiser)) == "encoder2"
    assert SiDA().tap_of(network_under(tiny().denoiser)) == "bottleneck"
    assert SiDA(tap="block0").tap_of(network_under(tiny().denoiser)) == "block0"


def test_the_gan_adds_no_network_and_no_parameter() -> None:
    plain, adversarial = SiD().roles(tiny()), SiDA().roles(tiny())
    assert plain.keys() == adversarial.keys()
    for name, role in plain.items():
        assert [p.shape for p in role.start().parameters()] == [p.shape for p in adversarial[name].start().parameters()]


@pytest.mark.parametrize("start", [tiny, unet])
def test_the_losses_are_the_written_out_ones(start: Any) -> None:
    method, noise, given = SiDA(gan=0.3, critic=0.7), Noise.of(5, 12), batch()
    m = models(method, start())
    fake, student = (u.loss() for u in method.step(m, given, 0, noise))
    tap, cond = method.tap_of(m.fake), given.cond
    x = m.student(2.5 * noise.normal(m.student.shape, "fake", "z"), 2.5, cond)
    own = noise.fold("fake")
    sigma, weight = LogNormal()(own, m.fake.sigma_data)
    n = widen(sigma, x) * own.normal(m.student.shape, "n")
    real, made = (patch_logits(m.fake.activations(y + n, sigma, cond, (tap,))) for y in (given.x, x))
    entropy = 0.5 * (-F.logsigmoid(real).mean(1) - F.logsigmoid(-made).mean(1))
    score = (widen(weight, x) * (m.fake(x + n, sigma, cond) - x).square()).mean()
    # Summed over 16 pixels the score's loss stands beside the entropy itself.
    assert float(16 * fake["loss"]) == pytest.approx(float(16 * score + 0.7 * (weight * entropy).mean()), rel=1e-5)

    x = m.student(2.5 * noise.normal(m.student.shape, "student", "z"), 2.5, cond)
    own = noise.fold("student")
    s, _ = KarrasUniform(top=0.8)(own, m.student.sigma_data)
    y = x + widen(s, x) * own.normal(m.student.shape, "n")
    d_teacher, d_fake = m.teacher(y, s, cond), m.fake(y, s, cond)
    logits = patch_logits(m.fake.activations(y, s, cond, (tap,)))
    adversarial = (-F.logsigmoid(logits.clamp(-10, 10)).mean(1) / distances(x, d_teacher)).mean()
    want = sid_loss(x, d_teacher, d_fake, 1.0)["loss"] + 0.3 * adversarial
    assert float(student["loss"]) == pytest.approx(float(want), rel=1e-5)
    assert student["adversarial"] > 0


def test_each_side_trains_its_own_network_and_pulls_its_own_way() -> None:
    method, given = SiDA(**LOUD), batch()
    m = models(method)
    judged, made = method.step(m, given, 0, Noise.of(1, 12))
    m.fake.requires_grad_(True)
    judged.loss()["loss"].backward()  # type: ignore[index]
    assert all(p.grad is None for p in m.student.parameters())
    before = judged.loss()["discriminator"]  # type: ignore[index]
    m.fake.requires_grad_(False)
    m.student.requires_grad_(True)
    made.loss()["loss"].backward()  # type: ignore[index]
    assert all(float(p.grad.abs().sum()) > 0 for n, p in m.student.named_parameters() if "embed" not in n)
    m.fake.requires_grad_(True)
    # So much of the critic that its gradient is not that of the score.
    alone = SiDA(gan=0.1, critic=1e6)
    m.fake.zero_grad()
    update = next(alone.step(m, given, 0, Noise.of(1, 12)))
    update.loss()["loss"].backward()  # type: ignore[index]
    norm = torch.stack([p.grad.square().sum() for p in m.fake.parameters() if p.grad is not None]).sum().sqrt()
    with torch.no_grad():
        for p in m.fake.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad / norm
    assert float(update.loss()["discriminator"]) < float(before)  # type: ignore[index]


def test_the_gan_starts_at_its_share_of_the_budget() -> None:
    method = SiDA(gan_after=0.5)
    m = models(method)
    for progress, there in ((0.0, False), (0.49, False), (0.5, True), (1.0, True)):
        m.progress = progress
        fake, student = (u.loss() for u in method.step(m, batch(), 0, Noise.of(1, 12)))
        assert (isinstance(fake, dict) and "discriminator" in fake) == there == ("adversarial" in student)


def test_without_the_gan_it_is_sid_in_every_bit(tmp_path: Path) -> None:
    run("SiD", tmp_path / "a", method=SiD(student=STEADY, fake=STEADY))
    run("SiD", tmp_path / "b", method=SiDA(gan=0.0, student=STEADY, fake=STEADY))
    assert differing(bits(tmp_path / "a"), bits(tmp_path / "b")) == []
    run("SiD", tmp_path / "c", method=METHODS["SiDA"])
    assert differing(bits(tmp_path / "a"), bits(tmp_path / "c"))


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    check_resume(name, METHODS[name], tmp_path)


# ---- guidance


def test_a_guided_teacher_is_matched_as_it_is(tmp_path: Path) -> None:
    start = guided(tiny(), 3.0)
    m = models(SiD(), start)
    assert isinstance(m.teacher, Frozen) and isinstance(m.fake, Precond) and isinstance(m.student, Precond)
    x, cond = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), batch().cond
    assert torch.equal(m.teacher(x, 1.0, cond), start.denoiser(x, 1.0, cond))
    made = distill(start, SiD(), out=tmp_path, budget=2, batch=4, progress=False)
    assert isinstance(made.denoiser, Precond) and made.sampler.nfe == 1


def estimates(method: SiD, m: Models) -> list[Tensor]:
    x, cond = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), batch().cond
    with torch.no_grad():
        scores = [method.fake_score(m, method.kappa_train), method.fake_score(m, method.kappa_fake), m.teacher]
        return [D(x, 1.0, cond) for D in scores]


def test_the_scales_guide_what_they_name() -> None:
    # Two of them at 1, and the third as CFG by hand.
    for key, place in (("kappa_train", 0), ("kappa_fake", 1), ("kappa_teacher", 2)):
        method = SiD(**{key: 2.5})  # type: ignore[arg-type]
        m = models(method)
        own = network_under(tiny().denoiser)
        for k, found in enumerate(estimates(method, m)):
            D = own if k == 2 else m.fake
            x, cond = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), batch().cond
            with torch.no_grad():
                guided_by_hand, plain = CFG(D, 2.5)(x, 1.0, cond), D(x, 1.0, cond)
            assert float((guided_by_hand - plain).abs().max()) > 1e-3
            assert torch.equal(found, guided_by_hand if k == place else plain)


def test_equal_guidance_of_equal_scores_moves_nothing() -> None:
    for method in (SiD(kappa_fake=2.0, kappa_teacher=2.0), SiDA(gan=0.0, kappa_fake=2.0, kappa_teacher=2.0)):
        m = build_models(method.roles(tiny()), "cpu")
        _, update = method.step(m, Batch(None, batch().cond), 0, Noise.of(1, 12))
        losses = update.loss()
        assert abs(float(losses["loss"])) < 1e-6 and float(losses["fisher"]) < 1e-12  # type: ignore[index]


def test_the_gan_under_guidance_reads_the_unguided_encoder() -> None:
    method = SiDA(kappa_train=2.0, kappa_fake=2.0, kappa_teacher=2.0)
    m = models(method)
    x, sigma, cond = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(12), batch().cond
    estimate, logits = method.judged(m, x, sigma, cond, 2.0)
    assert torch.equal(estimate, CFG(m.fake, 2.0)(x, sigma, cond))
    assert torch.equal(logits, method.judged(m, x, sigma, cond, 1.0)[1])


# ---- flows and levels


def flow() -> Generator:
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    made = Precond(net, (1, 4, 4), path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    return replace(tiny(), denoiser=made.eval())


@pytest.mark.parametrize("method", [SiD(), SiD(sigma_init=1e8), SiDA()])
def test_flow_teachers(method: Any, tmp_path: Path) -> None:
    data = tiny_data() if method.needs_data else None
    made = distill(flow(), method, data, out=tmp_path, budget=2, batch=4, progress=False)
    assert made.sample(3, progress=False).isfinite().all() and made.sampler.start == method.sigma_init
    assert Generator.load(tmp_path).denoiser.describe() == flow().denoiser.describe()  # type: ignore[attr-defined]


def test_levels_are_held_within_the_teachers() -> None:
    D = network_under(untrained(tiny_data(), "resmlp", width=8, embedding=8).denoiser)
    D.sigma_min, D.sigma_max = 0.1, 2.0
    free, _ = KarrasUniform(top=0.8)(Noise.of(0, 500), 0.5)
    sigma, _ = within(KarrasUniform(top=0.8), Noise.of(0, 500), D)
    assert torch.equal(sigma, free.clamp(0.1, 2.0)) and float(free.max()) > 2 > 0.1 > float(free.min())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SiD(sigma_init=0.0), "SiD needs sigma_init > 0"),
        (lambda: SiDA(alpha=float("nan")), "SiDA needs sigma_init > 0 and a finite alpha"),
        (lambda: SiD(kappa_fake=-1.0), "kappa_fake >= 0"),
        (lambda: SiD(kappa_train=float("inf")), "kappa_train >= 0"),
        (lambda: SiD(sigma_init=200.0).roles(tiny()), "outside of the teacher's levels, 0.002 to 80"),
        (lambda: SiD(kappa_teacher=2.0).roles(guided(tiny(), 2.0)), "would guide a CFG again"),
        (lambda: SiD(kappa_fake=2.0).roles(replace(tiny(), conds=None)), "this one is unconditional"),
        (lambda: SiDA(gan=-1.0), "gan >= 0"),
        (lambda: SiDA(critic=float("inf")), "critic >= 0"),
        (lambda: SiDA(gan_after=1.0), "gan_after within"),
        (lambda: SiDA(tap="nowhere").roles(tiny()), "unknown feature tap"),
        (lambda: [*SiDA().step(models(SiDA()), Batch(None, batch().cond), 0, Noise.of(0, 12))], "needs pictures"),
        (lambda: distill(tiny(), SiDA(), out="unused", budget=1), "learns from data"),
        (lambda: distill(tiny(), SiDA(gan=0.0), tiny_data(), out="unused", budget=1), "data-free"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
