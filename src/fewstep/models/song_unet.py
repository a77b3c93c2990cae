"""DDPM++ and NCSN++, the U-Nets of score-based modelling through SDEs (arXiv 2011.13456), as EDM trained them.

One network with options (arXiv 2206.00364, table 7): DDPM++ has the defaults; NCSN++ has ``embedding="fourier"``,
``noise_width=2``, ``encoder="residual"`` and ``filter=(1, 3, 3, 1)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.network import network
from fewstep.errors import InputError, unknown
from fewstep.models.adm import (
    BlockStyle,
    UNetBlock,
    augment_vector,
    check_unet,
    forget,
    kernel_of,
    norm_of,
    one_hot,
    resample,
    waves,
    zeroed,
)


class FourierWaves(nn.Module):
    """(B, width) float32: cosines, then sines, of the time at fixed random frequencies (arXiv 2006.10739)."""

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2) * scale)

    def forward(self, time: Tensor) -> Tensor:
        """``time`` (B,)."""
        phase = time.float()[:, None] * (2 * math.pi * self.frequencies.float())
        return torch.cat([phase.cos(), phase.sin()], 1)


@dataclass(frozen=True)
class SongUNetConfig:
    """Size of a DDPM++ or NCSN++ network.

    Attributes:
        shape: (C, H, W) of a picture; H and W divisible by 2 ** (len(multipliers) - 1).
        classes: number of classes, 0 for none.
        augment: width of the augmentation vector ``cond["augment"]``, 0 for none.
        channels: at full resolution, even.
        multipliers: of the channels at each resolution, full first.
        embedding_width: width of the vector that blocks are told, in ``channels``.
        blocks: residual blocks per resolution.
        attention: heights with self-attention; the bottleneck always has it.
        dropout: probability in each block.
        label_dropout: probability in training that a label is hidden, for classifier-free guidance.
        embedding: of the time: "positional" (DDPM++) or "fourier" (NCSN++).
        noise_width: width of the time's embedding, in ``channels``.
        encoder: "standard", or pictures of each resolution are added by "skip" or "residual" (NCSN++) connections.
        decoder: "standard", or pictures of each resolution are summed ("skip").
        filter: low-pass filter of resampling, an even number of weights: (1, 1), or (1, 3, 3, 1) for NCSN++.
        adaptive_scale: whether the vector scales and shifts, or only shifts.
        skip_scale: factor on every residual sum.
        learned_variance: the last layer has 2 C outputs, of which the second half is not returned (arXiv 2102.09672).
    """

    shape: tuple[int, int, int] = (3, 32, 32)
    classes: int = 0
    augment: int = 0
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    embedding_width: int = 4
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.1
    label_dropout: float = 0.0
    embedding: Literal["positional", "fourier"] = "positional"
    noise_width: int = 1
    encoder: Literal["standard", "skip", "residual"] = "standard"
    decoder: Literal["standard", "skip"] = "standard"
    filter: tuple[int, ...] = (1, 1)
    adaptive_scale: bool = False
    skip_scale: float = math.sqrt(0.5)
    learned_variance: bool = False

    def __post_init__(self) -> None:
        for name in ("shape", "multipliers", "attention", "filter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = {"channels": self.channels, "classes": self.classes, "augment": self.augment}
        check_unet("a Song U-Net", self.shape, self.multipliers, self.blocks, sizes)
        known = {"embedding": ("positional", "fourier"), "encoder": ("standard", "skip", "residual")}
        for name, names in {**known, "decoder": ("standard", "skip")}.items():
            if getattr(self, name) not in names:
                raise unknown(f"{name} of a Song U-Net", str(getattr(self, name)), names)
        if len(self.filter) % 2 or not self.filter or sum(self.filter) <= 0:
            raise InputError(f"a resampling filter has an even number of weights, such as (1, 1), got {self.filter}")
        if self.embedding == "positional" and self.channels * self.noise_width < 4:
            raise InputError("a positional embedding needs at least 4 channels")


@network("song-unet", SongUNetConfig)
class SongUNet(nn.Module):
    """See :class:`SongUNetConfig`.

    Taps: ``encoder<height>`` (last block of the encoder at that height), ``bottleneck`` and ``decoder<height>``, each
    (B, C, h, w).
    """

    def __init__(self, config: SongUNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels * config.embedding_width
        self.noise_width = config.channels * config.noise_width
        self.style = BlockStyle(
            width, 1e-6, config.dropout, config.filter, config.adaptive_scale, config.skip_scale, 0, True
        )
        self.noise = FourierWaves(self.noise_width) if config.embedding == "fourier" else None
        self.label = nn.Linear(config.classes, self.noise_width) if config.classes else None
        self.augment = nn.Linear(config.augment, self.noise_width, bias=False) if config.augment else None
        self.layer1 = nn.Linear(self.noise_width, width)
        self.layer2 = nn.Linear(width, width)
        self.embeds = {"layer2": width}
        self.taps: dict[str, str] = {}
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        self._build_decoder(self._build_encoder())

    def _build_encoder(self) -> list[int]:
        """Fills the encoder; returns the widths of what it hands to the decoder."""
        config, colours = self.config, self.config.shape[0]
        now, widths = config.channels, [config.channels]
        for level, factor in enumerate(config.multipliers):
            height = config.shape[1] >> level
            if level == 0:
                self.encoder[f"{height}_conv"] = nn.Conv2d(colours, now, 3, padding=1)
            else:
                self.encoder[f"{height}_down"] = UNetBlock(now, now, self.style, mode="down")
                widths.append(now)
                if config.encoder == "skip":
                    self.encoder[f"{height}_aux_skip"] = nn.Conv2d(colours, now, 1)
                if config.encoder == "residual":
                    self.encoder[f"{height}_aux_residual"] = nn.Conv2d(colours, now, 3)
                    colours = now
            for i in range(config.blocks):
                leave = config.channels * factor
                block = UNetBlock(now, leave, self.style, attention=height in config.attention)
                self.encoder[f"{height}_block{i}"], now = block, leave
                widths.append(now)
            self.taps[f"encoder{height}"] = f"encoder.{height}_block{config.blocks - 1}"
        return widths

    def _build_decoder(self, widths: list[int]) -> None:
        config, now = self.config, widths[-1]
        colours = config.shape[0] * (2 if config.learned_variance else 1)
        deepest = len(config.multipliers) - 1
        for level in range(deepest, -1, -1):
            height = config.shape[1] >> level
            if level == deepest:
                self.decoder[f"{height}_in0"] = UNetBlock(now, now, self.style, attention=True)
                self.decoder[f"{height}_in1"] = UNetBlock(now, now, self.style)
                self.taps["bottleneck"] = f"decoder.{height}_in1"
            else:
                self.decoder[f"{height}_up"] = UNetBlock(now, now, self.style, mode="up")
            for i in range(config.blocks + 1):
                leave = config.channels * config.multipliers[level]
                attends = i == config.blocks and height in config.attention
                block = UNetBlock(now + widths.pop(), leave, self.style, attention=attends)
                self.decoder[f"{height}_block{i}"], now = block, leave
            self.taps[f"decoder{height}"] = f"decoder.{height}_block{config.blocks}"
            if config.decoder == "skip" or level == 0:
                self.decoder[f"{height}_aux_norm"] = norm_of(now, 1e-6)
                self.decoder[f"{height}_aux_conv"] = zeroed(nn.Conv2d(now, colours, 3, padding=1))

    def _embed(self, time: Tensor, cond: Cond) -> Tensor:
        """The vector (B, width) that all blocks are told."""
        found = waves(time, self.noise_width, endpoint=True) if self.noise is None else self.noise(time)
        # Sines first.
        emb = found.roll(self.noise_width // 2, 1).to(self.layer1.weight.dtype)
        rows = one_hot(cond, self.config.classes, emb)
        vector = augment_vector(cond, self.config.augment, emb)
        if self.label is not None:
            rows = forget(rows, self.config.label_dropout, self.training)
            emb = emb + self.label(rows * math.sqrt(self.config.classes))
        if self.augment is not None and vector is not None:
            emb = emb + self.augment(vector)
        return F.silu(self.layer2(F.silu(self.layer1(emb))))

    def _shrink(self, name: str, layer: nn.Module, aux: Tensor) -> tuple[Tensor, Tensor]:
        """What an auxiliary connection of the encoder adds, and the smaller auxiliary picture."""
        filter = self.config.filter
        if name.endswith("aux_skip"):
            aux = resample(aux, filter, "down")
            return layer(aux), aux
        # The convolution comes before the halving here, and sees zeros as far out as both together reach.
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        wide = F.conv2d(aux, layer.weight, padding=1 + (len(filter) - 1) // 2)
        small = F.conv2d(wide, kernel_of(filter, wide), stride=2, groups=wide.shape[1])
        return small + layer.bias[:, None, None], aux

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,) -> (B, *shape)."""
        emb = self._embed(time, cond)
        aux, skips = x, list[Tensor]()
        for name, layer in self.encoder.items():
            if "_aux_" in name:
                added, aux = self._shrink(name, layer, aux)
                x = x + added
                if name.endswith("residual"):
                    x = aux = x / math.sqrt(2)
                skips[-1] = x
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        out: Tensor | None = None
        for name, layer in self.decoder.items():
            if name.endswith("aux_norm"):
                aux = F.silu(layer(x))
            elif name.endswith("aux_conv"):
                found = layer(aux)
                out = found if out is None else found + resample(out, self.config.filter, "up")
            else:
                x = layer(torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        assert out is not None
        return out[:, : self.config.shape[0]]
