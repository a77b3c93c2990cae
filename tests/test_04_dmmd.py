"""DMMD: unbiased discrepancies, particle flows against closed forms, the training loss by hand, and as runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.sample import Step
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.data import Images
from fewstep.errors import InputError
from fewstep.grid.own import own_levels
from fewstep.solve.particle_flow import (
    KERNELS,
    ParticleFlow,
    features_of,
    gram,
    mixed,
    mmd2,
    witness,
    witness_slope,
)
from fewstep.train import train, untrained
from fewstep.train.dmmd import DMMD, FeaturesConfig, Unlabelled, featured, train_dmmd
from tiny_runs import STEADY, StopsAfter, check_restart, log_of, tiny, tiny_data

OPTIONS: dict[str, Any] = {"batch": 8, "micro": 2, "log_every": 2, "save_every": 3, "progress": False}
METHOD = DMMD(steps=4, levels=2, group=4, optim=STEADY)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known() -> Tensor:
    x = tiny_data().take(torch.arange(48)).x
    assert x is not None
    return x


def critic(**changes: Any) -> Generator:
    """A tiny network with features, and a flow that knows where to go."""
    made = featured(tiny(**changes), features=5)
    return made.with_sampler(ParticleFlow([80.0], data=known()))


class Pixels(nn.Module):
    """The plainest denoiser there is, for flows on pixels."""

    shape, sigma_min, sigma_max, sigma_data = (1, 2, 2), 0.002, 80.0, 0.5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("paired", [False, True])
def test_the_discrepancy_of_equal_laws_is_zero_on_average(kernel: Any, paired: bool) -> None:
    x, y = drawn(4000, 6, 3), drawn(4000, 6, 3, seed=1)
    values = mmd2(x, y, kernel, (0.7, 1.5), paired=paired)
    assert values.shape == (4000,) and bool((values < 0).any())
    assert abs(float(values.mean())) < 5 * float(values.std()) / 4000**0.5
    assert float(mmd2(x, y + 1.0, kernel, (1.0,), paired=paired).mean()) > 10 * float(values.std()) / 4000**0.5


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_discrepancy_is_the_sum_over_pairs(kernel: Any) -> None:
    x, y = drawn(5, 3), drawn(4, 3, seed=1)
    n, m = len(x), len(y)
    k = lambda a, b: float(gram(a[None], b[None], kernel, (1.3,)))  # noqa: E731
    same = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    cross = sum(k(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)
    assert float(mmd2(x, y, kernel, (1.3,))) == pytest.approx(same + other - 2 * cross, abs=1e-12)
    cross = sum(k(x[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    same = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    paired = float(mmd2(x[:m], y, kernel, (1.3,), paired=True))
    assert paired == pytest.approx(same + other - 2 * cross, abs=1e-12)


def test_linear_features_give_the_difference_of_means() -> None:
    x, y = drawn(300, 2), drawn(200, 2, seed=1) + torch.tensor([1.0, -2.0], dtype=torch.float64)
    away = x.mean(0) - y.mean(0)
    spread = x.var(0).sum() / 300 + y.var(0).sum() / 200
    assert float(mmd2(x, y)) == pytest.approx(float(away.square().sum() - spread), rel=1e-9)
    # The direction is mean z - mean x, for each particle with itself left out of the mean.
    slope = witness_slope(x, None, y)
    others = (x.sum(0) - x) / 299
    assert float((slope - (others - y.mean(0))).abs().max()) < 1e-12
    assert float((witness_slope(x, x, y) - away).abs().max()) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_slopes_are_those_of_the_witness_with_the_particles_held(kernel: Any) -> None:
    z, data = drawn(6, 3), drawn(9, 3, seed=1)
    leaf = z.clone().requires_grad_(True)
    witness(leaf, z, data, kernel, (0.8, 2.0), among=True).sum().backward()
    assert float((leaf.grad - witness_slope(z, None, data, kernel, (0.8, 2.0))).abs().max()) < 1e-9  # type: ignore[operator]
    # Nothing is left of the witness where the particles are the data.
    assert float(witness(z, data, data, kernel).abs().max()) < 1e-12
    assert float(witness_slope(z, data, data, kernel).abs().max()) < 1e-12


@pytest.mark.parametrize("kernel", ["gaussian", "quadratic", "distance"])
def test_a_fixed_kernel_flow_makes_the_discrepancy_smaller(kernel: Any) -> None:
    data = (0.3 * drawn(60, 1, 2, 2) + 0.8).float()
    start = drawn(50, 1, 2, 2, seed=2).float()
    values: list[float] = []

    def see(step: Step) -> None:
        values.append(float(mmd2(step.point.flatten(1).double(), data.flatten(1).double(), kernel)))

    for moves in (0, 5, 10, 20):
        flow = ParticleFlow(
            [1.0], moves=max(moves, 1), rate=0.3, pace="constant", learned=False, kernel=kernel, data=data
        )
        end = flow(Pixels(), start) if moves else start
        see(Step(moves, 0.0, end, None))
    assert values[0] > values[1] > values[2] > values[3]


def test_particles_of_a_linear_flow_on_pixels_move_as_their_mean() -> None:
    data, start = drawn(7, 1, 2, 2).float(), drawn(5, 1, 2, 2, seed=1).float()
    flow = ParticleFlow([1.0], moves=1, rate=0.5, pace="constant", learned=False, data=data)
    others = (start.sum(0) - start) / 4
    assert float((flow(Pixels(), start) - (start - 0.5 * (others - data.mean(0)))).abs().max()) < 1e-6


def test_a_learned_flow_moves_by_the_slope_in_the_coordinates_of_the_path() -> None:
    made, x = critic(), known()
    D: Any = made.denoiser
    flow = ParticleFlow([5.0], moves=1, rate=0.2, pace="constant", data=x)
    n = drawn(6, 1, 4, 4).float()
    level = torch.tensor(5.0, dtype=torch.float64)
    a = float(D.path.coeffs(D.path.at(level)).a)
    z = (5.0 * a * n).requires_grad_(True)
    f = features_of(D, z, level)
    wanted = features_of(D, x, level)
    value = (f * ((f.detach().sum(0) - f.detach()) / 5 - wanted.mean(0))).sum()
    (g,) = torch.autograd.grad(value, z)
    assert float(g.abs().max()) > 1e-5
    assert float((flow(D, 5.0 * n) - (z - 0.2 * g).detach()).abs().max()) < 1e-6
    # A unit pace makes all moves at the only level as long as a noised picture's way to the data.
    unit = ParticleFlow([5.0], moves=4, data=x)
    end = D.path.coeffs(D.path.at(level))
    way = 4 * (((1 - float(end.a)) * D.sigma_data) ** 2 + float(end.b) ** 2) ** 0.5
    assert unit._length(D, 0) * 4 == pytest.approx(way, rel=1e-6)


def test_kept_means_are_those_of_the_pictures(tmp_path: Path) -> None:
    made, x = critic(), known()
    D, levels = made.denoiser, [10.0, 1.0]
    flow = ParticleFlow(levels, moves=2, data=x)
    kept = flow.embedded(D)
    assert kept.data is None and kept.clean is not None and kept.clean.shape == (2, 5)
    start = 10 * drawn(6, 1, 4, 4).float()
    assert float((flow(D, start) - kept(D, start)).abs().max()) < 1e-5
    again: Any = load_sampler(save_sampler(kept, tmp_path / "flow"))
    assert torch.equal(again(D, start), kept(D, start)) and again.settings() == kept.settings()
    # Without a population a picture stands for itself; with one it does not.
    alone = ParticleFlow(**(kept.settings() | {"population": False}), clean=kept.clean, noised=kept.noised)
    lone = ParticleFlow(**(alone.settings() | {"pace": "constant"}), clean=kept.clean, noised=kept.noised)
    assert float((lone(D, start)[:1] - lone(D, start[:1])).abs().max()) < 1e-6
    assert float((kept(D, start)[:2] - kept(D, start[:2])).abs().max()) > 1e-4
    assert [kept.start, kept.end, kept.nfe] == [10.0, 0.0, 4]


def test_the_loss_is_its_formula() -> None:
    made = critic()
    method = replace(METHOD, penalty=3.0, shrink=0.2)
    m = build_models(method.roles(made), "cpu")
    noise, batch = Noise.of(5, 8), tiny_data().take(torch.arange(8))
    update = next(method.step(m, batch, 0, noise))
    m.critic.requires_grad_(True)
    told: Any = update.loss()
    told["loss"].backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in m.critic.net.heads.parameters())
    x0, D = batch.x, m.critic
    assert x0 is not None
    share = noise.uniform((), "level", dtype=torch.float64)
    sigma = own_levels(D, share[[0, 0, 0, 0, 4, 4, 4, 4]])
    y = mixed(D, x0, noise.normal((1, 4, 4), "n"), sigma)
    place = noise.uniform((), "between").reshape(-1, 1, 1, 1)
    z = (y + place * (x0 - y)).requires_grad_(True)
    fx, fy, fz = (features_of(D, t, sigma) for t in (x0, y, z))
    total = 0.2 * (fx.square().sum(1).mean() + fy.square().sum(1).mean()) / 2
    for rows in (slice(0, 4), slice(4, 8)):
        total = total - mmd2(fx[rows], fy[rows], paired=True) / 2
        w = (fz[rows] @ (fy[rows].mean(0) - fx[rows].mean(0))).sum()
        (g,) = torch.autograd.grad(w, z, retain_graph=True)
        total = total + 3.0 * (g[rows].flatten(1).norm(dim=1) - 1).square().sum() / 8
    assert float(told["loss"].detach()) == pytest.approx(float(total.detach()), rel=1e-4)


def test_particles_come_near_the_data(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    board = torch.tensor([0.7, -0.7]).repeat(8).reshape(1, 1, 4, 4)
    x = (board + 0.05 * torch.randn(64, 1, 4, 4, generator=g)).clamp(-1, 1)
    source = Images("boards", x, torch.zeros(64, dtype=torch.long))
    method = replace(METHOD, group=8, steps=20, levels=5)
    start = untrained(cast(Any, Unlabelled(source)), "resmlp", width=16, embedding=8, blocks=1)
    made = train_dmmd(source, out=tmp_path, budget=60, method=method, start=start, features=5, batch=32, progress=False)
    log = log_of(tmp_path)
    assert log[-1]["critic/mmd"] > 2 * log[0]["critic/mmd"]
    noise = source.std * Noise.of(1, 32).normal((1, 4, 4), "start")
    pictures = made.sample(32, seed=1, progress=False)
    assert float((pictures - board).square().mean()) < 0.7 * float((noise.clamp(-1, 1) - board).square().mean())
    again = Generator.load(tmp_path)
    assert torch.equal(again.sample(6, seed=3, progress=False), made.sample(6, seed=3, progress=False))
    assert again.sampler.nfe == 20 and isinstance(again.sampler, ParticleFlow) and again.sampler.clean is not None


def test_other_kernels_and_maps_of_features(tmp_path: Path) -> None:
    start = featured(
        tiny("unet", channels=8, multipliers=(1, 2), blocks=1, attention=(2,)), ("bottleneck", "encoder4"), 3
    )
    assert features_of(start.denoiser, known()[:2], torch.tensor(1.0, dtype=torch.float64)).shape == (2, 3 * 4 + 3 * 16)
    method = replace(METHOD, kernel="quadratic", widths=(1.0, 2.0))
    made = train_dmmd(
        tiny_data(), out=tmp_path, budget=2, method=method, start=critic(), features=4, batch=8, progress=False
    )
    assert isinstance(made.sampler, ParticleFlow) and made.sampler.data is not None
    assert made.sample(4, progress=False).isfinite().all()


def test_a_resumed_run_and_micro_batches(tmp_path: Path) -> None:
    made, source = critic(), tiny_data()

    def go(out: Path, stop: int | None = None, **options: Any) -> None:
        given: Any = source if stop is None else StopsAfter(source, stop * OPTIONS["micro"])
        train(made, METHOD, given, out=out, budget=6, **(OPTIONS | options))

    check_restart(tmp_path, go, far=2e-3)


def lone(**changes: Any) -> Any:
    """A flow of one particle."""
    return ParticleFlow([1.0], data=known(), **changes)(critic().denoiser, torch.zeros(1, 1, 4, 4))


def stepped(batch: Batch) -> Any:
    """The first update on a batch."""
    return next(METHOD.step(build_models(METHOD.roles(critic()), "cpu"), batch, 0, Noise.of(0, 6)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DMMD(steps=15), "multiple of levels"),
        (lambda: DMMD(group=1), "group >= 2"),
        (lambda: DMMD(lowest=1.0), "lowest < 1"),
        (lambda: DMMD(penalty=-1.0), "penalty >= 0"),
        (lambda: DMMD(kernel="cubic"), "unknown kernel"),  # type: ignore[arg-type]
        (lambda: DMMD(widths=()), "one width or more"),
        (lambda: DMMD(rate=0.0), "rate > 0"),
        (lambda: DMMD(kernel="gaussian", population=False), "feel each other"),
        (lambda: DMMD().roles(tiny()), "has no features for particles"),
        (lambda: METHOD.sampler(replace(critic(), sampler=tiny().sampler)), "knows none"),
        (lambda: stepped(Batch(known()[:6], {})), "do not divide"),
        (lambda: stepped(Batch(None, {})), "needs pictures"),
        (lambda: featured(tiny(), ("nowhere",)), "unknown feature tap"),
        (lambda: FeaturesConfig({}, ("a",), (1, 2), (2,)), "features need for each tap"),
        (lambda: ParticleFlow([1.0, 2.0]), "falling levels"),
        (lambda: ParticleFlow([], moves=1), "falling levels"),
        (lambda: ParticleFlow([1.0], pace="fast"), "unknown pace"),  # type: ignore[arg-type]
        (lambda: ParticleFlow([1.0], kernel="gaussian", data=known()).embedded(critic().denoiser), "linear kernel"),
        (lambda: ParticleFlow([1.0])(critic().denoiser, torch.zeros(2, 1, 4, 4)), "what it moves towards"),
        (lambda: ParticleFlow([1.0], data=torch.zeros(3, 1, 2, 2))(critic().denoiser, torch.zeros(2, 1, 4, 4)),
         "cannot move towards"),
        (lone, "no population"),
        (lambda: ParticleFlow([1.0])(tiny().denoiser, torch.zeros(2, 1, 4, 4), {"label": torch.zeros(2)}),
         "unconditional"),
        (lambda: mmd2(torch.zeros(1, 2), torch.zeros(3, 2)), "two rows or more"),
        (lambda: mmd2(torch.zeros(2, 2), torch.zeros(3, 2), paired=True), "as many of both"),
        (lambda: train_dmmd(tiny_data(), out="x", budget=1, reference=1), "reference"),
    ],
)  # fmt: skip
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_the_network_of_the_start_is_copied() -> None:
    start = tiny()
    before = copy.deepcopy(start.denoiser.state_dict())  # type: ignore[attr-defined]
    made: Any = featured(start).denoiser
    for p in made.parameters():
        p.data += 1
    assert all(torch.equal(v, before[k]) for k, v in start.denoiser.state_dict().items())  # type: ignore[attr-defined]
    assert made.describe()["net"]["kind"] == "features"
