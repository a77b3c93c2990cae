"""Denoising score matching."""

from __future__ import annotations

from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.path import widen


def dsm(D: Denoiser, x0: Tensor, n: Tensor, sigma: Tensor, weight: Tensor, cond: Cond | None = None) -> Tensor:
    """``mean over pixels and batch of weight |D(x0 + sigma n, sigma) - x0|^2``.

    ``x0`` and ``n`` (B, ...), ``sigma`` and ``weight`` (B,); a scalar.
    """
    error = D(x0 + widen(sigma, x0) * n, sigma, cond) - x0
    return (widen(weight, x0) * error.square()).mean()
