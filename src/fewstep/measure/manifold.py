"""Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020,
arXiv:2002.09797): how much of the generated set looks real, and how much of the real set is reached.

A sample's ball reaches to its k-th nearest neighbour in its own set. Distances are computed a tile of pairs at a time,
so memory grows with neither set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.measure.frechet import jackknife
from fewstep.measure.kernel import rows_of


@dataclass(frozen=True)
class Manifold:
    """Who lies in whose ball.

    Attributes:
        k: the neighbour that decides the radii.
        balls: (N,) int64, real balls around each generated sample.
        reached: (M, G) bool, whether a real sample lies in a ball of one of the generated samples of each of G blocks.
        covered: (M, G) bool, whether a real sample's ball holds a generated one of each block.
    """

    k: int
    balls: Tensor
    reached: Tensor
    covered: Tensor

    @cached_property
    def values(self) -> dict[str, float]:
        """The four scores, see :func:`prdc`."""
        return {
            "precision": (self.balls > 0).double().mean().item(),
            "recall": self.reached.any(1).double().mean().item(),
            "density": self.balls.double().mean().item() / self.k,
            "coverage": self.covered.any(1).double().mean().item(),
        }

    @cached_property
    def errors(self) -> dict[str, float]:
        """Their standard errors over the generated samples, by the jack-knife; radii and real samples as they are.

        For precision and density, means over generated samples, leaving out one sample is meant; for recall and
        coverage a block.
        """
        n = len(self.balls)
        if n < 2:
            return dict.fromkeys(self.values, float("nan"))
        return {
            "precision": (self.balls > 0).double().std().item() / n**0.5,
            "recall": _without_blocks(self.reached),
            "density": self.balls.double().std().item() / self.k / n**0.5,
            "coverage": _without_blocks(self.covered),
        }


def _without_blocks(hit: Tensor) -> float:
    if hit.shape[1] < 2:
        return float("nan")
    others = hit.sum(1, keepdim=True) - hit.long()
    return jackknife((others > 0).double().mean(0))


def _radii(features: Tensor, centre: Tensor, k: int, block: int) -> Tensor:
    """Distance of each sample to its k-th neighbour among the others; a tile serves its rows and its columns."""
    nearest = torch.full((len(features), k), torch.inf, dtype=torch.float64)

    def offer(start: int, found: Tensor) -> None:
        own = slice(start, start + len(found))
        least = found.topk(min(k, found.shape[1]), largest=False).values
        nearest[own] = torch.cat([nearest[own], least], 1).topk(k, largest=False).values

    for top in range(0, len(features), block):
        rows = features[top : top + block].double() - centre
        for left in range(top, len(features), block):
            if left == top:
                offer(top, torch.cdist(rows, rows).fill_diagonal_(torch.inf))
                continue
            found = torch.cdist(rows, features[left : left + block].double() - centre)
            offer(top, found)
            offer(left, found.T)
    return nearest.amax(1)


def manifold(
    generated: Tensor, reference: Tensor, *, k: int = 5, block: int | None = None, groups: int = 1
) -> Manifold:
    """The neighbourhoods behind :func:`prdc`; ``groups`` blocks, of every so-manyth sample, for its errors.

    Raises:
        InputError: see :func:`prdc`.
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
    generated, reference = generated.cpu(), reference.cpu()
    block = rows_of(reference.shape[1]) if block is None else block
    # Distances do not change, but lose fewer digits near the origin. By blocks: a mean in float64 copies all it takes.
    centre = torch.stack([part.double().sum(0) for part in reference.split(block)]).sum(0) / len(reference)
    real_radii, fake_radii = (_radii(features, centre, k, block) for features in (reference, generated))
    balls = torch.zeros(len(generated), dtype=torch.int64)
    reached, covered = (torch.zeros(len(reference), groups, dtype=torch.bool) for _ in range(2))
    for top in range(0, len(reference), block):
        rows, own = reference[top : top + block].double() - centre, slice(top, top + block)
        for left in range(0, len(generated), block):
            there = slice(left, left + block)
            distance = torch.cdist(rows, generated[there].double() - centre)
            inside = distance < real_radii[own, None]
            balls[there] += inside.sum(0)
            reaching = distance < fake_radii[there]
            for group in range(groups):
                # Sample i is in group i % groups, wherever the tile begins.
                of = slice((group - left) % groups, None, groups)
                reached[own, group] |= reaching[:, of].any(1)
                covered[own, group] |= inside[:, of].any(1)
    return Manifold(k, balls, reached, covered)


def prdc(generated: Tensor, reference: Tensor, *, k: int = 5, block: int | None = None) -> dict[str, float]:
    """Precision, recall, density and coverage of generated features against real ones, in float64.

    Args:
        generated: (N, dim) features.
        reference: (M, dim) features.
        k: which neighbour decides the radius of a ball; 5 as in Naeem et al. (3 in Kynkaanniemi et al.).
        block: rows and columns of the distance matrix at a time; decides memory only. None takes fewer of many
            features.

    Returns:
        precision: share of generated samples inside some real ball, 0 to 1.
        recall: share of real samples inside some generated ball, 0 to 1.
        density: mean number of real balls around a generated sample, divided by k; near 1 for real data, may exceed 1.
        coverage: share of real samples whose ball holds a generated one, 0 to 1.

    Raises:
        InputError: k below 1, k samples or fewer on a side, or different features.
    """
    return manifold(generated, reference, k=k, block=block).values
