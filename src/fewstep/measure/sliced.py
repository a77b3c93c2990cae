"""Sliced Wasserstein distance: two clouds compared along random directions, where transport is sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import InputError

CHUNK = 32


def sliced_wasserstein(generated: Tensor, reference: Tensor, *, directions: int = 256, seed: int = 0) -> float:
    """The root of the mean over random directions of the squared Wasserstein-2 distance along each (Bonneel et al.
    2015, doi 10.1007/s10851-014-0506-3), exact for each direction, in float64 and in units of the features.

    Args:
        generated: (N, dim) features.
        reference: (M, dim) features; the counts may differ.
        directions: how many, uniform on the sphere; its own error is about ``1 / sqrt(2 directions)`` of the value.
        seed: decides them.

    Returns:
        At least 0. Like every Wasserstein distance of samples it falls as their counts rise.

    Raises:
        InputError: no samples, different features, or no directions.
    """
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise InputError(
            f"sliced distance of features {tuple(generated.shape)} and {tuple(reference.shape)}, expected (N, dim) "
            f"and (M, dim): use one extractor for both"
        )
    if not len(generated) or not len(reference) or directions < 1:
        raise InputError(
            f"sliced distance of {len(generated)} and {len(reference)} samples along {directions} directions, expected "
            f"at least 1 of each"
        )
    generated, reference = generated.cpu(), reference.cpu()
    draw = torch.Generator().manual_seed(seed)
    axes = torch.randn(directions, generated.shape[1], generator=draw, dtype=torch.float64)
    axes /= axes.norm(dim=1, keepdim=True)
    first, second, width = _steps(len(generated), len(reference))
    total = torch.zeros((), dtype=torch.float64)
    for some in axes.split(CHUNK):
        x, y = _sorted(generated, some)[:, first], _sorted(reference, some)[:, second]
        total += ((x - y).square() @ width).sum()
    return float((total / directions).sqrt())


def _sorted(features: Tensor, axes: Tensor) -> Tensor:
    """(directions, N): the places of the samples along each direction, in order."""
    return torch.cat([axes @ part.double().T for part in features.split(1024)], 1).sort(1).values


def _steps(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where both quantile functions are constant: the ranks in either set, and the width of each piece."""
    # In whole numbers of 1 / (n m), so that common edges are equal.
    edges = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    width = edges.diff(prepend=torch.zeros(1, dtype=edges.dtype))
    return (edges - 1) // m, (edges - 1) // n, width.double() / (n * m)
