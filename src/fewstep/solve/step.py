"""Single steps whose levels differ from sample to sample, for training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.path import widen
from fewstep.errors import InputError


def pictures(method: str, batch: Batch, shape: Sequence[int]) -> Tensor:
    """The pictures (B, *shape) of a batch, checked before ``method`` works on them.

    Raises:
        InputError: there are none, or they are of another shape.
    """
    got = None if batch.x is None else tuple(batch.x.shape[1:])
    if batch.x is None or got != tuple(shape):
        raise InputError(f"{method} needs pictures of {tuple(shape)}, as the network takes them, got {got}")
    return batch.x


def ode_step(D: Denoiser, x: Tensor, a: Tensor, b: Tensor, cond: Cond | None = None, *, order: int = 2) -> Tensor:
    """One step of the probability-flow ODE from levels ``a`` to ``b`` (both (B,), positive) at ``x`` (B, ...).

    ``order`` 2 is Heun's method in sigma, 1 is Euler's (arXiv 2206.00364, algorithm 1).
    """
    move, slope = widen(b - a, x), (x - D(x, a, cond)) / widen(a, x)
    ahead = x + move * slope
    if order == 1:
        return ahead
    return x + move * (slope + (ahead - D(ahead, b, cond)) / widen(b, x)) / 2


def ddim(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``(b / a) x + (1 - b / a) x0``: DDIM from levels ``a`` > 0 to ``b`` >= 0, both (B,), with the estimate ``x0``.

    ``b`` may be above ``a``, which is DDIM's inversion.
    """
    keep = widen(b / a, x)
    return torch.lerp(x0.to(x.dtype), x, keep)


def renoise(x: Tensor, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x + sqrt(b^2 - a^2) z``: from levels ``a`` up to ``b >= a`` (both (B,)) with unit noise ``z``."""
    return x + widen(((b - a) * (b + a)).clamp(min=0).sqrt(), x) * z
