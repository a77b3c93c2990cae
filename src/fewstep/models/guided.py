"""The U-Net of improved and guided diffusion (ADM: arXiv 2102.09672, 2105.05233), and consistency models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Precond
from fewstep.core.network import network
from fewstep.core.path import TRIG
from fewstep.errors import InputError
from fewstep.models.consistency import ConsistencyPrecond

GROUPS = 32


@dataclass(frozen=True)
class GuidedUNetConfig:
    """Size and variant of an ADM U-Net.

    Attributes:
        shape: (C, H, W) of a picture; H and W divisible by 2 ** (len(multipliers) - 1).
        classes: number of classes, 0 for none.
        channels: at multiplier 1; every multiple of it that occurs is divisible by 32.
        multipliers: of the channels at each resolution, full first; 0.5 occurs.
        blocks: residual blocks per resolution.
        attention: heights at which self-attention follows each block; the bottleneck always has it.
        heads: attention heads; 0 where ``head_channels`` says how many.
        head_channels: channels of one head; 0 where ``heads`` says how many.
        new_order: whether the projection holds q, k and v one after the other, each with all heads (arXiv 2105.05233,
            the 64x64 model), or q, k and v of each head side by side (all models before).
        scale_shift: whether the embedding scales and shifts the normalised features, or is added to them.
        updown: whether residual blocks change the resolution, or strided and plain convolutions.
        learn_variance: whether the output has as many channels again for the variance.
        time_scale: what the time is multiplied with: 1000/T for models that rescale their T time steps.
        dropout: probability in each block, when training.

    Raises:
        InputError: sizes or head counts that do not divide, or both or none of ``heads`` and ``head_channels``.
    """

    shape: tuple[int, int, int] = (3, 64, 64)
    classes: int = 0
    channels: int = 192
    multipliers: tuple[float, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (32, 16, 8)
    heads: int = 0
    head_channels: int = 64
    new_order: bool = False
    scale_shift: bool = True
    updown: bool = True
    learn_variance: bool = False
    time_scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("shape", "multipliers", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        fold = 2 ** (len(self.multipliers) - 1)
        if self.shape[1] % fold or self.shape[2] % fold:
            raise InputError(
                f"pictures of {self.shape[1]}x{self.shape[2]} cannot be halved {len(self.multipliers) - 1} times: pass "
                "the image_size that the model was trained at"
            )
        wrong = [w for w in self.widths if w % GROUPS or w < GROUPS]
        if wrong:
            raise InputError(f"an ADM U-Net has channels divisible by {GROUPS}, got {wrong[0]} at one resolution")
        if (self.heads > 0) == (self.head_channels > 0):
            raise InputError(
                f"attention needs heads or head_channels, one of them above 0, got {self.heads} and "
                f"{self.head_channels}"
            )
        for level, width in enumerate(self.widths):
            attends = self.shape[1] >> level in self.attention or level == len(self.widths) - 1
            if attends and width % (self.heads or self.head_channels):
                said = f"heads={self.heads}" if self.heads else f"head_channels={self.head_channels}"
                raise InputError(f"{width} channels cannot be split by {said}: pass the model's own number")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, full first."""
        return tuple(int(m * self.channels) for m in self.multipliers)


class _Norm(nn.GroupNorm):
    """In float32 whatever the weights are, because half precision loses the variance of large pictures."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(torch.promote_types(x.dtype, torch.float32)), self.bias
        out = F.group_norm(x.to(weight.dtype), self.num_groups, weight, bias.to(weight.dtype), self.eps)
        return out.to(x.dtype)


def _resample(x: Tensor, how: str) -> Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if how == "up" else x


class _Residual(nn.Module):
    """Residual block told the time; ``how`` is "", "up" or "down"."""

    def __init__(self, enter: int, leave: int, config: GuidedUNetConfig, how: str = "") -> None:
        super().__init__()
        self.how, self.scale_shift = how, config.scale_shift
        self.in_layers = nn.Sequential(_Norm(enter), nn.SiLU(), nn.Conv2d(enter, leave, 3, padding=1))
        told = 2 * leave if config.scale_shift else leave
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.channels, told))
        last = nn.Conv2d(leave, leave, 3, padding=1)
        self.out_layers = nn.Sequential(_Norm(leave), nn.SiLU(), nn.Dropout(config.dropout), _zero(last))
        self.skip_connection = nn.Conv2d(enter, leave, 1) if enter != leave else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](_resample(self.in_layers[1](self.in_layers[0](x)), self.how))
        told = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, 1)
            h = torch.addcmul(shift, self.out_layers[0](h), 1 + scale)
        else:
            h = self.out_layers[0](h + told)
        h = self.out_layers[3](self.out_layers[2](self.out_layers[1](h)))
        out: Tensor = self.skip_connection(_resample(x, self.how)) + h
        return out


class _Attention(nn.Module):
    """Self-attention over all positions; see ``new_order`` of :class:`GuidedUNetConfig`."""

    def __init__(self, channels: int, config: GuidedUNetConfig) -> None:
        super().__init__()
        self.heads, self.new_order = config.heads or channels // config.head_channels, config.new_order
        self.norm = _Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, c, h * w))
        if self.new_order:
            parts = qkv.reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        else:
            parts = qkv.reshape(b, self.heads, 3, c // self.heads, h * w).unbind(2)
        q, k, v = (part.transpose(2, 3) for part in parts)
        found = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, h * w)
        out: Tensor = x + self.proj_out(found).reshape(b, c, h, w)
        return out


class _Shrink(nn.Module):
    """Halves the resolution by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class _Grow(nn.Module):
    """Doubles the resolution, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(_resample(x, "up"))
        return out


class _Stage(nn.ModuleList):
    """Layers in a row, of which the residual blocks are told the time."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, _Residual) else layer(x)
        return x


class _Fraction(nn.Module):
    """From the variance channels, trained in [-1, 1], to the fraction in [0, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1) / 2


def _zero(layer: nn.Conv1d | nn.Conv2d) -> nn.Module:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


@network("guided-unet", GuidedUNetConfig)
class GuidedUNet(nn.Module):
    """See :class:`GuidedUNetConfig`. Its parameters have the names of the published checkpoints.

    Taps: ``encoder<height>`` (last activation of the encoder at that height), ``bottleneck`` and ``decoder<height>``,
    each (B, C, h, w); with learned variance ``logvar_frac`` (B, *shape), the place of the log variance between its
    bounds, 0 for the posterior's and 1 for beta (arXiv 2102.09672, eq. 15), which
    :class:`fewstep.solve.iddpm.LearnedVariance` reads.
    """

    def __init__(self, config: GuidedUNetConfig) -> None:
        super().__init__()
        self.config = config
        width, first = 4 * config.channels, config.widths[0]
        self.time_embed = nn.Sequential(nn.Linear(config.channels, width), nn.SiLU(), nn.Linear(width, width))
        self.embeds = {"time_embed": width}
        self.label_emb = nn.Embedding(config.classes, width) if config.classes else None
        self.taps = {"bottleneck": "middle_block"}
        sizes = self._encoder()
        last = config.widths[-1]
        middle = (_Residual(last, last, config), _Attention(last, config), _Residual(last, last, config))
        self.middle_block = _Stage(middle)
        self._decoder(sizes)
        copies = 2 if config.learn_variance else 1
        self.out = nn.Sequential(
            _Norm(first), nn.SiLU(), _zero(nn.Conv2d(first, copies * config.shape[0], 3, padding=1))
        )
        self.variance = _Fraction()
        if config.learn_variance:
            self.taps["logvar_frac"] = "variance"

    def _encoder(self) -> list[int]:
        """Adds the encoder; returns the channels of its outputs, in order."""
        config, height, now = self.config, self.config.shape[1], self.config.widths[0]
        self.input_blocks = nn.ModuleList([_Stage([nn.Conv2d(config.shape[0], now, 3, padding=1)])])
        sizes = [now]
        for level, leave in enumerate(config.widths):
            if level:
                shrink = _Residual(now, now, config, "down") if config.updown else _Shrink(now)
                self.input_blocks.append(_Stage([shrink]))
                sizes.append(now)
                height //= 2
            for _ in range(config.blocks):
                layers: list[nn.Module] = [_Residual(now, leave, config)]
                now = leave
                layers += [_Attention(now, config)] if height in config.attention else []
                self.input_blocks.append(_Stage(layers))
                sizes.append(now)
            self.taps[f"encoder{height}"] = f"input_blocks.{len(self.input_blocks) - 1}"
        return sizes

    def _decoder(self, sizes: list[int]) -> None:
        """Adds the decoder, whose blocks take what the encoder left, last first."""
        config, now = self.config, self.config.widths[-1]
        height = config.shape[1] >> (len(config.widths) - 1)
        self.output_blocks = nn.ModuleList()
        for level, leave in reversed(list(enumerate(config.widths))):
            for i in range(config.blocks + 1):
                layers: list[nn.Module] = [_Residual(now + sizes.pop(), leave, config)]
                now = leave
                layers += [_Attention(now, config)] if height in config.attention else []
                if i == config.blocks:
                    self.taps[f"decoder{height}"] = f"output_blocks.{len(self.output_blocks)}.{len(layers) - 1}"
                    if level:
                        layers.append(_Residual(now, now, config, "up") if config.updown else _Grow(now))
                self.output_blocks.append(_Stage(layers))
            height *= 2

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,) in steps of 1000 a run, ``cond["label"]`` (B,) int64 -> (B, *shape).

        The label -1, like no label, adds no class embedding. Of a learned variance only the tap is returned.

        Raises:
            InputError: a label where the network has no classes.
        """
        emb = self._embed(time, cond)
        skips: list[Tensor] = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb)
        out: Tensor = self.out(x)
        if self.config.learn_variance:
            out, variance = out.chunk(2, 1)
            self.variance(variance)
        return out

    def _embed(self, time: Tensor, cond: Cond) -> Tensor:
        weight = next(self.time_embed.parameters())
        half = self.config.channels // 2
        wide = torch.promote_types(weight.dtype, torch.float32)
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, device=time.device, dtype=wide))
        phase = time.to(wide)[:, None] * self.config.time_scale * rates
        emb: Tensor = self.time_embed(torch.cat([phase.cos(), phase.sin()], 1).to(weight.dtype))
        label = cond.get("label")
        if self.label_emb is None:
            if label is not None:
                raise InputError("this network has no classes: leave the label out of the condition")
            return emb
        if label is None:
            return emb
        return torch.where((label < 0)[:, None], emb, emb + self.label_emb(label.clamp(min=0)))


def karras(
    net: nn.Module, shape: Sequence[int], *, distilled: bool, sigma_data: float = 0.5, **options: Any
) -> Precond:
    """The denoiser of the consistency-models repository: EDM's, or its students', both told ``250 ln(sigma)``.

    ``options`` are those of :class:`fewstep.core.denoiser.Precond`, such as ``sigma_min``.

    Raises:
        InputError: levels that are not 0 < sigma_min < sigma_max < inf, or ``sigma_data <= 0``.
    """
    if not 0 < sigma_data < math.inf:
        raise InputError(f"sigma_data must be a finite number > 0, got {sigma_data!r}: 0.5 is the published one")
    return (ConsistencyPrecond if distilled else Precond)(
        net,
        shape,
        path=TRIG(sigma_data),
        predicts="velocity",
        time="250*log(sigma)",
        scale_in=1 / sigma_data,
        scale_out=-sigma_data,
        sigma_data=sigma_data,
        **options,
    )
