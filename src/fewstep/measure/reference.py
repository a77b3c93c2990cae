"""The real data's side of a comparison, computed once per data set and extractor and kept in a file."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.errors import InputError
from fewstep.measure.features import Classifier, Extractor
from fewstep.measure.files import cache_folder, read_npz, write_npz
from fewstep.measure.frechet import Moments
from fewstep.measure.modes import classes_of
from fewstep.measure.stream import of_data

FORMAT = 1
KEEP = 10_000


class RealData(Protocol):
    """What a comparison needs to know of a data set; every data set of this library fits."""

    @property
    def name(self) -> str:
        """A short name."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every picture."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content."""

    def __len__(self) -> int: ...

    def take(self, ids: Tensor) -> Batch:
        """The pictures ``ids`` (B,) int64: x (B, C, H, W) in [-1, 1]."""


def cache_path(data: RealData, extractor: Extractor, *, keep: int = KEEP, cache: str | Path | None = None) -> Path:
    """The reference file of ``data`` under ``extractor``: named by a hash of both contents."""
    key = f"{FORMAT} {data.fingerprint} {len(data)} {extractor.fingerprint} {min(keep, len(data))}"
    return cache_folder(cache) / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


@dataclass(frozen=True)
class Reference:
    """Everything the metrics need about the real pictures under one extractor.

    Attributes:
        moments: count, mean and covariance of the features.
        features: (M, dim) float32 of M evenly spaced pictures, or None when only the moments were asked for.
        classes: (N,) int64, the class the extractor sees in each picture, or None when it is not a classifier.
    """

    moments: Moments
    features: Tensor | None
    classes: Tensor | None

    @classmethod
    def of(
        cls,
        data: RealData,
        extractor: Extractor,
        *,
        keep: int = KEEP,
        batch: int = 512,
        cache: str | Path | None = None,
    ) -> Reference:
        """The reference of ``data``, read from the cache or computed and written there.

        A cache file that cannot be read is computed again, with a warning.

        Args:
            data: the real pictures.
            extractor: what turns them into features.
            keep: how many pictures' features are kept too, evenly spaced over the data, as KID, precision and recall
                need; their cost grows with its square. 0 keeps none. The moments and classes are those of all pictures.
            batch: pictures at a time.
            cache: the folder of cache files; see :func:`cache_folder`.

        Raises:
            InputError: fewer than two pictures, features that are not finite, or a cache folder that cannot be written.
        """
        path = cache_path(data, extractor, keep=keep, cache=cache)
        # A file with features serves those who need none, too.
        larger = cache_path(data, extractor, cache=cache)
        for place in (path, larger) if not keep else (path,):
            if place.exists():
                try:
                    return cls._read(place, extractor, len(data), keep)
                except InputError as error:
                    warnings.warn(f"reference of {data.name!r} is computed again: {error}", stacklevel=2)
        reference = cls._compute(data, extractor, keep, batch)
        reference._write(path)
        return reference

    @classmethod
    def _compute(cls, data: RealData, extractor: Extractor, keep: int, batch: int) -> Reference:
        if len(data) < 2:
            raise InputError(
                f"data {data.name!r} has {len(data)} pictures, expected at least 2: give more real pictures"
            )
        moments, found, filled = Moments(extractor.dim), [], 0
        chosen = _spaced(len(data), keep)
        features = torch.empty(len(chosen), extractor.dim)
        for images in of_data(data, batch):
            part, scores = seen(extractor, images)
            last = int(torch.searchsorted(chosen, moments.n + len(part)))
            features[filled:last] = part[chosen[filled:last] - moments.n]
            moments.update(part)
            filled = last
            if scores is not None:
                found.append(classes_of(scores))
        return cls(moments, features if keep else None, torch.cat(found) if found else None)

    def _write(self, path: Path) -> None:
        over, extra = self.moments.n - 1, {"features": self.features, "classes": self.classes}
        body = {"mu": self.moments.mean.numpy(), "n": np.array(self.moments.n)}
        body |= {k: v.numpy() for k, v in extra.items() if v is not None}
        # In place, because a matrix of 2048 features is 34 MB; a file that is read gives these same numbers.
        covariance = self.moments.scatter.div_(over)
        try:
            write_npz(path, body | {"sigma": covariance.numpy()})
        finally:
            covariance.mul_(over)

    @classmethod
    def _read(cls, path: Path, extractor: Extractor, count: int, keep: int) -> Reference:
        data = read_npz(path)
        moments = Moments.from_arrays(data, str(path))
        expected: dict[str, tuple[type, tuple[int, ...]]] = (
            {"features": (np.float32, (min(keep, count), extractor.dim))} if keep else {}
        )
        if isinstance(extractor, Classifier):
            expected["classes"] = (np.int64, (count,))
        fits = all(
            k in data and data[k].dtype == kind and data[k].shape == shape for k, (kind, shape) in expected.items()
        )
        if moments.n != count or moments.dim != extractor.dim or not fits:
            raise InputError(f"{path} does not hold {count} pictures of {extractor.dim} features: delete it")
        return cls(moments, *(torch.from_numpy(data[k]) if k in expected else None for k in ("features", "classes")))


def seen(extractor: Extractor, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features (B, dim) on the CPU, and the scores of a classifier, by one pass of its network where it can."""
    if not isinstance(extractor, Classifier):
        return extractor(images).cpu(), None
    both = getattr(extractor, "seen", None)
    features, scores = both(images) if both is not None else (extractor(images), extractor.classify(images))
    return features.cpu(), scores.cpu()


def _spaced(total: int, most: int) -> Tensor:
    """At most ``most`` of 0 .. total - 1, evenly spaced, so that data sorted by class stay represented."""
    count = min(most, total)
    return torch.arange(count) * total // max(count, 1)
