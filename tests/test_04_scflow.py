"""Self-corrected flow distillation against exact flows: what has no loss, what reaches whom, what costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Precond
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import FitOptions
from fewstep.core.path import FLOW
from fewstep.core.role import Ema, Models, Role, Update, added
from fewstep.core.state import Run, load_tensors
from fewstep.distill.scflow import SCFlow, level, times_of
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.models import ResMLP, ResMLPConfig
from fewstep.models.lora import LoRA
from fewstep.train.memory import estimate_memory
from test_04_gan import stock
from tiny_runs import STEADY, check_restart, of_roles, run, tiny, tiny_data

PLAIN = SCFlow(gan=0.0, bidirectional_from=0.0, correction_from=0.0, truncation=0.0)
FULL = SCFlow(
    optim=STEADY, critic=STEADY, bidirectional_from=0.0, correction_from=0.4, gan_from=0.2, truncation=0.3, hidden=8
)
MEAN, SPREAD = 0.3, 0.6


def flow_teacher() -> Generator:
    """A velocity model, which starts at pure noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ResMLP(ResMLPConfig((1, 4, 4), 3, width=16, embedding=8, blocks=1))
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    D = Precond(net, (1, 4, 4), path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    return replace(tiny(), denoiser=D.requires_grad_(False))


class Exact(nn.Module):
    """A Gaussian's denoiser as a role."""

    def __init__(self, spread: float = SPREAD, top: float = 80.0) -> None:
        super().__init__()
        self.problem = Mixture(torch.full((1, 1, 2, 2), MEAN), spread**2, sigma_max=top)
        self.shape, self.sigma_data = self.problem.shape, self.problem.sigma_data
        self.sigma_min, self.sigma_max = self.problem.sigma_min, self.problem.sigma_max

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        return self.problem(x, sigma, cond)


class Ends(Exact):
    """The end of the exact trajectory; counts what it is asked, and in which grad mode."""

    def __init__(self, spread: float = SPREAD, top: float = 80.0) -> None:
        super().__init__(spread, top)
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        self.seen.append((x.detach(), sigma.detach(), torch.is_grad_enabled()))
        s = sigma.reshape(-1, 1, 1, 1)
        gain = (self.problem.variances[0] / (self.problem.variances[0] + s**2)).sqrt()
        return MEAN + gain * (x - MEAN) + self.weight


def models(student: nn.Module, teacher: nn.Module | None = None, progress: float = 0.5) -> Models:
    roles = {"teacher": Role(lambda: teacher or Exact(top=student.sigma_max)), "student": Role(lambda: student)}
    m = build_models(roles, "cpu")
    m.progress = progress
    return m


def only(method: SCFlow, m: Models, x0: Tensor, seed: int = 3) -> Update:
    (update,) = method.step(m, Batch(x0, {}), 0, Noise.of(seed, len(x0)))
    return update


def parts(method: SCFlow, m: Models, x0: Tensor) -> dict[str, float]:
    return {k: float(v.detach()) for k, v in only(method, m, x0).loss().items()}  # type: ignore[union-attr]


# ---- the algebra of flow time


@pytest.mark.parametrize("top", [80.0, 1e8])
def test_a_step_in_flow_time_is_the_teachers_euler_step_on_z(top: float) -> None:
    m = models(Ends(top=top))
    x0 = m.teacher.problem.draw(64)
    noise = Noise.of(3, 64)
    PLAIN.aims(m, x0, *self_points(m, x0, noise), {}, noise)
    (near, s, _), (far, r, _) = m.student.seen
    x, t = self_points(m, x0, noise)
    z = (1 - t).reshape(-1, 1, 1, 1) * x
    velocity = (z - m.teacher(x, level(t))) / t.reshape(-1, 1, 1, 1)
    for point, sigma in ((near, s), (far, r)):
        u = sigma / (1 + sigma)
        moved = z + (u - t).reshape(-1, 1, 1, 1) * velocity
        got = (1 - u).reshape(-1, 1, 1, 1) * point
        assert float((moved - got).abs().max()) < 1e-6
        assert float((u - t).abs().max()) <= 0.1 + 1e-12
    assert bool((s < level(t)).all()) and bool((r > level(t)).all())
    low, high = times_of(m.student)
    assert low <= float((s / (1 + s)).min()) and float((r / (1 + r)).max()) <= high
    assert float(t.min()) < 0.1 and float(t.max()) > 0.9


def self_points(m: Models, x0: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """The training points and their flow times, as the method draws them."""
    t = PLAIN.times(m.student, noise)
    return x0 + level(t).reshape(-1, 1, 1, 1) * noise.normal(x0.shape[1:], "n", dtype=x0.dtype), t


@pytest.mark.parametrize("top", [80.0, 1e8])
def test_the_exact_end_of_the_flow_has_next_to_no_loss_and_less_for_nearer_neighbours(top: float) -> None:
    losses = []
    for near in (0.1, 0.01, 0.001):
        found = parts(replace(PLAIN, near=near, correction=0.0), models(Ends(top=top)), Exact().problem.draw(256))
        losses.append(found["loss"])
    assert losses[0] < 0.02 and losses[1] < losses[0] / 20 and losses[2] < losses[1] / 20, losses
    wrong = parts(replace(PLAIN, near=0.01, correction=0.0), models(Ends(2.0, top)), Exact().problem.draw(256))
    assert wrong["loss"] > 100 * losses[1]


def test_self_correction_is_zero_where_one_step_and_more_agree() -> None:
    method = replace(PLAIN, consistency=0.0, bidirectional=0.0, correction=1.0)

    class Fixed(Ends):
        def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
            super().forward(x, sigma, cond)
            return torch.full_like(x, 0.7) + self.weight

    x0 = Exact().problem.draw(16)
    m = models(Fixed())
    assert parts(method, m, x0)["loss"] == 0
    assert [grad for *_, grad in m.student.seen] == [False, True], "the sample is no one's gradient"
    (start, top, _), (x, sigma, _) = m.student.seen
    n = Noise.of(3, 16).normal((1, 2, 2), "n", dtype=torch.float64)
    assert float((start - 80 * n).abs().max()) == 0 and bool((top == 80).all())
    assert float((x - 0.7 - sigma.reshape(-1, 1, 1, 1) * n).abs().max()) < 1e-9, "noised with the noise it came from"
    assert parts(method, models(Ends()), x0)["loss"] > 1e-3


def test_targets_near_the_data_are_the_data() -> None:
    x0 = Exact().problem.draw(400)
    noise = Noise.of(3, 400)
    m = models(Ends())
    x, t = self_points(m, x0, noise)
    weight, free = PLAIN.aims(m, x0, x, t, {}, noise)["consistency"]
    _, held = replace(PLAIN, truncation=0.4).aims(m, x0, x, t, {}, noise)["consistency"]
    s = m.student.seen[0][1]
    near = s / (1 + s) < 0.4
    assert weight == 1 and 100 < int(near.sum()) < 250
    assert torch.equal(held[near], x0[near]) and torch.equal(held[~near], free[~near])
    assert float((free[near] - x0[near]).abs().max()) > 0.01


@pytest.mark.parametrize("weighted", [True, False])
def test_the_distance_to_a_neighbour_counts_as_an_error_of_the_velocity_or_of_x0(weighted: bool) -> None:
    x0 = Exact().problem.draw(64)
    m, noise = models(Ends(2.0)), Noise.of(3, 64)
    x, t = self_points(m, x0, noise)
    aims = PLAIN.aims(m, x0, x, t, {}, noise)
    own, each = m.student(x, level(t)), (1 / t if weighted else torch.ones_like(t))
    found = parts(replace(PLAIN, weighted=weighted, correction=0.0), m, x0)
    for name, (weight, aim) in aims.items():
        huber = ((own - aim) ** 2 + 1e-4).sqrt() - 0.01
        want = weight * float((each[:, None, None, None] * huber).mean().detach())
        assert found[name] == pytest.approx(want, rel=1e-6), name


def test_targets_come_from_the_average_and_have_no_gradient() -> None:
    m = models(Ends())
    m.averages["student.target"] = average = Ends()
    average.weight.data += 0.3
    average.requires_grad_(True)
    update = only(PLAIN, m, Exact().problem.draw(8))
    assert [grad for *_, grad in average.seen] == [False, False] and [g for *_, g in m.student.seen] == [False]
    m.student.requires_grad_(True)
    total = update.loss()
    assert isinstance(total, dict)
    total["loss"].backward()
    assert average.weight.grad is None and float(m.student.weight.grad.abs()) > 0


# ---- terms that are off cost nothing


@pytest.mark.parametrize(
    ("changes", "teacher", "student", "kept"),
    [
        ({}, 1, 3, {"consistency", "bidirectional", "correction"}),
        ({"bidirectional": 0.0}, 1, 3, {"consistency", "correction"}),
        ({"correction": 0.0}, 1, 1, {"consistency", "bidirectional"}),
        ({"consistency": 0.0, "bidirectional": 0.0}, 0, 2, {"correction"}),
        ({"bidirectional_from": 0.6}, 1, 3, {"consistency", "correction"}),
        ({"correction_from": 0.6}, 1, 1, {"consistency", "bidirectional"}),
    ],
)
def test_a_term_that_is_off_asks_nobody(changes: dict[str, Any], teacher: int, student: int, kept: set[str]) -> None:
    asked: list[int] = []
    m = models(Ends())
    m.averages["student.target"] = Ends()
    m.teacher.register_forward_hook(lambda *args: asked.append(1))
    found = parts(replace(PLAIN, **changes), m, Exact().problem.draw(4))
    assert set(found) == kept | {"loss"}
    assert (len(asked), len(m.student.seen)) == (teacher, student)
    assert found["loss"] == pytest.approx(sum(found[name] for name in kept))


def test_before_its_time_a_term_trains_nobody() -> None:
    method = replace(PLAIN, consistency=0.0, correction_from=0.6, bidirectional_from=0.6)
    assert list(method.step(models(Ends()), Batch(Exact().problem.draw(4), {}), 0, Noise.of(0, 4))) == []
    late = replace(FULL, gan_from=0.6)
    m = build_models(late.roles(flow_teacher()), "cpu")
    batch = Batch(torch.zeros(4, 1, 4, 4), {"label": torch.arange(4) % 3})
    for progress, names in ((0.5, ["student"]), (0.7, ["student", "discriminator"])):
        m.progress = progress
        assert [u.role for u in late.step(m, batch, 0, Noise.of(0, 4))] == names
    assert set(replace(FULL, gan=0.0).roles(flow_teacher())) == {"teacher", "student"}


@pytest.mark.parametrize("r1_on", ["pictures", "features"])
def test_the_adversarial_term_reaches_the_student_through_its_one_step_sample_only(r1_on: Any) -> None:
    method = replace(FULL, consistency=0.0, bidirectional=0.0, correction=0.0, gan=1.0, gan_from=0.0, r1_on=r1_on)
    m = build_models(method.roles(flow_teacher()), "cpu")
    seen: list[Tensor] = []
    m.student.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    batch = Batch(tiny_data().pixels[:4], {"label": torch.arange(4) % 3})
    for update in method.step(m, batch, 0, Noise.of(0, 4)):
        m.networks[str(update.role)].requires_grad_(True)
        made = update.loss()
        assert isinstance(made, dict)
        made["loss"].backward()
        for name, network in m.networks.items():
            graded = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters()]
            assert any(graded) if name == update.role else not any(graded), name
            network.requires_grad_(False).zero_grad()
        assert (update.role == "discriminator") == ("r1" in made)
    assert all(bool((sigma == 1e8).all()) for sigma in seen) and len(seen) == 1


def test_one_sample_serves_the_game_the_correction_and_the_discriminator() -> None:
    method = replace(FULL, consistency=0.0, bidirectional=0.0, gan=1.0, gan_from=0.0, correction_from=0.0, r1=0.0)
    m = build_models(method.roles(flow_teacher()), "cpu")
    seen: list[tuple[Tensor, Tensor]] = []
    made: list[Tensor] = []
    m.student.register_forward_hook(lambda module, args, out: seen.append(args[:2]))
    m.student.register_forward_hook(lambda module, args, out: made.append(out))
    batch = Batch(tiny_data().pixels[:4], {"label": torch.arange(4) % 3})
    noise = Noise.of(0, 4)
    shown: list[Tensor] = []
    for update in method.step(m, batch, 0, noise):
        if update.role == "discriminator":
            m.teacher.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
            m.teacher.net.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
        assert "loss" in update.loss()  # type: ignore[operator]
    assert len(seen) == 2 and bool((seen[0][1] == 1e8).all())
    sigma = seen[1][1]
    n = noise.normal((1, 4, 4), "n")
    again = made[0].detach() + sigma.float().reshape(-1, 1, 1, 1) * n
    assert float((seen[1][0] - again).abs().max()) <= 1e-5 * float(again.abs().max())
    # The clean picture, at the lowest level, is what the discriminator sees: a flow's input is x / (1 + sigma).
    z = m.teacher.sigma_min * noise.normal((1, 4, 4), "judged")
    want = (made[0].detach() + z) / (1 + m.teacher.sigma_min)
    assert min(float((x - want).abs().max()) for x in shown) < 1e-6


@pytest.mark.parametrize("lean", [True, False])
def test_in_parts_losses_and_gradients_are_the_same(lean: bool) -> None:
    method = replace(FULL, gan_from=0.0, correction_from=0.0, bidirectional_from=0.0, lean=lean)
    m = build_models(method.roles(flow_teacher()), "cpu")
    batch = Batch(tiny_data().pixels[:4], {"label": torch.arange(4) % 3})
    m.student.requires_grad_(True)
    found: list[tuple[dict[str, float], list[Tensor]]] = []
    for whole in (True, False):
        update = next(method.step(m, batch, 0, Noise.of(0, 4)))
        losses: list[Any] = []
        for part in (update.loss,) if whole else update.parts:
            losses.append(part())
            losses[-1]["loss"].backward()
        told = {name: float(value.detach()) for name, value in added(losses).items()}
        found.append((told, [p.grad for p in m.student.parameters() if p.grad is not None]))
        m.student.zero_grad(set_to_none=True)
    (one, a), (parts, b) = found
    assert len(update.parts) == 3 and one == pytest.approx(parts, rel=1e-6)
    far = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    assert far < 1e-6 * max(float(x.abs().max()) for x in a)


def test_one_graph_at_a_time_takes_less_memory() -> None:
    options, start = FitOptions(batch=64), tiny("unet", channels=16, multipliers=(1,), blocks=1, attention=())
    method = replace(FULL, gan_from=0.0, r1=0.0)
    lean, plain = (
        estimate_memory(replace(method, lean=on), start, tiny_data(), options).activations for on in (True, False)
    )
    assert lean < 0.95 * plain


# ---- the sampler


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("make", [tiny, flow_teacher])
def test_the_sampler_is_euler_on_levels_even_in_flow_time(make: Callable[[], Generator], steps: int) -> None:
    teacher = make()
    table = SCFlow(steps=steps).sampler(teacher)
    top = teacher.denoiser.sigma_max
    assert table.nfe == steps and table.start == top and table.end == 0 and not table.noisy
    t = table.levels / (1 + table.levels)
    assert float((t.diff() + top / (1 + top) / steps).abs().max()) < 1e-9
    x = top * Noise.of(0, 500).normal((1, 2, 2), "x", dtype=torch.float64)
    # The exact end of the trajectory is the same from every point of Euler's way along it.
    ends = table(lambda y, s, c: Ends(top=top)(y, s.reshape(1), c), x).detach()  # type: ignore[arg-type]
    assert float(ends.mean()) == pytest.approx(MEAN, abs=0.06) and SCFlow.any_steps


# ---- runs


@pytest.mark.parametrize("make", [tiny, flow_teacher, lambda: guided(tiny(), 2.0)])
def test_a_resumed_run_and_micro_batches(make: Callable[[], Generator], tmp_path: Path) -> None:
    start, options = make(), {"method": FULL, "budget": 6}
    check_restart(tmp_path, lambda out, **more: run("SCFlow", out, start=start, **options, **more), far=2e-5)
    kept = {k.split(":")[0].split("/")[-1].removesuffix(".safetensors") for k in of_roles(tmp_path / "one")}
    assert kept == {"student", "student.ema", "student.target", "discriminator"}
    made = Generator.load(tmp_path / "whole")
    assert made.sampler.nfe == 2 and made.sample(2, progress=False).shape == (2, 1, 4, 4)
    # The average of the target is not the one that ships.
    checkpoint = Run(tmp_path / "whole").checkpoints()[-1] / "roles"
    a, b = (load_tensors(checkpoint / f"student.{name}.safetensors") for name in ("ema", "target"))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) > 1e-5


def test_lora_leaves_the_discriminator_a_full_network(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = run("SCFlow", tmp_path, method=FULL, lora=LoRA(rank=2))
    names = load_tensors(Run(tmp_path).checkpoints()[-1] / "roles" / "discriminator.safetensors")
    assert names and not any("lora" in name for name in names)
    assert all("lora" in n for n in load_tensors(Run(tmp_path).checkpoints()[-1] / "roles" / "student.safetensors"))
    assert Generator.load(tmp_path).fingerprint() == made.fingerprint()


@pytest.mark.parametrize("name", ["dit", "sd", "sd3"])
def test_networks_of_diffusers_train(name: str) -> None:
    method = replace(FULL, gan_from=0.0, correction_from=0.0, judged_at=(0.3,))
    teacher = stock(name)
    m = build_models(method.roles(teacher), "cpu")
    noise = Noise.of(0, 2)
    assert teacher.conds is not None
    batch = Batch(noise.normal(teacher.denoiser.shape, "x0"), teacher.conds.draw(noise))
    for update in method.step(m, batch, 0, noise):
        m.networks[str(update.role)].requires_grad_(True)
        made = update.loss()
        assert isinstance(made, dict) and bool(made["loss"].isfinite())
        made["loss"].backward()
        m.networks[str(update.role)].requires_grad_(False)


def test_memory_is_told_before_a_run() -> None:
    found = estimate_memory(FULL, tiny(), tiny_data(), FitOptions(batch=8))
    assert set(found.roles) == {"teacher", "student", "discriminator"} and found.activations > 0


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: SCFlow(steps=0), "steps >= 1"),
    (lambda: SCFlow(gan=-1.0), "weights >= 0"),
    (lambda: SCFlow(consistency=float("nan")), "weights >= 0"),
    (lambda: SCFlow(r1=float("nan")), "r1 >= 0 and finite, got nan"),
    (lambda: SCFlow(hidden=0), "hidden >= 1"),
    (lambda: SCFlow(huber=float("inf")), "huber > 0"),
    (lambda: SCFlow(consistency=0, bidirectional=0, correction=0, gan=0), "one of its terms above 0"),
    (lambda: SCFlow(near=0.0), r"near within \(0, 1\]"),
    (lambda: SCFlow(truncation=1.0), r"truncation within \[0, 1\)"),
    (lambda: SCFlow(huber=0.0), "huber > 0"),
    (lambda: SCFlow(gan_from=1.0), r"shares of the run within \[0, 1\)"),
    (lambda: SCFlow(judged_at=()), "places within"),
    (lambda: SCFlow(game="wasserstein"), "unknown adversarial loss 'wasserstein'"),  # type: ignore[arg-type]
    (lambda: SCFlow(r1_on="weights"), "unknown input of R1 'weights'"),  # type: ignore[arg-type]
    (lambda: SCFlow(taps=("block9",)).roles(tiny()), "unknown feature tap 'block9'"),
    (lambda: SCFlow(steps=2000).roles(tiny()), "below the teacher's lowest, 0.002: take fewer steps"),
    (lambda: SCFlow().roles(replace(tiny(), denoiser=Exact().problem)), "Mixture has no weights to train"),
    (
        lambda: next(PLAIN.step(models(Ends()), Batch(torch.zeros(2, 3, 2, 2), {}), 0, Noise.of(0, 2))),
        r"needs pictures of \(1, 2, 2\)",
    ),
    (lambda: next(PLAIN.step(models(Ends()), Batch(None, {}), 0, Noise.of(0, 2))), "got None"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_averages_are_two() -> None:
    role = SCFlow().roles(tiny())["student"]
    assert role.ships and role.target == Ema(rate=0.9) and role.ema == Ema(power=0.05)
