"""Invertible consistency distillation and dynamic guidance: segments, both directions, round trips, editing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import CountingDenoiser, Precond
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import VP, widen
from fewstep.core.role import Models, Role, Update
from fewstep.distill.icd import ICD, edit, encode, reads, rising
from fewstep.errors import InputError
from fewstep.grid import own_levels
from fewstep.guide import CFG, guided
from fewstep.guide.dynamic import SCALE, DynamicGuidance, guided_at
from fewstep.models.extended import extended
from fewstep.models.lora import LoRA
from fewstep.solve.euler import euler
from tiny_runs import STEADY, check_restart, run, tiny, tiny_data

BASE = ICD(optim=STEADY, encoder=STEADY, steps=2, grid=8)
V = 0.36


def gaussian() -> Mixture:
    return Mixture(torch.full((1, 1, 1, 1), 0.3), V, sigma_min=0.01, sigma_max=50.0)


class Exact(nn.Module):
    """The estimate with which one step of DDIM lands exactly at the end of its segment, plus ``slope``."""

    def __init__(self, way: int, slope: float = 0.0, method: ICD = BASE) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.problem, self.path, self.way, self.method = gaussian(), VP, way, method
        self.shape, self.sigma_data = self.problem.shape, self.problem.sigma_data
        self.sigma_min, self.sigma_max = self.problem.sigma_min, self.problem.sigma_max
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        a = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        self.seen.append((x.detach(), a.detach()))
        if not self.way:
            return self.problem(x, a) + self.slope
        ends = self.method.ends(self, self.way)
        at = (ends < a[:, None] * (1 - 1e-9)) if self.way < 0 else (ends > a[:, None] * (1 + 1e-9))
        there = torch.where(at, ends, -1.0 if self.way < 0 else 1e9)
        c = there.amax(1) if self.way < 0 else there.amin(1).clamp(max=self.sigma_max * 2)
        k = widen(c / a, x)
        moved = 0.3 + ((V + widen(c, x) ** 2) / (V + widen(a, x) ** 2)).sqrt() * (x - 0.3)
        return (moved - k * x) / (1 - k) + self.slope


def models_of(method: ICD = BASE, student: float = 0.0, encoder: float = 0.0) -> Models:
    nets = {"teacher": Exact(0), "student": Exact(-1, student, method), "encoder": Exact(1, encoder, method)}
    return build_models({name: Role(lambda net=net: net) for name, net in nets.items()}, "cpu")


def updates(method: ICD, m: Models, count: int = 400) -> list[Update]:
    return list(method.step(m, Batch(gaussian().draw(count, 3), {}), 0, Noise.of(1, count)))


def size(update: Update) -> float:
    return float(update.loss().detach())  # type: ignore[union-attr]


# ---- segments and losses


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_segments_tile_the_native_time_in_both_directions(steps: int) -> None:
    method, D = ICD(steps=steps), Exact(0)
    down, up = method.ends(D, -1), method.ends(D, 1)
    shares = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    assert float((down[:-1] / own_levels(D, shares)[:-1] - 1).abs().max()) < 1e-12 and down[-1] == 0
    assert float((up.flip(0)[:-1] / down[:-1] - 1).abs().max()) < 1e-12
    assert float(up[0]) == pytest.approx(float(own_levels(D, torch.tensor([0.019], dtype=torch.float64))))
    assert rising(up).nfe == steps and method.sampler(replace(tiny(), denoiser=D)).nfe == steps  # type: ignore[arg-type]


def test_exact_maps_have_next_to_no_loss_in_either_direction_and_wrong_ones_have() -> None:
    sizes = []
    for grid in (12, 24, 48):
        method = replace(BASE, grid=grid, huber=10.0)
        made = updates(method, models_of(method))
        assert [u.role for u in made] == ["student", "encoder", "encoder", "student"]
        both = [size(u) for u in made]
        sizes.append(both[:2])
        assert max(both[2:]) < 2e-3, "each undoes the other, up to the lowest end, which is not quite 0"
    assert all(sizes[0][k] > 3 * sizes[1][k] > 9 * sizes[2][k] for k in (0, 1)), sizes
    off = [size(u) for u in updates(method, models_of(method, student=0.5, encoder=0.5))]
    assert min(off) > 3 * max(sizes[-1]), off
    assert len(updates(replace(BASE, preserve=0.0), models_of())) == 2


def test_targets_are_the_teachers_point_where_its_step_reaches_the_end() -> None:
    # Two steps a segment: half of the samples' targets cannot depend on the model, however wrong it is.
    method = replace(BASE, grid=4, preserve=0.0)
    right, wrong = models_of(method), models_of(method, 1e6, 1e6)
    updates(method, right)
    updates(method, wrong)
    for name, way in (("student", -1), ("encoder", 1)):
        x_b, b = right.networks[name].seen[0]  # type: ignore[index,union-attr]
        ends = method.ends(right.student, way)
        level = ends.clamp(min=right.student.sigma_min)
        at_end = (b[:, None] / level - 1).abs().amin(1) < 1e-9
        assert 0.3 < float(at_end.double().mean()) < 0.7, name
        assert torch.isfinite(x_b).all()


@pytest.mark.parametrize("weight", ["landing", "edm"])
def test_the_loss_is_that_of_the_two_landings(weight: Any) -> None:
    method = replace(BASE, weight=weight, preserve=0.0, huber=0.1)
    m = models_of(method, 0.4, 0.4)
    for update in updates(method, m):
        model: Any = m.networks[str(update.role)]
        found = size(update)
        (x_b, b), (x_a, a) = model.seen
        ends = method.ends(model, -1 if update.role == "student" else 1)
        # The end of the segment is the nearest one on the side that b is on, or b itself.
        side = (ends <= b[:, None] + 1e-9) if update.role == "student" else (ends >= b[:, None] * (1 - 1e-9))
        c = torch.where(side, ends, torch.nan)
        c = c.nan_to_num(-1.0).amax(1) if update.role == "student" else c.nan_to_num(1e9).amin(1)
        # Where b is the lowest level it stands for 0, at which there is no network to ask.
        inside = (b > model.sigma_min) & ((b / c - 1).abs() > 1e-9)
        assert 50 < int(inside.sum()) < 400
        D_a, D_b = (model(x, s.clamp(min=model.sigma_min)).detach() for x, s in ((x_a, a), (x_b, b)))
        k = widen(1 / (1 + c.clamp(min=0.01) ** 2).sqrt(), x_a)
        wide = [widen(s, x_a) for s in (a, b, c)]
        landed = [(wide[2] / s) * x + (1 - wide[2] / s) * D for x, s, D in ((x_a, wide[0], D_a), (x_b, wide[1], D_b))]
        d = k * (landed[0] - landed[1])
        if weight == "edm":
            sd = model.sigma_data
            d = d / k / (1 - wide[2] / wide[0]) * (wide[0] ** 2 + sd**2).sqrt() / (wide[0] * sd)
        want = ((d**2 + 0.01).sqrt() - 0.1).flatten(1).mean(1)
        # At the end the teacher's point is the target, so its own estimate is.
        T = m.teacher.problem(x_a, a)
        at_end = (
            (k * (1 - wide[2] / wide[0])) if weight == "landing" else (wide[0] ** 2 + sd**2).sqrt() / (wide[0] * sd)
        )
        own = ((at_end * (D_a - T)).square() + 0.01).sqrt().flatten(1).mean(1) - 0.1
        assert found == pytest.approx(float(torch.where(inside, want, own).mean()), rel=1e-6), update.role


def test_levels_go_one_step_down_for_the_student_and_up_for_the_encoder() -> None:
    method = replace(BASE, preserve=0.0)
    m = models_of(method)
    updates(method, m)
    down, up = (seen[1] for seen in m.teacher.seen)
    grid = own_levels(m.student, (torch.arange(9, dtype=torch.float64) / 8).clamp(min=method.lowest))
    assert sorted(set(down.tolist())) == pytest.approx(grid[1:].tolist())
    assert sorted(set(up.tolist())) == pytest.approx(grid[:-1].tolist())
    assert bool((m.student.seen[0][1] < down).all()) and bool((m.encoder.seen[0][1] > up).all())


def test_each_update_has_gradients_for_its_own_role_alone() -> None:
    m = models_of(student=0.1, encoder=0.1)
    for update in updates(BASE, m):
        for net in m.networks.values():
            net.requires_grad_(True)
        update.loss().backward()  # type: ignore[union-attr]
        for name, net in m.networks.items():
            assert (net.slope.grad is not None) == (name == update.role), (name, update.role)  # type: ignore[union-attr]
            net.slope.grad = None  # type: ignore[union-attr]


def test_exact_models_carry_pictures_to_noise_and_back_where_inversion_does_not() -> None:
    method = replace(BASE, steps=4, grid=8)
    start = replace(tiny(), conds=None)
    student = replace(start, denoiser=Exact(-1, method=method))  # type: ignore[arg-type]
    student.sampler = method.sampler(student)
    encoder = replace(student, denoiser=Exact(1, method=method), sampler=rising(method.ends(student.denoiser, 1)))  # type: ignore[arg-type]
    x = gaussian().draw(500, 1)
    noise = encode(encoder, x)
    assert float(noise.std()) == pytest.approx((V + 50.0**2) ** 0.5, rel=0.08)
    back = edit(student, encoder, x)
    # Encoding takes pictures to be at its lowest level, where the trajectory is within that level of its end.
    assert float((back - x).abs().max()) < 0.02
    teacher = replace(student, denoiser=Exact(0))  # type: ignore[arg-type]
    inverted = edit(teacher, replace(teacher, sampler=encoder.sampler), x)
    assert float((inverted - x).abs().mean()) > 20 * float((back - x).abs().mean())


# ---- guidance


def test_dynamic_guidance_is_on_at_low_noise_and_off_at_high() -> None:
    D = Precond(tiny().network.net, (1, 4, 4), path=VP, predicts="v", sigma_min=0.01, sigma_max=50.0)  # type: ignore[arg-type]
    made = DynamicGuidance(D, 8.0, 0.6, 0.8)
    shares = torch.tensor([0.0, 0.3, 0.6, 0.7, 0.8, 1.0], dtype=torch.float64)
    levels = own_levels(D, shares)
    assert made.scale_at(levels).tolist() == pytest.approx([8, 8, 8, 4.5, 1, 1])
    assert DynamicGuidance(D, 8.0, 0.7, 0.7).scale_at(levels).tolist() == pytest.approx([8, 8, 8, 8, 1, 1])
    x, label = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    with torch.no_grad():
        count = CountingDenoiser(D)
        watched = DynamicGuidance(count, 8.0, 0.6, 0.8)
        high, low = watched(x, levels[-1], {"label": label}), watched(x, levels[1], {"label": label})
        assert (count.nfe, count.images) == (2, 18), "no second estimate where the scale is 1"
        assert torch.equal(high, D(x, levels[-1], {"label": label}))
        assert torch.allclose(low, CFG(D, 8.0)(x, levels[1], {"label": label}), atol=1e-6)
        each = made(x, levels, {"label": label})
        for k in range(6):
            row = {"label": label[k : k + 1]}
            assert torch.allclose(
                each[k : k + 1], CFG(D, float(made.scale_at(levels[k])))(x[k : k + 1], levels[k], row), atol=1e-5
            )
        assert torch.equal(made(x, levels[1]), D(x, levels[1])), "nothing to guide without a condition"


def test_dynamic_guidance_is_told_and_saved(tmp_path: Path) -> None:
    start = tiny()
    D = extended(start.network, SCALE)  # type: ignore[arg-type]
    for p in D.net.terms.parameters():  # type: ignore[union-attr]
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    x, label = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    with torch.no_grad():
        said = DynamicGuidance(D, 6.0, told=True)(x, 0.1, {"label": label})
        assert torch.equal(said, D(x, 0.1, {"label": label, SCALE: torch.full((3,), 6.0)}))
    for told in (True, False):
        made = replace(
            start, denoiser=DynamicGuidance(D, 3.0, told=told), sampler=euler(torch.tensor([80.0, 2.0, 0.1, 0.0]))
        )
        again = Generator.load(made.save(tmp_path / str(told)))
        assert torch.equal(again.sample(3, progress=False), made.sample(3, progress=False))
        assert isinstance(again.denoiser, DynamicGuidance) and again.denoiser.told == told
    with pytest.raises(InputError, match=r"DynamicGuidance.* cannot be exported"):
        made.to_diffusers(tmp_path / "out")


def test_a_scale_for_each_sample() -> None:
    D, label = tiny().denoiser, torch.arange(3)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = guided_at(D, x, 2.0, {"label": label}, torch.tensor([1.0, 0.0, 5.0]))
        for k, s in enumerate((1.0, 0.0, 5.0)):
            assert torch.allclose(made[k], CFG(D, s)(x, 2.0, {"label": label})[k], atol=1e-6)


def test_the_student_is_told_the_scale_that_the_teacher_is_guided_with() -> None:
    start, method = tiny(), replace(BASE, scales=(1.0, 5.0))
    m = build_models(method.roles(start), "cpu")
    assert reads(m.student, SCALE) and not reads(m.encoder, SCALE) and not reads(m.teacher, SCALE)
    told: list[dict[str, Tensor]] = []
    calls: list[int] = []
    m.student.register_forward_pre_hook(lambda module, args: told.append(args[2]))
    m.teacher.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    made = list(method.step(m, Batch(torch.randn(64, 1, 4, 4), {"label": torch.arange(64) % 3}), 0, Noise.of(0, 64)))
    made[0].loss()
    assert (
        set(told[0][SCALE].tolist()) == {1.0, 5.0} and calls[0] == 128 and torch.equal(told[0][SCALE], told[-1][SCALE])
    )
    made[2].loss()
    assert any(set(t[SCALE].tolist()) == {1.0} for t in told), "models that undo each other are not guided"
    # A teacher that reads scales is asked once.
    reading = replace(start, denoiser=extended(start.network, SCALE))  # type: ignore[arg-type]
    m = build_models(method.roles(reading), "cpu")
    sizes: list[int] = []
    m.teacher.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    next(method.step(m, Batch(torch.randn(8, 1, 4, 4), {"label": torch.arange(8) % 3}), 0, Noise.of(0, 8)))
    assert sizes[0] == 8


# ---- runs


def test_a_run_ships_both_and_they_edit(tmp_path: Path) -> None:
    method, start, data = replace(BASE, scales=(1.0, 3.0)), tiny(), tiny_data()
    made = method.run(start, data, out=tmp_path, budget=3, batch=8, progress=False)
    student, encoder = Generator.load(tmp_path), Generator.load(tmp_path / "encoder")
    assert student.fingerprint() == made.fingerprint() and encoder.fingerprint() != student.fingerprint()
    assert encoder.sampler.start < encoder.sampler.end == pytest.approx(student.sampler.start)
    x, label = data.take(torch.arange(4)).x, torch.tensor([0, 1, 2, 0])
    dynamic = replace(student, denoiser=DynamicGuidance(student.denoiser, 3.0, told=True))
    same, other = (edit(dynamic, encoder, x, {"label": label}, {"label": (label + k) % 3}) for k in (0, 1))
    assert same.shape == x.shape and float((same - other).abs().max()) > 1e-4
    again = method.run(start, data, out=tmp_path, budget=3, batch=8, progress=False, resume=True)
    assert again.fingerprint() == made.fingerprint()
    with pytest.raises(InputError, match=r"encode takes pictures of \(1, 4, 4\)"):
        encode(encoder, torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match="needs a sampler that rises"):
        encode(student, x)
    with pytest.raises(InputError, match="the encoder ends at sigma 80 and the student starts at 3"):
        edit(student.with_sampler(euler(torch.tensor([3.0, 0.0]))), encoder, x)


def test_lora_trains_both(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    method = replace(BASE, scales=(1.0, 3.0))
    made = method.run(tiny(), tiny_data(), out=tmp_path, budget=2, batch=8, progress=False, lora=LoRA(rank=2))
    encoder = Generator.load(tmp_path / "encoder")
    assert Generator.load(tmp_path).fingerprint() == made.fingerprint() != encoder.fingerprint()
    assert encoder.fingerprint() != tiny().fingerprint()


@pytest.mark.parametrize("method", [BASE, replace(BASE, scales=(1.0, 4.0), null_share=0.3)], ids=["plain", "scales"])
def test_a_resumed_run_and_micro_batches(method: ICD, tmp_path: Path) -> None:
    check_restart(tmp_path, lambda out, **more: run("icd", out, method=method, **more), far=1e-5)


def blank() -> Generator:
    return replace(tiny(), conds=None)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: ICD(steps=0), "ICD needs steps >= 1"),
    (lambda: ICD(steps=3, grid=50), "a grid of a multiple of it, at least twice, got 3 and 50"),
    (lambda: ICD(lowest=0.5), r"ICD\(lowest=0.5\) must be above 0 and at most one step of the grid"),
    (lambda: ICD(preserve=-1), "preserve >= 0"),
    (lambda: ICD(huber=0), "huber > 0"),
    (lambda: ICD(null_share=2), "null_share within"),
    (lambda: ICD(scales=(-1.0,)), "guidance scales >= 0"),
    (lambda: ICD(scales=(1.0, 8.0)).roles(blank()), r"ICD\(guidance=8\) needs a teacher with classes or prompts"),
    (lambda: ICD(scales=(8.0,)).roles(guided(tiny(), 2.0)), "the teacher is a CFG already"),
    (lambda: ICD(sigma_max=99.0).roles(tiny()), "sigma_max=99 is outside of the teacher's levels"),
    (lambda: ICD().run(tiny(), None, out="/nowhere", budget=1), "got none: pass data"),
    (lambda: DynamicGuidance(tiny().denoiser, -1.0), "a scale >= 0"),
    (lambda: DynamicGuidance(tiny().denoiser, 2.0, 0.9, 0.1), "0 <= full <= none <= 1, got 0.9 and 0.1"),
    (lambda: DynamicGuidance(tiny().denoiser, float("nan")), "a scale >= 0"),
    (lambda: ICD(weight="snr"), "unknown weight 'snr'"),  # type: ignore[arg-type]
    (lambda: ICD(huber=float("inf")), "huber > 0"),
    (lambda: ICD(scales=(1.0, float("nan"))), "guidance scales >= 0"),
    (
        lambda: next(BASE.step(models_of(), Batch(torch.zeros(2, 3, 4, 4), {}), 0, Noise.of(0, 2))),
        r"ICD needs pictures of \(1, 1, 1\), as the network takes them, got \(3, 4, 4\)",
    ),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
