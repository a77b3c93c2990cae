"""Distribution matching with any f-divergence (f-distill, arXiv 2502.15681): a density ratio weights the direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core import distributed
from fewstep.core.cond import Cond
from fewstep.core.path import widen
from fewstep.core.role import Models
from fewstep.distill.dmd2 import DMD2
from fewstep.errors import InputError, unknown
from fewstep.loss.matching import DIVERGENCES, density_ratio
from fewstep.models.discriminator import read


@dataclass(frozen=True)
class FDistill(DMD2):
    """DMD2 whose direction is multiplied by ``h(r)``, r the ratio of the data's density to the student's.

    The ratio is the discriminator's, at the noised sample. Divergences with an h that grows with r cover more modes.
    With reverse-kl it is DMD2, bit for bit.

    Attributes:
        divergence: reverse-kl, softened-reverse-kl, neyman, jensen-shannon (the paper's default), hellinger,
            forward-kl or jeffreys.
        bins: of noise levels, even in their logarithm, in each of which the ratio is divided by its mean first; 0
            divides by none. The paper's are even in the level itself.
        gan: weight of the GAN term in the student's loss; above 0, because the ratio is the discriminator's.
    """

    divergence: str = "jensen-shannon"
    bins: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in DIVERGENCES:
            raise unknown("divergence", self.divergence, DIVERGENCES)
        if self.bins < 0:
            raise InputError(f"FDistill needs bins >= 0, got {self.bins}")
        if not self.gan and self.divergence != "reverse-kl":
            raise InputError(
                f"FDistill with {self.divergence} needs the discriminator's density ratio, so gan > 0, got {self.gan}: "
                "set gan, or use divergence reverse-kl"
            )

    def judged_estimates(self, m: Models, y: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """The weight is ``h(r)`` divided by its mean over the batch, so that only its shape matters."""
        if self.divergence == "reverse-kl":
            return super().judged_estimates(m, y, sigma, cond)
        if self.features == "fake":
            d_fake, found = m.fake.features(y, sigma, cond, m.heads.config.taps)
            d_teacher = m.teacher(y, sigma, cond)
        else:
            d_fake = m.fake(y, sigma, cond)
            d_teacher = m.teacher(y, sigma, cond)
            found = read(m.teacher, m.heads, y, sigma, cond)
        r = density_ratio(m.heads(found))
        h = DIVERGENCES[self.divergence](per_bin(r, sigma, self.bins) if self.bins else r)
        return d_fake, d_teacher, widen(h / distributed.average(h.mean()), y)


def per_bin(ratio: Tensor, sigma: Tensor, bins: int) -> Tensor:
    """``ratio`` (B,) over its mean among the samples of the same bin of ``ln sigma``, of ``bins`` over the batch."""
    place = sigma.log()
    low, high = place.min(), place.max()
    which = ((place - low) / (high - low).clamp_min(1e-12) * bins).long().clamp(max=bins - 1)
    members = torch.zeros(bins, device=ratio.device).index_add_(0, which, torch.ones_like(ratio))
    total = torch.zeros(bins, device=ratio.device).index_add_(0, which, ratio)
    return ratio / (total / members.clamp_min(1))[which]
