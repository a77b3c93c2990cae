"""A discriminator on the features of a denoiser: small heads on declared taps; the denoiser stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.generator import Generator
from fewstep.core.network import network
from fewstep.core.noise import Noise
from fewstep.errors import InputError, unknown
from fewstep.models.frozen import network_under


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Size of a discriminator.

    Attributes:
        taps: names of the features, as the denoiser declares them.
        widths: of each feature, its channels.
        ranks: dimensions of each feature: 2 (B, C), 3 (B, T, C) or 4 (B, C, h, w).
        hidden: width of each head.
    """

    taps: tuple[str, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    hidden: int = 128


@network("discriminator", DiscriminatorConfig)
class Discriminator(nn.Module):
    """One head for each tap; it judges every place of a feature map, or every token, by itself."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleDict(
            {
                tap: _head(width, rank, config.hidden)
                for tap, width, rank in zip(config.taps, config.widths, config.ranks, strict=True)
            }
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, n), high for real, of the activations at the taps."""
        return torch.cat([head(features[tap]).flatten(1) for tap, head in self.heads.items()], 1)


def _head(width: int, rank: int, hidden: int) -> nn.Module:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if hidden % g == 0)
    if rank == 4:
        return nn.Sequential(
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.GroupNorm(groups, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, 1, 1),
        )
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, 1))


def discriminator(teacher: Generator, taps: Sequence[str] = ("bottleneck",), hidden: int = 128) -> Discriminator:
    """A fresh discriminator for features of the network under ``teacher``; one forward pass of it finds their sizes.

    Raises:
        InputError: a tap that the network does not declare, none at all, or features of an unknown kind.
    """
    D = network_under(teacher.denoiser)
    if not taps:
        raise InputError(f"a discriminator needs taps: name some of {', '.join(D.taps)}")
    for tap in taps:
        if tap not in D.taps:
            raise unknown("feature tap", tap, D.taps)
    cond = {} if teacher.conds is None else teacher.conds.draw(Noise.of(0, 1, teacher.device))
    x = torch.zeros(1, *D.shape, device=teacher.device)
    with torch.no_grad():
        _, found = D.features(x, D.sigma_data, cond, taps)
    widths, ranks = [], []
    for tap in taps:
        rank = found[tap].ndim
        if rank not in (2, 3, 4):
            raise InputError(
                f"feature {tap!r} is {tuple(found[tap].shape)}, expected (B, C), (B, T, C) or (B, C, h, w)"
            )
        widths.append(found[tap].shape[1 if rank in (2, 4) else 2])
        ranks.append(rank)
    return Discriminator(DiscriminatorConfig(tuple(taps), tuple(widths), tuple(ranks), hidden))


def judged(D: Any, heads: Any, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Logits (B, n) of ``x`` (B, ...), noised to ``sigma`` (B,): the features of ``D`` in front of ``heads``."""
    _, found = D.features(x, sigma, cond, heads.config.taps)
    logits: Tensor = heads(found)
    return logits
