"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.core.cond import Cond, cat, null
from fewstep.core.denoiser import Denoiser, Wrapper
from fewstep.errors import InputError


class CFG(Wrapper):
    """``D(x, null) + scale (D(x, cond) - D(x, null))``: both estimates come from one batch of twice the size.

    ``scale`` 1 is no guidance and costs none. ``nulls`` are the null values of conditions other than ``label``, see
    :func:`fewstep.core.cond.null`. A call counts as one evaluation of the guided denoiser.

    Raises:
        InputError: a scale that is negative or not finite, or a condition without a null value.
    """

    def __init__(self, denoiser: Denoiser, scale: float, nulls: Cond | None = None) -> None:
        super().__init__(denoiser)
        if not 0 <= scale < math.inf:
            raise InputError(f"guidance needs a scale >= 0 (1 is none), got {scale}")
        self.scale, self.nulls = float(scale), nulls

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`."""
        if self.scale == 1 or not cond:
            return self.denoiser(x, sigma, cond)
        if isinstance(sigma, Tensor) and sigma.ndim:
            sigma = torch.cat([sigma, sigma]) if len(sigma) == len(x) else sigma
        both = self.denoiser(torch.cat([x, x]), sigma, cat([null(cond, self.nulls), dict(cond)]))
        free, own = both.chunk(2)
        return torch.lerp(free, own, self.scale)
