"""Copies of training pictures, and sameness among generated ones: what a low distance does not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.measure.features import Extractor
from fewstep.measure.reference import RealData

BLOCK = 1024
# The share of held-out pictures that count as near the training pictures by chance.
NEAR = 0.01


class Nearest(NamedTuple):
    """The training picture that each of N pictures is nearest to: ``distance`` (N,) float64 and ``id`` (N,) int64."""

    distance: Tensor
    id: Tensor


class Copies(NamedTuple):
    """Distances of generated pictures to their nearest training picture against those of pictures never seen.

    Attributes:
        nearer: probability that a generated picture is nearer to the training set than an unseen one: 0.5 is fair, 1
            is copying, 0 is far from all data. Ties count half.
        z: how many standard deviations ``nearer`` lies above one half if both were one law (the Mann-Whitney test of
            data copying, arXiv 2004.05675): above about 3 is evidence of copying.
        near: share of generated pictures nearer than all but one in a hundred unseen ones: 0.01 is fair.
        generated: each generated picture's nearest training picture, to look at.
        unseen: the same for the unseen pictures.
        leave_one_out: whether the unseen pictures were the training pictures themselves, each compared with the others.
    """

    nearer: float
    z: float
    near: float
    generated: Nearest
    unseen: Nearest
    leave_one_out: bool


def nearest(features: Tensor, data: RealData, extractor: Extractor, *, batch: int = 512, own: bool = False) -> Nearest:
    """The nearest picture of ``data`` to each row of ``features`` (N, dim); the data stream by once.

    Args:
        features: of the pictures that are looked up.
        data: the training pictures.
        extractor: gave the features.
        batch: training pictures at a time.
        own: row i is picture i of ``data`` itself, which then does not count.

    Raises:
        InputError: features of another extractor, or data without another picture to find.
    """
    if features.ndim != 2 or features.shape[1] != extractor.dim or len(data) < 1 + own:
        raise InputError(
            f"features are {tuple(features.shape)} for {len(data)} training pictures, expected (N, {extractor.dim}) "
            f"and at least {1 + own}"
        )
    found = torch.full((len(features),), torch.inf, dtype=torch.float64)
    which = torch.zeros(len(features), dtype=torch.int64)
    for ids in torch.arange(len(data)).split(batch):
        columns = extractor(_images(data, ids)).cpu().double()
        for start in range(0, len(features), BLOCK):
            rows = slice(start, start + BLOCK)
            # By differences, because the product's rounding would hide that a copy is exact.
            distance = torch.cdist(features[rows].cpu().double(), columns, compute_mode="donot_use_mm_for_euclid_dist")
            if own:
                here = torch.arange(start, start + len(distance))
                distance[here[:, None] == ids] = torch.inf
            least, at = distance.min(1)
            closer = least < found[rows]
            found[rows] = torch.where(closer, least, found[rows])
            which[rows] = torch.where(closer, ids[at], which[rows])
    return Nearest(found, which)


def copies(
    images: Tensor, data: RealData, extractor: Extractor, *, unseen: RealData | None = None, batch: int = 512
) -> Copies:
    """Whether generated pictures lie nearer to the training pictures than pictures that were never trained on.

    Args:
        images: (N, C, H, W) in [-1, 1], generated.
        data: what the generator was trained on.
        extractor: what distances are taken in; with "pixel" those are Euclidean distances of pixels.
        unseen: real pictures that it was not trained on. Without them each training picture is compared with all
            others, which is fair where they hold no near-duplicates.
        batch: pictures at a time.

    Raises:
        InputError: no pictures on a side, or pictures that the extractor refuses.
    """
    if not len(images) or (unseen is not None and not len(unseen)):
        raise InputError("copies need at least 1 generated and 1 unseen picture: give more pictures")
    made = torch.cat([extractor(part).cpu() for part in images.split(batch)])
    generated = nearest(made, data, extractor, batch=batch)
    other = data if unseen is None else unseen
    real = torch.cat([extractor(_images(other, ids)).cpu() for ids in torch.arange(len(other)).split(batch)])
    held = nearest(real, data, extractor, batch=batch, own=unseen is None)
    nearer = _share_below(generated.distance, held.distance)
    n, m = len(made), len(real)
    near = (generated.distance < held.distance.quantile(NEAR)).double().mean().item()
    z = (nearer - 0.5) * (12 * n * m / (n + m + 1)) ** 0.5
    return Copies(nearer, z, near, generated, held, unseen is None)


def _share_below(first: Tensor, second: Tensor) -> float:
    """The probability that a value of ``first`` is below one of ``second``; ties count half."""
    ranked = second.sort().values
    below = len(second) - torch.searchsorted(ranked, first, right=True)
    ties = torch.searchsorted(ranked, first, right=True) - torch.searchsorted(ranked, first)
    return float((below + 0.5 * ties).double().mean() / len(second))


def _images(data: RealData, ids: Tensor) -> Tensor:
    images = data.take(ids).x
    if images is None:
        raise InputError(f"data {data.name!r} has no pictures to compare with: choose other data")
    return images


class Diversity(NamedTuple):
    """The mean distance of two pictures, its standard error, and over how many pairs; 0 where all are one picture."""

    value: float
    error: float
    pairs: int


def diversity(
    images: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
    *,
    labels: Tensor | None = None,
    batch: int = 64,
) -> Diversity:
    """The mean perceptual distance between two different generated pictures, of one class where there are labels.

    Neighbours in the order given make a pair, so that pictures of independent seeds are compared and none twice.

    Args:
        images: (N, C, H, W) in [-1, 1].
        distance: of two batches, (B,): LPIPS (arXiv 1801.03924), as ``fewstep.loss.perceptual`` gives it.
        labels: (N,) classes; pairs are made within each.
        batch: pairs at a time.

    Raises:
        InputError: no two pictures to compare, or labels that do not fit.
    """
    if labels is not None and labels.shape != (len(images),):
        raise InputError(f"{tuple(labels.shape)} labels for {len(images)} pictures, expected one for each")
    order = torch.arange(len(images)) if labels is None else labels.cpu().argsort(stable=True)
    first, second = order[:-1], order[1:]
    if labels is None:
        first, second = first[::2], second[::2]
    else:
        kinds = labels.cpu()[order]
        place = torch.arange(len(order)) - torch.searchsorted(kinds, kinds)
        use = (kinds[:-1] == kinds[1:]) & (place[:-1] % 2 == 0)
        first, second = first[use], second[use]
    if not len(first):
        raise InputError(f"diversity of {len(images)} pictures, expected two to compare: give more pictures")
    with torch.no_grad():
        parts = [
            distance(images[a], images[b]).double().cpu()
            for a, b in zip(first.split(batch), second.split(batch), strict=True)
        ]
    values = torch.cat(parts)
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Diversity(float(values.mean()), error, len(values))
