"""Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020,
arXiv:2002.09797): how much of the generated set looks real, and how much of the real set is reached.

A sample's ball reaches to its k-th nearest neighbour in its own set. Distances are computed a block of rows at a time,
so memory grows with the larger set, not with the product of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import InputError

BLOCK = 1024


def _radii(features: Tensor, k: int, block: int) -> Tensor:
    """Distance of each sample to its k-th neighbour among the others; itself is the nearest, hence k + 1."""
    return torch.cat(
        [torch.cdist(rows, features).topk(k + 1, largest=False).values[:, -1] for rows in features.split(block)]
    )


def prdc(generated: Tensor, reference: Tensor, *, k: int = 5, block: int = BLOCK) -> dict[str, float]:
    """Precision, recall, density and coverage of generated features against real ones, in float64.

    Args:
        generated: (N, dim) features.
        reference: (M, dim) features.
        k: which neighbour decides the radius of a ball; 5 as in Naeem et al. (3 in Kynkaanniemi et al.).
        block: rows of the distance matrix at a time; decides memory only.

    Returns:
        precision: share of generated samples inside some real ball, 0 to 1.
        recall: share of real samples inside some generated ball, 0 to 1.
        density: mean number of real balls around a generated sample, divided by k; near 1 for real data, may exceed 1.
        coverage: share of real samples whose ball holds a generated one, 0 to 1.

    Raises:
        InputError: k below 1, k samples or fewer on a side, or different features.
    """
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise InputError(
            f"precision and recall of features {tuple(generated.shape)} and {tuple(reference.shape)}, "
            f"expected (N, dim) and (M, dim): use one extractor for both"
        )
    if k < 1:
        raise InputError(f"k={k} neighbours, expected at least 1: use k=5")
    for side, features in (("generated", generated), ("reference", reference)):
        if len(features) < k + 1:
            raise InputError(
                f"precision and recall with k={k} of {len(features)} {side} samples, expected at least {k + 1}: "
                f"give more pictures or a smaller k"
            )
    # Distances do not change, but lose fewer digits near the origin.
    centre = reference.cpu().double().mean(0)
    generated, reference = generated.cpu().double() - centre, reference.cpu().double() - centre
    real_radii, fake_radii = _radii(reference, k, block), _radii(generated, k, block)
    balls = torch.zeros(len(generated), dtype=torch.int64)
    reached, covered = [], []
    for rows, radii in zip(reference.split(block), real_radii.split(block), strict=True):
        distance = torch.cdist(rows, generated)
        balls += (distance < radii[:, None]).sum(0)
        reached.append((distance < fake_radii).any(1))
        covered.append(distance.amin(1) < radii)
    return {
        "precision": (balls > 0).double().mean().item(),
        "recall": torch.cat(reached).double().mean().item(),
        "density": balls.double().mean().item() / k,
        "coverage": torch.cat(covered).double().mean().item(),
    }
