"""Flow matching against exact velocities: the loss, its minimum, the sampler, and whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.cli import main
from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Precond, start_std
from fewstep.core.exact import Mixture
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW
from fewstep.core.role import Ema, Models, Role
from fewstep.core.state import Run
from fewstep.data import Images
from fewstep.errors import InputError
from fewstep.loss.draw import FlowTime
from fewstep.train import FlowMatching, flow_levels, flow_sampler, train, untrained
from tiny_runs import STEADY, check_restart, run, tiny, tiny_data

SMALL = {"width": 16, "embedding": 8, "blocks": 1}
METHOD = FlowMatching(optim=STEADY, ema=Ema(rate=0.9), steps=3)


def flow(**size: Any) -> Generator:
    """As `tiny`, on the flow path."""
    made = untrained(tiny_data(), "resmlp", path="flow", **(size or SMALL))
    g = torch.Generator().manual_seed(1)
    for p in made.network.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return made


class Student(nn.Module):
    """A mixture's exact denoiser plus one parameter; keeps what it is called with."""

    def __init__(self, problem: Mixture, scale: float = 1.0) -> None:
        super().__init__()
        self.off = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.problem, self.scale, self.shape, self.sigma_data = problem, scale, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = 1e-4, 1e8
        self.seen: list[tuple[Tensor, Tensor, Cond | None]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        self.seen.append((x.detach(), sigma.detach(), cond))
        return self.scale * self.problem(x.double(), sigma, cond) + self.off


def models_of(student: nn.Module) -> Models:
    return build_models({"student": Role(lambda: student)}, "cpu")


def loss_of(student: nn.Module, method: FlowMatching, x0: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
    student.requires_grad_(True)
    (update,) = method.step(models_of(student), Batch(x0, cond or {}), 0, Noise.of(3, len(x0)))
    student.requires_grad_(True)
    loss = update.loss()
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize("draw", [FlowTime(), FlowTime(mean=0.5, std=0.7)])
def test_the_loss_is_the_mean_squared_error_of_the_velocity(draw: FlowTime) -> None:
    made = flow()
    D = made.denoiser
    assert isinstance(D, Precond)
    x0, noise = tiny_data().take(torch.arange(40)).x, Noise.of(3, 40)
    assert x0 is not None
    found = loss_of(D, FlowMatching(draw=draw, class_dropout=0.0), x0).detach()
    sigma = draw(noise, 0.5)[0]
    t, n = (sigma / (1 + sigma)).reshape(-1, 1, 1, 1), noise.normal((1, 4, 4), "n")
    velocity = D.net((1 - t) * x0 + t * n, t.flatten(), {})
    assert float(found) == pytest.approx(float((velocity.detach() - (n - x0)).square().mean()), rel=1e-4)


def test_the_posterior_mean_has_the_least_loss_and_no_gradient() -> None:
    problem = Mixture(torch.tensor([-0.7, 0.4]).reshape(2, 1, 1, 1), 0.04)
    x0, method = problem.draw(60_000, 1), FlowMatching(draw=FlowTime(least=0.02))
    best = Student(problem)
    loss = loss_of(best, method, x0)
    (slope,) = torch.autograd.grad(loss, [best.off])
    for scale in (0.9, 1.1):
        assert float(loss_of(Student(problem, scale), method, x0)) > float(loss) + 1e-3
    # The mean weight t^-2 is about 50 here; the error left is that of the draws.
    assert abs(float(slope)) < 0.02 * 50


def test_the_levels_are_even_in_flow_time_for_every_model() -> None:
    for made, top in ((flow(), 1e8), (tiny(), 80.0)):
        for steps in (1, 2, 5):
            levels = flow_levels(made.denoiser, steps)
            assert float(levels[0]) == top and float(levels[-1]) == 0 and len(levels) == steps + 1
            t = levels / (1 + levels)
            assert float((t.diff() + top / (1 + top) / steps).abs().max()) < 1e-7
    assert flow_sampler(flow().denoiser, 4).nfe == 4 and flow_sampler(flow().denoiser, 4, "heun").nfe == 7


@pytest.mark.parametrize(("order", "power"), [("euler", 1), ("heun", 2)])
def test_the_sampler_follows_the_exact_flow_with_its_order(order: Any, power: int) -> None:
    problem = Mixture(torch.full((1, 1, 1, 1), 0.3), 0.25, sigma_min=1e-4, sigma_max=1e8)
    n = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
    # The flow of a Gaussian is monotone and keeps quantiles.
    want = 0.3 + 0.5 * n
    far = []
    for steps in (16, 32, 64):
        sampler = flow_sampler(problem, steps, order)  # type: ignore[arg-type]
        far.append(float((sampler(problem, start_std(problem, sampler.start) * n) - want).abs().max()))  # type: ignore[arg-type]
    assert far[0] / far[1] > 2**power * 0.8 and far[1] / far[2] > 2**power * 0.8


def test_labels_are_hidden_as_often_as_asked_for() -> None:
    problem = Mixture(torch.tensor([-0.7, 0.4]).reshape(2, 1, 1, 1), 0.04)
    x0, label = problem.draw(4000, 1), torch.arange(4000) % 2
    for share in (0.0, 0.25, 1.0):
        student = Student(problem)
        loss_of(student, FlowMatching(class_dropout=share), x0, {"label": label})
        cond = student.seen[0][2]
        assert cond is not None
        hidden = cond["label"] < 0
        assert abs(float(hidden.double().mean()) - share) < 0.03
        assert torch.equal(cond["label"][~hidden], label[~hidden])


def test_an_untrained_flow_model_is_a_generator(tmp_path: Path) -> None:
    made = flow()
    D = made.denoiser
    assert isinstance(D, Precond) and D.path == FLOW and D.predicts == "velocity" and D.sigma_max == 1e8
    made.save(tmp_path)
    again = Generator.load(tmp_path)
    pictures = again.sample(3, progress=False)
    assert pictures.shape == (3, 1, 4, 4) and torch.equal(pictures, made.sample(3, progress=False))
    # The two paths start with the same weights, and EDM's is the default.
    one, other = (untrained(tiny_data(), "resmlp", **SMALL, **k).network.state_dict() for k in ({}, {"path": "flow"}))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert untrained(tiny_data(), "resmlp", **SMALL).denoiser.sigma_max == 80.0


def test_training_finds_the_pictures(tmp_path: Path) -> None:
    two = torch.full((64, 1, 2, 2), 0.5)
    two[::2] = -0.5
    data = Images("two", two)
    start = untrained(data, "resmlp", path="flow", width=32, embedding=16, blocks=1)
    method = FlowMatching(optim=STEADY, steps=8)
    made = train(start, method, data, out=tmp_path, budget=250, batch=64, progress=False, save_every=0, log_every=50)
    losses = [e["student/loss"] for e in Run(tmp_path).read_log()]
    assert losses[-1] < 0.6 * losses[0]
    pictures = made.sample(64, seed=5, progress=False)
    near = (pictures.abs() - 0.5).abs().flatten(1).mean(1)
    assert float(near.median()) < 0.15 and 0.2 < float((pictures.mean((1, 2, 3)) > 0).double().mean()) < 0.8


def test_a_resumed_run_and_micro_batches(tmp_path: Path) -> None:
    check_restart(tmp_path, lambda out, **more: run("flow", out, method=METHOD, start=flow(), **more), far=1e-5)
    made, before = Generator.load(tmp_path / "whole"), flow().network.state_dict()
    assert made.sampler.nfe == 5 and math.isclose(made.sampler.start, 1e8)
    assert max(float((before[k] - v).abs().max()) for k, v in made.network.state_dict().items()) > 1e-4


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    line = "train --network resmlp --width 16 --batch 8 --budget 2 --log-every 1"
    main([*line.split(), "--path", "flow", "--draw.mean", "0.5", "--steps", "4", "--order", "euler", "--out", "one"])
    made = Generator.load("one")
    assert isinstance(made.denoiser, Precond) and made.denoiser.path == FLOW and made.sampler.nfe == 4
    main(["train", "--recipe", "one/recipe.json", "--out", "two"])
    for file in ("student.safetensors", "recipe.json"):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    main([*line.split(), "--out", "edm"])
    assert Generator.load("edm").denoiser.sigma_max == 80.0
    for wrong, said in (
        (["--path", "vp"], "vp"),
        (["--steps", "4"], "--steps"),
        (["--path=flow", "--draw.std=0"], "std"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*line.split(), *wrong, "--out", "none"])
        assert stop.value.code == 2 and said in capsys.readouterr().err and not Path("none").exists()


def take_step(x: Tensor | None) -> None:
    list(METHOD.step(models_of(flow().network), Batch(x, {}), 0, Noise.of(0, 2)))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: FlowMatching(steps=0), "FlowMatching needs steps >= 1"),
    (lambda: FlowMatching(class_dropout=1.5), r"class_dropout in \[0, 1\]"),
    (lambda: FlowMatching(order="rk4"), "unknown order 'rk4'"),  # type: ignore[arg-type]
    (lambda: FlowMatching(draw=FlowTime(std=0)), "std > 0"),
    (lambda: METHOD.roles(tiny()), "on the flow path, got TrigPath.*--path flow; for another path use EDMTraining"),
    (lambda: untrained(tiny_data(), "resmlp", path="vp"), "unknown path to train on 'vp'"),  # type: ignore[arg-type]
    (lambda: flow_levels(flow().denoiser, 0), "at least 1 step, got 0"),
    (lambda: take_step(None), r"needs pictures of \(1, 4, 4\).*got None"),
    (lambda: take_step(torch.zeros(2, 3, 4, 4)), r"needs pictures of \(1, 4, 4\).*got \(3, 4, 4\)"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
