"""Super-resolution: any data set with small versions of its own pictures as the condition ``image``."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fewstep.core.cond import Batch
from fewstep.core.noise import Noise, whole
from fewstep.data.base import Data, LoadReport, fingerprint
from fewstep.data.digits import digits
from fewstep.errors import InputError

IMAGE = "image"


def shrink(pictures: Tensor, factor: int) -> Tensor:
    """``pictures`` (B, C, H, W), each ``factor`` x ``factor`` block of pixels replaced by its mean."""
    return F.avg_pool2d(pictures, factor)


class SuperResolution:
    """Pictures with the condition ``image`` (B, C, H / factor, W / factor): the mean of every block of pixels.

    Args:
        data: the pictures.
        factor: by how much each side shrinks; it must divide both.
        noise: standard deviation of the white noise that is put on the small pictures, keyed by (seed, id), in units of
            [-1, 1]. They are not clamped after it.
        seed: of that noise.
        labelled: whether the condition keeps ``label`` where the data have labels.

    Raises:
        InputError: a factor below 2 or one that does not divide the sides, negative noise, or labels that are not
            there.
    """

    def __init__(
        self, data: Data, factor: int = 2, *, noise: float = 0.0, seed: int = 0, labelled: bool = False
    ) -> None:
        factor = whole("factor", factor)
        channels, height, width = data.shape
        if factor < 2 or height % factor or width % factor:
            raise InputError(
                f"data {data.name!r} of {height}x{width} cannot shrink by the factor {factor}: expected a whole number "
                "of at least 2 that divides both sides"
            )
        if not 0 <= noise < math.inf:
            raise InputError(f"the noise on small pictures must be finite and >= 0, got {noise!r}")
        if labelled and not data.classes:
            raise InputError(f"data {data.name!r} has no labels to keep: leave labelled out")
        self.data, self.factor, self.noise, self.seed, self.labelled = data, factor, float(noise), seed, labelled
        self.name = f"sr-{data.name}"
        self.shape = (channels, height, width)
        self.image_shape = (channels, height // factor, width // factor)
        self.classes = data.classes if labelled else 0
        self.class_names = list(getattr(data, "class_names", ())) if labelled else []

    @property
    def frequencies(self) -> list[float]:
        """The share of each class; empty unless labelled."""
        return list(self.data.frequencies) if self.labelled else []

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the pictures and how they are made small."""
        return fingerprint([self.data.fingerprint, self.options()], ())

    @property
    def std(self) -> float:
        """That of the pictures."""
        return self.data.std

    @property
    def report(self) -> LoadReport:
        """That of the pictures."""
        return self.data.report

    def options(self) -> dict[str, Any]:
        """JSON-able: what makes this of ``data``."""
        return {"factor": self.factor, "noise": self.noise, "seed": self.seed, "labelled": self.labelled}

    def __len__(self) -> int:
        return len(self.data)

    def take(self, ids: Tensor) -> Batch:
        """The pictures ``ids`` (B,) and their small versions. Raises InputError for ids out of range."""
        batch = self.data.take(ids)
        if batch.x is None:
            raise InputError(f"data {self.data.name!r} holds no pictures to shrink")
        small = shrink(batch.x, self.factor)
        if self.noise:
            small = small + self.noise * Noise.of(self.seed, ids).normal(self.image_shape, "shrunk")
        kept = {"label": batch.cond["label"]} if self.labelled else {}
        return Batch(batch.x, {IMAGE: small, **kept})


def sr_digits(limit: int | None = None) -> SuperResolution:
    """The 8x8 digits with the condition ``image`` (B, 1, 4, 4), without labels.

    Args:
        limit: at most this many, evenly spaced; None is all.

    Raises:
        InputError: a limit below 1.
    """
    return SuperResolution(digits(limit))
