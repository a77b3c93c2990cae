"""Kernel distance: unbiased squared maximum mean discrepancy (KID; Binkowski et al. 2018, arXiv:1801.01401)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import InputError

BLOCK = 512


def _kernel_sum(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the polynomial kernel (x.y / dim + 1)^3 over all pairs, a block of pairs at a time."""
    total = torch.zeros((), dtype=left.dtype)
    for rows in left.split(BLOCK):
        for columns in right.split(BLOCK):
            value = (rows @ columns.T).div_(left.shape[1]).add_(1)
            total += (value * value * value).sum()
    return total


def _diagonal_sum(features: Tensor) -> Tensor:
    return ((features.square().sum(1) / features.shape[1] + 1) ** 3).sum()


def _mmd2(generated: Tensor, reference: Tensor) -> Tensor:
    n, m = len(generated), len(reference)
    within_generated = (_kernel_sum(generated, generated) - _diagonal_sum(generated)) / (n * (n - 1))
    within_reference = (_kernel_sum(reference, reference) - _diagonal_sum(reference)) / (m * (m - 1))
    return within_generated + within_reference - 2 * _kernel_sum(generated, reference) / (n * m)


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
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise InputError(
            f"KID of features {tuple(generated.shape)} and {tuple(reference.shape)}, expected (N, dim) and (M, dim): "
            f"use one extractor for both"
        )
    smallest, largest = sorted((len(generated), len(reference)))
    if smallest < 2:
        raise InputError(f"KID of {smallest} samples on a side, expected at least 2: give more pictures")
    generated, reference = generated.cpu().double(), reference.cpu().double()
    if subset_size is None or largest <= subset_size:
        return _mmd2(generated, reference).item()
    if not 2 <= subset_size <= smallest or subsets < 1:
        raise InputError(
            f"KID of {subsets} subsets of {subset_size} samples, expected at least 1 of 2 to {smallest} samples: "
            f"choose a smaller subset_size or None"
        )
    draw = torch.Generator().manual_seed(seed)
    values = [
        _mmd2(
            generated[torch.randperm(len(generated), generator=draw)[:subset_size]],
            reference[torch.randperm(len(reference), generator=draw)[:subset_size]],
        )
        for _ in range(subsets)
    ]
    return torch.stack(values).mean().item()
