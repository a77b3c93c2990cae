"""Scores of pictures that each have a right answer: super-resolution, translation from one kind to another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import InputError

# The published window of 11 pixels has this deviation; narrower ones keep its shape.
SPREAD = 1.5 / 11


class Paired(NamedTuple):
    """Means over the pictures.

    Attributes:
        psnr: peak signal-to-noise ratio in dB.
        ssim: structural similarity, 1 for equal pictures.
        colour_shift: length of the difference between a picture's mean colour and the right one's.
    """

    psnr: float
    ssim: float
    colour_shift: float


def paired(made: Tensor, right: Tensor, *, window: int = 11) -> Paired:
    """All scores of ``made`` against ``right``, both (B, C, H, W) in [-1, 1].

    Raises:
        InputError: see :func:`psnr` and :func:`ssim`.
    """
    return Paired(
        float(psnr(made, right).mean()), float(ssim(made, right, window=window).mean()), colour_shift(made, right)
    )


def psnr(made: Tensor, right: Tensor) -> Tensor:
    """(B,) float64: ``10 log10(4 / mean square error)`` of each picture, since the values span 2; inf for equal ones.

    Raises:
        InputError: pictures of different shapes, or no pictures.
    """
    _check(made, right)
    error = (made.double() - right.double()).square().flatten(1).mean(1)
    return 10 * (4 / error).log10()


def ssim(made: Tensor, right: Tensor, *, window: int = 11) -> Tensor:
    """(B,) float64: structural similarity (doi 10.1109/TIP.2003.819861) of each picture, its mean over all windows.

    The window is Gaussian, ``window`` pixels wide with the deviation ``1.5 window / 11``, and stays within the picture;
    K1 = 0.01 and K2 = 0.03 of the range 2. Channels count alike.

    Raises:
        InputError: a window that is even, or wider than the pictures; or see :func:`psnr`.
    """
    _check(made, right)
    side = min(made.shape[-2:])
    if window < 1 or window % 2 == 0 or window > side:
        fits = side - (side + 1) % 2
        raise InputError(
            f"a window of {window} pixels does not fit pictures of side {side}: use an odd one, at most {fits}"
        )
    place = torch.arange(window, dtype=torch.float64, device=made.device) - window // 2
    bell = (-0.5 * (place / (SPREAD * window)).square()).exp()
    bell = bell / bell.sum()

    def mean(t: Tensor) -> Tensor:
        flat = t.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, bell.reshape(1, 1, -1, 1)), bell.reshape(1, 1, 1, -1))

    x, y = made.double(), right.double()
    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    score = (2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return score.reshape(len(x), -1).mean(1)


def colour_shift(made: Tensor, right: Tensor) -> float:
    """Mean over the pictures of ``|mean colour - right mean colour|``, a norm over channels, in units of [-1, 1].

    Raises:
        InputError: see :func:`psnr`.
    """
    _check(made, right)
    return float((made.double() - right.double()).mean((2, 3)).norm(dim=1).mean())


def colour_bias(made: Tensor, right: Tensor) -> list[float]:
    """For each channel the mean over all pictures of ``made - right``: a cast that all pictures share.

    Raises:
        InputError: see :func:`psnr`.
    """
    _check(made, right)
    bias: list[float] = (made.double() - right.double()).mean((0, 2, 3)).tolist()
    return bias


def _check(made: Tensor, right: Tensor) -> None:
    if made.ndim != 4 or made.shape != right.shape or not len(made):
        raise InputError(
            f"paired scores need two batches of pictures (B, C, H, W) of one shape, got {tuple(made.shape)} and "
            f"{tuple(right.shape)}"
        )
