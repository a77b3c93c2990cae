"""A U-Net in the manner of DDPM++ / ADM (arXiv 2011.13456, 2105.05233) for 8x8 to 256x256 pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.network import network
from fewstep.errors import InputError
from fewstep.models.embed import Embedding


@dataclass(frozen=True)
class UNetConfig:
    """Size of a U-Net.

    Attributes:
        shape: (C, H, W) of a picture; H and W divisible by 2 ** (len(multipliers) - 1).
        classes: number of classes, 0 for none.
        channels: at full resolution; a multiple of 8.
        multipliers: of the channels at each resolution, full first.
        blocks: residual blocks per resolution.
        attention: heights at which self-attention follows each block; the bottleneck always has it.
        dropout: probability in each block.
    """

    shape: tuple[int, int, int] = (3, 32, 32)
    classes: int = 0
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("shape", "multipliers", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        fold = 2 ** (len(self.multipliers) - 1)
        if self.channels % 8 or self.channels < 8:
            raise InputError(f"a U-Net needs channels divisible by 8, got {self.channels}")
        if self.shape[1] % fold or self.shape[2] % fold:
            raise InputError(
                f"pictures of {self.shape[1]}x{self.shape[2]} cannot be halved {len(self.multipliers) - 1} times"
            )

    @classmethod
    def for_shape(cls, shape: tuple[int, int, int], classes: int = 0, **changes: Any) -> UNetConfig:
        """A sensible size for pictures of this shape, from 8x8 (0.4 M parameters) to 256x256 (about 280 M)."""
        side = max(shape[1:])
        sizes: dict[int, dict[str, Any]] = {
            8: {"channels": 24, "multipliers": (1, 2), "blocks": 1, "attention": (4,)},
            16: {"channels": 48, "multipliers": (1, 2), "blocks": 2, "attention": (8,)},
            32: {"channels": 128, "multipliers": (1, 2, 2), "blocks": 3, "attention": (16,)},
            64: {"channels": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8)},
            256: {"channels": 192, "multipliers": (1, 1, 2, 2, 4, 4), "blocks": 2, "attention": (32, 16, 8)},
        }
        size = sizes[min((s for s in sizes if s >= side), default=256)]
        return cls(shape, classes, **{**size, **changes})


def _groups(channels: int) -> nn.GroupNorm:
    most = min(32, channels // 4)
    return nn.GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels, eps=1e-6)


class _Block(nn.Module):
    """Residual block with adaptive scale and shift; ``resample`` is "", "up" or "down"."""

    def __init__(self, enter: int, leave: int, emb: int, dropout: float, resample: str, attention: bool) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = _groups(enter)
        self.conv1 = nn.Conv2d(enter, leave, 3, padding=1)
        self.modulate = nn.Linear(emb, 2 * leave)
        self.norm2 = _groups(leave)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(leave, leave, 3, padding=1)
        self.skip = nn.Conv2d(enter, leave, 1) if enter != leave else nn.Identity()
        self.attention = _Attention(leave) if attention else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def _scale(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self._scale(F.silu(self.norm1(x))))
        scale, shift = self.modulate(emb)[:, :, None, None].chunk(2, 1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        out: Tensor = self.attention(self.skip(self._scale(x)) + self.conv2(self.dropout(h)))
        return out


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm = _groups(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.leave = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = (t.transpose(2, 3) for t in qkv.unbind(1))
        found = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, h, w)
        out: Tensor = x + self.leave(found)
        return out


@network("unet", UNetConfig)
class UNet(nn.Module):
    """See :class:`UNetConfig`.

    Taps: ``encoder<height>`` (last activation of the encoder at that height), ``bottleneck`` and ``decoder<height>``,
    each (B, C, h, w).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = 4 * config.channels
        self.embed = Embedding(width, config.classes)
        self.embeds = {"embed": width}
        self.enter = nn.Conv2d(config.shape[0], config.channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        self.taps = {"bottleneck": "middle.1"}
        sizes, now, height = [config.channels], config.channels, config.shape[1]

        def block(enter: int, leave: int, resample: str = "", attend: bool | None = None) -> _Block:
            return _Block(
                enter, leave, width, config.dropout, resample, height in config.attention if attend is None else attend
            )

        for level, factor in enumerate(config.multipliers):
            if level:
                height //= 2
                self.encoder.append(block(now, now, "down"))
                sizes.append(now)
            for _ in range(config.blocks):
                self.encoder.append(block(now, factor * config.channels))
                now = factor * config.channels
                sizes.append(now)
            self.taps[f"encoder{height}"] = f"encoder.{len(self.encoder) - 1}"
        self.middle = nn.ModuleList([block(now, now, attend=True), block(now, now, attend=False)])
        for level, factor in reversed(list(enumerate(config.multipliers))):
            for _ in range(config.blocks + 1):
                self.decoder.append(block(now + sizes.pop(), factor * config.channels))
                now = factor * config.channels
            self.taps[f"decoder{height}"] = f"decoder.{len(self.decoder) - 1}"
            if level:
                height *= 2
                self.decoder.append(block(now, now, "up"))
        self.norm = _groups(now)
        self.leave = nn.Conv2d(now, config.shape[0], 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor, cond: Cond, residuals: Sequence[Tensor] = ()) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,) -> (B, *shape).

        ``residuals`` are added to the skips, one for each in the encoder's order, and the last to the bottleneck.
        """
        emb = F.silu(self.embed(time, cond))
        h = self.enter(x)
        skips = [h]
        for block in self.encoder:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        if residuals:
            *beside, last = residuals
            skips = [skip + more for skip, more in zip(skips, beside, strict=True)]
            h = h + last
        for block in self.decoder:
            if block.resample != "up":
                h = torch.cat([h, skips.pop()], 1)
            h = block(h, emb)
        out: Tensor = self.leave(F.silu(self.norm(h)))
        return out
