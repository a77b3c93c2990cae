"""The convolutional U-Net of k-diffusion (its model type "image_v1"), in the manner of arXiv 2206.00364."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.network import network
from fewstep.errors import InputError

GROUP, HEAD = 32, 64


@dataclass(frozen=True)
class KUNetConfig:
    """Size of a k-diffusion U-Net.

    Attributes:
        shape: (C, H, W) of a picture; H and W divisible by patch * 2 ** (len(channels) - 1).
        features: width of the mapping network and of the time's Fourier features; even.
        depths: blocks at each resolution, full first, in the encoder and again in the decoder.
        channels: at each resolution; above 64 a multiple of 64 where there is attention, above 32 one of 32.
        attention: whether self-attention follows each block, at each resolution.
        patch: side of the squares that are folded into channels first.
        mapping_cond: numbers that the mapping network is told beside the time, 9 for augmentation; 0 for none. They
            are zeros here, as they are in sampling.
        variance: whether the output has one more channel, the log variance of the loss, which is not used.
        dropout: probability in each block, when training.

    Raises:
        InputError: sizes that do not agree or divide.
    """

    shape: tuple[int, int, int] = (3, 32, 32)
    features: int = 256
    depths: tuple[int, ...] = (2, 4, 4)
    channels: tuple[int, ...] = (128, 256, 512)
    attention: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    mapping_cond: int = 0
    variance: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("shape", "depths", "channels", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.depths) == len(self.channels) == len(self.attention) > 0:
            raise InputError(
                "a k-diffusion U-Net needs as many depths, channels and self-attention flags, one of each a "
                f"resolution, got {len(self.depths)}, {len(self.channels)} and {len(self.attention)}"
            )
        fold = self.patch * 2 ** (len(self.channels) - 1)
        if self.patch < 1 or self.shape[1] % fold or self.shape[2] % fold:
            raise InputError(f"pictures of {self.shape[1]}x{self.shape[2]} cannot be divided by {fold}")
        if self.features < 2 or self.features % 2:
            raise InputError(f"the mapping network needs an even width, got {self.features}")
        for width, attends in zip(self.channels, self.attention, strict=True):
            if width % max(1, width // GROUP) or (attends and width % max(1, width // HEAD)):
                raise InputError(f"{width} channels cannot be split into groups of {GROUP} and heads of {HEAD}")


class _Norm(nn.Module):
    """Group normalisation, scaled and shifted by what the mapping network says."""

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.groups = max(1, channels // GROUP)
        self.mapper = nn.Linear(features, 2 * channels)
        nn.init.zeros_(self.mapper.weight)
        nn.init.zeros_(self.mapper.bias)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.mapper(told)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(shift, F.group_norm(x, self.groups), 1 + scale)


class _Residual(nn.Module):
    def __init__(self, features: int, enter: int, middle: int, leave: int, dropout: float) -> None:
        super().__init__()
        last = nn.Conv2d(middle, leave, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        layers = (_Norm(features, enter), nn.GELU(), nn.Conv2d(enter, middle, 3, padding=1), nn.Dropout2d(dropout))
        self.main = nn.ModuleList([*layers, _Norm(features, middle), nn.GELU(), last, nn.Dropout2d(dropout)])
        self.skip = nn.Conv2d(enter, leave, 1, bias=False) if enter != leave else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        h = x
        for layer in self.main:
            h = layer(h, told) if isinstance(layer, _Norm) else layer(h)
        out: Tensor = h + self.skip(x)
        return out


class _Attention(nn.Module):
    def __init__(self, features: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = max(1, channels // HEAD), dropout
        self.norm_in = _Norm(features, channels)
        self.qkv_proj = nn.Conv2d(channels, 3 * channels, 1)
        self.out_proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv_proj(self.norm_in(x, told)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = (part.transpose(2, 3) for part in qkv.unbind(1))
        # Only when training, although the original drops attention when sampling too.
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = x + self.out_proj(found.transpose(2, 3).reshape(b, c, h, w))
        return out


class _Resample(nn.Module):
    """Half or double the resolution by the separable filter (1, 3, 3, 1) / 8, with reflected edges."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / (4 if up else 8)
        self.register_buffer("kernel", line[:, None] * line)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel: Tensor = self.kernel  # type: ignore[assignment]
        weight = kernel.to(x).expand(channels, 1, 4, 4)
        x = F.pad(x, (1, 1, 1, 1), "reflect")
        if self.up:
            return F.conv_transpose2d(x, weight, stride=2, padding=3, groups=channels)
        return F.conv2d(x, weight, stride=2, groups=channels)


class _Block(nn.ModuleList):
    """All layers of one resolution; residual blocks and attention are told what the mapping network says."""

    def __init__(self, config: KUNetConfig, level: int, enter: int, leave: int, up: bool) -> None:
        features, middle, layers = config.features, config.channels[level], list[nn.Module]()
        for i in range(config.depths[level]):
            out = middle if i < config.depths[level] - 1 else leave
            layers.append(_Residual(features, middle if i else enter, middle, out, config.dropout))
            layers += [_Attention(features, out, config.dropout)] if config.attention[level] else []
        resample: list[nn.Module] = [_Resample(up) if level else nn.Identity()]
        super().__init__(layers + resample if up else resample + layers)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, told) if isinstance(layer, _Residual | _Attention) else layer(x)
        return x


class _UNet(nn.Module):
    def __init__(self, config: KUNetConfig) -> None:
        super().__init__()
        widths = config.channels
        above = (widths[0], *widths[:-1])
        levels = range(len(widths))
        self.d_blocks = nn.ModuleList(_Block(config, i, above[i], widths[i], False) for i in levels)
        # All but the lowest take the encoder's activations beside their input.
        joined = [2 * w for w in widths[:-1]] + [widths[-1]]
        self.u_blocks = nn.ModuleList(_Block(config, i, joined[i], above[i], True) for i in reversed(levels))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        skips = []
        for block in self.d_blocks:
            x = block(x, told)
            skips.append(x)
        for i, block in enumerate(self.u_blocks):
            skip = skips.pop()
            x = block(torch.cat([x, skip], 1) if i else x, told)
        return x


class _Fourier(nn.Module):
    """Random Fourier features of a number."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(features // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[assignment]
        phase = 2 * math.pi * x[:, None] @ weight.to(x.dtype).T
        return torch.cat([phase.cos(), phase.sin()], 1)


@network("k-unet", KUNetConfig)
class KUNet(nn.Module):
    """See :class:`KUNetConfig`. Its parameters have the names of the checkpoints.

    Taps: ``encoder<height>`` and ``bottleneck``, each (B, C, h, w).
    """

    def __init__(self, config: KUNetConfig) -> None:
        super().__init__()
        self.config = config
        folded = config.shape[0] * config.patch**2
        self.timestep_embed = _Fourier(config.features)
        if config.mapping_cond:
            self.mapping_cond = nn.Linear(config.mapping_cond, config.features, bias=False)
        width = config.features
        self.mapping = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.embeds = {"mapping": width}
        self.proj_in = nn.Conv2d(folded, config.channels[0], 1)
        self.proj_out = nn.Conv2d(config.channels[0], folded + int(config.variance), 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]
        self.u_net = _UNet(config)
        heights = [config.shape[1] // config.patch >> level for level in range(len(config.channels))]
        self.taps = {f"encoder{height}": f"u_net.d_blocks.{level}" for level, height in enumerate(heights)}
        self.taps["bottleneck"] = f"u_net.d_blocks.{len(heights) - 1}"

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,) = ln(sigma)/4 -> (B, *shape).

        Raises:
            InputError: a label, because these networks have no classes.
        """
        if "label" in cond:
            raise InputError("this network has no classes: leave the label out of the condition")
        told = self.mapping(self.timestep_embed(time).to(self.proj_in.weight.dtype))
        x = F.pixel_unshuffle(x, self.config.patch)
        out: Tensor = self.proj_out(self.u_net(self.proj_in(x), told))
        return F.pixel_shuffle(out[:, : self.config.shape[0] * self.config.patch**2], self.config.patch)
