"""Networks that read a picture: further input channels, and control branches of own U-Nets and of diffusers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import Generator
from fewstep.core.denoiser import Precond, build_denoiser, edm
from fewstep.core.role import Ema, Optim
from fewstep.data.conditions import ImageConditions
from fewstep.data.sr import SuperResolution, sr_digits
from fewstep.errors import InputError
from fewstep.models import ResMLP, ResMLPConfig, UNet, UNetConfig
from fewstep.models.control import Controlled, controlled, whole
from fewstep.models.extended import extended
from fewstep.models.image_conditioned import ImageConditioned, image_conditioned, upsampled
from fewstep.train import EDMTraining, train, untrained
from tiny_runs import tiny_data

IMAGE = (2, 4, 4)


def moved(module: nn.Module, by: float = 0.1, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += by * torch.randn(p.shape, generator=g)


def unet(classes: int = 3) -> Precond:
    torch.manual_seed(0)
    made = edm(
        UNet(UNetConfig((1, 8, 8), classes, channels=8, multipliers=(1, 2), blocks=1, attention=(4,))), (1, 8, 8)
    )
    moved(made)
    return made.requires_grad_(False).eval()


def mlp() -> Precond:
    torch.manual_seed(0)
    made = edm(ResMLP(ResMLPConfig((1, 8, 8), 3, width=16, embedding=8, blocks=2)), (1, 8, 8))
    moved(made)
    return made.requires_grad_(False).eval()


def inputs(size: tuple[int, ...] = IMAGE, n: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    x, image = torch.randn(n, 1, 8, 8, generator=g), torch.randn(n, *size, generator=g)
    return x, torch.tensor([0.3, 1.0, 5.0])[:n], {"label": torch.tensor([0, 2, -1])[:n], "image": image}


def without(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"label": cond["label"]}


# ---- further input channels


@pytest.mark.parametrize("make", [unet, mlp])
def test_an_image_conditioned_network_starts_as_the_one_it_was_made_of(make: Callable[[], Precond]) -> None:
    plain, (x, s, cond) = make(), inputs()
    D = image_conditioned(plain, IMAGE)
    assert torch.equal(D(x, s, cond), plain(x, s, without(cond)))
    assert isinstance(D.net, ImageConditioned) and not bool(D.net.extra.weight.any())
    # The new channels have a gradient at once, and then matter.
    D.net.extra.weight.requires_grad_(True)
    D(x, s, cond).square().sum().backward()
    assert float(D.net.extra.weight.grad.abs().max()) > 1e-4  # type: ignore[union-attr]
    moved(D.net.extra)
    steered = D(x, s, cond).detach()
    assert float((steered - plain(x, s, without(cond))).abs().amax((1, 2, 3)).min()) > 1e-3
    assert torch.equal(D(x, s, without(cond)), plain(x, s, without(cond))), "no image, no change"
    other = {**cond, "image": cond["image"].flip(0)}
    assert float((D(x, s, other) - steered).abs().max()) > 1e-3
    alone = torch.cat([D(x[i : i + 1], s[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()}) for i in range(3)])
    assert float((alone - steered).abs().max()) < 1e-5


def test_the_new_channels_are_those_of_a_wider_first_layer() -> None:
    plain, (x, s, cond) = unet(), inputs()
    D = image_conditioned(plain, IMAGE)
    moved(D.net.extra)  # type: ignore[arg-type]
    wide = copy.deepcopy(plain)
    first, net = plain.net.enter, wide.net
    joined = nn.Conv2d(3, first.out_channels, 3, padding=1)  # type: ignore[union-attr]
    joined.weight.data = torch.cat([first.weight, D.net.extra.weight], 1).data  # type: ignore[union-attr, list-item]
    joined.bias.data = first.bias.data.clone()  # type: ignore[union-attr]
    image = upsampled(cond["image"], (8, 8))

    class Joins(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return joined(torch.cat([x, image], 1))

    net.enter = Joins()  # type: ignore[assignment]
    assert float((wide(x, s, without(cond)) - D(x, s, cond)).abs().max()) < 1e-5


@pytest.mark.parametrize("make", [unet, mlp])
def test_it_is_described_copied_and_told_more(make: Callable[[], Precond]) -> None:
    (x, s, cond), D = inputs(), image_conditioned(make(), IMAGE)
    moved(D.net.extra)  # type: ignore[arg-type]
    again = build_denoiser(D.describe())
    again.load_state_dict(D.state_dict())  # type: ignore[attr-defined]
    assert torch.equal(again(x, s, cond), D(x, s, cond))
    twin = copy.deepcopy(D)
    moved(twin)
    assert torch.equal(again(x, s, cond), D(x, s, cond)) and not torch.equal(twin(x, s, cond), D(x, s, cond))
    _, found = D.features(x, s, cond, ["bottleneck"])
    _, other = D.features(x, s, without(cond), ["bottleneck"])
    assert not torch.equal(found["bottleneck"], other["bottleneck"])
    more = extended(D, "guidance")
    told = {**cond, "guidance": torch.full((3,), 2.0)}
    assert torch.equal(more(x, s, told), D(x, s, cond))
    moved(more.net.terms, 0.3)  # type: ignore[arg-type]
    assert float((more(x, s, told) - D(x, s, cond)).abs().max()) > 1e-4


def test_an_image_conditioned_teacher_is_trained_as_any_other(tmp_path: Path) -> None:
    data = SuperResolution(tiny_data())
    start = untrained(data, "resmlp", width=32, embedding=8, blocks=1)
    D = image_conditioned(start.denoiser, data.image_shape)  # type: ignore[arg-type]
    start = replace(start, denoiser=D, conds=ImageConditions(data))
    # No dropout, because nothing but labels has a null of its own.
    method = EDMTraining(class_dropout=0.0, optim=Optim(lr=2e-2), ema=Ema(rate=0.9))
    made = train(start, method, data, out=tmp_path, budget=150, batch=32, progress=False)
    again = Generator.load(tmp_path)
    cond = {"image": data.take(torch.arange(16)).cond["image"]}
    x, right = 5.0 * torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0)), data.take(torch.arange(16)).x
    assert right is not None and torch.equal(again.denoiser(x, 5.0, cond), made.denoiser(x, 5.0, cond))
    told = float((made.denoiser(x, 5.0, cond) - right).square().mean())
    wrong = float((made.denoiser(x, 5.0, {"image": cond["image"].flip(0)}) - right).square().mean())
    assert told < 0.9 * wrong, (told, wrong)


# ---- control branches


def test_a_fresh_branch_changes_nothing_and_all_of_it_learns() -> None:
    plain, (x, s, cond) = unet(), inputs()
    D = controlled(plain, IMAGE, held=True)
    assert torch.equal(D(x, s, cond), plain(x, s, without(cond)))
    assert not [n for n, _ in D.named_parameters() if not n.startswith("net.branch.")]
    D.requires_grad_(True)
    assert not any(p.requires_grad for p in plain.parameters()), "the network stays frozen"
    optimizer = torch.optim.SGD(D.parameters(), 0.05)
    before = {n: p.detach().clone() for n, p in D.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        (D(x, s, cond) - 1).square().sum().backward()
        optimizer.step()
    changed = [n for n, p in D.named_parameters() if not torch.equal(p, before[n])]
    # The bias in front of a normalization and keys' biases need not move; every layer's weight does.
    assert {n for n in before if n.endswith("weight")} - set(changed) == set()
    assert all(p.grad is None for p in plain.parameters())
    assert float((D(x, s, cond) - plain(x, s, without(cond))).abs().max()) > 1e-3
    assert torch.equal(D(x, s, without(cond)), plain(x, s, without(cond)))


def test_residuals_reach_every_skip_and_the_bottleneck() -> None:
    plain, (x, s, cond) = unet(), inputs()
    D = controlled(plain, IMAGE)
    zeros: Any = D.net.branch.zeros  # type: ignore[union-attr]
    assert len(zeros) == 1 + len(plain.net.encoder) + 1  # type: ignore[arg-type]
    for layer in zeros:
        layer.bias.data += 0.5
        assert float((D(x, s, cond) - plain(x, s, without(cond))).abs().max()) > 1e-4
        layer.bias.data -= 0.5
    with pytest.raises(ValueError, match="zip"):
        plain.net(x, s, without(cond), [x])


def test_copies_of_a_held_branch_share_the_network_and_files_hold_both(tmp_path: Path) -> None:
    plain, (x, s, cond) = unet(0), inputs((1, 4, 4))
    cond = {"image": cond["image"]}
    D = controlled(plain, (1, 4, 4), held=True)
    moved(D)
    twin = copy.deepcopy(D)
    assert isinstance(twin.net, Controlled) and twin.net.base is plain.net
    assert torch.equal(twin(x, s, cond), D(x, s, cond))
    moved(twin)
    assert not torch.equal(twin(x, s, cond), D(x, s, cond))
    full = whole(D)
    assert torch.equal(full(x, s, cond), D(x, s, cond))
    assert {n.split(".")[1] for n in full.state_dict()} == {"net", "branch"}
    count = sum(p.numel() for p in full.parameters())
    assert count == sum(p.numel() for p in plain.parameters()) + sum(p.numel() for p in D.parameters())
    start = replace(untrained(sr_digits(8), "unet", channels=8), denoiser=full, conds=ImageConditions(sr_digits()))
    again = Generator.load(start.save(tmp_path))
    assert torch.equal(again.denoiser(x, s, cond), D(x, s, cond))
    _, found = full.features(x, s, cond, ["bottleneck", "decoder8"])
    assert set(found) == {"bottleneck", "decoder8"}


def stock(**changes: Any) -> Precond:
    """A UNet2DConditionModel of one down and one up block."""
    pytest.importorskip("diffusers")
    from fewstep.models.diffusers import DiffusersConfig, DiffusersNet

    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        **changes,
    }
    torch.manual_seed(0)
    made = edm(DiffusersNet(DiffusersConfig("UNet2DConditionModel", config)), (1, 8, 8))
    return made.requires_grad_(False).eval()


@pytest.mark.parametrize("size", [(3, 4, 4), (3, 8, 8), (3, 32, 32)])
def test_diffusers_own_branch_steers_its_u_net(size: tuple[int, int, int]) -> None:
    plain, (x, s, cond) = stock(), inputs(size)
    own = {"prompt_embeds": torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))}
    told = {**own, "image": cond["image"]}
    D = controlled(plain, size, held=True)
    assert float((D(x, s, told) - plain(x, s, own)).abs().max()) == 0
    moved(D, 0.05)
    assert float((D(x, s, told) - plain(x, s, own)).abs().max()) > 1e-4
    other = {**own, "image": told["image"].flip(0)}
    assert float((D(x, s, other) - D(x, s, told)).abs().max()) > 1e-6
    full = whole(D)
    again = build_denoiser(full.describe())
    again.load_state_dict(full.state_dict())  # type: ignore[attr-defined]
    assert float((again(x, s, told) - D(x, s, told)).abs().max()) < 1e-6


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: image_conditioned(mlp(), (1, 4)), r"need a shape \(C, h, w\), got \(1, 4\)"),
    (lambda: image_conditioned(unet(), IMAGE, upsampling="cubic"), "unknown upsampling 'cubic'"),  # type: ignore[arg-type]
    (lambda: image_conditioned(unet(), IMAGE, enter="front"), "UNet has no layer 'front': name its first layer"),
    (lambda: image_conditioned(unet(), IMAGE, enter="norm"), "'norm' of UNet is a GroupNorm, expected a Conv2d"),
    (
        lambda: image_conditioned(unet(), IMAGE)(*inputs((2, 8, 8))),
        r"image conditions of wrong size: this network reads \(B, 2, 4, 4\), got \(3, 2, 8, 8\)",
    ),
    (lambda: controlled(unet(), IMAGE)(*inputs((1, 4, 4))), r"image conditions of wrong size"),
    (lambda: controlled(mlp(), IMAGE), "a ResMLP has no control branch: expected a U-Net of kind 'unet'"),
    (lambda: controlled(unet(), (4,)), r"need a shape \(C, h, w\), got \(4,\)"),
    (lambda: controlled(stock(time_cond_proj_dim=8), (3, 8, 8)), "told its guidance has no ControlNetModel"),
    (lambda: whole(unet()), "a UNet has no control branch"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
