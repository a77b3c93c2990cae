"""Smaller U-Nets with the weights of a larger one (BK-SDM, arXiv 2305.15798; SDXS, 2403.16627), and a small decoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Precond, build_precond
from fewstep.core.memory import hollow
from fewstep.core.network import describe_network, network
from fewstep.core.noise import Noise
from fewstep.errors import InputError

ATTENDING = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
# Settings of diffusers that hold one value for each resolution, in the order of the encoder.
PER_LEVEL = (
    "block_out_channels",
    "down_block_types",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)


@dataclass(frozen=True)
class Pruning:
    """What is left of a U-Net.

    Attributes:
        blocks: the most blocks per resolution; the decoder has one more. Its first and its last are kept.
        bare: resolutions that lose their attention, 0 the full one.
        levels: lowest resolutions that are left out.
        middle: keeps the middle between encoder and decoder; only networks of diffusers can do without.
    """

    blocks: int = 1
    bare: tuple[int, ...] = ()
    levels: int = 0
    middle: bool = True

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.levels < 0 or any(level < 0 for level in self.bare):
            raise InputError(f"pruning needs blocks >= 1, levels >= 0 and resolutions >= 0 in bare, got {self}")


def pruned(D: Precond, how: Pruning, *, seed: int = 0) -> Precond:
    """A smaller denoiser whose blocks have the weights of those of ``D`` that they stand for; nothing is shared.

    For our own U-Net and ``UNet2DConditionModel`` of diffusers. Of the blocks at a resolution the first are kept, in
    the decoder the first and the last, as in BK-SDM. What has no counterpart of its shape, such as the entrance of the
    decoder where it now meets another resolution, is drawn anew, a function of ``seed``.

    Raises:
        InputError: another network, a middle that cannot be left out, or more resolutions gone than there are.
    """
    told = describe_network(D.net)
    kind = told["class_name"] if told["kind"] == "diffusers" else told["kind"]
    if kind == "unet":
        small, names = _own(told, how)
    elif kind == "UNet2DConditionModel":
        small, names = _diffusers(told, how)
    else:
        raise InputError(f"a {kind} network cannot be pruned by blocks, expected a unet or a UNet2DConditionModel")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(Noise.of(seed, 1).fold("pruned").seeds))
        # From its description, because the denoiser may be one that LoRA layers share.
        made = build_precond({**D.describe(), "net": small})
    first = next(D.parameters())
    # A tree without contents has small buffers all the same, which a move would empty.
    made = cast(Precond, hollow(made)) if first.is_meta else made.to(first.device, first.dtype)
    _inherit(made.net, D.net, names)
    return made.eval().requires_grad_(False)


def shared_taps(teacher: Any, student: Any) -> tuple[str, ...]:
    """Names of the features that both have at the same resolution: the last of encoder and decoder at each.

    Raises:
        InputError: there are none.
    """
    found = tuple(
        tap for tap in student.taps if tap in teacher.taps and tap.startswith(("encoder", "decoder", "block"))
    )
    if not found:
        raise InputError(
            f"{type(student.net).__name__} declares no features in common with its teacher: set its weight to 0"
        )
    return found


@torch.no_grad()
def _inherit(small: nn.Module, large: nn.Module, names: Mapping[str, str]) -> None:
    """Copies what has the same shape; ``names`` are prefixes of the small network's parameters and of the large's."""
    held = large.state_dict()
    # The longest prefix first: "encoder.1" must not answer for "encoder.12".
    order = sorted(names, key=len, reverse=True)
    for name, tensor in small.state_dict().items():
        prefix = next((p for p in order if name.startswith(f"{p}.")), None)
        source = held.get(name if prefix is None else names[prefix] + name[len(prefix) :])
        if source is not None and source.shape == tensor.shape:
            tensor.copy_(source)


def _kept(count: int, of: int, *, last: bool) -> list[int]:
    """Which ``count`` of ``of`` blocks stay: the first ones, and the last of them all if ``last``."""
    return [*range(count - 1), of - 1] if last else [*range(count)]


def _levels(how: Pruning, levels: int) -> int:
    """Resolutions that are left of ``levels``."""
    left = levels - how.levels
    if left < 1 or any(level >= left for level in how.bare):
        raise InputError(f"{how} needs more resolutions than the network's {levels}: lower levels or bare")
    return left


def _own(told: dict[str, Any], how: Pruning) -> tuple[dict[str, Any], dict[str, str]]:
    """Description and names for our own U-Net."""
    if not how.middle:
        raise InputError("our own U-Net always has a middle: set middle=True, or prune levels")
    before, most = told["blocks"], len(told["multipliers"])
    left, blocks = _levels(how, most), min(how.blocks, before)
    bare = {told["shape"][1] >> level for level in how.bare}
    small = dict(told) | {
        "blocks": blocks,
        "multipliers": tuple(told["multipliers"][:left]),
        "attention": tuple(height for height in told["attention"] if height not in bare),
    }
    names: dict[str, str] = {}
    # Each resolution but the first of the encoder begins with a block that halves.
    for level in range(left):
        for j in range(blocks + bool(level)):
            names[f"encoder.{level * (blocks + 1) - bool(level) + j}"] = (
                f"encoder.{level * (before + 1) - bool(level) + j}"
            )
    # In the decoder each but the last ends with one that doubles.
    for place, at in enumerate(range(how.levels, most)):
        ways = [*_kept(blocks + 1, before + 1, last=True), *([before + 1] if at < most - 1 else [])]
        for j, source in enumerate(ways):
            names[f"decoder.{place * (blocks + 2) + j}"] = f"decoder.{at * (before + 2) + source}"
    return small, names


def _diffusers(told: dict[str, Any], how: Pruning) -> tuple[dict[str, Any], dict[str, str]]:
    """Description and names for a UNet2DConditionModel."""
    config = copy.deepcopy(dict(told["config"]))
    most = len(config["block_out_channels"])
    left, layers = _levels(how, most), config.get("layers_per_block", 2)
    before = [layers] * most if isinstance(layers, int) else [*layers]
    for name in PER_LEVEL:
        if isinstance(config.get(name), list | tuple):
            config[name] = list(config[name])[:left]
    ups = list(config["up_block_types"])[how.levels :]
    downs, blocks = list(config["down_block_types"]), [min(how.blocks, n) for n in before]
    for level in how.bare:
        downs[level] = ATTENDING.get(downs[level], downs[level])
        ups[left - 1 - level] = ATTENDING.get(ups[left - 1 - level], ups[left - 1 - level])
    config |= {"down_block_types": downs, "up_block_types": ups}
    config["layers_per_block"] = blocks[0] if isinstance(layers, int) else blocks[:left]
    if not how.middle:
        config["mid_block_type"] = None
    names: dict[str, str] = {}
    for level in range(left):
        up, source = f"up_blocks.{left - 1 - level}", f"up_blocks.{most - 1 - level}"
        names |= {f"model.{up}": f"model.{source}"}
        for j, k in enumerate(_kept(blocks[level] + 1, before[level] + 1, last=True)):
            names |= {f"model.{up}.{part}.{j}": f"model.{source}.{part}.{k}" for part in ("resnets", "attentions")}
    return {**told, "config": config}, names


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Size of a decoder.

    Attributes:
        latents: channels of a latent.
        pictures: channels of a picture.
        factor: pixels per latent along one side, a power of 2.
        width: channels throughout; 64 for a decoder of 1.2 M parameters.
        blocks: residual blocks at each resolution.

    Raises:
        InputError: a size below 1, or a factor that is no power of 2.
    """

    latents: int = 4
    pictures: int = 3
    factor: int = 8
    width: int = 64
    blocks: int = 3

    def __post_init__(self) -> None:
        if min(self.latents, self.pictures, self.factor, self.width, self.blocks) < 1 or self.factor & self.factor - 1:
            raise InputError(f"a tiny decoder needs sizes >= 1 and a factor that is a power of 2, got {self}")


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.body = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


@network("tiny-decoder", TinyDecoderConfig)
class TinyDecoder(nn.Module):
    """Latents to pictures by convolutions alone, without normalisation or attention (arXiv 2403.16627)."""

    def __init__(self, config: TinyDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.body = nn.Sequential(*self._layers(config))

    def _layers(self, config: TinyDecoderConfig) -> Iterator[nn.Module]:
        yield nn.Conv2d(config.latents, config.width, 3, padding=1)
        yield nn.ReLU()
        for level in range(int(math.log2(config.factor)) + 1):
            if level:
                yield nn.Upsample(scale_factor=2.0, mode="nearest")
                yield nn.Conv2d(config.width, config.width, 3, padding=1, bias=False)
            for _ in range(config.blocks if 2**level < config.factor else 1):
                yield _Residual(config.width)
        yield nn.Conv2d(config.width, config.pictures, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """``latents`` (B, c, h, w), of any magnitude -> pictures (B, C, factor h, factor w)."""
        # Rare large latents would dominate everything after them.
        out: Tensor = self.body(torch.tanh(latents / 3) * 3)
        return out


class TinyCodec:
    """A codec (:class:`fewstep.core.pipeline.Codec`) whose decoder is small; it encodes with the one it was made of."""

    def __init__(self, decoder: nn.Module, codec: Any) -> None:
        self.decoder, self.codec = decoder, codec

    def decode(self, latents: Tensor) -> Tensor:
        """See :class:`fewstep.core.pipeline.Codec`."""
        first = next(self.decoder.parameters())
        out: Tensor = self.decoder(latents.to(first.dtype)).float()
        return out

    def encode(self, pictures: Tensor) -> Tensor:
        """See :class:`fewstep.core.pipeline.Codec`."""
        out: Tensor = self.codec.encode(pictures)
        return out
