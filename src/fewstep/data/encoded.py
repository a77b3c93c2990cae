"""Pictures that stay encoded (files of a folder, rows of a Parquet file) until they are taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import BinaryIO

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.data.base import LoadReport, check_ids, count_classes, deviation, fingerprint, shares, unit
from fewstep.data.pixels import Filter, Fit, Found, decode, inspect
from fewstep.errors import InputError

CACHE_BYTES = 2**30
WORKERS = min(4, os.cpu_count() or 1)
CHUNK = 256


@dataclass
class Source:
    """Encoded images before they are checked: one name, one opener and perhaps one label each.

    Args:
        name: of the data set, for messages.
        names: of the images.
        open: gives the encoded bytes of image i as a seekable file.
        labels: one class number for each image, -1 for one that has none; or None for an unlabelled set.
        class_names: one name per class; empty without labels.
        refused: names rejected before any image was opened, by reason.
    """

    name: str
    names: Sequence[str]
    open: Callable[[int], BinaryIO]
    labels: Sequence[int] | None
    class_names: Sequence[str]
    refused: dict[str, list[str]]


class Encoded:
    """Pictures decoded when they are taken, and then kept in memory if all of them fit.

    Everything is looked at once on construction, so that sizes, colours and rejected images are known before training.

    Args:
        source: the encoded images.
        resize: side of the square pictures in pixels; None keeps the size, which must then be the same for all.
        centre_crop: cut the centred square out before resizing; otherwise pictures are stretched.
        channels: 1 or 3; by default 1 if all pictures are grey and 3 otherwise.
        filter: "box" (area average) or "lanczos"; by default box when every picture's side is a whole multiple of
            ``resize``, lanczos otherwise. The choice is the same for all pictures and is kept as ``filter``.
        cache_bytes: decoded pictures are kept when all of them need at most this many bytes.

    Raises:
        InputError: no image accepted, different sizes without ``resize``, a value of resize or channels that is not
            possible.
    """

    def __init__(
        self,
        source: Source,
        *,
        resize: int | None = None,
        centre_crop: bool = True,
        channels: int | None = None,
        filter: Filter | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        check_options(source.name, resize, channels)
        found = survey(source)
        self.report = LoadReport(sum(not f.reason for f in found), gather(source, found)).require(source.name)
        self.name = source.name
        self._source = source
        self._rows = [i for i, f in enumerate(found) if not f.reason]
        kept = [found[i] for i in self._rows]
        self.names = [source.names[i] for i in self._rows]
        if resize is None:
            same_size(self.name, self.names, kept)
        self.filter: Filter | None = None if resize is None else filter or choose_filter(kept, resize, centre_crop)
        width, height = (kept[0].width, kept[0].height) if resize is None else (resize, resize)
        self._fit = Fit(channels or (1 if all(f.grey for f in kept) else 3), resize, centre_crop, self.filter or "box")
        self.shape = (self._fit.channels, height, width)
        self.labels = None if source.labels is None else torch.tensor([source.labels[i] for i in self._rows])
        self.class_names = list(source.class_names)
        self.classes = count_classes(self.name, len(self), self.labels, len(self.class_names))
        self.fingerprint = fingerprint(
            [astuple(self._fit), None if self.labels is None else self.labels.tolist()], (f.digest for f in kept)
        )
        wanted = len(self) * self._fit.channels * height * width
        self._cache = torch.empty(len(self), *self.shape, dtype=torch.uint8) if wanted <= cache_bytes else None
        self._cached = torch.zeros(len(self), dtype=torch.bool)

    @cached_property
    def frequencies(self) -> list[float]:
        """The share of each class; empty without labels."""
        return shares(self.labels, self.classes)

    @cached_property
    def std(self) -> float:
        """Root mean square deviation of the pixels from their mean, in [-1, 1] units, over at most 2048 pictures."""
        return deviation(self)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, ids: Tensor) -> Batch:
        """The pictures ``ids`` (B,): x float32 (B, C, H, W) in [-1, 1].

        Raises:
            InputError: ids out of range, or an image that was removed or damaged since it was checked.
        """
        check_ids(self.name, ids, len(self))
        pixels = self._decode(ids) if self._cache is None else self._remember(self._cache, ids)
        return Batch(unit(pixels), {} if self.labels is None else {"label": self.labels[ids]})

    def _remember(self, cache: Tensor, ids: Tensor) -> Tensor:
        """The pictures ``ids`` out of the cache, after the missing ones were decoded into it."""
        missing = ids[~self._cached[ids]].unique()
        if len(missing):
            cache[missing] = self._decode(missing)
            # set last: another thread may read between the two lines, and must then decode for itself
            self._cached[missing] = True
        return cache[ids]

    def _decode(self, ids: Tensor) -> Tensor:
        """The pictures ``ids`` as uint8 (B, C, H, W), decoded by a few threads."""
        wanted = ids.tolist()
        if not wanted:
            return torch.empty(0, *self.shape, dtype=torch.uint8)
        if len(wanted) < 2 * WORKERS:
            return torch.stack([self._one(i) for i in wanted])
        with ThreadPoolExecutor(WORKERS) as pool:
            return torch.stack(list(pool.map(self._one, wanted)))

    def _one(self, index: int) -> Tensor:
        try:
            with self._source.open(self._rows[index]) as file:
                pixels = decode(file, self._fit)
        # decoders answer damaged bytes with many types of exception: OSError, SyntaxError, struct.error, ValueError
        except Exception as error:
            raise InputError(
                f"{self.name}: {self.names[index]} can no longer be decoded ({error}): restore or remove it"
            ) from error
        if tuple(pixels.shape) != self.shape:
            raise InputError(
                f"{self.name}: {self.names[index]} is {tuple(pixels.shape)}, but was {self.shape} when it was checked: "
                "restore or remove it"
            )
        return pixels


def check_options(name: str, resize: int | None, channels: int | None) -> None:
    """Raises InputError for a resize below 1 or for channels other than 1 and 3."""
    if resize is not None and resize < 1:
        raise InputError(f"{name}: resize {resize} is not possible, expected a side in pixels of at least 1")
    if channels not in (None, 1, 3):
        raise InputError(f"{name}: channels {channels} is not possible, expected 1 (grey) or 3 (RGB)")


def survey(source: Source) -> list[Found]:
    """Looks at every image of a source, in order, with a few threads."""

    def look(index: int) -> Found:
        if source.labels is not None and not 0 <= source.labels[index] < len(source.class_names):
            return Found(reason="label missing or out of range")
        try:
            with source.open(index) as file:
                return inspect(file)
        except OSError:
            return Found(reason="unreadable")

    def part(start: int) -> list[Found]:
        return [look(i) for i in range(start, min(start + CHUNK, len(source.names)))]

    with ThreadPoolExecutor(WORKERS) as pool:
        return [found for some in pool.map(part, range(0, len(source.names), CHUNK)) for found in some]


def gather(source: Source, found: Sequence[Found]) -> dict[str, list[str]]:
    """The names of all rejected images by reason, with those the source had rejected already."""
    rejected = {reason: list(names) for reason, names in source.refused.items() if names}
    for name, one in zip(source.names, found, strict=True):
        if one.reason:
            rejected.setdefault(one.reason, []).append(name)
    return rejected


def same_size(name: str, names: Sequence[str], kept: Sequence[Found]) -> None:
    """Raises InputError, naming two pictures, unless all have one size."""
    first = kept[0]
    for other, one in zip(names, kept, strict=True):
        if (one.width, one.height) != (first.width, first.height):
            raise InputError(
                f"{name}: images have different sizes ({names[0]} is {first.width}x{first.height}, {other} is "
                f"{one.width}x{one.height}), expected one size: pass --resize N to crop and resize all to NxN"
            )


def choose_filter(kept: Sequence[Found], resize: int, centre_crop: bool) -> Filter:
    """Box, there the plain area average, if every side is a whole multiple of ``resize``; lanczos otherwise."""
    sides = ((min(f.width, f.height),) * 2 if centre_crop else (f.width, f.height) for f in kept)
    return "box" if all(w % resize == 0 and h % resize == 0 for w, h in sides) else "lanczos"
