"""How pictures are brought to the side that a published network takes: part of a score's definition.

All three begin with whole grey levels 0 to 255, because that is what files hold and what published numbers were
computed from. ``tf1`` is the resize of the first TensorFlow, which EDM, StyleGAN and torch-fidelity keep; ``clean`` is
Pillow's antialiased bicubic one without rounding (clean-fid, arXiv 2104.11222); ``pytorch`` is that of pytorch-fid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import InputError


def levels(images: Tensor) -> Tensor:
    """Pictures (B, 1 or 3, H, W) in [-1, 1] as (B, 3, H, W) of whole levels 0 to 255, float32; half a level goes up.

    Raises:
        InputError: another number of axes or channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(
            f"pictures are {tuple(images.shape)}, expected (B, 3, H, W) or (B, 1, H, W): decode latents first, and "
            "choose another extractor for other channels"
        )
    return (images.float() * 127.5 + 128).floor().clamp(0, 255).expand(-1, 3, -1, -1)


def tf1(x: Tensor, side: int) -> Tensor:
    """Bilinear where pixel i of the result lies at ``i * before / after``, as in TensorFlow 1: (B, C, side, side)."""
    for axis in (2, 3):
        before = x.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=x.device) * (before / side)
        low = place.long().clamp(max=before - 1)
        high = (low + 1).clamp(max=before - 1)
        weight = (place - low).reshape(-1, 1) if axis == 2 else place - low
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
    return x


def clean(x: Tensor, side: int) -> Tensor:
    """Bicubic with antialiasing, as Pillow does it on floats; values may leave 0 to 255: (B, C, side, side)."""
    return F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True)


def pytorch(x: Tensor, side: int) -> Tensor:
    """Bilinear with the centres of pixels at halves and without antialiasing: (B, C, side, side)."""
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {"tf1": tf1, "clean": clean, "pytorch": pytorch}
