"""Imagine Flash: points that the student reaches itself, targets from its own x0, and the true noise of the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Precond, start_std
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import FitOptions
from fewstep.core.path import DDPM, FLOW, TRIG, VP
from fewstep.core.role import Models, Role
from fewstep.core.state import Run, load_tensors
from fewstep.distill import distill
from fewstep.distill.imagine_flash import ImagineFlash, corrected_ddim
from fewstep.errors import InputError
from fewstep.grid import own_grid, own_levels, own_shares
from fewstep.guide import guided
from fewstep.models import ResMLP, ResMLPConfig
from fewstep.models.lora import LoRA
from fewstep.solve.euler import euler
from fewstep.train.memory import estimate_memory
from test_04_gan import stock
from tiny_runs import STEADY, check_restart, run, tiny, tiny_data

METHOD = ImagineFlash(optim=STEADY, teacher_steps=2)
WITH_GAN = ImagineFlash(optim=STEADY, critic=STEADY, teacher_steps=2, gan=0.2, r1=0.1, hidden=8)


class Exact(nn.Module):
    """A mixture's denoiser as a role with one weight; remembers where it was asked."""

    def __init__(self, problem: Mixture, path: Any = None) -> None:
        super().__init__()
        self.problem, self.shape, self.sigma_data = problem, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = problem.sigma_min, problem.sigma_max
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor, bool]] = []
        if path is not None:
            self.path = path

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        self.seen.append((x.detach(), torch.as_tensor(sigma).detach(), torch.is_grad_enabled()))
        return self.problem(x, sigma, cond) + self.weight.to(x.dtype)


def gaussian(spread: float = 0.6, top: float = 80.0) -> Mixture:
    return Mixture(torch.full((1, 1, 2, 2), 0.3), spread**2, sigma_max=top)


def models(student: Mixture, teacher: Mixture | None = None, path: Any = None) -> Models:
    roles = {
        "teacher": Role(lambda: Exact(teacher or student, path)),
        "student": Role(lambda: Exact(student, path)),
    }
    return build_models(roles, "cpu")


def only(method: ImagineFlash, m: Models, n: int = 64, x0: Tensor | None = None) -> Any:
    (update,) = method.step(m, Batch(x0, {}), 0, Noise.of(3, n))
    return update


def with_path(path: Any, predicts: Any, top: float, low: float = 0.03, **fields: Any) -> Generator:
    net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
    D = Precond(net, (1, 4, 4), path=path, predicts=predicts, sigma_min=low, sigma_max=top, **fields)
    return replace(tiny(), denoiser=D)


# ---- levels


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_levels_are_even_in_the_time_of_the_teachers_own_path(steps: int) -> None:
    cases = [
        (with_path(FLOW(shift=3.0), "velocity", 1e8).denoiser, FLOW(shift=3.0)),
        (with_path(VP, "noise", 80.0).denoiser, VP),
        (with_path(DDPM, "noise", float(DDPM.levels[-1])).denoiser, DDPM),
        (tiny().denoiser, TRIG(tiny().denoiser.sigma_data)),
        (gaussian(), TRIG(gaussian().sigma_data)),
    ]
    for D, path in cases:
        levels = own_grid(D, steps)  # type: ignore[arg-type]
        assert levels.shape == (steps + 1,) and levels[0] == D.sigma_max and levels[-1] == 0
        ends = path.at(torch.tensor([D.sigma_min, D.sigma_max], dtype=torch.float64))
        even = torch.linspace(float(ends[1]), float(ends[0]), steps + 1, dtype=torch.float64)
        assert float((path.at(levels[:-1]) - even[:-1]).abs().max()) < 1e-6 * float(ends[1])
        place = own_levels(D, torch.tensor([0.0, 1.0], dtype=torch.float64))  # type: ignore[arg-type]
        assert place.tolist() == [D.sigma_min, D.sigma_max], "the ends are exact"
        shares = torch.linspace(0, 1, 7, dtype=torch.float64)
        back = own_shares(D, own_levels(D, shares))  # type: ignore[arg-type]
        assert float((back - shares).abs().max()) < 1e-6 and back[0] == 0 and back[-1] == 1


# ---- noise correction


@pytest.mark.parametrize("top", [5.0, 14.6, 80.0])
def test_noise_correction_adds_what_ddim_lacks(top: float) -> None:
    problem = gaussian(top=top)
    levels = own_grid(problem, 3)
    x = top * Noise.of(0, 200).normal((1, 2, 2), "x", dtype=torch.float64)
    own, plain = corrected_ddim(levels, top), euler(levels)
    D, b = problem(x, top), float(levels[1])
    first = own[0:1](problem, x)
    assert float((first - (D + b * x / top)).abs().max()) < 1e-9, "the noise of the start is kept"
    assert float((first - plain[0:1](problem, x) - b / top * D).abs().max()) < 1e-9
    assert own.nfe == 3 and own.end == 0 and not own.noisy
    assert float((corrected_ddim(levels, None)(problem, x) - plain(problem, x)).abs().max()) < 1e-12
    # From pure noise there is nothing to correct, and one step has no noise to keep.
    pure = own_grid(gaussian(top=1e8), 3)
    y = 1e8 * x / top
    gap = corrected_ddim(pure, 1e8)(problem, y) - euler(pure)(problem, y)
    assert float(gap.abs().max()) < 1e-5
    one = own_grid(problem, 1)
    assert torch.equal(corrected_ddim(one, top)(problem, x), D)


def test_after_the_corrected_step_a_point_of_data_has_the_law_of_noised_data() -> None:
    point = Mixture(torch.full((1, 1, 2, 2), 0.3), 1e-12, sigma_max=5.0)
    levels = torch.tensor([5.0, 2.0, 0.0], dtype=torch.float64)
    x = 5.0 * Noise.of(0, 20000).normal((1, 2, 2), "x", dtype=torch.float64)
    b = float(levels[1])
    on = corrected_ddim(levels, 5.0)[0:1](point, x)
    assert float(on.mean()) == pytest.approx(0.3, abs=0.02) and float(on.std()) == pytest.approx(b, rel=0.02)
    off = euler(levels)[0:1](point, x)
    assert float(off.mean()) == pytest.approx(0.3 * (1 - b / 5), abs=0.02), "plain DDIM loses some of the picture"
    assert abs(float(off.mean()) - 0.3) > 0.03


def test_the_shipped_sampler_knows_the_start_of_its_teacher() -> None:
    start = with_path(DDPM, "noise", 14.6, unit_start=True)
    std = start_std(start.denoiser, 14.6)
    assert std == pytest.approx(math.hypot(1, 14.6))
    table = ImagineFlash(steps=3).sampler(start)
    assert float(table.P[0, 0]) == pytest.approx(float(table.levels[1]) / std) and float(table.W[0, 0]) == 1
    off = ImagineFlash(steps=3, noise_correction=False).sampler(start)
    assert float(off.P[0, 0]) == pytest.approx(float(off.levels[1]) / 14.6) and off.nfe == table.nfe == 3


# ---- backward distillation


@pytest.mark.parametrize("top", [80.0, 1e8])
def test_training_points_are_where_the_student_itself_arrives(top: float) -> None:
    m = models(gaussian(top=top))
    m.student.weight.data += 0.1
    noise = Noise.of(3, 300)
    grid = own_grid(m.student, 3)
    k = noise.integers(0, 3, (), "level")
    x = METHOD.points(m, Batch(None, {}), grid.tolist(), k, noise)
    assert [grad for *_, grad in m.student.seen] == [False, False]
    start = top * noise.normal((1, 2, 2), "start")
    own = m.student.problem
    way = [start]
    for j in range(2):
        D = own(way[-1].double(), grid[j]).float() + 0.1
        way.append(D + float(grid[j + 1] / grid[j]) * (way[-1] - D))
    for j in range(3):
        assert int((k == j).sum()) > 50
        want = way[j][k == j]
        assert float((x[k == j] - want).abs().max()) < 1e-5 * float(want.abs().max())


def test_the_gradient_is_that_of_the_last_evaluation_alone() -> None:
    m = models(gaussian())
    update = only(METHOD, m)
    assert not any(grad for *_, grad in [*m.student.seen, *m.teacher.seen]), "rollout and targets are no one's gradient"
    before = len(m.student.seen)
    assert (before, m.teacher.seen) == (2, [])
    m.student.requires_grad_(True)
    total = update.loss()["loss"]
    total.backward()
    assert len(m.student.seen) == before + 1, "the pass that the target is made from is the one that is trained"
    assert [grad for *_, grad in m.teacher.seen] == [False, False]
    x, sigma, _ = m.student.seen[-1]
    target = METHOD.target(m, x, m.student(x, sigma).detach(), sigma, {}, Noise.of(3, 64))
    residual = m.student.problem(x, sigma) - target
    assert float(m.student.weight.grad) == pytest.approx(2 * float(residual.double().mean()), rel=1e-4)


def test_forward_training_noises_data_and_needs_it() -> None:
    method = replace(METHOD, backward=False)
    assert method.needs_data and not METHOD.needs_data and WITH_GAN.needs_data and not ImagineFlash.needs_data
    assert replace(WITH_GAN, gan=0.0).needs_data is False
    m = models(gaussian())
    x0 = gaussian().draw(300)
    noise = Noise.of(3, 300)
    grid, k = own_grid(m.student, 3), noise.integers(0, 3, (), "level")
    x = method.points(m, Batch(x0, {}), grid.tolist(), k, noise)
    assert m.student.seen == []
    unit = (x - x0)[k > 0] / grid[k][k > 0].reshape(-1, 1, 1, 1)
    assert float((unit - noise.normal((1, 2, 2), "n")[k > 0]).abs().max()) < 1e-5
    assert float((x[k == 0] - 80 * noise.normal((1, 2, 2), "start")[k == 0]).abs().max()) < 1e-4
    with pytest.raises(InputError, match="ImagineFlash is data-free"):
        distill(tiny(), METHOD, tiny_data(), out="/nonexistent", budget=1)
    with pytest.raises(InputError, match="ImagineFlash learns from data"):
        distill(tiny(), WITH_GAN, out="/nonexistent", budget=1)


# ---- shifted reconstruction


@pytest.mark.parametrize("again", ["own", "fresh"])
@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0])
def test_the_teacher_goes_on_from_the_students_own_picture_at_a_lower_place(shift: float, again: Any) -> None:
    method = replace(METHOD, shift=shift, teacher_steps=3, again=again)
    m = models(gaussian())
    noise, path = Noise.of(3, 64), TRIG(gaussian().sigma_data)
    sigma = own_grid(m.student, 3)[noise.integers(0, 3, (), "level")]
    made = 0.5 + 0.1 * noise.normal((1, 2, 2), "made", dtype=torch.float64)
    x = made + sigma.reshape(-1, 1, 1, 1) * noise.normal((1, 2, 2), "unit", dtype=torch.float64)
    method.target(m, x, made, sigma, {}, noise)
    first, level, _ = m.teacher.seen[0]
    low, top = (float(path.at(torch.tensor(s, dtype=torch.float64))) for s in (0.002, 80.0))
    places = [(path.at(s) - low) / (top - low) for s in (sigma, level)]
    assert float((places[1] - places[0] ** shift).abs().max()) < 1e-9
    assert bool((level[sigma == 80] == 80).all()), "the highest stays the highest"
    n = noise.normal((1, 2, 2), "again" if again == "fresh" else "unit", dtype=torch.float64)
    assert float((first - made - level.reshape(-1, 1, 1, 1) * n).abs().max()) < 1e-9
    assert len(m.teacher.seen) == 3 and bool((m.teacher.seen[1][1] < level).all())


def test_with_its_own_noise_an_unshifted_point_is_the_students() -> None:
    m = models(gaussian(top=20.0))
    x = torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(8, 1, 1, 1).expand(8, 1, 2, 2)
    sigma = torch.full((8,), 4.0, dtype=torch.float64)
    ends = [replace(METHOD, shift=s).target(m, x, x / 7, sigma, {}, Noise.of(0, 8)) for s in (1.0, None)]
    assert float((ends[0] - ends[1]).abs().max()) < 1e-12
    assert float((m.teacher.seen[0][0] - x).abs().max()) < 1e-12, "from the student's very point"


def test_without_shift_the_teacher_goes_on_from_the_students_point() -> None:
    method = replace(METHOD, shift=None, teacher_steps=64)
    problem = gaussian(top=20.0)
    m = models(problem)
    x = torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(8, 1, 1, 1).expand(8, 1, 2, 2)
    sigma = torch.full((8,), 4.0, dtype=torch.float64)
    end = method.target(m, x, torch.zeros_like(x), sigma, {}, Noise.of(0, 8))
    assert torch.equal(m.teacher.seen[0][0], x) and bool((m.teacher.seen[0][1] == 4.0).all())
    assert float((end - problem.flow(x, 4.0, 1e-6)).abs().max()) < 0.05


@pytest.mark.parametrize(("shift", "again"), [(None, "own"), (1.0, "own"), (2.0, "own"), (2.0, "fresh")])
def test_on_one_point_of_data_a_perfect_student_has_no_loss(shift: float | None, again: Any) -> None:
    point = Mixture(torch.full((1, 1, 2, 2), 0.3), 1e-16, sigma_max=20.0)
    method = replace(METHOD, shift=shift, again=again)
    assert float(only(method, models(point)).loss()["loss"].detach()) < 1e-8
    m = models(point)
    m.student.weight.data += 0.2
    found = float(only(method, m).loss()["loss"].detach())
    assert found == pytest.approx(0.04, rel=0.05), "the teacher takes it back to the data"


# ---- the adversarial term, and other networks


def test_the_adversarial_term_is_played_by_both() -> None:
    for method, names in ((METHOD, ["student"]), (WITH_GAN, ["student", "discriminator"])):
        m = build_models(method.roles(tiny()), "cpu")
        x0 = tiny_data().pixels[:4] if method.gan else None
        updates = []
        for update in method.step(m, Batch(x0, {"label": torch.arange(4) % 3}), 0, Noise.of(0, 4)):
            updates.append(update.role)
            m.networks[str(update.role)].requires_grad_(True)
            made = update.loss()
            assert isinstance(made, dict)
            made["loss"].backward()
            for name, network in m.networks.items():
                assert all((p.grad is not None) == (name == update.role) for p in network.parameters()), name
                network.requires_grad_(False).zero_grad()
            assert ("adversarial" in made) == (update.role == "student" and method.gan > 0)
        assert updates == names and set(m.networks) == {"teacher", *names}


@pytest.mark.parametrize("name", ["unet2d", "dit", "sd", "sd3"])
def test_class_and_text_conditional_networks_of_diffusers_train(name: str) -> None:
    teacher = stock(name)
    if name != "unet2d":
        teacher = guided(teacher, 3.0)
    m = build_models(WITH_GAN.roles(teacher), "cpu")
    noise = Noise.of(0, 2)
    assert teacher.conds is not None
    batch = Batch(noise.normal(teacher.denoiser.shape, "x0"), teacher.conds.draw(noise))
    for update in WITH_GAN.step(m, batch, 0, noise):
        m.networks[str(update.role)].requires_grad_(True)
        made = update.loss()
        assert isinstance(made, dict) and bool(made["loss"].isfinite())
        made["loss"].backward()
        m.networks[str(update.role)].requires_grad_(False)
    table = ImagineFlash(steps=3).sampler(teacher)
    x = teacher.start_std(table) * noise.normal(teacher.denoiser.shape, "start")
    assert bool(table(m.student, x, batch.cond).isfinite().all())


# ---- runs


@pytest.mark.parametrize(("method", "make"), [(METHOD, tiny), (WITH_GAN, tiny), (METHOD, lambda: guided(tiny(), 2.0))])
def test_a_resumed_run_and_micro_batches(method: ImagineFlash, make: Callable[[], Generator], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": method, "start": make()}
    check_restart(tmp_path, lambda out, **more: run("ImagineFlash", out, **options, **more), far=2e-5)
    made = Generator.load(tmp_path / "whole")
    assert made.sampler.nfe == 3 and made.sample(2, progress=False).shape == (2, 1, 4, 4)


def test_lora_leaves_the_discriminator_a_full_network(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = run("ImagineFlash", tmp_path, method=WITH_GAN, lora=LoRA(rank=2))
    names = load_tensors(Run(tmp_path).checkpoints()[-1] / "roles" / "discriminator.safetensors")
    assert names and not any("lora" in name for name in names)
    assert Generator.load(tmp_path).fingerprint() == made.fingerprint()


def test_memory_is_told_before_a_run() -> None:
    assert set(estimate_memory(METHOD, tiny(), None, FitOptions(batch=8)).roles) == {"teacher", "student"}
    assert "discriminator" in estimate_memory(WITH_GAN, tiny(), tiny_data(), FitOptions(batch=8)).roles


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: ImagineFlash(steps=0), "steps >= 1"),
    (lambda: ImagineFlash(teacher_steps=0), "teacher_steps >= 1"),
    (lambda: ImagineFlash(gan=-1.0), "gan >= 0"),
    (lambda: ImagineFlash(gan=float("nan")), "gan >= 0 and finite, got nan"),
    (lambda: ImagineFlash(r1=float("inf")), "r1 >= 0 and finite, got inf"),
    (lambda: ImagineFlash(hidden=0), "hidden >= 1"),
    (lambda: ImagineFlash(shift=float("nan")), "power of at least 1"),
    (
        lambda: ImagineFlash().roles(with_path(DDPM, "noise", 1e8)),
        "predicts noise says nothing of x0 at sigma 1e\\+08",
    ),
    (lambda: ImagineFlash(shift=0.75), "power of at least 1, or None, got 0.75"),
    (lambda: ImagineFlash(again="other"), "unknown noise 'other'"),  # type: ignore[arg-type]
    (lambda: ImagineFlash(judged_at=(1.0,)), r"places within \[0, 1\)"),
    (lambda: ImagineFlash(game="wasserstein"), "unknown adversarial loss 'wasserstein'"),  # type: ignore[arg-type]
    (lambda: ImagineFlash(gan=1.0, taps=("block9",)).roles(tiny()), "unknown feature tap 'block9'"),
    (lambda: ImagineFlash().roles(replace(tiny(), denoiser=gaussian())), "Mixture has no weights to train"),
    (lambda: next(WITH_GAN.step(models(gaussian()), Batch(None, {}), 0, Noise.of(0, 2))), "got None"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
