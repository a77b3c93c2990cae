"""The equilibrium transformer, its gradients, and its distillation from pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.denoiser import build_denoiser
from fewstep.core.fit import build_models, fit
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions
from fewstep.core.role import Models, Optim
from fewstep.data import make_pairs
from fewstep.distill import distill
from fewstep.distill.get import GETDistillation, weights
from fewstep.errors import InputError
from fewstep.guide import CFG
from fewstep.models.get import GET, GETConfig, OneLevel, ViT, ViTConfig, one_level, transformer
from fewstep.train import train
from tiny_runs import STEADY, StopsAfter, check_restart, tiny, tiny_data

TINY = GETConfig((1, 4, 4), 3, patch=2, width=16, heads=2, depth=1, tied=1, tied_mlp=2.0, iterations=4)
METHOD = GETDistillation(width=16, heads=2, depth=1, tied=1, tied_mlp=2.0, iterations=4, vit_depth=2, optim=STEADY)


class Pairs:
    """``size`` pairs of unit noise and a picture that is a function of it and of the class."""

    def __init__(self, size: int = 32, shuffled: bool = False) -> None:
        source = Noise.of(0, size)
        self.noise = source.normal((1, 4, 4), "n")
        self.label = torch.arange(size) % 3
        x = torch.tanh(2 * self.noise.flip(3) + self.label[:, None, None, None] - 1)
        self.x = x.roll(5, 0) if shuffled else x
        self.fingerprint = "pairs"

    def __len__(self) -> int:
        return len(self.x)

    def take(self, ids: Tensor) -> Batch:
        return Batch(self.x[ids], {"label": self.label[ids]}, self.noise[ids])


def made(size: ViTConfig = TINY, spread: float = 0.0) -> Any:
    torch.manual_seed(0)
    net = transformer(size)
    for p in net.parameters():
        p.data += spread * torch.randn(p.shape)
    return net


def models_of(method: GETDistillation, teacher: Generator | None = None) -> Models:
    return build_models(method.roles(teacher or tiny()), "cpu")


# ---- the network


@pytest.mark.parametrize("size", [TINY, ViTConfig((1, 4, 4), 3, width=16, heads=2, depth=2)])
def test_the_head_starts_at_nothing_and_the_first_loss_is_the_mean_of_the_picture(size: ViTConfig) -> None:
    net, pairs = made(size), Pairs()
    assert float(net(pairs.noise, torch.zeros(32), {"label": pairs.label}).abs().max()) == 0
    method = replace(METHOD, network="get" if isinstance(net, GET) else "vit")
    (update,) = method.step(models_of(method), pairs.take(torch.arange(32)), 0, Noise.of(0, 32))
    assert float(update.loss()["loss"]) == pytest.approx(float(pairs.x.abs().mean()), rel=1e-6)  # type: ignore[index]


def test_patches_are_put_back_where_they_were() -> None:
    net = made(GETConfig((2, 6, 4), patch=2, width=16, heads=2, depth=1, tied=1, iterations=1))
    z = torch.zeros(1, 6, 16)
    parts = torch.arange(48.0).reshape(2, 6, 4)
    cut = parts.unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 0, 3, 4).reshape(1, 6, 8)
    net.norm, net.leave = torch.nn.Identity(), _Fixed(cut)
    assert torch.equal(net.decode(z)[0], parts)


class _Fixed(torch.nn.Module):
    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, z: Tensor) -> Tensor:
        return self.out


def test_places_tell_rows_and_columns_apart() -> None:
    places = made(GETConfig((1, 8, 4), patch=2, width=16, heads=2, tied=1)).places
    assert places.shape == (8, 16) and float(places.abs().max()) <= 1
    gaps = torch.cdist(places, places) + 10 * torch.eye(8)
    assert float(gaps.min()) > 0.1
    assert torch.equal(places[0, :8], places[2, :8]) and not torch.equal(places[0, 8:], places[2, 8:])
    # Sines and cosines of the place times 10000^(-k / 4).
    want = torch.tensor([math.sin(3 * 10000 ** (-k / 4)) for k in range(4)])
    assert float((places[6, 8:12] - want).abs().max()) < 1e-6


def test_the_time_is_not_read_and_the_class_is() -> None:
    net, pairs = made(spread=0.2), Pairs(6)
    one, two = (net(pairs.noise, torch.full((6,), t), {"label": pairs.label}) for t in (0.0, 5.0))
    assert torch.equal(one, two)
    other = net(pairs.noise, torch.zeros(6), {"label": (pairs.label + 1) % 3})
    none = net(pairs.noise, torch.zeros(6), {})
    assert float((one - other).abs().max()) > 1e-2 and float((one - none).abs().max()) > 1e-2
    assert torch.equal(none, net(pairs.noise, torch.zeros(6), {"label": torch.full((6,), -1)}))
    with pytest.raises(InputError, match="no classes"):
        made(replace(TINY, classes=0))(pairs.noise, torch.zeros(6), {"label": pairs.label})


def test_iterations_share_weights_and_the_forward_is_the_last_iterate() -> None:
    few, many = made(replace(TINY, iterations=2), 0.2), made(replace(TINY, iterations=8), 0.2)
    assert [p.shape for p in few.parameters()] == [p.shape for p in many.parameters()]
    many.load_state_dict(few.state_dict())
    pairs = Pairs(4)
    cond = {"label": pairs.label}
    iterates = many.iterates(pairs.noise, cond)
    assert len(iterates) == 8
    assert torch.equal(iterates[-1], many(pairs.noise, torch.zeros(4), cond))
    assert torch.equal(iterates[1], few(pairs.noise, torch.zeros(4), cond))
    once, z = many.equation(pairs.noise, cond)
    assert torch.equal(many.decode(once(once(z))), iterates[1])
    assert torch.equal(z, many.tokens(pairs.noise, cond)[0]), "tokens that start alike are slow to tell apart"
    assert float(made(replace(TINY, start="zero")).equation(pairs.noise, cond)[1].abs().max()) == 0


def contractive() -> GET:
    """A double-precision GET whose tied block is a contraction, so that there is a fixed point to differentiate."""
    net = made(replace(TINY, iterations=60), 0.2).double()
    constant = 5 * Noise.of(1, 4).normal((16,), "constant", dtype=torch.float64)

    class Contraction(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, z: Tensor, injected: Tensor) -> Tensor:
            # The large constant keeps the norm's own slope small.
            return constant + 0.1 * self.block(z, injected)

    net.tied = torch.nn.ModuleList(Contraction(b) for b in net.tied)
    return net


def test_implicit_and_phantom_gradients_are_those_of_the_fixed_point() -> None:
    net, pairs = contractive(), Pairs(3)
    x, cond = pairs.noise.double(), {"label": pairs.label}
    found = {}
    for name, options in {
        "unrolled": {"gradient": "unrolled"},
        "implicit": {"gradient": "implicit", "backward": 40},
        "phantom": {"gradient": "phantom", "backward": 60, "damping": 0.9},
        "one term": {"gradient": "phantom", "backward": 1},
    }.items():
        iterates = net.iterates(x, cond, **options)
        assert len(iterates) == {"unrolled": 60, "implicit": 1, "phantom": 60, "one term": 1}[name]
        grads = torch.autograd.grad(iterates[-1].square().sum(), list(net.parameters()))
        found[name] = torch.cat([g.flatten() for g in grads])
    exact = found["unrolled"]
    size = float(exact.abs().max())
    assert size > 1e-3
    for name in ("implicit", "phantom"):
        assert float((found[name] - exact).abs().max()) < 1e-8 * size, name
    assert float((found["one term"] - exact).abs().max()) > 1e-3 * size
    with torch.no_grad():
        assert not net.iterates(x, cond, "implicit")[0].requires_grad
    with pytest.raises(InputError, match="gradient of an equilibrium"):
        net.iterates(x, cond, "exact")  # type: ignore[arg-type]


def test_a_generator_of_one_level_knows_no_other() -> None:
    net = made(spread=0.2)
    D = one_level(net, (1, 4, 4), sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    n, cond = Pairs(4).noise, {"label": torch.tensor([0, 1, 2, -1])}
    want = net(n, torch.zeros(4), cond)
    for level in (80.0, torch.full((4,), 80.0)):
        assert float((D(80 * n, level, cond) - want).detach().abs().max()) < 1e-5
    for level in (1.0, 79.0, torch.tensor([80.0, 80.0, 2.0, 80.0])):
        with pytest.raises(InputError, match="knows no other level, got"):
            D(80 * n, level, cond)
    again = build_denoiser(D.describe())
    again.load_state_dict(D.state_dict())  # type: ignore[attr-defined]
    assert isinstance(again, OneLevel) and torch.equal(again(80 * n, 80.0, cond), D(80 * n, 80.0, cond))


def test_the_published_size_of_get_t() -> None:
    net = transformer(GETConfig(width=256, heads=4, depth=6, tied_mlp=6.0))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(8.6, rel=0.015)


# ---- the method


def test_the_weights_of_the_iterates() -> None:
    assert weights(3, 0.5).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert weights(3, 0.0).tolist() == [0, 0, 1] and weights(2, 1.0).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("distance", ["l1", "l2", "huber"])
def test_the_loss_is_the_weighted_distance_of_the_iterates(distance: Any) -> None:
    method = replace(METHOD, distance=distance, correction=0.5)
    m, batch = models_of(method), Pairs(8).take(torch.arange(8))
    for p in m.student.parameters():
        p.data += 0.1
    (update,) = method.step(m, batch, 0, Noise.of(0, 8))
    found = m.student.net.iterates(batch.noise, batch.cond)
    gaps = torch.stack(found) - batch.x
    c = 0.00054 * 4
    each = {
        "l1": gaps.abs().flatten(1).mean(1),
        "l2": gaps.square().flatten(1).mean(1),
        "huber": ((gaps.flatten(2).square().sum(2) + c * c).sqrt() - c).mean(1),
    }[distance]
    made = update.loss()
    assert float(made["loss"]) == pytest.approx(float((weights(4, 0.5) * each).sum()), rel=1e-5)  # type: ignore[index]
    assert float(made["last"]) == pytest.approx(float(each[-1]), rel=1e-5)  # type: ignore[index]


def trained(method: GETDistillation, pairs: Pairs, steps: int) -> tuple[Models, dict[str, float]]:
    m = models_of(method)
    reports = list(fit(method, m, pairs, FitOptions(Budget(steps), batch=len(pairs), log_every=10), None))
    return m, reports[-1].losses


def test_it_learns_pairs_by_heart_and_every_iterate_comes_near() -> None:
    optim = Optim(lr=3e-3, warmup=10, decay="cosine", clip=1.0)
    method = replace(METHOD, width=32, iterations=2, correction=0.5, optim=optim)
    pairs = Pairs(8)
    m, losses = trained(method, pairs, 400)
    assert losses["student/last"] < 1e-3
    with torch.no_grad():
        found = torch.stack(m.student.net.iterates(pairs.noise, {"label": pairs.label}))
    # The fixed-point correction: the first iterate is supervised too, with a smaller weight.
    first, last = (found - pairs.x).abs().mean((1, 2, 3, 4)).tolist()
    assert last < first < 0.02 * float(pairs.x.abs().mean())


def test_shuffled_pairs_are_not_learnt() -> None:
    optim = Optim(lr=1e-2, warmup=5, clip=1.0)
    method = replace(METHOD, optim=optim, network="vit", vit_depth=1)
    right = trained(method, Pairs(96), 60)[1]["student/last"]
    wrong = trained(method, Pairs(96, shuffled=True), 60)[1]["student/last"]
    assert right < 0.8 * wrong, (right, wrong)


def test_the_student_is_told_by_the_teacher_what_it_makes() -> None:
    size = METHOD.size(tiny())
    assert isinstance(size, GETConfig) and size.shape == (1, 4, 4) and size.classes == 3
    assert type(replace(METHOD, network="vit").size(tiny())) is ViTConfig
    assert isinstance(models_of(replace(METHOD, network="vit")).student.net, ViT)
    bare = replace(tiny(), conds=None)
    assert METHOD.size(bare).classes == 0
    assert METHOD.sampler(bare).nfe == 1 and METHOD.sampler(bare).start == 80


def without_noise() -> None:
    next(METHOD.step(models_of(METHOD), Pairs().take(torch.arange(4))._replace(noise=None), 0, Noise.of(0, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_noise, "fewstep pairs"),
        (lambda: GETDistillation(steps=2), "in one evaluation"),
        (lambda: GETDistillation(network="unet"), "unknown network"),  # type: ignore[arg-type]
        (lambda: GETDistillation(gradient="exact"), "unknown gradient"),  # type: ignore[arg-type]
        (lambda: GETDistillation(distance="lpips"), "unknown distance"),  # type: ignore[arg-type]
        (lambda: GETDistillation(damping=0.0), "damping in"),
        (lambda: GETDistillation(correction=2.0), "correction in"),
        (lambda: replace(METHOD, patch=3).roles(tiny()), "patches of 3x3"),
        (lambda: replace(METHOD, heads=3).roles(tiny()), "divisible by 4 and by heads"),
        (lambda: replace(METHOD, iterations=0).roles(tiny()), "iterations >= 1"),
        (lambda: replace(METHOD, start="noise").roles(tiny()), "unknown start"),
        (lambda: replace(METHOD, network="vit", vit_depth=0).roles(tiny()), "depth >= 1"),
        (lambda: METHOD.roles(replace(tiny(), conds=object())), "prompts"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_pairs_of_another_teacher_are_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    held = make_pairs(tiny(), tmp_path / "pairs", n=8, progress=False)
    other = replace(tiny(), denoiser=CFG(tiny().denoiser, 2.0))
    for teacher, data, said in (
        (other, held, "made by another teacher"),
        (tiny(), tiny_data(), "GET learns from pairs .*`fewstep pairs"),
    ):
        with pytest.raises(InputError, match=said):
            distill(teacher, METHOD, data, out=tmp_path / "s", budget=1, batch=4, progress=False)
        assert not (tmp_path / "s").exists()
    assert distill(tiny(), METHOD, held, out=tmp_path / "s", budget=1, batch=4, progress=False).sampler.nfe == 1


def test_a_level_on_a_device_is_not_waited_for() -> None:
    D = one_level(made(), (1, 4, 4), sigma_min=0.002, sigma_max=80.0, sigma_data=0.5).to("meta")
    x, label = torch.zeros(4, 1, 4, 4, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    # Reading a value of a tensor without contents is an error, as reading one of a device is a wait.
    assert D(x, torch.full((4,), 3.0, device="meta"), {"label": label}).shape == (4, 1, 4, 4)


def go(out: Path, method: GETDistillation, *, stop: int | None = None, micro: int = 2, **options: Any) -> Generator:
    data: Any = Pairs() if stop is None else StopsAfter(Pairs(), stop * micro)
    options = {"batch": 8, "log_every": 2, "save_every": 3, "progress": False} | options
    return train(tiny(), method, data, out=out, budget=6, micro=micro, **options)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_a_resumed_run_and_micro_batches(gradient: Any, tmp_path: Path) -> None:
    method = replace(METHOD, gradient=gradient)
    check_restart(tmp_path, lambda out, **more: go(out, method, **more), stop=4, far=1e-3)
    student = Generator.load(tmp_path / "whole")
    assert isinstance(student.denoiser, OneLevel) and student.sampler.nfe == 1
    assert torch.isfinite(student.sample(3, progress=False)).all()
