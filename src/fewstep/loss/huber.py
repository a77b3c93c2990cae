"""The pseudo-Huber distance of whole pictures."""

from __future__ import annotations

import math

from torch import Tensor

# Times the root of the number of values in a picture (arXiv 2310.14189).
PUBLISHED = 0.00054


def pseudo_huber(x: Tensor, y: Tensor, c: float | None = None) -> Tensor:
    """``sqrt(|x - y|^2 + c^2) - c`` with the norm over the whole picture (arXiv 2310.14189): (B,).

    ``x`` and ``y`` (B, ...); ``c`` > 0 in units of that norm, ``0.00054 sqrt(d)`` for ``d`` values without one. Far
    above ``c`` it is the norm, far below half the square over ``c``; the gradient's norm stays below 1.
    """
    square = (x - y).flatten(1).square().sum(1)
    c = PUBLISHED * math.sqrt(x[0].numel()) if c is None else c
    # Not the difference of the formula, which cancels where the pictures are close.
    return square / ((square + c * c).sqrt() + c)
