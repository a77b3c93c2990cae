"""Frechet distance between two sets of features, from their first two moments (Heusel et al. 2017, arXiv:1706.08500).

Statistics are float64 throughout and merge by Chan, Golub and LeVeque's pairwise update (1979), so that the value does
not depend on batch size, batch order or number of processes. Float32 sums, as some tools keep, change published scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import InputError
from fewstep.measure.files import read_npz, write_npz

# Of the jack-knife: few enough to be cheap, many enough for an error good to a quarter of itself.
BLOCKS = 10


def require_finite(features: Tensor) -> None:
    """Raises InputError, naming rows, unless all of ``features`` (B, dim) are finite."""
    if not features.isfinite().all():
        bad = (~features.isfinite()).any(1).nonzero().flatten()[:5].tolist()
        raise InputError(
            f"features of samples {bad} of this batch are not finite, expected numbers: look for NaN in pictures"
        )


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
        wide = features.detach().to("cpu", torch.float64, copy=True)
        require_finite(wide)
        if len(wide) == 0:
            return self
        # In place, because a scatter matrix of 2048 features is 34 MB.
        mean = wide.mean(0)
        wide -= mean
        self._shift(mean, len(wide))
        self.scatter.addmm_(wide.T, wide)
        return self

    def _shift(self, mean: Tensor, count: int) -> None:
        """Takes in the number and mean of further samples; their own scatter is not in it yet."""
        total, step = self.n + count, mean - self.mean
        self.scatter.addr_(step, step, alpha=self.n * count / total)
        self.mean = self.mean + step * (count / total)
        self.n = total

    def merge(self, other: Moments) -> Moments:
        """Takes in the samples that ``other`` has seen. Returns itself.

        Raises:
            InputError: ``other`` has another number of features.
        """
        if other.dim != self.dim:
            raise InputError(
                f"cannot merge moments of {other.dim} features into moments of {self.dim}: use one extractor for both"
            )
        if other.n:
            self._shift(other.mean, other.n)
            self.scatter += other.scatter
        return self

    def without(self, part: Tensor) -> Moments:
        """The moments as if the samples with features ``part`` (B, dim) had not been seen.

        Raises:
            InputError: as many samples as have been seen, or more.
        """
        if len(part) >= self.n:
            raise InputError(f"cannot take {len(part)} samples out of {self.n}: give fewer")
        left, out = Moments(self.dim), Moments.of(part)
        left.n = self.n - out.n
        left.mean = (self.mean * self.n - out.mean * out.n) / left.n
        step = out.mean - left.mean
        left.scatter = (self.scatter - out.scatter).addr_(step, step, alpha=-left.n * out.n / self.n)
        return left

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


class Target:
    """The real side of Frechet distances: mean, covariance, and a factor of the covariance, which is computed once.

    Args:
        mean: (dim,) float64.
        scatter: (dim, dim) float64, the covariance times ``over``; it is neither copied nor changed.
        over: 1 where ``scatter`` is the covariance itself.
    """

    def __init__(self, mean: Tensor, scatter: Tensor, over: int = 1) -> None:
        self.mean, self.scatter, self.over = mean, scatter, over
        self.trace = float(scatter.trace()) / over

    @classmethod
    def of(cls, moments: Moments) -> Target:
        """That of some moments. Raises InputError for fewer than two samples."""
        if moments.n < 2:
            raise InputError(f"Frechet distance of {moments.n} reference samples, expected at least 2: give more")
        return cls(moments.mean, moments.scatter, moments.n - 1)

    @cached_property
    def factor(self) -> Tensor:
        """(dim, dim): F with F F^T the covariance; eigenvalues below 0 are rounding and count as 0."""
        values, vectors = torch.linalg.eigh(self.scatter)
        # In place, because every matrix of 2048 features is 34 MB.
        return vectors.mul_(values.div_(self.over).clamp_(min=0).sqrt_())

    def distance(self, generated: Moments, *, normalise: bool = True) -> float:
        """See :func:`frechet`."""
        if generated.dim != len(self.mean):
            raise InputError(
                f"generated features have {generated.dim} dimensions and the reference {len(self.mean)}: "
                f"use one extractor for both"
            )
        if generated.n < 2:
            raise InputError(
                f"Frechet distance of {generated.n} generated samples, expected at least 2: give more pictures"
            )
        if normalise and self.trace <= 0:
            raise InputError(
                "reference features have variance 0, expected more: pass other pictures or normalise=False"
            )
        # The lower triangle is all that is read, so the product needs no symmetrising.
        product = (self.factor.T @ (generated.scatter @ self.factor)).div_(generated.n - 1)
        overlap = torch.linalg.eigvalsh(product).clamp_(min=0).sqrt_().sum()
        step = (generated.mean - self.mean).square().sum()
        trace = generated.scatter.trace() / (generated.n - 1)
        value = float((step + trace + self.trace - 2 * overlap).clamp(min=0))
        return 100 * value / self.trace if normalise else value


def frechet(generated: Moments, reference: Moments, *, normalise: bool = True) -> float:
    """Squared Frechet (2-Wasserstein) distance of the two Gaussians with these moments.

    ``|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))``. The last trace is taken from the eigenvalues of the
    symmetric matrix F^T S1 F with F F^T = S2, which has those of S1 S2 but stays real when a covariance is singular.

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
    return Target.of(reference).distance(generated, normalise=normalise)


def frechet_error(
    features: Tensor, moments: Moments, target: Target, *, blocks: int = BLOCKS, normalise: bool = True
) -> float:
    """The standard error of a Frechet distance by the jack-knife that leaves out one of ``blocks`` blocks at a time.

    Blocks of mergeable moments cost one distance each, where the bootstrap would cost hundreds. Only the scatter of the
    generated pictures is in it: the distance's bias by the sample count is not (see :func:`frechet_infinity`).

    Args:
        features: (n, dim) of all the samples of ``moments``; every ``blocks``-th makes a block.
        moments: their moments.
        target: the real side.
        blocks: how many; at least 2, and at most half the samples.
        normalise: see :func:`frechet`.

    Raises:
        InputError: too few samples for the blocks, or features of other samples.
    """
    if not 2 <= blocks <= len(features) // 2:
        raise InputError(f"{blocks} blocks of {len(features)} samples, expected 2 to {len(features) // 2} blocks")
    if len(features) != moments.n:
        raise InputError(f"{len(features)} features for moments of {moments.n} samples, expected as many")
    values = [target.distance(moments.without(features[start::blocks]), normalise=normalise) for start in range(blocks)]
    return jackknife(torch.tensor(values, dtype=torch.float64))


def jackknife(values: Tensor) -> float:
    """The standard error from a statistic's values (G,), each computed without one of G equal blocks."""
    return float(((len(values) - 1) * values.var(correction=0)).sqrt())


def frechet_infinity(
    features: Tensor, target: Target, *, points: int = 15, seed: int = 0, normalise: bool = True
) -> float:
    """The Frechet distance extrapolated to endlessly many generated samples (arXiv 1911.07023).

    A distance of N samples is too large by about a constant over N. It is computed for ``points`` random subsets, of a
    tenth of the samples to all of them, and the line through them over 1 / N is read at 0. The reference keeps its own
    count. The result may lie below 0 by chance.

    Args:
        features: (N, dim) of generated pictures.
        target: the real side.
        points: subsets, at least 3.
        seed: decides the subsets.
        normalise: see :func:`frechet`.

    Raises:
        InputError: fewer than 100 samples or 3 points.
    """
    if len(features) < 100 or points < 3:
        raise InputError(
            f"fd_infinity of {len(features)} samples and {points} points, expected at least 100 and 3: give more"
        )
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(len(features) / 10, len(features), points, dtype=torch.float64).long()
    values = [
        target.distance(
            Moments.of(features[part] for part in torch.randperm(len(features), generator=draw)[:size].split(512)),
            normalise=normalise,
        )
        for size in sizes.tolist()
    ]
    rows = torch.stack([torch.ones(points, dtype=torch.float64), 1 / sizes.double()], 1)
    return float(torch.linalg.lstsq(rows, torch.tensor(values, dtype=torch.float64)[:, None]).solution[0])
