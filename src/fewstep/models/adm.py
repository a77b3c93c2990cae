"""ADM, the U-Net of guided diffusion (arXiv 2105.05233) as EDM trained it, and the block that it shares with DDPM++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.network import network
from fewstep.errors import InputError

Resample = Literal["", "up", "down"]


def check_unet(
    kind: str, shape: tuple[int, ...], multipliers: tuple[int, ...], blocks: int, sizes: dict[str, int]
) -> None:
    """Raises InputError for pictures that cannot be halved, no blocks, or sizes below 0 (``channels``: below 2)."""
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{kind} needs a shape (C, H, W) of positive numbers, got {shape}")
    if not multipliers or min(multipliers) < 1:
        raise InputError(f"{kind} needs at least one multiplier, each at least 1, got {multipliers}")
    fold = 2 ** (len(multipliers) - 1)
    if shape[1] % fold or shape[2] % fold:
        raise InputError(f"pictures of {shape[1]}x{shape[2]} cannot be halved {len(multipliers) - 1} times")
    if blocks < 1:
        raise InputError(f"{kind} needs at least 1 block per resolution, got {blocks}")
    for name, size in sizes.items():
        if size < 0 or (name == "channels" and (size < 2 or size % 2)):
            raise InputError(f"{kind} cannot have {name}={size}: channels are even, other sizes 0 or more")


def one_hot(cond: Cond, classes: int, like: Tensor) -> Tensor:
    """(B, classes) in the dtype of ``like`` (B, ...): zeros for label -1, and where no label is given.

    Raises:
        InputError: a label where the network has no classes.
    """
    label = cond.get("label")
    if label is not None and not classes:
        raise InputError("this network has no classes: leave the label out of the condition")
    rows = like.new_zeros(len(like), classes)
    if label is None:
        return rows
    # Labels beyond the classes have no column, so that scatter refuses them.
    return rows.scatter(1, label.clamp(min=0)[:, None], (label >= 0).to(like.dtype)[:, None])


def augment_vector(cond: Cond, width: int, like: Tensor) -> Tensor | None:
    """``cond["augment"]`` (B, width): how the picture was augmented in training (arXiv 2206.00364, appendix F.2).

    None without one, which means zeros: a picture as it is.

    Raises:
        InputError: the network was trained without, or the vector has another width.
    """
    vector = cond.get("augment")
    if vector is None:
        return None
    if not width or vector.shape != (len(like), width):
        wants = f"({len(like)}, {width})" if width else "none"
        raise InputError(f"condition 'augment' is {tuple(vector.shape)}, expected {wants}")
    return vector.to(like.dtype)


def forget(rows: Tensor, chance: float, training: bool) -> Tensor:
    """Label vectors (B, classes), in training each set to zero with this probability."""
    if not training or not chance:
        return rows
    return rows * (torch.rand(len(rows), 1, device=rows.device) >= chance).to(rows.dtype)


def waves(time: Tensor, width: int, *, endpoint: bool) -> Tensor:
    """(B, width) float32: cosines, then sines, of ``time`` (B,) at frequencies from 1 to 1/10000.

    With ``endpoint`` the last frequency is 1/10000 itself, otherwise the one after it.
    """
    half = width // 2
    place = torch.arange(half, dtype=torch.float32, device=time.device) / (half - 1 if endpoint else half)
    phase = time.float()[:, None] * (1 / 10000) ** place
    return torch.cat([phase.cos(), phase.sin()], 1)


def kernel_of(filter: tuple[int, ...], like: Tensor) -> Tensor:
    """(C, 1, k, k): the separable low-pass filter for each channel of ``like`` (B, C, ...), its sum 1."""
    taps = torch.tensor(filter, dtype=torch.float32, device=like.device)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    return kernel.to(like.dtype).expand(like.shape[1], 1, -1, -1)


def resample(x: Tensor, filter: tuple[int, ...], mode: Resample) -> Tensor:
    """``x`` (B, C, H, W) filtered and halved ("down") or doubled ("up"); as it is for ""."""
    if not mode:
        return x
    if filter == (1, 1):
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
    kernel, pad = kernel_of(filter, x), (len(filter) - 1) // 2
    if mode == "down":
        return F.conv2d(x, kernel, stride=2, padding=pad, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=pad, groups=x.shape[1])


def norm_of(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation of at most 32 groups of at least 4 channels. Raises InputError if they do not divide."""
    groups = max(1, min(32, channels // 4))
    if channels % groups:
        raise InputError(f"{channels} channels cannot be split into {groups} groups: choose a multiple of 4, or of 32")
    return nn.GroupNorm(groups, channels, eps=eps)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, silent at the start of training."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of one U-Net share.

    Attributes:
        embedding: width of the vector that every block is told.
        eps: of the normalisations.
        dropout: probability.
        filter: low-pass filter of resampling.
        adaptive_scale: whether the vector scales and shifts, or only shifts before the normalisation.
        skip_scale: factor on every residual sum.
        head_channels: width of an attention head; 0 for a single head.
        project: whether resampling skips have a 1x1 convolution although the width stays.
    """

    embedding: int
    eps: float
    dropout: float
    filter: tuple[int, ...] = (1, 1)
    adaptive_scale: bool = True
    skip_scale: float = 1.0
    head_channels: int = 64
    project: bool = False


class UNetBlock(nn.Module):
    """Residual block with optional resampling and self-attention; (B, enter, h, w) -> (B, leave, ...)."""

    def __init__(
        self, enter: int, leave: int, style: BlockStyle, *, mode: Resample = "", attention: bool = False
    ) -> None:
        super().__init__()
        self.style, self.mode = style, mode
        self.norm1 = norm_of(enter, style.eps)
        self.conv1 = nn.Conv2d(enter, leave, 3, padding=1)
        self.modulate = nn.Linear(style.embedding, leave * (2 if style.adaptive_scale else 1))
        self.norm2 = norm_of(leave, style.eps)
        self.dropout = nn.Dropout(style.dropout)
        self.conv2 = zeroed(nn.Conv2d(leave, leave, 3, padding=1))
        projects = enter != leave or (style.project and mode)
        self.skip = nn.Conv2d(enter, leave, 1) if projects else nn.Identity()
        heads = leave // style.head_channels if style.head_channels else 1
        # Layers narrower than a head have none, as in the networks that were trained so.
        self.attention = UNetAttention(leave, heads, style) if attention and heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x`` (B, enter, h, w) and the vector ``emb`` (B, embedding)."""
        style = self.style
        h = self.conv1(resample(F.silu(self.norm1(x)), style.filter, self.mode))
        told = self.modulate(emb)[:, :, None, None]
        if style.adaptive_scale:
            scale, shift = told.chunk(2, 1)
            h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        else:
            h = F.silu(self.norm2(h + told))
        h = self.conv2(self.dropout(h)) + self.skip(resample(x, style.filter, self.mode))
        out: Tensor = self.attention(h * style.skip_scale)
        return out


class UNetAttention(nn.Module):
    """Self-attention over all places, added to its input; queries, keys and values are interleaved by channel."""

    def __init__(self, channels: int, heads: int, style: BlockStyle) -> None:
        super().__init__()
        if channels % heads:
            raise InputError(f"{channels} channels cannot be split into {heads} attention heads")
        self.heads, self.scale = heads, style.skip_scale
        self.norm = norm_of(channels, style.eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.leave = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, h, w), unchanged in shape."""
        b, c, h, w = x.shape
        parts = self.qkv(self.norm(x)).reshape(b, self.heads, c // self.heads, 3, h * w)
        q, k, v = (t.transpose(2, 3) for t in parts.unbind(3))
        found = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, h, w)
        out: Tensor = (x + self.leave(found)) * self.scale
        return out


@dataclass(frozen=True)
class ADMConfig:
    """Size of an ADM network.

    Attributes:
        shape: (C, H, W) of a picture; H and W divisible by 2 ** (len(multipliers) - 1).
        classes: number of classes, 0 for none.
        augment: width of the augmentation vector ``cond["augment"]``, 0 for none.
        channels: at full resolution, even.
        multipliers: of the channels at each resolution, full first.
        embedding_width: width of the vector that blocks are told, in ``channels``.
        blocks: residual blocks per resolution.
        attention: heights with self-attention; the bottleneck always has it. Layers narrower than a head have none.
        dropout: probability in each block.
        label_dropout: probability in training that a label is hidden, for classifier-free guidance.
        head_channels: width of an attention head.
        learned_variance: the last layer has 2 C outputs, of which the second half is not returned (arXiv 2102.09672).
    """

    shape: tuple[int, int, int] = (3, 64, 64)
    classes: int = 0
    augment: int = 0
    channels: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    embedding_width: int = 4
    blocks: int = 3
    attention: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    label_dropout: float = 0.0
    head_channels: int = 64
    learned_variance: bool = False

    def __post_init__(self) -> None:
        for name in ("shape", "multipliers", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = {"channels": self.channels, "classes": self.classes, "augment": self.augment}
        check_unet("an ADM network", self.shape, self.multipliers, self.blocks, sizes)
        if self.head_channels < 1:
            raise InputError(f"attention heads need at least 1 channel, got head_channels={self.head_channels}")


@network("adm", ADMConfig)
class ADM(nn.Module):
    """See :class:`ADMConfig`.

    Taps: ``encoder<height>`` (last block of the encoder at that height), ``bottleneck`` and ``decoder<height>``, each
    (B, C, h, w).
    """

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels * config.embedding_width
        self.style = BlockStyle(width, 1e-5, config.dropout, head_channels=config.head_channels)
        self.augment = nn.Linear(config.augment, config.channels, bias=False) if config.augment else None
        self.layer1 = nn.Linear(config.channels, width)
        self.layer2 = nn.Linear(width, width)
        self.embeds = {"layer2": width}
        self.label = nn.Linear(config.classes, width, bias=False) if config.classes else None
        if self.label is not None:
            # One row of it is used at a time, so that its scale does not depend on the number of classes.
            nn.init.normal_(self.label.weight)
        if self.augment is not None:
            nn.init.zeros_(self.augment.weight)
        self.taps: dict[str, str] = {}
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        now = self._build_decoder(self._build_encoder())
        colours = config.shape[0] * (2 if config.learned_variance else 1)
        self.norm = norm_of(now, 1e-5)
        self.leave = zeroed(nn.Conv2d(now, colours, 3, padding=1))

    def _build_encoder(self) -> list[int]:
        """Fills the encoder; returns the widths of what it hands to the decoder."""
        config = self.config
        now, widths = config.channels * config.multipliers[0], list[int]()
        for level, factor in enumerate(config.multipliers):
            height = config.shape[1] >> level
            if level == 0:
                self.encoder[f"{height}_conv"] = nn.Conv2d(config.shape[0], now, 3, padding=1)
            else:
                self.encoder[f"{height}_down"] = UNetBlock(now, now, self.style, mode="down")
            widths.append(now)
            for i in range(config.blocks):
                leave = config.channels * factor
                block = UNetBlock(now, leave, self.style, attention=height in config.attention)
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
                self.decoder[f"{height}_in0"] = UNetBlock(now, now, self.style, attention=True)
                self.decoder[f"{height}_in1"] = UNetBlock(now, now, self.style)
                self.taps["bottleneck"] = f"decoder.{height}_in1"
            else:
                self.decoder[f"{height}_up"] = UNetBlock(now, now, self.style, mode="up")
            for i in range(config.blocks + 1):
                leave = config.channels * config.multipliers[level]
                block = UNetBlock(now + widths.pop(), leave, self.style, attention=height in config.attention)
                self.decoder[f"{height}_block{i}"], now = block, leave
            self.taps[f"decoder{height}"] = f"decoder.{height}_block{config.blocks}"
        return now

    def _embed(self, time: Tensor, cond: Cond) -> Tensor:
        """The vector (B, width) that all blocks are told."""
        emb = waves(time, self.config.channels, endpoint=False).to(self.layer1.weight.dtype)
        rows = one_hot(cond, self.config.classes, emb)
        vector = augment_vector(cond, self.config.augment, emb)
        if self.augment is not None and vector is not None:
            emb = emb + self.augment(vector)
        emb = self.layer2(F.silu(self.layer1(emb)))
        if self.label is not None:
            emb = emb + self.label(forget(rows, self.config.label_dropout, self.training))
        return F.silu(emb)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,) -> (B, *shape)."""
        emb = self._embed(time, cond)
        skips: list[Tensor] = []
        for layer in self.encoder.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.decoder.items():
            x = layer(torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        out: Tensor = self.leave(F.silu(self.norm(x)))
        return out[:, : self.config.shape[0]]
