"""Adversarial losses in closed form, and discriminators on the features of every kind of denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fewstep.core.cond import Classes, Cond
from fewstep.core.denoiser import Precond
from fewstep.core.generator import Generator
from fewstep.core.memory import hollow
from fewstep.core.network import build_network, describe_network
from fewstep.core.noise import Noise
from fewstep.core.path import DDPM, FLOW
from fewstep.errors import InputError
from fewstep.guide import CFG, guided
from fewstep.loss.gan import ADVERSARIAL, r1
from fewstep.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    discriminator,
    discriminator_config,
    discriminator_loss,
    generator_loss,
    judged,
    read,
    usual_taps,
)
from fewstep.models.frozen import frozen, network_under
from tiny_runs import tiny

V = torch.tensor([-3.0, -0.7, 0.0, 0.4, 2.5], dtype=torch.float64)


# ---- teachers of every kind


@dataclass(frozen=True)
class Texts:
    """Conditions of a text-conditional model, without an encoder."""

    shapes: Mapping[str, tuple[int, ...]]

    def draw(self, noise: Noise) -> dict[str, Tensor]:
        return {name: noise.normal(shape, name) for name, shape in self.shapes.items()}

    def check(self, cond: Cond) -> None:
        pass

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self.draw(Noise.of(1, len(prompts)))

    def nulls(self, negative: str = "") -> dict[str, Tensor | None]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}


@cache
def stock(name: str) -> Generator:
    """A generator on a tiny network of diffusers with random weights, the kind of conditions that it reads, no VAE."""
    pytest.importorskip("diffusers")
    import tiny_models
    from fewstep.models.diffusers import DiffusersConfig, DiffusersNet

    pipes: dict[str, Callable[[], Any]] = {
        "unet2d": lambda: tiny_models.ddpm(classes=True),
        "dit": tiny_models.dit,
        "sd": tiny_models.stable_diffusion,
        "sd3": tiny_models.sd3,
    }
    pipe = pipes[name]()
    model = getattr(pipe, "unet", None) or pipe.transformer
    net = DiffusersNet(DiffusersConfig(type(model).__name__, dict(model.config)), model)
    shape = (model.config.in_channels, 8, 8)
    if name == "sd3":
        D = Precond(
            net, shape, path=FLOW, predicts="velocity", time="native*1000", sigma_min=1e-3, sigma_max=1e8, sigma_data=1
        )
        texts = {"prompt_embeds": (3, 16), "pooled_prompt_embeds": (16,)}
    else:
        ends = {"sigma_min": float(DDPM.levels[0]), "sigma_max": float(DDPM.levels[-1]), "sigma_data": 1.0}
        D = Precond(net, shape, path=DDPM, predicts="noise", unit_start=True, **ends)
        texts = {"prompt_embeds": (3, 8)}
    conds: Any = Texts(texts) if name in ("sd", "sd3") else Classes((0.5, 0.3, 0.2))
    return Generator(D.requires_grad_(False).eval(), None, None, conds)  # type: ignore[arg-type]


def small_unet() -> Generator:
    return tiny("unet", channels=8, multipliers=(1, 2), blocks=1, attention=(2,))


TEACHERS: dict[str, Callable[[], Generator]] = {
    "resmlp": tiny,
    "unet": small_unet,
    "guided": lambda: guided(tiny(), 3.0),
    **{name: (lambda name=name: stock(name)) for name in ("unet2d", "dit", "sd", "sd3")},
}


def pair(teacher: Generator, n: int = 3) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Real and fake pictures, levels and conditions."""
    noise = Noise.of(5, n)
    shape = network_under(teacher.denoiser).shape
    assert teacher.conds is not None
    sigma = torch.linspace(0.3, 2.0, n, dtype=torch.float64)
    return noise.normal(shape, "real"), noise.normal(shape, "fake"), sigma, teacher.conds.draw(noise)


def total(loss: Tensor | dict[str, Tensor]) -> Tensor:
    return loss if isinstance(loss, Tensor) else loss["loss"]


# ---- losses


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


# Value and slope of the discriminator's loss on real and fake, and of the generator's, one logit at a time.
CLOSED: dict[str, Any] = {
    "hinge": (
        (lambda v: (1 - v).clamp(min=0), lambda v: -(v < 1).double()),
        (lambda v: (1 + v).clamp(min=0), lambda v: (v > -1).double()),
        (lambda v: -v, lambda v: -torch.ones_like(v)),
    ),
    "non-saturating": (
        (lambda v: (1 + (-v).exp()).log(), lambda v: sigmoid(v) - 1),
        (lambda v: (1 + v.exp()).log(), sigmoid),
        (lambda v: (1 + (-v).exp()).log(), lambda v: sigmoid(v) - 1),
    ),
    "least-squares": (
        (lambda v: (v - 1) ** 2 / 2, lambda v: v - 1),
        (lambda v: v**2 / 2, lambda v: v),
        (lambda v: (v - 1) ** 2 / 2, lambda v: v - 1),
    ),
}


@pytest.mark.parametrize("game", ADVERSARIAL)
def test_losses_and_their_gradients_are_the_closed_forms(game: str) -> None:
    (on_real, d_real), (on_fake, d_fake), (on_made, d_made) = CLOSED[game]
    real, fake = V.clone().requires_grad_(True), (0.5 - V).requires_grad_(True)
    judging, playing = ADVERSARIAL[game]
    loss = judging(real, fake)
    assert loss.item() == pytest.approx((on_real(real) + on_fake(fake)).mean().item(), abs=1e-12)
    by_real, by_fake = torch.autograd.grad(loss, [real, fake])
    assert float((by_real - d_real(real.detach()) / 5).abs().max()) < 1e-12
    assert float((by_fake - d_fake(fake.detach()) / 5).abs().max()) < 1e-12
    made = playing(fake)
    assert made.item() == pytest.approx(on_made(fake).mean().item(), abs=1e-12)
    assert float((torch.autograd.grad(made, fake)[0] - d_made(fake.detach()) / 5).abs().max()) < 1e-12
    # Large logits neither overflow nor lose their gradient.
    far = torch.tensor([-500.0, 500.0], requires_grad=True)
    assert bool(torch.autograd.grad(judging(far, far) + playing(far), far)[0].isfinite().all())


def test_losses_of_a_discriminator_that_knows_nothing() -> None:
    nothing = torch.zeros(4, 3)
    at_zero = {"hinge": 2.0, "non-saturating": 2 * math.log(2), "least-squares": 0.5}
    for game, value in at_zero.items():
        assert float(ADVERSARIAL[game].discriminator(nothing, nothing)) == pytest.approx(value)
    sure = torch.full((4,), 1.5, requires_grad=True)
    assert not torch.autograd.grad(ADVERSARIAL["hinge"].discriminator(sure, -sure), sure)[0].any()


def test_r1_of_a_linear_discriminator_is_half_its_squared_norm() -> None:
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_(True)
    penalty = r1(x @ w, x)
    assert penalty.item() == pytest.approx(0.5 * 5.25, rel=1e-6)
    # Its own gradient is the weight itself, which needs the graph of the gradient.
    assert float((torch.autograd.grad(penalty, w)[0] - w.detach()).abs().max()) < 1e-6
    squares = r1(0.5 * 3 * x.square().sum(1), x)
    assert float(squares) == pytest.approx(0.5 * float((3 * x).square().sum(1).mean()), rel=1e-6)
    y = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    both = r1(x @ w + 4 * y[:, 1], [x, y])
    assert float(both) == pytest.approx(0.5 * (5.25 + 16), rel=1e-6)


# ---- heads


def test_heads_judge_every_place_of_every_kind_of_feature() -> None:
    config = DiscriminatorConfig(("flat", "pop", "a.b"), (5, 6, 7), (2, 3, 4), hidden=12)
    heads = Discriminator(config)
    g = torch.Generator().manual_seed(0)
    shapes = {"flat": (2, 5), "pop": (2, 4, 6), "a.b": (2, 7, 3, 3)}
    features = {tap: torch.randn(shape, generator=g) for tap, shape in shapes.items()}
    logits = heads(features)
    assert logits.shape == (2, 1 + 4 + 9)
    # A token is judged by itself, and a sample by itself.
    features["pop"][0, 2] += 1
    changed = (heads(features) != logits).nonzero().tolist()
    assert changed == [[0, 3]]
    half = heads({tap: f.bfloat16() for tap, f in features.items()})
    assert half.dtype == torch.float32 and float((half - heads(features)).abs().max()) < 0.05
    again = build_network(describe_network(heads))
    again.load_state_dict(heads.state_dict())
    assert torch.equal(again(features), heads(features))


@pytest.mark.parametrize("name", TEACHERS)
def test_sizes_are_found_without_running_the_network(name: str) -> None:
    teacher = TEACHERS[name]()
    D = network_under(teacher.denoiser)
    state = torch.get_rng_state()
    calls: list[Any] = []
    hook = D.net.register_forward_hook(lambda module, args, out: calls.append(out))
    config = discriminator_config(teacher, tuple(D.taps))
    hook.remove()
    assert all(isinstance(out, FakeTensor) for out in calls) and torch.equal(state, torch.get_rng_state())
    real, _, sigma, cond = pair(teacher)
    with torch.no_grad():
        _, found = D.features(real, sigma, cond, config.taps)
    for tap, width, rank in zip(config.taps, config.widths, config.ranks, strict=True):
        assert rank == found[tap].ndim and width == found[tap].shape[2 if rank == 3 else 1], tap
    logits = judged(frozen(teacher.denoiser), Discriminator(config), real, sigma, cond)
    assert logits.ndim == 2 and len(logits) == 3 and bool(logits.isfinite().all())
    empty = replace(teacher, denoiser=hollow(D))
    assert discriminator_config(empty, tuple(D.taps)) == config, "as for a teacher without contents"
    assert usual_taps(D) == (("block0",) if name in ("dit", "sd3") else ("bottleneck",))


@pytest.mark.parametrize("penalised", ["features", "pictures"])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("name", TEACHERS)
def test_gradients_reach_the_heads_or_the_picture_and_never_the_teacher(
    name: str, gamma: float, penalised: Any
) -> None:
    if penalised == "pictures" and not gamma:
        pytest.skip("without R1 both are the same")
    teacher = TEACHERS[name]()
    T = frozen(teacher.denoiser).requires_grad_(False)
    torch.manual_seed(0)
    heads = discriminator(teacher, (), hidden=8)
    real, fake, sigma, cond = pair(teacher)
    fake.requires_grad_(True)
    made = discriminator_loss(T, heads, real, fake, sigma, cond, gamma=gamma, penalised=penalised)
    made["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in heads.parameters())
    assert fake.grad is None and real.grad is None and not real.requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in T.parameters())
    assert made["r1"].item() > 0 if gamma else "r1" not in made
    heads.requires_grad_(False)
    generator_loss(T, heads, fake, sigma, cond).backward()
    assert fake.grad is not None and float(fake.grad.abs().sum()) > 0
    assert not any(p.grad is not None for p in T.parameters())


@pytest.mark.parametrize("game", ADVERSARIAL)
def test_the_discriminators_loss_is_its_parts(game: str) -> None:
    teacher = small_unet()
    T, (real, fake, sigma, cond) = frozen(teacher.denoiser), pair(teacher)
    torch.manual_seed(0)
    heads = discriminator(teacher, ("bottleneck", "encoder4"), hidden=8)
    x = real.clone().requires_grad_(True)
    on_real, on_fake = judged(T, heads, x, sigma, cond), judged(T, heads, fake, sigma, cond)
    want = ADVERSARIAL[game].discriminator(on_real, on_fake)
    slope = torch.autograd.grad(on_real.sum(), x)[0].flatten(1).square().sum(1).mean()
    found = read(T, heads, real, sigma, cond)
    leaves = {tap: f.detach().requires_grad_(True) for tap, f in found.items()}
    slopes = torch.autograd.grad(heads(leaves).sum(), [*leaves.values()])
    apart = torch.stack([s.flatten(1).square().sum(1).mean() for s in slopes]).sum()

    def loss(**options: Any) -> float:
        return float(discriminator_loss(T, heads, real, fake, sigma, cond, game=game, **options)["loss"])

    assert loss() == pytest.approx(float(want), rel=1e-5)
    assert loss(gamma=3.0, penalised="pictures") == pytest.approx(float(want + 1.5 * slope), rel=1e-5)
    assert loss(gamma=3.0) == pytest.approx(float(want + 1.5 * apart), rel=1e-5)
    made = discriminator_loss(T, heads, real, fake, sigma, cond, game=game)
    assert float(made["real"]) == pytest.approx(float(on_real.mean()), rel=1e-4)
    assert float(made["fake"]) == pytest.approx(float(on_fake.mean()), rel=1e-4)


def test_guidance_takes_no_part_and_the_pass_ends_at_the_last_tap() -> None:
    teacher = tiny(width=16, embedding=8, blocks=3)
    real, _, sigma, cond = pair(teacher)
    heads = discriminator(teacher, ("block0", "bottleneck"))
    T = frozen(guided(teacher, 5.0).denoiser)
    assert isinstance(guided(teacher, 5.0).denoiser, CFG)
    net: Any = network_under(teacher.denoiser).net
    seen: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.append(f"{name} {len(out)}"))
        for name, module in (("middle", net.blocks[1]), ("later", net.blocks[2]), ("last", net.leave))
    ]
    logits = judged(T, heads, real, sigma, cond)
    assert seen == ["middle 3"]
    for hook in hooks:
        hook.remove()
    assert torch.equal(logits, judged(teacher.denoiser, heads, real, sigma, cond))
    assert float((logits - judged(T, heads, real, sigma, {"label": cond["label"] * 0 - 1})).abs().max()) > 1e-6


class Silent(nn.Module):
    """A network that declares nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.weight * x


def silent() -> Generator:
    return replace(tiny(), denoiser=Precond(Silent(), (1, 4, 4)))


class Deep(Silent):
    """Its feature has five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.taps = nn.Identity(), {"deep": "inner"}

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.weight * self.inner(x[:, None])[:, 0]


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: discriminator(tiny(), ("encoder8",)), "unknown feature tap 'encoder8'"),
    (lambda: discriminator(silent(), ()), "Silent declares no features"),
    (lambda: discriminator(replace(tiny(), denoiser=Precond(Deep(), (1, 4, 4))), ()), r"'deep' is \(1, 1, 1, 4, 4\)"),
    (lambda: discriminator(tiny(), (), hidden=0), "hidden >= 1"),
    (lambda: discriminator(tiny(), ("block0", "block0")), "different taps"),
    (lambda: DiscriminatorConfig((), (), ()), "different taps"),
    (lambda: DiscriminatorConfig(("a",), (3, 4), (2,)), "a width >= 1 and a rank"),
    (lambda: DiscriminatorConfig(("a",), (3,), (5,)), "rank of 2, 3 or 4"),
    (lambda: discriminator(replace(tiny(), denoiser=lambda x, s, c: x)), "has no weights"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
