"""Zero-shot editing with a consistency model (arXiv 2303.01469, algorithm 4): a part of the picture is held known.

The paper works in the coordinates ``A x`` of an invertible linear map and keeps those outside of a mask. With an
orthogonal ``A`` that is a projector ``P`` onto what is known: after each evaluation ``x <- x + P (y - x)``. Inpainting
keeps pixels, colorization the luma, super-resolution the mean of each block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.core.cond import Cond, take
from fewstep.core.generator import Generator, Prompts
from fewstep.core.noise import Noise, Seed, whole
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.grid.karras import karras

# Luma of red, green and blue (ITU-R BT.601), as in the paper.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Known:
    """What is known of each picture.

    Attributes:
        part: (n, C, H, W), ``P y``: the known part, the rest of it 0 in the coordinates of the paper.
        project: ``P``, an orthogonal projector of (B, C, H, W); it gets the pictures and the rows that they are.
    """

    part: Tensor
    project: Callable[[Tensor, slice], Tensor]

    def hold(self, x: Tensor, rows: slice) -> Tensor:
        """``x - P x + P y`` for the pictures ``x`` (B, C, H, W) of these rows."""
        return x - self.project(x, rows) + self.part[rows].to(x)


@torch.no_grad()
def edit(
    generator: Generator,
    known: Known,
    *,
    cond: Cond | Prompts | None = None,
    levels: Tensor | None = None,
    steps: int = 16,
    seed: Seed = 0,
    batch: int = 256,
) -> Tensor:
    """(n, C, H, W) pictures, float32 on the CPU, that agree with what is known, in [-1, 1] elsewhere.

    One evaluation for each of the decreasing noise ``levels``, by default ``steps`` of Karras' grid from the model's
    highest. ``x ~ N(P y, s^2)``; at every further level noise of variance ``s^2 - sigma_min^2`` is added to the last
    result. Picture i is a function of (seed, i) alone. ``cond`` is drawn without any, as for samples.

    Raises:
        InputError: the generator is no consistency model of pixels, the levels do not fall within the model's, or the
            counts do not agree.
    """
    table, D = generator.sampler, generator.denoiser
    if not isinstance(table, Tableau) or table.name != "consistency":
        name = getattr(table, "name", type(table).__name__)
        raise InputError(
            f"zero-shot editing needs a consistency model, whose one evaluation is a picture, and this generator's "
            f"sampler is {name!r}: distil it with cd, ct or ect"
        )
    if generator.codec is not None:
        raise InputError("zero-shot editing knows pixels, and this generator makes latents: its codec is not linear")
    n, low = len(known.part), float(table.meta.get("options", {}).get("sigma_min", 0.0))
    if known.part.shape[1:] != tuple(D.shape) or n < 1:
        raise InputError(f"pictures of this generator are {tuple(D.shape)}, what is known is {tuple(known.part.shape)}")
    grid = _levels(levels, whole("steps", steps), max(low, D.sigma_min), table.start)
    noise = Noise.of(seed, n, generator.device)
    conds = generator.conditions(cond, noise)
    if any(len(value) != n for value in conds.values()):
        raise InputError(f"{n} pictures to edit have conditions for {[len(value) for value in conds.values()]}")
    parts = []
    for i in range(0, n, max(1, whole("batch", batch))):
        rows = slice(i, i + max(1, batch))
        own, c = noise[rows], take(conds, rows)
        x = known.part[rows].to(generator.device, torch.float32)
        for k, level in enumerate(grid):
            spread = level if k == 0 else math.sqrt((level - low) * (level + low))
            x = known.hold(D(x + spread * own.normal(D.shape, "edit", k), level, c), rows)
        # What is known stays as it is, also where it lies on the edge of the range.
        parts.append(known.hold(x.clamp(-1, 1), rows).float().cpu())
    return torch.cat(parts)


def _levels(levels: Tensor | None, steps: int, low: float, top: float) -> list[float]:
    if levels is None:
        if steps < 1:
            raise InputError(f"editing needs steps >= 1, got {steps}")
        # The lowest level is left out: there the model is the identity.
        return [float(s) for s in karras(steps, low, top, to_zero=False)[:-1]]
    grid = [float(s) for s in levels]
    if not grid or sorted(set(grid), reverse=True) != grid or not low <= grid[-1] <= grid[0] <= top * (1 + 1e-6):
        raise InputError(f"the levels of editing must fall, between {top:g} and {low:g}, got {grid}")
    return grid


def inpaint(generator: Generator, pictures: Tensor, mask: Tensor, **options: object) -> Tensor:
    """``pictures`` (n, C, H, W) in [-1, 1] with what ``mask`` does not hold made anew.

    ``mask`` is 1 or true where pixels are known; (H, W), or anything that broadcasts to the pictures. ``options`` are
    those of :func:`edit`.

    Raises:
        InputError: a mask of another shape, or one that is neither 0 nor 1.
    """
    _check(pictures)
    try:
        kept = mask.to(pictures).expand_as(pictures)
    except RuntimeError:
        shapes = f"{tuple(mask.shape)} for pictures {tuple(pictures.shape)}"
        raise InputError(f"the mask must broadcast to the pictures, got {shapes}") from None
    if not bool(((kept == 0) | (kept == 1)).all()):
        raise InputError("the mask must be 1 where a pixel is known and 0 where it is not, and nothing between")
    known = Known(pictures * kept, lambda x, rows: x * kept[rows].to(x))
    return edit(generator, known, **options)  # type: ignore[arg-type]


def colorize(generator: Generator, grey: Tensor, *, luma: tuple[float, ...] = LUMA, **options: object) -> Tensor:
    """Pictures (n, C, H, W) whose luma is ``grey`` (n, 1, H, W) in [-1, 1].

    ``luma`` are the weights of the C channels. ``options`` are those of :func:`edit`.

    Raises:
        InputError: ``grey`` has not one channel, or there is not one weight for each of the model's.
    """
    _check(grey)
    channels = generator.denoiser.shape[0]
    if grey.shape[1] != 1 or len(luma) != channels or channels < 2:
        raise InputError(
            f"colorization takes (n, 1, H, W) and a weight for each of the model's {channels} channels (2 or more), "
            f"got {tuple(grey.shape)} and {luma}"
        )
    w = torch.tensor(luma).reshape(1, -1, 1, 1)
    unit = w / w.square().sum()

    def project(x: Tensor, rows: slice) -> Tensor:
        return (x * w.to(x)).sum(1, keepdim=True) * unit.to(x)

    return edit(generator, Known(grey * unit.to(grey), project), **options)  # type: ignore[arg-type]


def super_resolve(generator: Generator, small: Tensor, **options: object) -> Tensor:
    """Pictures of the model's size whose blocks have the means ``small`` (n, C, h, w) in [-1, 1].

    ``options`` are those of :func:`edit`.

    Raises:
        InputError: the model's sides are no multiples of those of ``small``, by one factor of 2 or more.
    """
    _check(small)
    channels, height, width = generator.denoiser.shape
    factor = height // small.shape[2]
    if (
        factor < 2
        or (small.shape[1] != channels)
        or (small.shape[2] * factor, small.shape[3] * factor) != (height, width)
    ):
        raise InputError(
            f"super-resolution to {(channels, height, width)} takes {channels} channels and sides smaller by a whole "
            f"factor, got {tuple(small.shape)}"
        )

    def enlarge(x: Tensor) -> Tensor:
        return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    known = Known(enlarge(small), lambda x, rows: enlarge(F.avg_pool2d(x, factor)))
    return edit(generator, known, **options)  # type: ignore[arg-type]


@torch.no_grad()
def denoise(generator: Generator, noisy: Tensor, sigma: float, cond: Cond | None = None, *, batch: int = 256) -> Tensor:
    """Pictures (n, C, H, W) in [-1, 1] from pictures with Gaussian noise of standard deviation ``sigma``.

    One evaluation at that level (arXiv 2303.01469, appendix D). Conditions, if any, are those of the pictures.

    Raises:
        InputError: ``sigma`` is not one of the model's levels, or the pictures have another shape.
    """
    D = generator.denoiser
    if noisy.ndim != 4 or noisy.shape[1:] != tuple(D.shape) or not D.sigma_min <= sigma <= D.sigma_max:
        raise InputError(
            f"denoising takes pictures (n, *{tuple(D.shape)}) with noise of {D.sigma_min:g} to {D.sigma_max:g}, got "
            f"{tuple(noisy.shape)} and {sigma:g}"
        )
    conds = generator.conditions(cond, Noise.of(0, len(noisy), generator.device))
    parts = []
    for i in range(0, len(noisy), batch):
        rows = slice(i, i + batch)
        x = D(noisy[rows].to(generator.device, torch.float32), sigma, take(conds, rows))
        parts.append(x.clamp(-1, 1).float().cpu())
    return torch.cat(parts)


def _check(pictures: Tensor) -> None:
    if pictures.ndim != 4 or not pictures.is_floating_point() or len(pictures) < 1:
        raise InputError(f"pictures to edit must be floats (n, C, H, W) in [-1, 1], got {tuple(pictures.shape)}")
