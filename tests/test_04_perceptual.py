"""Perceptual distances: their axioms, the published layout of LPIPS, and their choice by name in a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.core.denoiser import edm
from fewstep.core.fit import build_models
from fewstep.distill.consistency import CD
from fewstep.distill.consistency_training import ECT
from fewstep.errors import InputError
from fewstep.loss.perceptual import (
    DISTANCES,
    PIXELS,
    Decoded,
    DigitsDistance,
    LayerDistance,
    Lpips,
    TapDistance,
    distance_of,
    distance_roles,
    layer_distance,
    lpips,
)
from fewstep.models import UNet, UNetConfig
from fewstep.train import untrained
from tiny_runs import STEADY, tiny, tiny_data


def pictures(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def random_lpips() -> Lpips:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Lpips()
    for k in range(5):
        made.linear(k).data.abs_()
    return made


def small_unet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(UNetConfig.for_shape((1, 8, 8), 3, channels=16))


# ---- what every distance must be


def distances() -> dict[str, tuple[Any, tuple[int, ...]]]:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    made = {name: (d, (2, 6, 6)) for name, d in PIXELS.items()}
    taps = edm(small_unet(), (1, 8, 8))
    return made | {
        "digits": (DigitsDistance(), (1, 8, 8)),
        "stacked digits": (DigitsDistance(), (3, 8, 8)),
        "layers": (LayerDistance(net, ("0", "3")), (2, 6, 6)),
        "taps": (TapDistance(taps), (1, 8, 8)),
    }


@pytest.mark.parametrize("name", distances())
def test_a_distance_is_symmetric_zero_at_equality_and_independent_of_the_batch(name: str) -> None:
    measured, shape = distances()[name]
    x, y = pictures(5, *shape), pictures(5, *shape, seed=1)
    with torch.no_grad():
        there, back = measured(x, y), measured(y, x)
    assert there.shape == (5,) and float((there - back).abs().max()) < 1e-6
    with torch.no_grad():
        assert float(measured(x, x).abs().max()) == 0 and float(there.min()) > 1e-3
        alone = torch.cat([measured(x[i : i + 1], y[i : i + 1]) for i in range(5)])
        nearer = measured(x, torch.lerp(x, y, 0.1))
    assert float((alone - there).abs().max()) < 1e-5
    assert bool((nearer < there).all())


@pytest.mark.parametrize("name", distances())
def test_a_distance_has_a_gradient_that_leads_to_the_target(name: str) -> None:
    measured, shape = distances()[name]
    y, x = pictures(3, *shape, seed=1), pictures(3, *shape).requires_grad_(True)
    before = measured(x, y)
    (slope,) = torch.autograd.grad(before.sum(), x)
    assert bool(slope.isfinite().all()) and float(slope.flatten(1).norm(dim=1).min()) > 0
    moved = x.detach() - 1e-3 * slope / slope.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    assert bool((measured(moved, y) < before).all())
    same = y.clone().requires_grad_(True)
    (flat,) = torch.autograd.grad(measured(same, y).sum(), same)
    assert float(flat.abs().max()) == 0 if name != "l1" else bool(flat.isfinite().all())


def test_layers_are_compared_by_the_direction_of_their_channels() -> None:
    f = torch.tensor([[[[3.0]], [[4.0]]]])
    g = torch.tensor([[[[4.0]], [[-3.0]]]])
    # Orthogonal unit vectors: (0.6 - 0.8)^2 and (0.8 + 0.6)^2.
    assert float(layer_distance(f, g)) == pytest.approx(2.0, abs=1e-6)
    assert float(layer_distance(f, g, torch.tensor([1.0, 0.5]))) == pytest.approx(0.04 + 0.5 * 1.96, abs=1e-6)
    assert float(layer_distance(f, 7 * f)) == pytest.approx(0.0, abs=1e-12)
    # Half of the places are equal; tokens (B, T, C) and features (B, C) are read alike.
    wide = layer_distance(torch.cat([f, f], 3), torch.cat([f, g], 3))
    assert float(wide) == pytest.approx(1.0, abs=1e-6)
    tokens = [torch.stack([v[:, :, 0, 0], v[:, :, 0, 0]], 1) for v in (f, g)]
    assert float(layer_distance(*tokens)) == pytest.approx(2.0, abs=1e-6)
    assert float(layer_distance(f[:, :, 0, 0], g[:, :, 0, 0])) == pytest.approx(2.0, abs=1e-6)
    dead = torch.zeros(1, 2, 1, 1, requires_grad=True)
    assert bool(torch.autograd.grad(layer_distance(dead, g).sum(), dead)[0].isfinite().all())


# ---- LPIPS


def test_lpips_has_the_published_names_and_shapes(random_lpips: Lpips) -> None:
    found = {name: tuple(t.shape) for name, t in random_lpips.state_dict().items()}
    widths = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
    widths |= {17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
    slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    wanted: dict[str, tuple[int, ...]] = {}
    for at, (before, after) in widths.items():
        wanted[f"net.slice{slices[at]}.{at}.weight"] = (after, before, 3, 3)
        wanted[f"net.slice{slices[at]}.{at}.bias"] = (after,)
    wanted |= {f"lin{k}.model.1.weight": (1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}
    assert found == wanted
    # 14 714 688 weights of VGG16's convolutions and 1472 linear ones.
    assert sum(t.numel() for t in random_lpips.state_dict().values()) == 14_714_688 + 1472
    assert not any(p.requires_grad for p in random_lpips.parameters()) and not random_lpips.training


def test_lpips_is_vgg16_layer_by_layer(random_lpips: Lpips) -> None:
    x = pictures(1, 3, 32, 32)
    random_lpips.resize = False
    try:
        found = random_lpips.features(x)
    finally:
        random_lpips.resize = True
    state, y = random_lpips.state_dict(), (x - random_lpips.shift) / random_lpips.scale
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    # The scale of LPIPS is that of ImageNet's statistics for pictures in [0, 1].
    assert float((y - ((x + 1) / 2 - mean) / std).abs().max()) < 0.01
    at = 0
    for k, count in enumerate((2, 2, 3, 3, 3)):
        if k:
            y, at = nn.functional.max_pool2d(y, 2), at + 1
        for _ in range(count):
            name = f"net.slice{k + 1}.{at}"
            y, at = nn.functional.conv2d(y, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu(), at + 2
        assert float((found[k] - y).abs().max()) < 1e-5 * float(y.abs().max())


def test_small_pictures_are_enlarged_and_grey_ones_have_three_equal_channels(random_lpips: Lpips) -> None:
    x, y = pictures(1, 3, 16, 16), pictures(1, 3, 16, 16, seed=1)
    with torch.no_grad():
        there = random_lpips(x, y)
        big = [nn.functional.interpolate(v, (224, 224), mode="bilinear") for v in (x, y)]
        random_lpips.resize = False
        try:
            assert float((random_lpips(*big) - there).abs()) < 1e-5 * float(there)
            plain = random_lpips(x, y)
            assert float((random_lpips(y, x) - plain).abs()) < 1e-5 * float(plain) and float(random_lpips(x, x)) == 0
            assert abs(float(plain - there)) > 1e-3 * float(there), "enlarging matters"
            grey = random_lpips(x[:, :1], y[:, :1]) - random_lpips(*(v[:, :1].expand(-1, 3, -1, -1) for v in (x, y)))
            assert float(grey.abs()) == 0
            with torch.enable_grad():
                moving = x.clone().requires_grad_(True)
                (slope,) = torch.autograd.grad(random_lpips(moving, y).sum(), moving)
        finally:
            random_lpips.resize = True
    assert bool(slope.isfinite().all()) and float(slope.abs().max()) > 0


def test_weights_are_read_from_every_published_layout(random_lpips: Lpips, tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in random_lpips.state_dict().items()}
    lins = {k: v for k, v in state.items() if k.startswith("lin")}
    scaling = {"scaling_layer.shift": random_lpips.shift.clone(), "scaling_layer.scale": random_lpips.scale.clone()}
    doubled = {f"lins.{k[3]}{k[4:]}": v.clone() for k, v in lins.items()}
    save_file({**state, **scaling, **doubled}, tmp_path / "whole.safetensors")
    parts = tmp_path / "parts"
    parts.mkdir()
    backbone = {f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")}
    torch.save({**backbone, "classifier.0.weight": torch.zeros(4, 4)}, parts / "vgg16.pth")
    torch.save({k.replace("model.1", "model.0"): v for k, v in lins.items()}, parts / "vgg.pth")
    for place in (tmp_path / "whole.safetensors", parts):
        read = lpips(place).state_dict()
        assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state), place
    made = distance_of("lpips", (3, 32, 32), str(parts))
    assert isinstance(made, Lpips)
    # What can go wrong with such files.
    torch.save(lins, tmp_path / "lins.pth")
    save_file({**state, "net.slice1.0.bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    save_file({**state, "net.slice9.0.bias": torch.zeros(3)}, tmp_path / "name.safetensors")
    save_file({**state, **scaling, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "scale.safetensors")
    save_file({**state, "lin2.model.1.weight": -state["lin2.model.1.weight"]}, tmp_path / "sign.safetensors")
    torch.save({"net": random_lpips}, tmp_path / "module.pth")
    bad = {
        "lins.pth": "lacks 26 tensors of LPIPS, the first is net.slice1.0.bias",
        "shape.safetensors": r"net.slice1.0.bias is \(3,\), expected \(64,\)",
        "name.safetensors": "expected no such tensor",
        "scale.safetensors": "scaling_layer.shift is .*expected",
        "sign.safetensors": "lin2 has weights below 0",
        "module.pth": "which is not executed",
        "none.pth": "holds no weights of LPIPS",
    }
    for file, said in bad.items():
        with pytest.raises(InputError, match=said) as error:
            lpips(tmp_path / file)
        assert "\n" not in str(error.value)


# ---- the choice by name


class Doubling:
    """A codec of 1x8x8 pictures whose latents are half as large."""

    def decode(self, latents: Tensor) -> Tensor:
        return 2 * latents

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures / 2


def test_latents_are_compared_as_pictures_with_a_gradient_through_the_codec() -> None:
    inner = DigitsDistance()
    made = Decoded(inner, Doubling())
    x, y = pictures(3, 1, 8, 8).requires_grad_(True), pictures(3, 1, 8, 8, seed=1)
    assert torch.equal(made(x / 2, y / 2), inner(x, y))
    (by_latent,) = torch.autograd.grad(made(x / 2, y / 2).sum(), x)
    (by_picture,) = torch.autograd.grad(inner(x, y).sum(), x)
    assert float((by_latent - by_picture).abs().max()) < 1e-6


def test_pixel_distances_need_no_role_and_lpips_has_one() -> None:
    start = untrained(type(tiny_data())("digits-like", pictures(6, 1, 8, 8), torch.arange(6) % 3), "unet", channels=16)
    assert set(DISTANCES) == {"l2", "l1", "huber", "lpips"}
    assert distance_roles("huber", start) == {} == distance_roles("l2", start, "nowhere")
    own = distance_roles("lpips", start)["distance"]
    assert own.optim is None and not own.ships and isinstance(own.start(), DigitsDistance)
    taps = distance_roles("lpips", start, "teacher")["distance"].start()
    assert isinstance(taps, TapDistance) and taps.D is start.denoiser
    for method in (CD(distance="lpips", optim=STEADY), ECT(distance="lpips", features="teacher")):
        m = build_models(method.roles(start), "cpu")
        assert {"student", "distance"} <= set(m.networks)
        assert not any(p.requires_grad for p in m.networks["distance"].parameters())


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: distance_of("ssim", (1, 8, 8)), "unknown distance 'ssim'"),
    (lambda: distance_of("lpips", (3, 32, 32)), r"no packaged features for pictures \(3, 32, 32\)"),
    (lambda: distance_of("lpips", (1, 8, 8), codec=Doubling()), r"no packaged features for latents \(1, 8, 8\)"),
    (lambda: distance_of("lpips", (4, 8, 8), "/nowhere"), "pictures of 1 or 3 channels"),
    (lambda: distance_of("lpips", (3, 8, 8), "/nowhere"), "/nowhere holds no weights of LPIPS"),
    (lambda: distance_of("lpips", (3, 8, 8), "teacher"), "needs a teacher with a network"),
    (lambda: TapDistance(edm(nn.Linear(2, 2), (2,))), "declares no taps"),
    (lambda: TapDistance(edm(small_unet(), (1, 8, 8)), ("middle",)), "unknown feature tap 'middle'"),
    (lambda: LayerDistance(nn.Sequential(nn.Linear(2, 2)), ()), "needs layers"),
    (lambda: LayerDistance(nn.Sequential(nn.Linear(2, 2)), ("5",)), "unknown layer '5'"),
    (lambda: Lpips().features(torch.zeros(1, 4, 32, 32)), r"LPIPS takes pictures .*got \(1, 4, 32, 32\)"),
    (lambda: Lpips(resize=False).features(torch.zeros(1, 3, 8, 8)), "16 pixels or more without resize"),
    (lambda: CD(distance="lpips").roles(tiny()), r"no packaged features for pictures \(1, 4, 4\)"),
    (lambda: CD(distance="lpips", features="/none").roles(tiny()), "/none holds no weights"),
    (
        lambda: CD(distance="lpips", features="x").roles(replace(tiny(), codec=Doubling())),
        "x holds no weights of LPIPS",
    ),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
