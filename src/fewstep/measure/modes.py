"""Modes and labels: what a classifier sees in the pictures.

Mode coverage on stacked digits follows the stacked-MNIST test of Metz et al. 2017 (arXiv:1611.02163) and Srivastava et
al. 2017 (arXiv:1705.07761): three digits, one per channel, make 1000 modes, and a collapsed generator misses many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.measure.features import Classifier

NOTHING = torch.empty(0, dtype=torch.int64)


class ModeCoverage(NamedTuple):
    """``modes``: how many were hit at least once. ``kl``: divergence of the histogram from the reference, nats."""

    modes: int
    kl: float


def classes(images: Tensor, extractor: Classifier, batch: int = 512) -> Tensor:
    """The class (B,) int64 of each picture; stacked digits a, b, c in the channels are class 100 a + 10 b + c.

    Args:
        images: (B, C, H, W) in [-1, 1].
        extractor: the classifier.
        batch: pictures at a time.
    """
    return torch.cat([classes_of(extractor.classify(part)) for part in images.split(batch)] or [NOTHING])


def classes_of(scores: Tensor) -> Tensor:
    """The class (B,) int64 of each picture from a classifier's scores (B, 10) or (B, channels, 10)."""
    found = scores.argmax(-1).cpu()
    digits = found[:, None] if found.ndim == 1 else found
    return (digits * 10 ** torch.arange(digits.shape[1] - 1, -1, -1)).sum(1)


def histogram(found: Tensor, extractor: Classifier) -> Tensor:
    """How often each of the classifier's classes (10 per channel, so 10^channels) occurs in ``found`` (B,)."""
    return torch.bincount(found, minlength=10**extractor.channels)


def coverage_of(counts: Tensor, reference: Tensor | None = None) -> ModeCoverage:
    """Modes hit and divergence, from histograms.

    Args:
        counts: (M,) how often each mode was generated.
        reference: (M,) how often it occurs in the real data, smoothed by half a count per mode so that a mode which the
            data happen to lack costs a finite amount; None is the uniform distribution.

    Returns:
        The number of modes hit, and KL(generated | reference) in nats: 0 when equal, log(M) when one of M equal modes
        takes everything. Both depend on the number of samples: N draws from M equal modes hit M (1 - exp(-N / M)).

    Raises:
        InputError: no samples, or histograms of different length.
    """
    if counts.sum() < 1:
        raise InputError("mode coverage of 0 samples, expected at least 1: give more pictures")
    if reference is not None and reference.shape != counts.shape:
        raise InputError(
            f"histograms of {len(counts)} and {len(reference)} modes, expected the same: use one extractor for both"
        )
    share = counts.double() / counts.sum()
    prior = torch.ones_like(share) if reference is None else reference.double() + 0.5
    divergence = torch.special.xlogy(share, share / (prior / prior.sum())).sum()
    return ModeCoverage(int((counts > 0).sum()), divergence.item())


def mode_coverage(images: Tensor, extractor: Classifier, reference: Tensor | None = None) -> ModeCoverage:
    """Modes hit by ``images`` (B, C, H, W) in [-1, 1], and divergence from ``reference`` (see :func:`coverage_of`)."""
    return coverage_of(histogram(classes(images, extractor), extractor), reference)


def check_labels(labels: Tensor, count: int, extractor: Classifier) -> Tensor:
    """``labels`` as int64 on the CPU.

    Raises:
        InputError: another number than ``count``, not whole numbers, or outside the classifier's classes.
    """
    labels = torch.as_tensor(labels).detach().cpu()
    if labels.shape != (count,) or labels.is_floating_point():
        raise InputError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} for {count} images, "
            f"expected ({count},) whole numbers: give one class per image"
        )
    last = 10**extractor.channels - 1
    if count and not 0 <= int(labels.min()) <= int(labels.max()) <= last:
        raise InputError(
            f"labels from {int(labels.min())} to {int(labels.max())}, expected 0 to {last}: "
            f"give the class each image was asked for, and no labels for unconditional images"
        )
    return labels.long()


def label_accuracy(images: Tensor, labels: Tensor, extractor: Classifier) -> float:
    """Share of conditional samples in which the classifier sees the class that was asked for, 0 to 1.

    Args:
        images: (B, C, H, W) in [-1, 1].
        labels: (B,) classes: 0 to 9, or 100 a + 10 b + c for stacked digits.
        extractor: the classifier.

    Raises:
        InputError: no images, or labels that do not fit them.
    """
    if len(images) == 0:
        raise InputError("label accuracy of 0 images, expected at least 1: give more pictures")
    wanted = check_labels(labels, len(images), extractor)
    return (classes(images, extractor) == wanted).double().mean().item()
