"""SlimFlow: the laws of the annealed noise, the flow-guided target, the smaller network, and whole runs."""

from __future__ import annotations

import itertools
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
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW
from fewstep.core.role import Ema, Models, Role, Update
from fewstep.data import OnlinePairs, Pairs, make_pairs
from fewstep.distill.slimflow import SlimFlow, slimmer, two_steps
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.loss.draw import FlowTime
from fewstep.models.k_unet import KUNet, KUNetConfig
from fewstep.models.lora import LoRA
from fewstep.solve.heun import heun
from fewstep.train import flow_sampler, train, untrained
from tiny_runs import STEADY, Breaks, Stop, bits, differing, furthest, log_of, tiny, tiny_data, tiny_pairs

SHORT = heun(torch.tensor([80.0, 5.0, 1.0, 0.0], dtype=torch.float64))
MEAN, SPREAD = 0.3, 0.5


class Straight(nn.Module):
    """The exact flow of ``x0 = MEAN + SPREAD n`` plus an error; keeps what it is called with."""

    def __init__(self, off: float = 0.0, top: float = 1e8) -> None:
        super().__init__()
        self.off = nn.Parameter(torch.tensor(off, dtype=torch.float64))
        self.shape, self.sigma_data, self.sigma_min, self.sigma_max = (1, 1, 1), 0.5, 1e-4, top
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x)).reshape(-1, 1, 1, 1)
        self.seen.append((x.detach(), sigma.flatten().detach(), torch.is_grad_enabled()))
        left = 1 - sigma / self.sigma_max
        return MEAN + SPREAD * (x.double() - left * MEAN) / (left * SPREAD + sigma) + self.off


def coupled(count: int) -> tuple[Tensor, Tensor]:
    n = Noise.of(7, count).normal((1, 1, 1), "n", dtype=torch.float64)
    return MEAN + SPREAD * n, n


def models_of(**networks: nn.Module) -> Models:
    return build_models({n: Role(lambda net=net: net) for n, net in networks.items()}, "cpu")


def first(method: SlimFlow, m: Models, x0: Tensor, n: Tensor, seed: int = 3) -> Update:
    (update,) = method.step(m, Batch(x0, {}, n), 0, Noise.of(seed, len(x0)))
    m.student.requires_grad_(True)
    return update


# ---- annealing reflow


@pytest.mark.parametrize("kind", ["linear", "exponential", "cosine", "none"])
def test_the_share_of_independent_noise_falls_from_1_to_0(kind: Any) -> None:
    method = SlimFlow(anneal=kind, until=0.5)
    found = [method.independent(p / 100) for p in range(101)]
    assert all(a >= b for a, b in itertools.pairwise(found)) and found[-1] >= 0
    if kind == "none":
        assert set(found) == {0.0}
        return
    assert found[0] == 1.0
    assert found[50] == pytest.approx(math.exp(-1) if kind == "exponential" else 0.0, abs=1e-15)
    assert found[25] == pytest.approx({"linear": 0.5, "exponential": math.exp(-0.5), "cosine": math.sqrt(0.5)}[kind])


@pytest.mark.parametrize("progress", [0.0, 0.15, 0.3, 0.6, 1.0])
def test_the_noise_keeps_its_variance_and_slowly_becomes_that_of_the_pair(progress: float) -> None:
    method = SlimFlow(stage="reflow", until=0.6, draw=FlowTime(mean=12.0, std=0.1, least=1e-6))
    student, count = Straight(), 40_000
    x0, n = coupled(count)
    m = models_of(student=student)
    m.progress = progress
    first(method, m, x0, n).loss()
    x, sigma, _ = student.seen[0]
    used = ((x - x0) / sigma.reshape(-1, 1, 1, 1)).flatten()
    b = max(0.0, 1 - progress / 0.6)
    assert float(used.var()) == pytest.approx(1, abs=0.03) and abs(float(used.mean())) < 0.02
    # 4 / sqrt(40000) is 0.02.
    assert float((used * n.flatten()).mean()) == pytest.approx(math.sqrt(1 - b * b), abs=0.03)


def test_without_annealing_the_first_stage_is_reflow() -> None:
    x0, n = coupled(300)
    for progress in (0.0, 0.5):
        m = models_of(student=Straight())
        m.progress = progress
        loss = first(SlimFlow(stage="reflow", anneal="none"), m, x0, n).loss()
        assert float(loss.detach()) < 1e-12  # type: ignore[union-attr]
    m.progress = 0.0
    assert float(first(SlimFlow(stage="reflow"), m, x0, n).loss().detach()) > 0.1  # type: ignore[union-attr]


# ---- flow-guided distillation


@pytest.mark.parametrize("top", [1e8, 80.0])
@pytest.mark.parametrize("leg", ["student", "flow"])
def test_a_straight_flow_and_its_student_have_no_loss(top: float, leg: Any) -> None:
    x0, n = coupled(200)
    m = models_of(student=Straight(top=top), flow=Straight(top=top))
    made = first(SlimFlow(first_leg=leg), m, x0, n).loss()
    assert isinstance(made, dict)
    assert set(made) == {"loss", "pairs", "guide"} and all(float(v.detach()) < 1e-12 for v in made.values())


def test_two_steps_end_where_two_euler_steps_end() -> None:
    flow: Any = untrained(tiny_data(), "resmlp", path="flow", width=16, embedding=8, blocks=1).denoiser
    g = torch.Generator().manual_seed(1)
    for p in flow.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    n = Noise.of(3, 4).normal((1, 4, 4), "n")
    with torch.no_grad():
        want = flow_sampler(flow, 2)(flow, 1e8 * n)
        leg = flow(1e8 * n, 1e8, {})
        found = two_steps(flow, leg, n, torch.full((4,), 0.5, dtype=torch.float64), {})
    assert float((found - want).abs().max()) < 1e-5


@pytest.mark.parametrize("leg", ["student", "flow"])
def test_the_guide_has_no_gradient_and_its_own_noise_and_times(leg: Any) -> None:
    x0, n = coupled(4000)
    student, flow = Straight(0.1), Straight()
    m = models_of(student=student, flow=flow)
    made = first(SlimFlow(first_leg=leg, guide=2.0, guide_times=(0.3, 0.7)), m, x0, n).loss()
    assert isinstance(made, dict)
    # The flow takes the point that the student's error moved to a time s after the noise: by 0.1 s in z, which is
    # there (1 - s) n + s x0 with the slope (1 - s) + s SPREAD, and the estimate by SPREAD times what n seems to be.
    sigma = flow.seen[-1][1]
    s = 1 / (1 + sigma)
    assert float(s.min()) >= 0.3 and float(s.max()) <= 0.7 and abs(float(s.mean()) - 0.5) < 0.01
    off = 0.1 - (SPREAD * 0.1 * s / (s * SPREAD + 1 - s) if leg == "student" else 0)
    guide = float(torch.as_tensor(off**2).mean())
    assert float(made["guide"]) == pytest.approx(guide, rel=1e-6)
    assert float(made["pairs"]) == pytest.approx(0.01, rel=1e-6)
    assert float(made["loss"].detach()) == pytest.approx(0.01 + 2 * guide, rel=1e-6)
    (slope,) = torch.autograd.grad(made["loss"], [student.off])
    assert float(slope) == pytest.approx(0.2 + 2 * 2 * float(torch.as_tensor(off).mean()), rel=1e-6)
    assert len(student.seen) == 1 and not any(grad for *_, grad in flow.seen) and flow.off.grad is None
    both = student.seen[0][0].reshape(2, -1) / start_std(student, 1e8)  # type: ignore[arg-type]
    assert float((both[0] - n.flatten()).abs().max()) < 1e-7
    assert abs(float((both[1] * both[0]).mean())) < 0.08 and float(both[1].var()) == pytest.approx(1, abs=0.1)


def test_the_flow_is_held_only_where_it_guides() -> None:
    assert set(SlimFlow().roles(tiny())) == {"student", "flow"}
    for method in (SlimFlow(guide=0.0), SlimFlow(stage="reflow")):
        assert set(method.roles(tiny())) == {"student"}
    assert SlimFlow().roles(tiny())["flow"].optim is None
    x0, n = coupled(50)
    plain = first(SlimFlow(guide=0.0), models_of(student=Straight(0.1)), x0, n).loss()
    assert float(plain.detach()) == pytest.approx(0.01)  # type: ignore[union-attr]


# ---- the smaller network


@pytest.mark.parametrize(("network", "field"), [("resmlp", "width"), ("unet", "channels")])
def test_the_student_is_a_fresh_narrower_network_in_the_same_form(network: str, field: str) -> None:
    size = {field: 32}
    start = untrained(tiny_data(), network, **size)
    made = slimmer(start, shrink=0.5, seed=4)
    D, before = made.denoiser, start.denoiser
    assert isinstance(D, Precond) and isinstance(before, Precond)
    assert getattr(D.net.config, field) == 16 and getattr(before.net.config, field) == 32
    assert sum(p.numel() for p in D.parameters()) < 0.7 * sum(p.numel() for p in before.parameters())
    assert (D.path, D.sigma_max, D.predicts, D.shape) == (before.path, before.sigma_max, before.predicts, before.shape)
    again, other = (slimmer(start, shrink=0.5, seed=seed).network.state_dict() for seed in (4, 5))
    own = made.network.state_dict()
    assert all(torch.equal(own[k], again[k]) for k in own) and any(not torch.equal(own[k], other[k]) for k in own)
    assert getattr(slimmer(start, shrink=0.01, seed=4).network.net.config, field) == 8


# ---- runs

METHOD = SlimFlow(optim=STEADY, ema=Ema(rate=0.9), ode_steps=2, probe=4)
OPTIONS: dict[str, Any] = {"budget": 10, "batch": 8, "micro": 2, "log_every": 1, "save_every": 2, "progress": False}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pairs(tmp_path_factory.mktemp("pairs") / "p", SHORT)


def go(out: Path, data: Any, *, method: SlimFlow = METHOD, teacher: Generator | None = None, **options: Any) -> Any:
    return method.run(teacher or tiny(), data, out=out, **OPTIONS | options)


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    go(out, Pairs(pairs))
    return out


def whole(out: Path) -> dict[str, Tensor]:
    parts = {f"{s}/{k}": t for s in ("reflow", "distil") for k, t in bits(out / "stages" / s).items()}
    return parts | {f"top/{k}": t for k, t in Generator.load(out).network.state_dict().items()}


def test_a_run_leaves_a_smaller_one_step_generator(finished: Path) -> None:
    made = Generator.load(finished)
    D = made.denoiser
    assert isinstance(D, Precond) and D.net.config.width == 8 and made.sampler.nfe == 1
    assert [(s["stage"], s["step"]) for s in made.card["stages"]] == [("reflow", 6), ("distil", 4)]
    assert made.sample(3, progress=False).shape == (3, 1, 4, 4) and not (finished / "pairs").exists()


# The loader asks for one step more than is done: 6 and 4 steps of 2 micro-batches take 14 and 10.
@pytest.mark.parametrize("stop", [7, 21])
def test_a_broken_run_goes_on_to_the_same_bits(stop: int, pairs: Path, finished: Path, tmp_path: Path) -> None:
    held = Breaks(pairs)
    held.left = stop
    with pytest.raises(Stop):
        go(tmp_path / "run", held)
    assert (tmp_path / "run/stages/distil").exists() == (stop > 14)
    torch.manual_seed(1)
    go(tmp_path / "run", Pairs(pairs), resume=True)
    assert differing(whole(finished), whole(tmp_path / "run")) == []
    assert log_of(finished) == log_of(tmp_path / "run")


def test_two_micro_batches_are_one_batch(pairs: Path, tmp_path: Path) -> None:
    for stage in ("reflow", "distil"):
        states = []
        for micro in (1, 2):
            method, out = replace(METHOD, stage=stage), tmp_path / f"{stage}{micro}"
            made = train(tiny(), method, Pairs(pairs), out=out, **OPTIONS | {"micro": micro})
            states.append(dict(made.network.state_dict()))
        far, where = furthest(*states)
        assert far < 1e-5, where
        before = tiny().network.state_dict()
        assert max(float((before[k] - v).abs().max()) for k, v in states[0].items()) > 1e-4


def test_own_pairs_and_a_guided_flow_teacher(tmp_path: Path) -> None:
    teacher = guided(untrained(tiny_data(), "resmlp", path="flow", width=16, embedding=8, blocks=1), 2.0)
    held = make_pairs(teacher, tmp_path / "p", n=24, progress=False)
    made = go(tmp_path / "s", held, teacher=teacher, method=replace(METHOD, fresh=True, flip=True))
    flow = Generator.load(tmp_path / "s/stages/reflow")
    assert Pairs(tmp_path / "s/pairs/distil").require(flow).facts["guidance"] == 1
    assert made.sampler.start == 1e8 and isinstance(made.denoiser, Precond) and made.denoiser.path == FLOW


# ---- bad input


def odd() -> Generator:
    net = KUNet(KUNetConfig(shape=(1, 4, 4), features=16, depths=(1,), channels=(16,), attention=(False,)))
    return Generator(Precond(net, (1, 4, 4)), SHORT)


ODD = odd()

BAD: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: SlimFlow(steps=2), "a student of one step, got steps=2"),
    (lambda p: SlimFlow(shrink=1.5), "0 < shrink, until <= 1"),
    (lambda p: SlimFlow(until=0.0), "0 < shrink, until <= 1"),
    (lambda p: SlimFlow(guide=-1.0), "finite guide >= 0"),
    (lambda p: SlimFlow(guide=math.nan), "guide >= 0, got .*guide=nan"),
    (lambda p: SlimFlow(guide_times=(0.5,)), "two guide_times"),  # type: ignore[arg-type]
    (lambda p: SlimFlow(guide_times=(0.8, 0.2)), "0 < guide_times < 1 in order"),
    (lambda p: SlimFlow(anneal="slowly"), "unknown anneal 'slowly'"),  # type: ignore[arg-type]
    (lambda p: SlimFlow(first_leg="teacher"), "unknown first_leg 'teacher'"),  # type: ignore[arg-type]
    (lambda p: SlimFlow(distance="l3"), "unknown distance 'l3'"),  # type: ignore[arg-type]
    (lambda p: SlimFlow(stage="all"), "unknown stage 'all'"),  # type: ignore[arg-type]
    (lambda p: slimmer(ODD, shrink=0.5, seed=0), "no single width to shrink, .*with reflow"),
    (lambda p: go(p / "x", tiny_data()), "SlimFlow learns from pairs .*`fewstep pairs"),
    (lambda p: go(p / "x", OnlinePairs(untrained(tiny_data(), "unet"), SHORT)), "made by another teacher"),
    (lambda p: go(p / "x", OnlinePairs(tiny(), SHORT), lora=LoRA(rank=2)), "leave LoRA out"),
    (lambda p: go(p / "x", OnlinePairs(ODD, SHORT), teacher=ODD), "no single width to shrink"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named_before_anything_is_written(
    make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as error:
        make(tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
