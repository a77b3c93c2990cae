"""Divergences of samples from a Gaussian mixture that is known exactly, by quadrature in one or two dimensions.

A generator's law is known by its draws alone. Its density, smoothed by a Gaussian kernel, is their kernel density
estimate without any bias; a smoothed mixture is again a mixture. So both laws are smoothed alike, and the divergences
of the smoothed laws, which are finite wherever the draws lie, are integrated on a grid.

Of N draws the estimate of either Kullback-Leibler divergence is too large: for K separate modes of variance v and a
bandwidth h by about ``K (1 + v / h^2)^d / 2 N``, which is 0.0002 nats for a ring of eight modes of deviation 0.05 with
h = 0.04 and N = 200,000, and 0.0011 (0.0005 measured) with h = 0.02. The forward one is also too large where the known
law has mass and the draws have hardly any, because the tails of few draws are not smooth. Smoothing makes divergences
smaller; take h below the modes' own deviation.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.exact import Mixture
from fewstep.errors import InputError

# Cells per bandwidth, how many deviations around what there is the grid spans, and most cells along an axis.
FINENESS, REACH, MOST = 2, 6.0, 4096


class Divergences(NamedTuple):
    """In nats, 0 for equal laws, of the samples' law p and the known law q.

    Attributes:
        reverse_kl: ``KL(p | q)``, large where there are samples and the law has none: mass between modes.
        forward_kl: ``KL(q | (1 - floor) p + floor q)``, large where the law has modes and there are no samples; at most
            ``-ln floor``.
        jensen_shannon: between 0 and ln 2.
    """

    reverse_kl: float
    forward_kl: float
    jensen_shannon: float


class ModeShares(NamedTuple):
    """Where samples lie among the components of a mixture.

    Attributes:
        shares: of the samples, for each component: those within ``reach`` standard deviations of it and of none nearer.
        modes: components whose share is a tenth of their weight or more.
        between: share of the samples that are within reach of no component. The law's own, for well separated ones in
            two dimensions, is exp(-reach^2 / 2): 0.011 for 3.
    """

    shares: tuple[float, ...]
    modes: int
    between: float


def divergences(samples: Tensor, law: Mixture, *, bandwidth: float, floor: float = 1e-6) -> Divergences:
    """Reverse and forward Kullback-Leibler and Jensen-Shannon divergence of ``samples`` (N, ...) from ``law``.

    Args:
        samples: of the law's shape, which has one or two values.
        law: what they are compared with.
        bandwidth: standard deviation of the kernel that both laws are smoothed by.
        floor: share of the known law that is mixed to the samples' in the forward divergence. Draws say nothing of
            densities far below 1 / N of the law's, and a missing mode would cost what the kernel's tail happens to be;
            with it a missing mode costs its weight times ``-ln floor``.

    Raises:
        InputError: samples of another shape, none, or not finite, a law of more than two values, a bandwidth not above
            0 or so small that the grid would have more than 4096 cells along an axis, or a floor outside (0, 1).
    """
    points = checked(samples, law)
    if not 0 < bandwidth < math.inf or not 0 < floor < 1:
        raise InputError(f"divergences need bandwidth > 0 and 0 < floor < 1, got {bandwidth} and {floor}")
    axes = axes_of(points, law, bandwidth)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    log_q = log_density(law, places.flatten(0, -2), bandwidth).reshape(places.shape[:-1])
    return integrated(smoothed(points, axes, bandwidth), log_q, math.prod(float(a[1] - a[0]) for a in axes), floor)


def integrated(p: Tensor, log_q: Tensor, cell: float, floor: float = 1e-6) -> Divergences:
    """The divergences of a density ``p`` from ``exp(log_q)``, both on one even grid with cells of volume ``cell``."""
    q = log_q.exp()
    middle, mixed = (p + q) / 2, (1 - floor) * p + floor * q
    # The logarithm is exact where the density itself is too small for a float.
    reverse = torch.special.xlogy(p, p) - p * log_q
    # Where the law is below what floats hold, it has no part in the integral.
    forward = torch.where(mixed > 0, q * (log_q - mixed.clamp_min(1e-300).log()), 0.0)
    halves = torch.special.xlogy(p, p) + torch.special.xlogy(q, q) - 2 * torch.special.xlogy(middle, middle)
    reverse_kl, forward_kl, js = (float(part.sum()) * cell for part in (reverse, forward, halves / 2))
    return Divergences(reverse_kl, forward_kl, js)


def log_density(law: Mixture, points: Tensor, bandwidth: float = 0.0) -> Tensor:
    """(N,) float64: the logarithm of the density of ``law`` at ``points`` (N, d), smoothed by ``bandwidth``."""
    means, variances = law.means.flatten(1), law.variances.flatten(1) + bandwidth**2
    log_scale = law.log_weights - 0.5 * (2 * math.pi * variances).log().sum(1)
    # A block of points at a time: the table of points and components is never whole.
    return torch.cat(
        [
            (log_scale - 0.5 * ((part[:, None] - means) ** 2 / variances).sum(2)).logsumexp(1)
            for part in points.double().split(1 << 16)
        ]
    )


def smoothed(points: Tensor, axes: list[Tensor], bandwidth: float) -> Tensor:
    """The kernel density estimate of ``points`` (N, d) on the grid of ``axes``, each even, with Gaussian kernels.

    A point is shared out among the nodes around it in proportion to its nearness, which keeps its place and spreads it
    by a sixth of the width of a cell squared, on the average. The kernel is narrower by that much (as in Sheppard's
    correction); what is left is of the fourth order of the width.
    """
    sizes = [len(axis) for axis in axes]
    found = torch.zeros(math.prod(sizes), dtype=torch.float64)
    steps = torch.stack([axis[1] - axis[0] for axis in axes])
    place = (points - torch.stack([axis[0] for axis in axes])) / steps
    below = place.floor()
    share = place - below
    for corner in itertools.product((0, 1), repeat=len(axes)):
        index = torch.zeros(len(points), dtype=torch.int64)
        weight = torch.ones(len(points), dtype=torch.float64)
        for value, upper in enumerate(corner):
            index = index * sizes[value] + below[:, value].long() + upper
            weight = weight * (share[:, value] if upper else 1 - share[:, value])
        found += torch.bincount(index, weight, minlength=len(found))
    found = found.reshape(sizes) / len(points)
    for value, axis in enumerate(axes):
        variance = bandwidth**2 - float(axis[1] - axis[0]) ** 2 / 6
        gap = (axis[:, None] - axis) ** 2
        kernel = (-gap / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)
        found = torch.tensordot(found, kernel, dims=([value], [1])).movedim(-1, value)
    return found


def axes_of(points: Tensor, law: Mixture, bandwidth: float) -> list[Tensor]:
    """An even axis for each value, float64, that spans law and points.

    Raises:
        InputError: one with more than 4096 cells.
    """
    means, deviation = law.means.flatten(1), (law.variances.flatten(1) + bandwidth**2).sqrt()
    low = torch.minimum((means - REACH * deviation).amin(0), points.amin(0) - REACH * bandwidth)
    high = torch.maximum((means + REACH * deviation).amax(0), points.amax(0) + REACH * bandwidth)
    counts = ((high - low) / bandwidth * FINENESS).ceil().long() + 1
    if int(counts.max()) > MOST:
        raise InputError(
            f"samples and law span {float((high - low).max()):.4g}, which at bandwidth {bandwidth:g} takes "
            f"{int(counts.max())} cells, at most {MOST}: take a larger bandwidth, or leave out samples far away"
        )
    step = bandwidth / FINENESS
    return [a + step * torch.arange(int(n), dtype=torch.float64) for a, n in zip(low, counts, strict=True)]


def mode_shares(samples: Tensor, law: Mixture, *, reach: float = 3.0) -> ModeShares:
    """Which components of ``law`` the ``samples`` (N, ...) lie at, and how many lie at none.

    Distances are in standard deviations of each component, value by value.

    Raises:
        InputError: samples of another shape, none or not finite, or a reach not above 0.
    """
    points = checked(samples, law, most=None)
    if not 0 < reach < math.inf:
        raise InputError(f"mode shares need reach > 0 standard deviations, got {reach}")
    deviations, means = law.variances.flatten(1).sqrt(), law.means.flatten(1)
    gap, nearest = torch.stack([((points - m) / s).norm(dim=1) for m, s in zip(means, deviations, strict=True)]).min(0)
    inside = gap < reach
    shares = torch.bincount(nearest[inside], minlength=len(means)).double() / len(points)
    modes = int((shares >= 0.1 * law.log_weights.exp()).sum())
    return ModeShares(tuple(shares.tolist()), modes, float(1 - inside.double().mean()))


def checked(samples: Tensor, law: Mixture, *, most: int | None = 2) -> Tensor:
    """The samples (N, d) float64 on the CPU.

    Raises:
        InputError: they do not fit the law, or the law has more than ``most`` values.
    """
    values = math.prod(law.shape)
    if most is not None and values > most:
        raise InputError(f"the law has {values} values, and quadrature takes at most {most}: use mode_shares, or fd")
    if samples.ndim < 2 or not len(samples) or samples[0].numel() != values:
        raise InputError(f"samples are {tuple(samples.shape)}, expected (N, ...) of {values} values with N > 0")
    points = samples.detach().cpu().double().reshape(len(samples), values)
    wrong = (~points.isfinite().all(1)).nonzero()
    if len(wrong):
        raise InputError(f"{len(wrong)} of {len(points)} samples are not finite, the first is number {int(wrong[0])}")
    return points
