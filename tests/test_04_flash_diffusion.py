"""Flash Diffusion: the mixture of levels, the teacher's solution, the terms of each phase, any kind of condition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Classes, Cond, null
from fewstep.core.denoiser import CountingDenoiser, Precond, edm
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.network import network
from fewstep.core.noise import Noise
from fewstep.core.options import FitOptions
from fewstep.core.role import Models, Role
from fewstep.core.state import Run, load_tensors
from fewstep.data import load_data
from fewstep.distill.flash_diffusion import DISTANCES, FlashDiffusion, Scaled
from fewstep.errors import InputError
from fewstep.grid import own_grid, own_levels
from fewstep.guide import CFG, guided
from fewstep.loss.perceptual import distance_in
from fewstep.models.conditions import Need
from fewstep.models.frozen import frozen
from fewstep.models.lora import LoRA
from fewstep.solve.dpmpp import dpmpp
from fewstep.train import untrained
from fewstep.train.memory import estimate_memory
from test_04_gan import stock
from tiny_runs import STEADY, check_restart, run, tiny, tiny_data

PLAIN = FlashDiffusion(teacher_steps=8, distance="l2", adversarial=(0.0,) * 4, dmd=(0.0,) * 4)
FULL = FlashDiffusion(teacher_steps=8, optim=STEADY, critic=STEADY, hidden=8)
LAST = 0.99


class Exact(nn.Module):
    """A Gaussian's denoiser as a role, off by its weight; remembers where it was asked."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.problem = Mixture(torch.full((1, 1, 2, 2), 0.3), 0.36)
        self.shape, self.sigma_data = self.problem.shape, self.problem.sigma_data
        self.sigma_min, self.sigma_max = self.problem.sigma_min, self.problem.sigma_max
        self.weight = nn.Parameter(torch.tensor(off, dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        self.seen.append((x.detach(), torch.as_tensor(sigma).detach(), torch.is_grad_enabled()))
        return self.problem(x, sigma, cond) + self.weight.to(x.dtype)


def models(off: float = 0.0, progress: float = 0.0) -> Models:
    m = build_models({"teacher": Role(Exact), "student": Role(lambda: Exact(off))}, "cpu")
    m.progress = progress
    return m


def only(method: FlashDiffusion, m: Models, x0: Tensor, i: int = 0) -> Any:
    (update,) = method.step(m, Batch(x0, {}), i, Noise.of(3, len(x0)))
    return update


# ---- levels


def test_the_mixture_is_the_papers_and_moves_with_the_phases() -> None:
    method = FlashDiffusion()
    for phase, modes in enumerate([(0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2)]):
        mass = torch.tensor(
            [sum(w * math.exp(-((k - 8 * j) ** 2) / 0.5) for j, w in enumerate(modes)) for k in range(32)]
        )
        assert float((torch.tensor(method.chances(phase)) - mass / mass.sum()).abs().max()) < 1e-6
        peaks = [method.chances(phase)[8 * j] for j in range(4)]
        assert [p > 0.01 for p in peaks] == [w > 0 for w in modes]
    assert [method.phase(p) for p in (0.0, 0.24, 0.25, 0.5, 0.99, 1.0)] == [0, 0, 1, 2, 3, 3]
    # The modes are the levels that four evaluations of the sampler use.
    fine, coarse = own_grid(tiny().denoiser, 32), FlashDiffusion(steps=4).sampler(tiny()).levels
    assert float((fine[::8] - coarse).abs().max()) < 1e-9


@pytest.mark.parametrize("phase", [0, 1, 3])
def test_every_level_is_met_as_often_as_it_is_probable(phase: int) -> None:
    method = FlashDiffusion()
    chances = torch.tensor(method.chances(phase), dtype=torch.float64)
    for first in (0, 12345):
        m = models()
        m.seed = first
        met = (
            torch.bincount(torch.tensor([method.start(m, first + i, phase) for i in range(1000)]), minlength=32) / 1000
        )
        assert float((met - chances).abs().max()) < 0.01
    made = []
    for seed in (0, 0, 1):
        m.seed = seed
        made.append([method.start(m, i, phase) for i in range(30)])
    assert made[0] == made[1] != made[2], "the run's seed says where the sequence starts"


# ---- the teacher's solution


def test_the_student_starts_where_the_teacher_does_and_is_to_land_where_it_lands() -> None:
    x0 = Exact().problem.draw(64)
    for i in range(12):
        m = models(0.1)
        j = PLAIN.start(m, i, 0)
        loss = only(PLAIN, m, x0, i).loss()["loss"]
        levels = own_grid(m.student, 8)
        n = Noise.of(3, 64).normal((1, 2, 2), "n", dtype=torch.float64)
        x = (0 if j == 0 else x0) + levels[j] * n
        (own, sigma, _) = m.student.seen[-1]
        assert float((own - x).abs().max()) < 1e-9 and bool((sigma == levels[j]).all())
        asked = [float(s) for _, s, _ in m.teacher.seen]
        assert asked == pytest.approx(levels[j:-1].tolist()), "one evaluation of the teacher for each step that is left"
        assert not any(grad for *_, grad in m.teacher.seen)
        # The published solver on the same levels.
        aim = dpmpp(levels[j:], 2)(Exact().problem, x)
        want = (m.student.problem(x, sigma) + 0.1 - aim).square().mean()
        assert float(loss.detach()) == pytest.approx(float(want), rel=1e-6)
    first = replace(PLAIN, modes=(1.0, 0, 0, 0) * 4)
    m = models()
    only(replace(first, variance=1e-3), m, x0, 0).loss()
    assert float((m.student.seen[-1][0] - 80 * n).abs().max()) == 0, "pure noise has no data in it"


@pytest.mark.parametrize("features", ["own", "teacher"])
def test_lpips_sees_what_the_student_and_the_teacher_make(features: str) -> None:
    data = load_data("digits")
    teacher = untrained(data, "resmlp", width=16, embedding=8, blocks=1)
    method = replace(PLAIN, distance="lpips", features=features)
    m = build_models(method.roles(teacher), "cpu")
    m.teacher.requires_grad_(False)
    for p in m.student.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    part = data.take(torch.arange(3))
    made: list[Tensor] = []
    m.student.register_forward_hook(lambda module, args, out: made.append(out.detach()))
    m.student.requires_grad_(True)
    (update,) = method.step(m, part, 1, Noise.of(3, 3))
    found = update.loss()["distil"]  # type: ignore[index]
    table, n = method.start(m, 1, 0), Noise.of(3, 3).normal((1, 8, 8), "n")
    levels = own_grid(m.student, 8)
    x = (0 if table == 0 else part.x) + float(levels[table]) * n
    aim = dpmpp(levels[table:], 2)(m.teacher, x, part.cond)
    # Roots of tiny squares follow the rounding of a tensor in another place.
    want = float(distance_in(m, "lpips")(made[0], aim).mean())
    assert float(found) == pytest.approx(want, rel=1e-4) and want > 0
    (loud,) = method.step(m, part, 1, Noise.of(3, 3))
    loud.loss()["loss"].backward()  # type: ignore[index]
    assert any(bool(p.grad.abs().sum() > 0) for p in m.student.parameters() if p.grad is not None)
    assert all(p.grad is None for p in m.networks["distance"].parameters())
    assert "distance" not in replace(method, distil=0.0, dmd=(0.1,) * 4).roles(teacher), "nobody asks it"


def test_distances_do_not_grow_with_the_picture() -> None:
    x0 = Exact().problem.draw(8)
    fine = replace(PLAIN, teacher_steps=8)
    m = models(0.1)
    only(fine, m, x0).loss()
    parts = {d: float(only(replace(fine, distance=d), models(0.1), x0).loss()["distil"]) for d in ("l1", "l2", "huber")}
    assert parts["l1"] ** 2 <= parts["l2"] and parts["l1"] > 0
    # A mean of roots lies below the root of the mean.
    assert parts["l1"] - 0.00054 <= parts["huber"] <= parts["l2"] ** 0.5


def test_huber_is_the_error_of_a_picture_of_any_size_and_its_slope_does_not_fade() -> None:
    for side, error in ((4, 0.5), (32, 0.5), (4, 0.05)):
        x = torch.full((3, 1, side, side), error, dtype=torch.float64, requires_grad=True)
        found = DISTANCES["huber"](x, torch.zeros_like(x))
        assert float(found.detach()) == pytest.approx(error, abs=0.00054)
        (slope,) = torch.autograd.grad(found, x)
        assert float(slope.sum()) == pytest.approx(1, abs=1e-3)


def test_a_scale_for_each_sample_is_guidance_at_that_scale() -> None:
    teacher = tiny()
    wrapper = CFG(teacher.denoiser, 2.0)
    w = torch.tensor([0.0, 1.0, 3.0, 7.5])
    x, sigma = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.7)
    cond = {"label": torch.tensor([0, 1, 2, 1])}
    with torch.no_grad():
        made = Scaled(frozen(wrapper), w)(x, sigma, cond)
        for k in range(4):
            one = CFG(teacher.denoiser, float(w[k]))(
                x[k : k + 1], sigma[k : k + 1], {"label": cond["label"][k : k + 1]}
            )
            assert float((made[k : k + 1] - one).abs().max()) < 1e-5
        assert float((made[0] - teacher.denoiser(x, sigma, null(cond))[0]).abs().max()) < 1e-5
        assert torch.allclose(Scaled(frozen(wrapper), w)(x, 0.7, cond), made, atol=1e-6)
    method = replace(FULL, guidance=(3.0, 13.0))
    m = build_models(method.roles(teacher), "cpu")
    drawn = method.guide(m, Noise.of(0, 4000)).w  # type: ignore[attr-defined]
    assert 3 <= float(drawn.min()) < 3.1 and 12.9 < float(drawn.max()) <= 13
    assert FULL.guide(m, Noise.of(0, 4)) is m.teacher


# ---- the further terms


def test_dmd_is_zero_where_student_and_teacher_agree_and_pulls_towards_the_teacher() -> None:
    x = Exact().problem.draw(64).requires_grad_(True)
    noise = Noise.of(1, 64)
    assert float(FULL.matching(models(), x, {}, noise).detach()) == 0
    m = models(0.2)
    (slope,) = torch.autograd.grad(FULL.matching(m, x, {}, noise), x)
    (y, sigma, grad), (_, again, _) = m.teacher.seen[-1], m.student.seen[-1]
    assert not grad and torch.equal(sigma, again) and m.student.weight.grad is None
    d_teacher = m.teacher.problem(y, sigma)
    scale = (x.detach() - d_teacher).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1) + 1e-5
    want = 2 * 0.2 / scale / x.numel()
    assert float((slope / want - 1).abs().max()) < 1e-3
    places = own_levels(m.student, noise.uniform((), "level", dtype=torch.float64))
    assert torch.equal(places, sigma) and float(sigma.min()) >= 0.002 and float(sigma.max()) <= 80


@pytest.mark.parametrize(
    ("progress", "roles", "parts"),
    [
        (0.0, ["student"], {"distil"}),
        (0.3, ["student", "discriminator"], {"distil", "adversarial", "dmd"}),
        (LAST, ["student", "discriminator"], {"distil", "adversarial", "dmd"}),
    ],
)
def test_terms_turn_on_by_phase_and_cost_nothing_before(progress: float, roles: list[str], parts: set[str]) -> None:
    m = build_models(FULL.roles(tiny()), "cpu")
    m.progress = progress
    batch = Batch(tiny_data().pixels[:4], {"label": torch.arange(4) % 3})
    found = []
    for update in FULL.step(m, batch, 2, Noise.of(0, 4)):
        found.append(update.role)
        m.networks[str(update.role)].requires_grad_(True)
        made = update.loss()
        made["loss"].backward()
        if update.role == "student":
            assert set(made) == parts | {"loss"}
            assert float(made["loss"].detach()) == pytest.approx(sum(float(made[p]) for p in parts), rel=1e-5)
        for name, net in m.networks.items():
            graded = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters()]
            assert any(graded) if name == update.role else not any(graded), name
            net.requires_grad_(False).zero_grad()
    assert found == roles
    assert "discriminator" not in PLAIN.roles(tiny())


def test_a_run_without_the_distance_asks_the_teacher_for_no_solution() -> None:
    method = replace(PLAIN, distil=0.0, dmd=(1.0,) * 4)
    m = models(0.1)
    only(method, m, Exact().problem.draw(4)).loss()
    assert len(m.teacher.seen) == 1


@pytest.mark.parametrize("real", ["data", "teacher"])
def test_what_counts_as_real(real: Any) -> None:
    method = replace(FULL, real=real, judged_at=(0.0,), adversarial=(1.0,) * 4)
    m = build_models(method.roles(tiny()), "cpu")
    x0 = tiny_data().pixels[:4]
    batch = Batch(x0, {"label": torch.arange(4) % 3})
    shown: list[Tensor] = []
    m.teacher.net.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    asked: list[int] = []
    m.student.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    student, discriminator = [(update, update.loss())[0] for update in method.step(m, batch, 0, Noise.of(0, 4))]
    assert (student.role, discriminator.role, asked) == ("student", "discriminator", [4])
    scaled = x0 / (m.teacher.sigma_data**2 + m.teacher.sigma_min**2) ** 0.5
    assert (float((shown[-1] - scaled).abs().max()) < 0.05) == (real == "data")


# ---- conditions and networks of every kind


@dataclass(frozen=True)
class EnlargingConfig:
    """Channels of a network that enlarges pictures."""

    channels: int = 8


@network("test-enlarging", EnlargingConfig)
class Enlarging(nn.Module):
    """Reads a smaller picture, ``cond["low"]`` (B, 1, 2, 2), beside the noised one."""

    def __init__(self, config: EnlargingConfig) -> None:
        super().__init__()
        self.config, self.taps = config, {"bottleneck": "middle"}
        self.needs = {"low": Need((1, 2, 2))}
        self.enter, self.middle = nn.Conv2d(2, config.channels, 3, padding=1), nn.SiLU()
        self.leave = nn.Conv2d(config.channels, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        low = nn.functional.interpolate(cond["low"], scale_factor=2.0)
        out: Tensor = self.leave(self.middle(self.enter(torch.cat([x, low], 1)) + time.reshape(-1, 1, 1, 1)))
        return out


def play(method: FlashDiffusion, teacher: Generator, cond: dict[str, Tensor], progress: float = LAST) -> Models:
    """Both sides of one iteration, with gradients; every trained weight moves."""
    m = build_models(method.roles(teacher), "cpu")
    m.progress = progress
    x0 = Noise.of(0, 2).normal(teacher.denoiser.shape, "x0")
    for update in method.step(m, Batch(x0, cond), 0, Noise.of(0, 2)):
        m.networks[str(update.role)].requires_grad_(True)
        made = update.loss()
        assert isinstance(made, dict) and bool(made["loss"].isfinite())
        made["loss"].backward()
        assert any(
            bool(p.grad.abs().sum() > 0) for p in m.networks[str(update.role)].parameters() if p.grad is not None
        )
        m.networks[str(update.role)].requires_grad_(False)
    return m


@pytest.mark.parametrize("name", ["sd", "sd3", "dit"])
def test_text_and_classes_on_unet_and_transformers_with_a_range_of_guidance(name: str) -> None:
    method = replace(FULL, guidance=(3.0, 13.0), teacher_steps=4)
    teacher = stock(name)
    assert teacher.conds is not None
    cond = teacher.conds.draw(Noise.of(0, 2))
    m = play(method, teacher, cond)
    table = method.sampler(teacher)
    x = teacher.start_std(table) * Noise.of(1, 2).normal(teacher.denoiser.shape, "start")
    counted = CountingDenoiser(m.student)
    assert bool(table(counted, x, cond, noise=Noise.of(2, 2)).isfinite().all()) and counted.nfe == 4


def test_a_lower_picture_or_a_mask_passes_through_as_any_condition() -> None:
    torch.manual_seed(0)
    D = edm(Enlarging(EnlargingConfig()), (1, 4, 4)).requires_grad_(False)

    class Lows:
        def draw(self, noise: Noise) -> dict[str, Tensor]:
            return {"low": noise.normal((1, 2, 2), "low")}

        def check(self, cond: Cond) -> None:
            pass

    teacher = Generator(D, FULL.sampler(tiny()), None, Lows())
    m = play(FULL, teacher, Lows().draw(Noise.of(0, 2)))
    x = torch.zeros(2, 1, 4, 4)
    a, b = (m.student(x, torch.ones(2), Lows().draw(Noise.of(seed, 2))) for seed in (0, 1))
    assert float((a - b).abs().max()) > 1e-4


# ---- runs


@pytest.mark.parametrize(
    "method", [FULL, replace(FULL, guidance=(1.5, 4.0), adversarial=(0.3,) * 2, dmd=(0.3,) * 2, modes=(0.25,) * 8)]
)
def test_a_resumed_run_and_micro_batches(method: FlashDiffusion, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": method, "start": tiny()}
    check_restart(tmp_path, lambda out, **more: run("FlashDiffusion", out, **options, **more), far=5e-5)
    made = Generator.load(tmp_path / "whole")
    assert made.sampler.nfe == 4 and made.sample(2, progress=False).shape == (2, 1, 4, 4)


def test_lora_with_a_range_of_guidance_leaves_the_discriminator_a_full_network(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    method = replace(FULL, guidance=(1.5, 4.0))
    made = run("FlashDiffusion", tmp_path, method=method, lora=LoRA(rank=2))
    roles = Run(tmp_path).checkpoints()[-1] / "roles"
    names = load_tensors(roles / "discriminator.safetensors")
    assert names and not any("lora" in name for name in names)
    assert all("lora" in name for name in load_tensors(roles / "student.safetensors"))
    assert isinstance(made.denoiser, Precond) and Generator.load(tmp_path).fingerprint() == made.fingerprint()


def test_memory_is_told_before_a_run() -> None:
    found = estimate_memory(FULL, tiny(), tiny_data(), FitOptions(batch=8))
    assert set(found.roles) == {"teacher", "student", "discriminator"} and found.activations > 0


def unconditional() -> Generator:
    return replace(tiny(), conds=None)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: FlashDiffusion(steps=0), "steps >= 1"),
    (lambda: FlashDiffusion(components=40), "components <= teacher_steps"),
    (lambda: FlashDiffusion(variance=0.0), "variance > 0"),
    (lambda: FlashDiffusion(variance=float("inf")), "variance > 0"),
    (lambda: FlashDiffusion(distil=float("nan")), "finite weights >= 0"),
    (lambda: FlashDiffusion(dmd=(0.0, 0.3, 0.5, float("nan"))), "finite weights >= 0"),
    (lambda: FlashDiffusion(guidance=(1.0,)), "the lowest and the highest of a range of scales"),  # type: ignore[arg-type]
    (lambda: FlashDiffusion(guidance=(1.0, float("nan"))), "a range of scales >= 0"),
    (lambda: FlashDiffusion(hidden=0), "hidden >= 1"),
    (lambda: FlashDiffusion(distance="lpips").roles(tiny()), "no packaged features for pictures"),
    (lambda: FlashDiffusion(dmd=(0.0, 0.3)), "4 in modes for each phase, got 4, 2 and 16"),
    (lambda: FlashDiffusion(modes=(0.25,) * 8), "got 4, 4 and 8"),
    (lambda: FlashDiffusion(modes=(0.0,) * 4 + (0.25,) * 12), "in each phase a mode above 0"),
    (lambda: FlashDiffusion(adversarial=(0.0, -0.1, 0.2, 0.3)), "weights >= 0"),
    (lambda: FlashDiffusion(distil=0.0), "one of its terms above 0 in each phase"),
    (lambda: FlashDiffusion(guidance=(7.0, 3.0)), "the lowest and the highest of a range of scales >= 0"),
    (lambda: FlashDiffusion(judged_at=()), "places within"),
    (lambda: FlashDiffusion(game="wasserstein"), "unknown adversarial loss"),  # type: ignore[arg-type]
    (lambda: FlashDiffusion(distance="dreamsim"), "unknown distance 'dreamsim'"),  # type: ignore[arg-type]
    (lambda: FlashDiffusion(real="noise"), "unknown kind of real pictures"),  # type: ignore[arg-type]
    (lambda: FlashDiffusion(guidance=(3.0, 13.0)).roles(unconditional()), "this one is unconditional"),
    (lambda: FlashDiffusion(taps=("block9",)).roles(tiny()), "unknown feature tap 'block9'"),
    (
        lambda: FlashDiffusion(guidance=(3.0, 13.0)).roles(
            replace(tiny(), denoiser=CountingDenoiser(tiny().denoiser), conds=Classes((1.0,)))
        ),
        "cannot guide a CountingDenoiser",
    ),
    (lambda: FlashDiffusion().roles(replace(tiny(), denoiser=Exact().problem)), "Mixture has no weights to train"),
    (lambda: guided(unconditional(), 3.0), "unconditional"),
    (lambda: next(PLAIN.step(models(), Batch(None, {}), 0, Noise.of(0, 2))), "got None"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
