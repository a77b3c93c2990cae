"""The pseudo-Huber distances of whole pictures and of single pixels."""

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


def pixel_huber(d: Tensor, c: float) -> Tensor:
    """``sqrt(d^2 + c^2) - c``, a mean over the values of each picture: (B,), for differences ``d`` (B, ...).

    ``c`` > 0 in units of one value: above it the distance is the absolute error, below half its square over ``c``.
    """
    square = d.square()
    # Not the difference of the formula, which cancels where the pictures are close.
    return (square / ((square + c * c).sqrt() + c)).flatten(1).mean(1)
