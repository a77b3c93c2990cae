"""Kernel distances: squared maximum mean discrepancies, a tile of pairs at a time, in float64.

The polynomial kernel gives KID (Binkowski et al. 2018, arXiv 1801.01401), the Gaussian one of CLIP embeddings CMMD
(Jayasumana et al. 2024, arXiv 2401.09603).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.errors import InputError

# Of a tile of pairs: most rows, and most values of a side, which is held in float64.
BLOCK, VALUES = 512, 2**19
# Of CMMD: the kernel's deviation, for embeddings of length 1, and the factor that makes values readable.
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
Kernel = Callable[[Tensor, Tensor], Tensor]


class Discrepancy(NamedTuple):
    """A squared discrepancy and its standard error over the generated samples, the reference taken as it is."""

    value: float
    error: float


def polynomial(left: Tensor, right: Tensor) -> Tensor:
    """(n, m): ``(x.y / dim + 1)^3``."""
    value = (left @ right.T).div_(left.shape[1]).add_(1)
    return value * value * value


def gaussian(left: Tensor, right: Tensor) -> Tensor:
    """(n, m): ``exp(-|x - y|^2 / 2 sigma^2)`` with sigma = 10."""
    square = left.square().sum(1)[:, None] + right.square().sum(1) - 2 * left @ right.T
    return (square / (-2 * CMMD_SIGMA**2)).exp_()


def rows_of(dim: int) -> int:
    """How many rows of ``dim`` features a tile of pairs has on each side."""
    return min(BLOCK, max(64, VALUES // dim))


def _row_sums(left: Tensor, right: Tensor, kernel: Kernel) -> Tensor:
    """(n,) float64: for each row of ``left`` the sum of the kernel with all of ``right``."""
    total, block = torch.zeros(len(left), dtype=torch.float64), rows_of(left.shape[1])
    for start in range(0, len(left), block):
        rows = left[start : start + block].double()
        for columns in right.split(block):
            total[start : start + block] += kernel(rows, columns.double()).sum(1)
    return total


def _within(features: Tensor, kernel: Kernel) -> Tensor:
    """(n,) float64: for each sample the sum of the kernel with all others; a tile serves its rows and its columns."""
    total, block = torch.zeros(len(features), dtype=torch.float64), rows_of(features.shape[1])
    for top in range(0, len(features), block):
        rows = features[top : top + block].double()
        total[top : top + block] += kernel(rows, rows).fill_diagonal_(0).sum(1)
        for left in range(top + block, len(features), block):
            tile = kernel(rows, features[left : left + block].double())
            total[top : top + block] += tile.sum(1)
            total[left : left + block] += tile.sum(0)
    return total


def _unbiased(generated: Tensor, reference: Tensor, kernel: Kernel) -> Discrepancy:
    """The unbiased estimate, with the exact jack-knife that leaves out one generated sample at a time."""
    n, m = len(generated), len(reference)
    rows, across = _within(generated, kernel), _row_sums(generated, reference, kernel)
    real = _within(reference, kernel).sum() / (m * (m - 1))
    total, cross = rows.sum(), across.sum()
    value = total / (n * (n - 1)) + real - 2 * cross / (n * m)
    if n < 3:
        return Discrepancy(float(value), float("nan"))
    without = (total - 2 * rows) / ((n - 1) * (n - 2)) - 2 * (cross - across) / ((n - 1) * m)
    return Discrepancy(float(value), float(((n - 1) * without.var(correction=0)).sqrt()))


def discrepancy(generated: Tensor, reference: Tensor) -> Discrepancy:
    """:func:`kid` of all pairs with its standard error. See there for arguments and errors."""
    _check(generated, reference, "KID")
    return _unbiased(generated.cpu(), reference.cpu(), polynomial)


def cmmd(generated: Tensor, reference: Tensor) -> Discrepancy:
    """1000 times the squared discrepancy of embeddings of length 1 under a Gaussian kernel of deviation 10.

    The estimate is the published program's, with every sample paired with itself too (arXiv 2401.09603): at least 0,
    and too large by about ``1000 (1 - mean kernel) (1 / n + 1 / m)``.

    Args:
        generated: (N, dim) embeddings, as the CLIP extractor gives them.
        reference: (M, dim).

    Raises:
        InputError: fewer than two samples on a side, different features, or rows whose length is not 1.
    """
    _check(generated, reference, "CMMD")
    for side, features in (("generated", generated), ("reference", reference)):
        length = features[:BLOCK].double().norm(dim=1)
        if (length - 1).abs().max() > 1e-3:
            raise InputError(
                f"CMMD got {side} embeddings of length {float(length.min()):.3g} to {float(length.max()):.3g}, "
                f"expected 1: use the clip extractor"
            )
    generated, reference = generated.cpu(), reference.cpu()
    n, m = len(generated), len(reference)
    # The kernel of a sample with itself is 1.
    rows, across = _within(generated, gaussian) + 1, _row_sums(generated, reference, gaussian)
    real = (_within(reference, gaussian) + 1).sum() / m**2
    total, cross = rows.sum(), across.sum()
    value = total / n**2 + real - 2 * cross / (n * m)
    without = (total - 2 * rows + 1) / (n - 1) ** 2 - 2 * (cross - across) / ((n - 1) * m)
    error = ((n - 1) * without.var(correction=0)).sqrt()
    return Discrepancy(CMMD_SCALE * float(value), CMMD_SCALE * float(error))


def kid(
    generated: Tensor,
    reference: Tensor,
    *,
    subset_size: int | None = None,
    subsets: int = 100,
    seed: int = 0,
) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / dim + 1)^3, without bias, in float64.

    Unbiased means: its mean does not depend on the sample counts, and it may come out slightly negative.

    Args:
        generated: (N, dim) features.
        reference: (M, dim) features.
        subset_size: None uses all pairs at once, exact and free of chance. A number averages over random subsets of
            that size from each side, as the paper does to save time on large sets; all pairs are used when both sides
            are no larger than it.
        subsets: how many subsets.
        seed: decides the subsets.

    Returns:
        The plain value, not multiplied by 1000.

    Raises:
        InputError: fewer than two samples on a side, different features, or a subset size that does not fit.
    """
    smallest, largest = _check(generated, reference, "KID")
    generated, reference = generated.cpu(), reference.cpu()
    if subset_size is None or largest <= subset_size:
        return _unbiased(generated, reference, polynomial).value
    if not 2 <= subset_size <= smallest or subsets < 1:
        raise InputError(
            f"KID of {subsets} subsets of {subset_size} samples, expected at least 1 of 2 to {smallest} samples: "
            f"choose a smaller subset_size or None"
        )
    draw = torch.Generator().manual_seed(seed)
    values = [
        _unbiased(
            generated[torch.randperm(len(generated), generator=draw)[:subset_size]],
            reference[torch.randperm(len(reference), generator=draw)[:subset_size]],
            polynomial,
        ).value
        for _ in range(subsets)
    ]
    return sum(values) / subsets


def _check(generated: Tensor, reference: Tensor, name: str) -> tuple[int, int]:
    """The smaller and the larger count."""
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise InputError(
            f"{name} of features {tuple(generated.shape)} and {tuple(reference.shape)}, expected (N, dim) and "
            f"(M, dim): use one extractor for both"
        )
    smallest, largest = sorted((len(generated), len(reference)))
    if smallest < 2:
        raise InputError(f"{name} of {smallest} samples on a side, expected at least 2: give more pictures")
    return smallest, largest
