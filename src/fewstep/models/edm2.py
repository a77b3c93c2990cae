"""EDM2's magnitude-preserving U-Net (arXiv 2312.02696, configuration G)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.network import network
from fewstep.errors import InputError
from fewstep.models.adm import Resample, check_unet, one_hot, resample


def unit(x: Tensor, dim: int | tuple[int, ...], eps: float = 1e-4) -> Tensor:
    """``x`` with root mean square 1 over ``dim``; ``eps`` is added to the root (eq. 47). Norms are float32."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (eps + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of normal input (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """``(1 - share) a + share b``, scaled to keep the magnitude of independent summands (eq. 88)."""
    return a.lerp(b, share) / math.hypot(1 - share, share)


def mp_cat(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Channels of ``a`` and ``b`` side by side, ``b`` contributing this share whatever their numbers (eq. 103)."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt(n + m) / math.hypot(1 - share, share)
    return torch.cat([a * (scale * (1 - share) / math.sqrt(n)), b * (scale * share / math.sqrt(m))], 1)


class MPWaves(nn.Module):
    """(B, width) float32: the time at fixed random frequencies and phases, with magnitude 1 (eq. 75)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, time: Tensor) -> Tensor:
        """``time`` (B,)."""
        phase = time.float()[:, None] * self.frequencies.float() + self.phases.float()
        return phase.cos() * math.sqrt(2)


class MPLayer(nn.Module):
    """Convolution (``kernel`` > 0) or linear layer without bias, its weights of unit magnitude per output (eq. 47).

    In training the stored weights themselves are brought to unit magnitude before they are used, once after each
    change (eq. 66), so that the step size of the optimizer means the same in every layer.
    """

    def __init__(self, enter: int, leave: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(leave, enter, *[kernel] * (2 if kernel else 0)))
        self._seen: int | None = None

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """``x`` (B, enter) or (B, enter, h, w); ``gain`` a number."""
        own = tuple(range(1, self.weight.ndim))
        # A second use in the same step must leave the weights alone: the first one's gradient needs them.
        if self.training and self.weight._version != self._seen:
            with torch.no_grad():
                self.weight.copy_(unit(self.weight.float(), own))
            self._seen = self.weight._version
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        w = (unit(self.weight.to(wide), own) * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPBlock(nn.Module):
    """Block of the encoder (normalises its input by pixel) or of the decoder (figure 21)."""

    def __init__(
        self,
        enter: int,
        leave: int,
        config: EDM2Config,
        side: Literal["encoder", "decoder"],
        *,
        mode: Resample = "",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.side, self.mode = config, side, mode
        self.gain = nn.Parameter(torch.zeros([]))
        self.conv1 = MPLayer(leave if side == "encoder" else enter, leave, 3)
        self.modulate = MPLayer(config.told, leave)
        self.conv2 = MPLayer(leave, leave, 3)
        self.skip = MPLayer(enter, leave, 1) if enter != leave else nn.Identity()
        # Layers narrower than a head have none, as in the networks that were trained so.
        self.heads = leave // config.head_channels if attention else 0
        if self.heads and leave % self.heads:
            raise InputError(f"{leave} channels cannot be split into {self.heads} attention heads")
        self.qkv = MPLayer(leave, 3 * leave, 1) if self.heads else None
        self.leave = MPLayer(leave, leave, 1) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x`` (B, enter, h, w) and the vector ``emb`` (B, told)."""
        config = self.config
        x = resample(x, config.filter, self.mode)
        if self.side == "encoder":
            x = unit(self.skip(x), 1)
        told = self.modulate(emb, self.gain) + 1
        h = mp_silu(self.conv1(mp_silu(x)) * told[:, :, None, None].to(x.dtype))
        h = self.conv2(F.dropout(h, config.dropout, self.training))
        if self.side == "decoder":
            x = self.skip(x)
        x = mp_sum(x, h, config.residual_balance)
        if self.qkv is not None and self.leave is not None:
            x = mp_sum(x, self.leave(self._attend(self.qkv(x))), config.attention_balance)
        return x if config.clip is None else x.clamp(-config.clip, config.clip)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Cosine attention: queries, keys and values (B, 3 C, h, w), interleaved by channel, are of unit magnitude."""
        b, c, h, w = qkv.shape
        parts = unit(qkv.reshape(b, self.heads, c // self.heads // 3, 3, h * w), 2)
        q, k, v = (t.transpose(2, 3) for t in parts.unbind(3))
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c // 3, h, w)


@dataclass(frozen=True)
class EDM2Config:
    """Size of an EDM2 network.

    Attributes:
        shape: (C, H, W) of a picture or latent; H and W divisible by 2 ** (len(multipliers) - 1).
        classes: number of classes, 0 for none.
        channels: at full resolution, even; 128 (XS), 192 (S), 256 (M), 320 (L), 384 (XL) or 448 (XXL).
        multipliers: of the channels at each resolution, full first.
        noise_width: width of the time's embedding in ``channels``; None for that of the first resolution.
        embedding_width: width of the vector that blocks are told in ``channels``; None for the widest resolution.
        blocks: blocks per resolution.
        attention: heights with self-attention; the bottleneck always has it. Layers narrower than a head have none.
        label_balance: share of the class in the vector, in [0, 1].
        concat_balance: share of the encoder where the decoder takes it up, in [0, 1].
        filter: low-pass filter of resampling, an even number of weights.
        head_channels: width of an attention head.
        dropout: probability in each block.
        residual_balance: share of the residual branch, in [0, 1].
        attention_balance: share of the attention, in [0, 1].
        clip: largest magnitude of an activation; None for no limit.
        logvar_channels: width of the head that estimates the loss at each level (section 2.2), 0 for none.
    """

    shape: tuple[int, int, int] = (3, 64, 64)
    classes: int = 0
    channels: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    noise_width: int | None = None
    embedding_width: int | None = None
    blocks: int = 3
    attention: tuple[int, ...] = (16, 8)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    filter: tuple[int, ...] = (1, 1)
    head_channels: int = 64
    dropout: float = 0.0
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    clip: float | None = 256.0
    logvar_channels: int = 128

    def __post_init__(self) -> None:
        for name in ("shape", "multipliers", "attention", "filter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = {"channels": self.channels, "classes": self.classes, "logvar_channels": self.logvar_channels}
        check_unet("an EDM2 network", self.shape, self.multipliers, self.blocks, sizes)
        for name in ("label_balance", "concat_balance", "residual_balance", "attention_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share in [0, 1], got {getattr(self, name)}")
        if len(self.filter) % 2 or not self.filter or sum(self.filter) <= 0:
            raise InputError(f"a resampling filter has an even number of weights, such as (1, 1), got {self.filter}")
        if self.head_channels < 1:
            raise InputError(f"attention heads need at least 1 channel, got head_channels={self.head_channels}")

    @property
    def told(self) -> int:
        """Width of the vector that blocks are told."""
        wide = max(self.multipliers) if self.embedding_width is None else self.embedding_width
        return self.channels * wide


@network("edm2-unet", EDM2Config)
class EDM2UNet(nn.Module):
    """See :class:`EDM2Config`.

    Taps: ``encoder<height>`` (last block of the encoder at that height), ``bottleneck`` and ``decoder<height>``, each
    (B, C, h, w).
    """

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        self.config = config
        first = config.channels * (config.multipliers[0] if config.noise_width is None else config.noise_width)
        self.noise = MPWaves(first)
        self.layer = MPLayer(first, config.told)
        self.embeds = {"layer": config.told}
        self.label = MPLayer(config.classes, config.told) if config.classes else None
        self.taps: dict[str, str] = {}
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        now = self._build_decoder(self._build_encoder())
        self.leave = MPLayer(now, config.shape[0], 3)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.logvar_noise = MPWaves(config.logvar_channels) if config.logvar_channels else None
        self.logvar = MPLayer(config.logvar_channels, 1) if config.logvar_channels else None

    def _build_encoder(self) -> list[int]:
        """Fills the encoder; returns the widths of what it hands to the decoder."""
        config = self.config
        now, widths = config.channels * config.multipliers[0], list[int]()
        for level, factor in enumerate(config.multipliers):
            height = config.shape[1] >> level
            if level == 0:
                self.encoder[f"{height}_conv"] = MPLayer(config.shape[0] + 1, now, 3)
            else:
                self.encoder[f"{height}_down"] = MPBlock(now, now, config, "encoder", mode="down")
            widths.append(now)
            for i in range(config.blocks):
                leave = config.channels * factor
                block = MPBlock(now, leave, config, "encoder", attention=height in config.attention)
                self.encoder[f"{height}_block{i}"], now = block, leave
                widths.append(now)
            self.taps[f"encoder{height}"] = f"encoder.{height}_block{config.blocks - 1}"
        return widths

    def _build_decoder(self, widths: list[int]) -> int:
        """Fills the decoder; returns the width of its last block."""
        config, now = self.config, widths[-1]
        deepest = len(config.multipliers) - 1
        for level in range(deepest, -1, -1):
            height = config.shape[1] >> level
            if level == deepest:
                self.decoder[f"{height}_in0"] = MPBlock(now, now, config, "decoder", attention=True)
                self.decoder[f"{height}_in1"] = MPBlock(now, now, config, "decoder")
                self.taps["bottleneck"] = f"decoder.{height}_in1"
            else:
                self.decoder[f"{height}_up"] = MPBlock(now, now, config, "decoder", mode="up")
            for i in range(config.blocks + 1):
                leave = config.channels * config.multipliers[level]
                attends = height in config.attention
                block = MPBlock(now + widths.pop(), leave, config, "decoder", attention=attends)
                self.decoder[f"{height}_block{i}"], now = block, leave
            self.taps[f"decoder{height}"] = f"decoder.{height}_block{config.blocks}"
        return now

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,) -> (B, *shape)."""
        emb = self.layer(self.noise(time).to(x.dtype))
        rows = one_hot(cond, self.config.classes, emb)
        if self.label is not None:
            emb = mp_sum(emb, self.label(rows * math.sqrt(self.config.classes)), self.config.label_balance)
        emb = mp_silu(emb)
        # A channel of ones stands in for biases.
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        skips: list[Tensor] = []
        for layer in self.encoder.values():
            x = layer(x, emb) if isinstance(layer, MPBlock) else layer(x)
            skips.append(x)
        for name, layer in self.decoder.items():
            x = layer(mp_cat(x, skips.pop(), self.config.concat_balance) if "_block" in name else x, emb)
        out: Tensor = self.leave(x, self.out_gain)
        return out

    def log_variance(self, time: Tensor) -> Tensor:
        """(B,) log of the loss to be expected at the network's times ``time`` (B,), for its weighting (eq. 21).

        Raises:
            InputError: the network has no such head.
        """
        if self.logvar is None or self.logvar_noise is None:
            raise InputError("this network has no head for the loss of each level: logvar_channels is 0")
        found: Tensor = self.logvar(self.logvar_noise(time))
        return found[:, 0]
