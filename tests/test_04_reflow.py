"""Reflow against straight lines, exact couplings and closed-form straightness, and whole runs of several stages."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import CountingDenoiser, Precond, start_std
from fewstep.core.exact import Mixture, bimodal
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW, VP
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.state import Run
from fewstep.data import Images, OnlinePairs, Pairs, make_pairs
from fewstep.data.pairs import guidance_of
from fewstep.distill.reflow import Reflow, flow_step
from fewstep.distill.straightening import between, flow_draw, straightness
from fewstep.errors import InputError
from fewstep.guide import CFG, guided
from fewstep.loss.draw import FlowTime
from fewstep.models.lora import LoRA
from fewstep.solve.heun import heun
from fewstep.train import FlowMatching, flow_levels, flow_sampler, train, untrained
from tiny_runs import STEADY, Breaks, Stop, bits, differing, log_of, tiny, tiny_data, tiny_pairs

SMALL = {"width": 16, "embedding": 8, "blocks": 1}
SHORT = heun(torch.tensor([80.0, 5.0, 1.0, 0.0], dtype=torch.float64))
MEAN, SPREAD = 0.3, 0.5


class Straight(nn.Module):
    """The exact flow of the coupling ``x0 = MEAN + SPREAD n``, whose lines are straight; one parameter is its error."""

    def __init__(self, top: float, unit_start: bool = False, sigma_min: float = 1e-4) -> None:
        super().__init__()
        self.off = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.shape, self.sigma_data, self.sigma_min, self.sigma_max = (1, 1, 1), 0.5, sigma_min, top
        self.unit_start = unit_start
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x)).reshape(-1, 1, 1, 1)
        self.seen.append(sigma.flatten().detach())
        left, gain = 1 - sigma / self.sigma_max, sigma * start_std(self, self.sigma_max) / self.sigma_max
        n = (x.double() - left * MEAN) / (left * SPREAD + gain)
        return MEAN + SPREAD * n + self.off


def coupled(count: int) -> tuple[Tensor, Tensor]:
    n = Noise.of(7, count).normal((1, 1, 1), "n", dtype=torch.float64)
    return MEAN + SPREAD * n, n


def models_of(student: nn.Module, **more: nn.Module) -> Models:
    roles = {name: Role(lambda net=net: net) for name, net in {"student": student, **more}.items()}
    return build_models(roles, "cpu")


def first(method: Reflow, student: nn.Module, x0: Tensor, n: Tensor | None, seed: int = 3) -> Update:
    (update,) = method.step(models_of(student), Batch(x0, {}, n), 0, Noise.of(seed, len(x0)))
    student.requires_grad_(True)
    return update


def flow(**size: Any) -> Generator:
    """As `tiny`, on the flow path."""
    made = untrained(tiny_data(), "resmlp", path="flow", **(size or SMALL))
    g = torch.Generator().manual_seed(1)
    for p in made.network.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return made


# ---- the line


@pytest.mark.parametrize(("top", "unit"), [(1e8, False), (80.0, False), (14.6, True), (157.0, True)])
def test_the_line_goes_from_the_samplers_start_to_the_picture_and_euler_stays_on_it(top: float, unit: bool) -> None:
    D: Any = Straight(top, unit)
    x0, n = coupled(5)
    ones = torch.ones(5, dtype=torch.float64)
    start = start_std(D, top) * n
    assert float((between(D, x0, n, top * ones) - start).abs().max()) <= 1e-15 * top
    assert float((between(D, x0, n, 0 * ones) - x0).abs().max()) == 0
    levels, x = flow_levels(D, 7), start
    for a, b in itertools.pairwise(levels):
        x = (b / a) * x + (1 - b / a) * x0
        assert float((x - between(D, x0, n, b * ones)).abs().max()) < 1e-9 * max(1.0, float(b))


@pytest.mark.parametrize("top", [1e8, 80.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_euler_step_of_the_exact_rectified_flow_is_an_exact_sample(top: float, steps: int) -> None:
    D: Any = Straight(top)
    x0, n = coupled(50)
    with torch.no_grad():
        found = Reflow(steps=steps).sampler(Generator(D, SHORT))(D, top * n)
    assert float((found - x0).abs().max()) < 1e-6


@pytest.mark.parametrize("top", [1e8, 80.0])
@pytest.mark.parametrize("distance", ["l2", "l1", "huber"])
@pytest.mark.parametrize("stage", ["reflow", "distil"])
def test_an_exact_rectified_flow_has_no_loss(top: float, distance: Any, stage: Any) -> None:
    x0, n = coupled(200)
    update = first(Reflow(steps=2, stage=stage, distance=distance), Straight(top), x0, n)
    assert float(update.loss().detach()) < 1e-9  # type: ignore[union-attr]


def test_the_loss_is_that_of_the_velocity() -> None:
    """An error e of x0 is an error e / t of the velocity, whose square, size or norm is the loss."""
    x0, n = coupled(400)
    for stage, steps in (("reflow", 1), ("distil", 3), ("distil", 1)):
        for distance in ("l2", "l1"):
            student = Straight(1e8)
            student.off.data.fill_(0.1)
            method = Reflow(steps=steps, stage=stage, distance=distance)  # type: ignore[arg-type]
            loss = first(method, student, x0, n).loss()
            assert isinstance(loss, Tensor)
            t = student.seen[0] / (1 + student.seen[0])
            square = stage == "reflow" or distance == "l2"
            want = (0.1 / t).square().mean() if square else (0.1 / t).mean()
            assert float(loss.detach()) == pytest.approx(float(want), rel=1e-6)
            (slope,) = torch.autograd.grad(loss, [student.off])
            assert float(slope) == pytest.approx(float((2 * 0.1 / t**2).mean() if square else (1 / t).mean()), rel=1e-6)


def test_independent_pairs_give_back_the_posterior_mean() -> None:
    class Exact(Straight):
        def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
            return (1 + self.off) * problem(x.double(), sigma)

    problem = Mixture(torch.full((1, 1, 1, 1), MEAN), SPREAD**2)
    x0, n = problem.draw(100_000, 1), Noise.of(9, 100_000).normal((1, 1, 1), "n", dtype=torch.float64)
    losses = []
    for off in (-0.1, 0.0, 0.1):
        student = Exact(1e8)
        student.off.data.fill_(off)
        method = Reflow(stage="reflow", draw=FlowTime(least=0.05))
        losses.append(float(first(method, student, x0, n).loss().detach()))  # type: ignore[union-attr]
    assert losses[1] < min(losses[0], losses[2]) - 1e-3


def test_pairs_in_the_wrong_order_do_not_fit() -> None:
    x0, n = coupled(400)
    right, wrong = (
        float(first(Reflow(), Straight(1e8), x0, m).loss().detach())  # type: ignore[union-attr]
        for m in (n, n.flip(0))
    )
    # E (x0 - x0')^2 = 2 SPREAD^2 of two unrelated ones.
    assert right < 1e-9 and wrong == pytest.approx(2 * SPREAD**2, rel=0.2)


@pytest.mark.parametrize("top", [1e8, 80.0])
def test_times_are_drawn_alike_up_to_the_start(top: float) -> None:
    D: Any = Straight(top, sigma_min=0.01)
    sigma = flow_draw(FlowTime(), Noise.of(0, 20_000), D)
    share = (sigma / (1 + sigma)) / (top / (1 + top))
    assert float(sigma.min()) >= 0.01 and 0.99 < float(share.max()) <= 1
    for edge in (0.25, 0.5, 0.75):
        assert abs(float((share < edge).double().mean()) - edge) < 0.01
    levels = flow_levels(D, 4)[:-1]
    drawn = flow_step(Noise.of(0, 8000), D, 4)
    nearest = (drawn[:, None] / levels - 1).abs().min(1)
    assert float(nearest[0].max()) < 1e-9 and torch.equal(drawn.max(), levels[0])
    assert float((torch.bincount(nearest[1], minlength=4) / 8000 - 0.25).abs().max()) < 0.02


def test_a_flip_turns_picture_and_noise_together() -> None:
    class Seen(Straight):
        def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
            self.x = x
            return 0 * x + self.off

    student = Seen(1e8)
    student.shape = (1, 1, 2)
    x0 = torch.tensor([-1.0, 1.0], dtype=torch.float64).expand(200, 1, 1, 2)
    n = torch.tensor([-3.0, 5.0], dtype=torch.float64).expand(200, 1, 1, 2)
    for flip in (False, True):
        loss = first(Reflow(flip=flip), student, x0, n).loss()
        assert isinstance(loss, Tensor)
        kept = student.x[:, 0, 0, 0] < 0
        assert torch.equal(student.x[kept], (1e8 * n)[kept]) and torch.equal(
            student.x[~kept], (1e8 * n.flip(-1))[~kept]
        )
        assert (60 < int(kept.sum()) < 140) if flip else bool(kept.all())


# ---- straightness


def test_straightness_is_that_of_the_closed_form_and_0_for_straight_lines() -> None:
    assert straightness(Generator(Straight(1e8), SHORT), 50) < 1e-12  # type: ignore[arg-type]
    assert straightness(Generator(Straight(80.0), SHORT), 50) < 1e-12  # type: ignore[arg-type]
    problem = Mixture(torch.full((1, 1, 1, 1), MEAN), SPREAD**2, sigma_min=1e-4, sigma_max=1e8)
    # z_t = (1 - t) MEAN + g(t) n with g^2 = (1 - t)^2 SPREAD^2 + t^2: the integral is that of (g' - 1 + SPREAD)^2.
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    g = ((1 - t) ** 2 * SPREAD**2 + t**2).sqrt()
    want = float((((t - (1 - t) * SPREAD**2) / g) - (1 - SPREAD)).square().mean())
    found = straightness(Generator(problem, SHORT), 4000, steps=400, batch=1000)
    assert found == pytest.approx(want, rel=0.05) and want > 0.05


def trained(out: Path) -> Generator:
    """A flow model of three points on a line of two pixels."""
    points = torch.tensor([[-0.8, 0.6], [0.0, -0.7], [0.8, 0.5]]).repeat(64, 1).reshape(-1, 1, 1, 2)
    data = Images("three", points + 0.05 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0)))
    start = untrained(data, "resmlp", path="flow", width=32, embedding=16, blocks=1)
    method = FlowMatching(optim=Optim(lr=3e-3, decay="cosine", clip=1.0), steps=12)
    return train(start, method, data, out=out, budget=200, batch=64, progress=False, save_every=0)


def test_reflow_straightens_and_distillation_shortens(tmp_path: Path) -> None:
    teacher = trained(tmp_path / "t")
    pairs = make_pairs(teacher, tmp_path / "p", n=512, progress=False)
    method = Reflow(optim=Optim(lr=2e-3, decay="cosine", clip=1.0), rounds=1, probe=64, ode_steps=4)
    student = method.run(teacher, pairs, out=tmp_path / "s", budget=300, batch=64, progress=False, save_every=0)
    card = Generator.load(tmp_path / "s").card
    assert card["stages"][0]["straightness"] < 0.25 * card["straightness"]
    assert card["straightness"] == pytest.approx(straightness(teacher, 64), rel=1e-4)
    held = OnlinePairs(teacher, seed=5).take(torch.arange(256))
    assert held.noise is not None and held.x is not None
    far = []
    for made in (teacher, student):
        with torch.no_grad():
            one = flow_sampler(made.denoiser, 1)(made.denoiser, 1e8 * held.noise)
        far.append(float((one - held.x).square().mean()))
    assert far[1] < 0.1 * far[0] and student.sampler.nfe == 1


# ---- runs

METHOD = Reflow(optim=STEADY, ema=Ema(rate=0.9), rounds=2, ode_steps=2, probe=4, share=0.4)
OPTIONS: dict[str, Any] = {"budget": 10, "batch": 8, "micro": 2, "log_every": 1, "save_every": 2, "progress": False}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pairs(tmp_path_factory.mktemp("pairs") / "p", SHORT)


def go(out: Path, data: Any, *, method: Reflow = METHOD, teacher: Generator | None = None, **options: Any) -> Generator:
    return method.run(teacher or tiny(), data, out=out, **OPTIONS | options)


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    go(out, Pairs(pairs))
    return out


def whole(out: Path) -> dict[str, Tensor]:
    """Every tensor of every stage and of the student."""
    parts = {f"{p.name}/{k}": t for p in sorted((out / "stages").glob("*-*[0-9]")) for k, t in bits(p).items()}
    parts |= {f"distil/{k}": t for k, t in bits(out / "stages/distil").items()}
    return parts | {f"top/{k}": t for k, t in Generator.load(out).network.state_dict().items()}


def test_a_run_leaves_a_generator_and_the_pairs_of_every_flow(finished: Path, pairs: Path) -> None:
    made = Generator.load(finished)
    assert made.sampler.nfe == 1 and made.sampler.start == 80.0 and isinstance(made.denoiser, Precond)
    assert [s["stage"] for s in made.card["stages"]] == ["reflow-1", "reflow-2", "distil"]
    assert [s["step"] for s in made.card["stages"]] == [3, 3, 4]
    assert all(s["straightness"] > 0 for s in made.card["stages"]) and made.card["straightness"] > 0
    flows = [Generator.load(finished / "stages" / f"reflow-{k}") for k in (1, 2)]
    for name, of in (("reflow-2", flows[0]), ("distil", flows[1])):
        own = Pairs(finished / "pairs" / name)
        assert own.require(of) is own and len(own) == 40 and own.facts["sampler"]["nfe"] == 3
    assert not (finished / "pairs/reflow-1").exists()
    one, other = (
        Pairs(pairs).take(torch.arange(40)).noise,
        Pairs(finished / "pairs/distil").take(torch.arange(40)).noise,
    )
    assert float((one - other).abs().max()) > 1  # type: ignore[operator]
    assert [e["step"] for e in Run(finished).read_log()] == [1, 2, 3]


@pytest.mark.parametrize("stop", [3, 5])
def test_a_broken_run_goes_on_to_the_same_bits(stop: int, pairs: Path, finished: Path, tmp_path: Path) -> None:
    held = Breaks(pairs)
    held.left = stop
    with pytest.raises(Stop):
        go(tmp_path / "run", held)
    torch.manual_seed(1)
    go(tmp_path / "run", Pairs(pairs), resume=True)
    assert differing(whole(finished), whole(tmp_path / "run")) == []
    assert log_of(finished) == log_of(tmp_path / "run")


def test_a_run_broken_in_its_distillation_goes_on_with_the_pairs_that_it_had(pairs: Path, tmp_path: Path) -> None:
    for fresh in (False, True):
        method, base = replace(METHOD, rounds=1, fresh=fresh), tmp_path / str(fresh)
        go(base / "one", Pairs(pairs), method=method)
        go(base / "two", Pairs(pairs), method=method)
        for name in ("fewstep.json", "student.safetensors"):
            (base / "two" / name).unlink()
            (base / "two/stages/distil" / name).unlink()
        last = Run(base / "two/stages/distil").checkpoints()[-1]
        (last / "step.json").unlink()
        last.rename(last.with_name(".gone.tmp"))
        go(base / "two", Pairs(pairs), method=method, resume=True)
        student = [Generator.load(base / k).network.state_dict() for k in ("one", "two")]
        assert all(torch.equal(student[0][k], student[1][k]) for k in student[0])
        recipe = json.loads((base / "two/stages/distil/recipe.json").read_text())
        own = Pairs(base / "two/pairs/distil").fingerprint if fresh else Pairs(pairs).fingerprint
        assert recipe["data"] == own


def test_resuming_a_finished_run_trains_nothing(finished: Path, pairs: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    held = Breaks(pairs)
    held.left = 0
    go(finished, held, resume=True)
    assert all(p.read_bytes() == b for p, b in before.items())


def test_two_micro_batches_are_one_batch(pairs: Path, tmp_path: Path) -> None:
    far = 0.0
    for stage in ("reflow", "distil"):
        method = replace(METHOD, stage=stage, steps=2)
        made = [
            train(tiny(), method, Pairs(pairs), out=tmp_path / f"{stage}{m}", **OPTIONS | {"micro": m}) for m in (1, 2)
        ]
        a, b = (g.network.state_dict() for g in made)
        far = max(far, *(float((a[k] - b[k]).abs().max() / (b[k].abs().max() + 1e-12)) for k in a))
        before = tiny().network.state_dict()
        assert max(float((before[k] - v).abs().max()) for k, v in a.items()) > 1e-4
    assert far < 1e-5


def test_a_guided_teacher_is_folded_in(tmp_path: Path) -> None:
    teacher = guided(tiny(), 3.0)
    held = make_pairs(teacher, tmp_path / "p", n=24, sampler=SHORT, progress=False)
    made = go(tmp_path / "s", held, teacher=teacher, method=replace(METHOD, rounds=1))
    assert isinstance(made.denoiser, Precond) and not isinstance(made.denoiser, CFG)
    assert guidance_of(made.denoiser) == 1 and held.facts["guidance"] == 3
    with pytest.raises(InputError, match="made by another teacher"):
        go(tmp_path / "t", held)
    assert not (tmp_path / "t").exists()


def test_online_pairs_need_no_disk(tmp_path: Path) -> None:
    made = go(tmp_path / "s", OnlinePairs(tiny(), SHORT, size=64), method=replace(METHOD, rounds=1))
    assert made.sampler.nfe == 1 and not (tmp_path / "s/pairs").exists()


def test_a_flow_teacher_and_a_flow_that_is_shipped(tmp_path: Path) -> None:
    teacher = flow()
    held = make_pairs(teacher, tmp_path / "p", n=24, progress=False)
    made = go(tmp_path / "s", held, teacher=teacher, method=replace(METHOD, steps=4, distil=False, probe=0))
    assert made.sampler.nfe == 4 and made.sampler.start == 1e8
    assert [s["stage"] for s in made.card["stages"]] == ["reflow-1", "reflow-2"]
    assert made.card["straightness"] is None
    assert made.sample(3, progress=False).isfinite().all()


def test_labels_reach_the_student(pairs: Path) -> None:
    D = CountingDenoiser(tiny().denoiser)
    seen: list[Any] = []

    class Watched(nn.Module):
        shape, sigma_min, sigma_max, sigma_data = (1, 4, 4), 0.002, 80.0, 0.5

        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
            seen.append(cond)
            return D(x, sigma, cond) + self.p

    batch = Pairs(pairs).take(torch.arange(8))
    (update,) = Reflow().step(models_of(Watched()), batch, 0, Noise.of(0, 8))
    update.loss()
    assert torch.equal(seen[0]["label"], batch.cond["label"]) and D.nfe == 1


def test_lpips_is_a_frozen_role_of_the_distillation_alone(tmp_path: Path) -> None:
    digits = Images("eight", torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    teacher = untrained(digits, "resmlp", **SMALL)
    method = Reflow(distance="lpips")
    roles = method.roles(teacher)
    assert set(roles) == {"student", "distance"} and roles["distance"].optim is None
    assert set(replace(method, stage="reflow").roles(teacher)) == {"student"}
    m = build_models(roles, "cpu")
    noise = Noise.of(0, 4)
    x0, n = noise.normal((1, 8, 8), "x") * 0.3, noise.normal((1, 8, 8), "n")
    (update,) = method.step(m, Batch(x0, {}, n), 0, noise)
    with torch.no_grad():
        estimate = m.student(80.0 * n, 80.0, {})
        want = m.networks["distance"](estimate, x0).mean()
    assert float(update.loss()) == pytest.approx(float(want), rel=1e-5)  # type: ignore[arg-type]


def test_lora_layers_are_merged_after_every_stage(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    teacher = guided(tiny(), 2.0)
    held = make_pairs(teacher, tmp_path / "p", n=24, sampler=SHORT, progress=False)
    made = go(tmp_path / "s", held, teacher=teacher, method=replace(METHOD, rounds=1), lora=LoRA(rank=2))
    assert type(made.denoiser) is Precond
    assert Generator.load(tmp_path / "s").fingerprint() == made.fingerprint()


# ---- bad input


def with_net(**changes: Any) -> Generator:
    made = copy.deepcopy(flow())
    D = made.denoiser
    assert isinstance(D, Precond)
    return replace(made, denoiser=Precond(D.net, D.shape, **{"path": FLOW, "sigma_max": 1e8, **changes}))


def stepped(batch: Batch) -> None:
    list(Reflow().step(models_of(tiny().network), batch, 0, Noise.of(0, 2)))


X = torch.zeros(2, 1, 4, 4)
BAD: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: Reflow(steps=0), "Reflow needs steps >= 1"),
    (lambda p: Reflow(share=1.0), "0 < share < 1"),
    (lambda p: Reflow(rounds=0, distil=False), "has nothing to do"),
    (lambda p: Reflow(stage="both"), "unknown stage 'both'"),  # type: ignore[arg-type]
    (lambda p: Reflow(distance="l3"), "unknown distance 'l3'"),  # type: ignore[arg-type]
    (lambda p: Reflow().roles(replace(tiny(), denoiser=bimodal())), "Mixture has no weights to train"),
    (lambda p: Reflow().roles(with_net(predicts="noise")), r"says nothing of x0 at sigma 1e\+08.*lower sigma_max"),
    (
        lambda p: Reflow().roles(with_net(predicts="noise", path=VP, sigma_max=150.0)) and stepped(Batch(X, {})),
        "no noise",
    ),
    (lambda p: stepped(Batch(None, {}, X)), "has no picture: make pairs with `fewstep pairs`"),
    (lambda p: stepped(Batch(X[:, :, :2], {}, X[:, :, :2])), r"needs pairs of \(1, 4, 4\), got \(1, 2, 4\)"),
    (lambda p: Reflow(distance="lpips").roles(tiny()), r"no packaged features for pictures \(1, 4, 4\)"),
    (lambda p: go(p / "x", tiny_data()), "Reflow learns from pairs .* and got 'tiny'.*`fewstep pairs"),
    (lambda p: go(p / "x", None), "got nothing"),
    (lambda p: go(p / "x", OnlinePairs(flow(), SHORT)), "made by another teacher"),
    (lambda p: go(p / "x", OnlinePairs(tiny(), SHORT), lr=3), "unknown training option"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named_before_anything_is_written(
    make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as error:
        make(tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_occupied_folder_and_another_recipe_are_refused(finished: Path, pairs: Path) -> None:
    with pytest.raises(InputError, match="already holds files"):
        go(finished, Pairs(pairs))
    with pytest.raises(InputError, match=r"another recipe: settings.rounds was 2 and is 1"):
        go(finished, Pairs(pairs), method=replace(METHOD, rounds=1), resume=True)
    assert math.isfinite(Generator.load(finished).card["straightness"])
