"""A residual MLP denoiser for tiny pictures: 8x8 digits in under a minute of CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.core.network import network
from fewstep.models.embed import Embedding


@dataclass(frozen=True)
class ResMLPConfig:
    """Size of a ResMLP.

    Attributes:
        shape: (C, H, W) of a picture.
        classes: number of classes, 0 for none.
        width: of every hidden layer.
        embedding: width of the time and class embedding.
        blocks: residual blocks.
        dropout: probability in each block.
    """

    shape: tuple[int, int, int] = (1, 8, 8)
    classes: int = 0
    width: int = 384
    embedding: int = 96
    blocks: int = 4
    dropout: float = 0.0


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(embedding, 2 * width)
        self.enter = nn.Linear(width, width)
        self.leave = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        # Zero start: every block is the identity at first.
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulate(emb).chunk(2, 1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return x + self.leave(self.dropout(nn.functional.silu(self.enter(h))))


@network("resmlp", ResMLPConfig)
class ResMLP(nn.Module):
    """See :class:`ResMLPConfig`. Taps: ``block0`` .. and ``bottleneck`` (the middle block), each (B, width)."""

    def __init__(self, config: ResMLPConfig) -> None:
        super().__init__()
        self.config = config
        pixels = math.prod(config.shape)
        self.embed = Embedding(config.embedding, config.classes)
        self.embeds = {"embed": config.embedding}
        self.enter = nn.Linear(pixels, config.width)
        self.blocks = nn.ModuleList(
            _Block(config.width, config.embedding, config.dropout) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.width)
        self.leave = nn.Linear(config.width, pixels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.taps = {f"block{i}": f"blocks.{i}" for i in range(config.blocks)}
        self.taps["bottleneck"] = f"blocks.{config.blocks // 2}"

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,) -> (B, *shape)."""
        emb = nn.functional.silu(self.embed(time, cond))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, emb)
        out: Tensor = self.leave(nn.functional.silu(self.norm(h)))
        return out.reshape(x.shape)
