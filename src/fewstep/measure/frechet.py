"""Frechet distance between two sets of features, from their first two moments (Heusel et al. 2017, arXiv:1706.08500).

Statistics are float64 throughout and merge by Chan, Golub and LeVeque's pairwise update (1979), so that the value does
not depend on batch size, batch order or number of processes. Float32 sums, as some tools keep, change published scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import InputError
from fewstep.measure.files import read_npz, write_npz


class Moments:
    """Count, mean and scatter matrix of features seen so far, in float64 on the CPU.

    Args:
        dim: number of features per sample.

    Attributes:
        n: samples seen.
        mean: (dim,) their mean; zeros before the first sample.
        scatter: (dim, dim) sum over samples of the outer product of (feature - mean) with itself.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        """Number of features per sample."""
        return len(self.mean)

    @classmethod
    def of(cls, features: Tensor | Iterable[Tensor]) -> Moments:
        """The moments of features (N, dim), or of an iterable of such batches.

        Raises:
            InputError: no batch at all, or a batch that :meth:`update` refuses.
        """
        moments: Moments | None = None
        for batch in [features] if isinstance(features, Tensor) else features:
            moments = (cls(batch.shape[-1]) if moments is None else moments).update(batch)
        if moments is None:
            raise InputError("moments of no batches: expected at least one tensor of features (N, dim)")
        return moments

    def update(self, features: Tensor) -> Moments:
        """Takes in features (B, dim); B may be 0. Returns itself.

        Raises:
            InputError: another shape, or values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise InputError(
                f"features have shape {tuple(features.shape)}, expected (B, {self.dim}): "
                f"use one extractor for all pictures that are compared"
            )
        # To the CPU first: Apple's GPUs have no float64.
        wide = features.detach().cpu().double()
        if not wide.isfinite().all():
            bad = (~wide.isfinite()).any(1).nonzero().flatten()[:5].tolist()
            raise InputError(
                f"features of samples {bad} of this batch are not finite, expected numbers: look for NaN in pictures"
            )
        if len(wide) == 0:
            return self
        batch = Moments(self.dim)
        batch.n, batch.mean = len(wide), wide.mean(0)
        centred = wide - batch.mean
        batch.scatter = centred.T @ centred
        return self.merge(batch)

    def merge(self, other: Moments) -> Moments:
        """Takes in the samples that ``other`` has seen. Returns itself.

        Raises:
            InputError: ``other`` has another number of features.
        """
        if other.dim != self.dim:
            raise InputError(
                f"cannot merge moments of {other.dim} features into moments of {self.dim}: use one extractor for both"
            )
        total = self.n + other.n
        if total == 0:
            return self
        step = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.n * other.n / total)
        self.mean = self.mean + step * (other.n / total)
        self.n = total
        return self

    def all_reduce(self) -> Moments:
        """Joins the samples of all processes, so that each holds the same moments; nothing when there is one process.

        Returns itself. Call it once per evaluation: a second call would count every sample again.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        first = torch.cat([torch.tensor([float(self.n)], dtype=torch.float64), self.mean * self.n]).to(device)
        dist.all_reduce(first)
        first = first.cpu()
        total = round(first[0].item())
        if total == 0:
            return self
        mean = first[1:] / total
        step = self.mean - mean
        scatter = (self.scatter + torch.outer(step, step) * self.n).to(device)
        dist.all_reduce(scatter)
        self.n, self.mean, self.scatter = total, mean, scatter.cpu()
        return self

    def covariance(self) -> Tensor:
        """(dim, dim) unbiased covariance.

        Raises:
            InputError: fewer than two samples.
        """
        if self.n < 2:
            raise InputError(f"covariance of {self.n} samples, expected at least 2: give more pictures")
        return self.scatter / (self.n - 1)

    def save(self, path: str | Path) -> None:
        """Writes ``mu``, ``sigma`` (the covariance) and ``n`` as ``.npz``, the layout that other FID tools read.

        Raises:
            InputError: fewer than two samples.
        """
        write_npz(Path(path), self.arrays())

    def arrays(self) -> dict[str, np.ndarray]:
        """``mu`` (dim,), ``sigma`` (dim, dim) and ``n`` (), as :meth:`save` writes them."""
        return {"mu": self.mean.numpy(), "sigma": self.covariance().numpy(), "n": np.array(self.n)}

    @classmethod
    def load(cls, path: str | Path, n: int | None = None) -> Moments:
        """Reads what :meth:`save` wrote, or another tool's ``mu`` and ``sigma``.

        Args:
            path: the ``.npz`` file.
            n: the sample count, for files of other tools that do not state it.

        Raises:
            InputError: no such file, not an npz file, keys missing, shapes that do not fit, or no sample count.
        """
        data = read_npz(Path(path))
        if n is None and "n" not in data:
            raise InputError(f"{path} does not state its sample count: pass n=... (its keys: {sorted(data)})")
        return cls.from_arrays({**data, **({} if n is None else {"n": np.array(n)})}, str(path))

    @classmethod
    def from_arrays(cls, data: dict[str, np.ndarray], source: str) -> Moments:
        """Moments from ``mu``, ``sigma`` and ``n``; ``source`` names them in errors.

        Raises:
            InputError: keys missing, shapes that do not fit, values that are not finite, or fewer than two samples.
        """
        if missing := [key for key in ("mu", "sigma", "n") if key not in data]:
            raise InputError(
                f"{source} lacks {', '.join(missing)}, expected mu, sigma and n: write it with Moments.save"
            )
        mean, covariance = torch.from_numpy(data["mu"]).double(), torch.from_numpy(data["sigma"]).double()
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise InputError(
                f"{source} has mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, "
                f"expected (dim,) and (dim, dim): write it with Moments.save"
            )
        moments = cls(len(mean))
        moments.n, moments.mean = int(data["n"]), mean
        if moments.n < 2 or not (mean.isfinite().all() and covariance.isfinite().all()):
            raise InputError(
                f"{source} has n={moments.n} or values that are not finite, expected n >= 2: compute it again"
            )
        moments.scatter = covariance * (moments.n - 1)
        return moments


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(generated: Moments, reference: Moments, *, normalise: bool = True) -> float:
    """Squared Frechet (2-Wasserstein) distance of the two Gaussians with these moments.

    ``|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))``. The last trace is taken from the eigenvalues of the
    symmetric matrix S1^(1/2) S2 S1^(1/2), which has those of S1 S2 but stays real when a covariance is singular.

    Args:
        generated: moments of the generated pictures.
        reference: moments of the real ones.
        normalise: True scales by 100 / tr(S2): 100 is the distance of the real pictures from their own mean. False
            gives the plain value, as FID is published.

    Returns:
        The distance, at least 0. It falls as sample counts rise: compare only values of equal counts.

    Raises:
        InputError: fewer than two samples on a side, different features, or a reference without variance.
    """
    if generated.dim != reference.dim:
        raise InputError(
            f"generated features have {generated.dim} dimensions and the reference {reference.dim}: "
            f"use one extractor for both"
        )
    for side, moments in (("generated", generated), ("reference", reference)):
        if moments.n < 2:
            raise InputError(f"Frechet distance of {moments.n} {side} samples, expected at least 2: give more pictures")
    first, second = generated.covariance(), reference.covariance()
    root = _root(first)
    product = root @ second @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    step = (generated.mean - reference.mean).square().sum()
    value = (step + first.trace() + second.trace() - 2 * overlap).clamp(min=0)
    if not normalise:
        return value.item()
    if second.trace() <= 0:
        raise InputError("reference features have variance 0, expected more: pass other pictures or normalise=False")
    return (100 * value / second.trace()).item()
