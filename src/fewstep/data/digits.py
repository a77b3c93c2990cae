"""Two data sets that need no download: scikit-learn's 8x8 digits, and three of them stacked as colour channels."""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.data.base import Images, LoadReport, check_ids, deviation, fingerprint, shares
from fewstep.errors import InputError

SCALE = 8.0


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    # scikit-learn is slow to import, and only these two data sets need it
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.from_numpy(raw.images.astype(np.uint8))[:, None], torch.from_numpy(raw.target.astype(np.int64))


def digits(limit: int | None = None) -> Images:
    """The 1797 handwritten digits of scikit-learn: (1, 8, 8), pixel values 0..16 mapped to [-1, 1], ten classes.

    Args:
        limit: at most this many, evenly spaced; None is all.

    Raises:
        InputError: a limit below 1.
    """
    pixels, labels = _digits()
    whole = Images("digits", pixels, labels, scale=SCALE, classes=10, class_names=[str(i) for i in range(10)])
    return whole.subset(limit)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 on uint64: every input bit moves every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class StackedDigits:
    """Three independent digits as the channels of a (3, 8, 8) picture: 1000 modes, to see which ones a student lost.

    A picture's id and the seed choose its digits through an integer hash, so any id can be made without the others.

    Args:
        size: number of pictures, at least 1.
        seed: another seed gives other pictures for the same ids.
        labelled: True gives the three-digit number 0..999 as the condition "label".

    Raises:
        InputError: a size below 1.
    """

    def __init__(self, size: int = 50_000, seed: int = 0, labelled: bool = False) -> None:
        if size < 1:
            raise InputError(f"stacked-digits: size {size} is not possible, expected at least 1")
        self.name = "stacked-digits"
        self.shape = (3, 8, 8)
        self.size, self.seed, self.labelled = size, seed, labelled
        self.classes = 1000 if labelled else 0
        self.class_names = [f"{i:03d}" for i in range(1000)] if labelled else []
        self.report = LoadReport(size)

    def _triples(self, ids: Tensor) -> Tensor:
        """(B, 3) indices into the digits."""
        check_ids(self.name, ids, self.size)
        key = _mix(np.array([self.seed % 2**64], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        word = ids.numpy().astype(np.uint64)[:, None] * np.uint64(3) + np.arange(3, dtype=np.uint64)
        count = np.uint64(len(_digits()[0]))
        return torch.from_numpy((_mix(_mix(word + key) ^ key) % count).astype(np.int64))

    def modes(self, ids: Tensor) -> Tensor:
        """The numbers 0..999 that the pictures ``ids`` (B,) show, channel 0 as the hundreds: (B,) int64.

        Raises:
            InputError: ids out of range.
        """
        figures = _digits()[1][self._triples(ids)]
        return figures @ torch.tensor([100, 10, 1])

    @cached_property
    def frequencies(self) -> list[float]:
        """The share of each of the 1000 modes; empty when not labelled."""
        return shares(self.modes(torch.arange(self.size)), 1000) if self.labelled else []

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over size, seed, labelling and the digits themselves."""
        return fingerprint([self.name, self.size, self.seed, self.labelled], (p.numpy().data for p in _digits()))

    @cached_property
    def std(self) -> float:
        """Root mean square deviation of the pixels from their mean, in units of [-1, 1]."""
        return deviation(self)

    def __len__(self) -> int:
        return self.size

    def take(self, ids: Tensor) -> Batch:
        """The pictures ``ids`` (B,): x float32 (B, 3, 8, 8) in [-1, 1]. Raises InputError for ids out of range."""
        pixels, figures = _digits()
        triples = self._triples(ids)
        x = pixels[triples, 0].float().div_(SCALE).sub_(1)
        return Batch(x, {"label": figures[triples] @ torch.tensor([100, 10, 1])} if self.labelled else {})


def stacked_digits(
    size: int = 50_000, seed: int = 0, labelled: bool = False, *, limit: int | None = None
) -> StackedDigits:
    """Three random digits as the channels of a (3, 8, 8) picture, 1000 modes; see `StackedDigits`.

    Args:
        size: number of pictures, at least 1.
        seed: another seed gives other pictures for the same ids.
        labelled: True gives the three-digit number 0..999 as the condition "label".
        limit: at most this many of the ``size`` pictures; None is all.

    Raises:
        InputError: a size or limit below 1.
    """
    return StackedDigits(size if limit is None else min(size, limit), seed, labelled)
