"""The ancestral sampler of models that learned their variance (improved DDPM, arXiv 2102.09672)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.sample import OnStep, Step
from fewstep.core.solver import check_grid
from fewstep.errors import InputError

TAP = "logvar_frac"


@dataclass(frozen=True, eq=False)
class LearnedVariance:
    """Draws each step from a Gaussian whose variance the network interpolates, pixel by pixel.

    From ``a`` to ``b`` the mean is DDPM's, ``(b/a)^2 x + (1 - (b/a)^2) D``, and the variance
    ``large^v small^(1 - v)`` between ``small = b^2 (a^2 - b^2) / a^2``, the posterior's for a known x0, and
    ``large = (a^2 - b^2) (1 + b^2) / (1 + a^2)``, DDPM's beta in these coordinates. Both belong to the levels of this
    grid, as when the betas of a shortened chain are computed anew. A step that ends at 0 gives D without noise.

    The fraction ``v`` comes from ``D.features(x, sigma, cond, ("logvar_frac",))``, which returns the estimate and
    ``{"logvar_frac": v}`` of the same shape, meant to lie in [0, 1]; as in the paper nothing holds it there. ``v = 0``
    is :func:`fewstep.solve.euler.ddim` with ``eta=1``, noise by noise. This is no table, because ``v`` depends on the
    state.

    Attributes:
        levels: (N+1,) decreasing noise levels, as for a solver; the last may be 0.
        clip: whether D is first clipped to [-1, 1], the range of pictures.
        name: what people call it.

    Raises:
        InputError: a bad grid; when called, a denoiser that does not offer the fraction or offers another shape, or a
            missing ``noise``, or one of another batch.
    """

    levels: Tensor
    clip: bool = False
    name: str = "iddpm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", check_grid(self.levels))

    @property
    def start(self) -> float:
        """The noise level of the start."""
        return float(self.levels[0])

    @property
    def end(self) -> float:
        """The noise level of the result."""
        return float(self.levels[-1])

    @property
    def nfe(self) -> int:
        """Denoiser evaluations: one a step."""
        return len(self.levels) - 1

    @property
    def noisy(self) -> bool:
        """Whether any step adds noise: all but one from the start to 0 do."""
        return self.nfe > 1 or self.end > 0

    @torch.no_grad()
    def __call__(
        self,
        D: Denoiser,
        x: Tensor,
        cond: Cond | None = None,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """``x`` (B, *shape) at the first level -> the sample (B, *shape) at the last, float32 or float64."""
        if self.noisy and noise is None:
            raise InputError(f"sampler {self.name!r} adds noise: pass noise=Noise.of(seed, {len(x)})")
        if noise is not None and len(noise) != len(x):
            raise InputError(f"noise has {len(noise)} sources for {len(x)} samples: they must be as many")
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        for k, (a, b) in enumerate(itertools.pairwise(self.levels.tolist())):
            denoised, fraction = _with_fraction(D, x, self.levels[k], cond)
            if on_step is not None:
                on_step(Step(k, a, x, denoised))
            mean = denoised.clamp(-1, 1) if self.clip else denoised
            if b == 0:
                x = mean
                continue
            ratio = b / a
            fresh = (1 - ratio) * (1 + ratio)
            small = math.log(b**2 * fresh)
            # Divided by a^2 above and below, so that a level of 1e8 keeps its digits.
            large = math.log(fresh * (1 + b**2) / (1 + a**-2))
            assert noise is not None
            unit = noise.normal(x.shape[1:], "step", k, dtype=x.dtype).to(x.device)
            x = ratio**2 * x + fresh * mean + (0.5 * (small + fraction * (large - small))).exp() * unit
        if on_step is not None:
            on_step(Step(self.nfe, self.end, x, None))
        return x


def _with_fraction(D: Denoiser, x: Tensor, sigma: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
    """The estimate and the variance fraction, both in the shape and dtype of ``x``."""
    features = getattr(D, "features", None)
    if features is None:
        raise InputError(
            f"{type(D).__name__} has no features(), so no learned variance {TAP!r}: sample it with ddim(eta=1) instead"
        )
    denoised, found = features(x, sigma, cond, (TAP,))
    if TAP not in found or found[TAP].shape != x.shape:
        got = tuple(found[TAP].shape) if TAP in found else f"only {sorted(found)}"
        raise InputError(f"features() must return {TAP!r} of shape {tuple(x.shape)}, got {got}")
    return denoised.to(x.dtype), found[TAP].to(x.dtype)
