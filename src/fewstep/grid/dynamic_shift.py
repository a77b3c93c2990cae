"""The shifted uniform grid whose shift grows with the size of the picture."""

from __future__ import annotations

import math

from torch import Tensor

from fewstep.errors import InputError
from fewstep.grid.flow_shift import flow_shift


def dynamic_shift(
    steps: int,
    sigma_min: float,
    sigma_max: float,
    *,
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    to_zero: bool = True,
) -> Tensor:
    """:func:`~fewstep.grid.flow_shift.flow_shift` with ``shift = exp(mu)``, mu linear in the number of image tokens.

    mu is ``base_shift`` at ``base_tokens`` and ``max_shift`` at ``max_tokens``, and goes on beyond both; the defaults
    are those of Flux, whose tokens are 16 x 16 pixels: (height / 16) (width / 16) of them.
    Returns (steps + 1,) float64. Raises InputError for bad ranges, tokens < 1, base_tokens >= max_tokens or
    |mu| above 50.
    """
    if tokens < 1:
        raise InputError(f"dynamic_shift needs tokens >= 1, got {tokens}: pass (height / 16) (width / 16)")
    if not 0 < base_tokens < max_tokens:
        raise InputError(f"dynamic_shift needs 0 < base_tokens < max_tokens, got {base_tokens} and {max_tokens}")
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    if not abs(mu) <= 50:
        raise InputError(f"{tokens} tokens give the shift exp({mu:g}): pass the number of tokens of a picture")
    return flow_shift(steps, sigma_min, sigma_max, shift=math.exp(mu), to_zero=to_zero)
