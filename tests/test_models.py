"""Networks: every advertised size builds and keeps its shape, and what they are told changes what they say."""

import pytest
import torch

from fewstep import InputError, edm
from fewstep.core.network import build_network, describe_network
from fewstep.models import ResMLP, ResMLPConfig, UNet, UNetConfig


@pytest.mark.parametrize("side", [8, 16, 32, 64, 128, 256])
def test_every_unet_size_builds_and_keeps_the_shape(side: int) -> None:
    with torch.device("meta"):
        net = UNet(UNetConfig.for_shape((3, side, side), 10))
        out = net(torch.empty(2, 3, side, side), torch.empty(2), {"label": torch.zeros(2, dtype=torch.int64)})
    assert out.shape == (2, 3, side, side)
    assert {"bottleneck", f"encoder{side}", f"decoder{side}"} <= set(net.taps)


def small(kind: str, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "unet":
        net: torch.nn.Module = UNet(UNetConfig((1, 8, 8), 3, 16, (1, 2), 1, (4,), dropout))
    else:
        net = ResMLP(ResMLPConfig((1, 8, 8), 3, 32, 16, 2, dropout))
    # Zero-started layers would hide everything behind them.
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("kind", ["unet", "resmlp"])
def test_output_depends_on_picture_time_and_class_of_its_own_sample_alone(kind: str) -> None:
    net, x, time = small(kind), torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, -1.0])
    label = torch.tensor([0, 1, 2])
    base = net(x, time, {"label": label})
    for changed in (
        net(x + torch.tensor([0.0, 1.0, 0.0])[:, None, None, None], time, {"label": label}),
        net(x, time + torch.tensor([0.0, 0.3, 0.0]), {"label": label}),
        net(x, time, {"label": torch.tensor([0, 2, 2])}),
        net(x, time, {"label": torch.tensor([0, -1, 2])}),
    ):
        far = (changed - base).flatten(1).abs().amax(1)
        assert far[1] > 1e-3 and far[0] < 1e-5 and far[2] < 1e-5
    assert torch.equal(net(x, time, {}), net(x, time, {"label": torch.full((3,), -1)})), "no label is no class"


@pytest.mark.parametrize("kind", ["unet", "resmlp"])
def test_dropout_works_in_training_only(kind: str) -> None:
    net, x, time = small(kind, dropout=0.5), torch.randn(2, 1, 8, 8), torch.zeros(2)
    assert torch.equal(net(x, time, {}), net(x, time, {}))
    net.train()
    assert not torch.equal(net(x, time, {}), net(x, time, {}))


@pytest.mark.parametrize("kind", ["unet", "resmlp"])
def test_a_description_makes_the_same_network(kind: str) -> None:
    net = small(kind)
    again = build_network(describe_network(net)).eval()
    again.load_state_dict(net.state_dict(), strict=True)
    x, time = torch.randn(2, 1, 8, 8), torch.zeros(2)
    assert torch.equal(net(x, time, {}), again(x, time, {}))


def test_channels_last_changes_nothing_but_speed() -> None:
    net, x = small("unet"), torch.randn(2, 1, 8, 8)
    plain = net(x, torch.zeros(2), {})
    found = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), torch.zeros(2), {})
    assert (plain - found).abs().max() < 1e-4 * plain.abs().max()


def test_declared_taps_of_the_unet_have_their_sizes() -> None:
    D = edm(small("unet"), (1, 8, 8))
    _, found = D.features(torch.randn(2, 1, 8, 8), 1.0, None, ["encoder8", "bottleneck", "decoder8"])
    assert [tuple(found[t].shape) for t in ("encoder8", "bottleneck", "decoder8")] == [
        (2, 16, 8, 8),
        (2, 32, 4, 4),
        (2, 16, 8, 8),
    ]


def test_sizes_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(InputError, match="divisible by 8, got 12"):
        UNetConfig((3, 32, 32), channels=12)
    with pytest.raises(InputError, match="7x8 cannot be halved"):
        UNetConfig((1, 7, 8), channels=8)
    with pytest.raises(InputError, match="no classes"):
        ResMLP(ResMLPConfig())(torch.randn(1, 1, 8, 8), torch.zeros(1), {"label": torch.zeros(1, dtype=torch.int64)})
