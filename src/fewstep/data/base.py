"""What training and evaluation read: pictures in [-1, 1], found by integer ids, and the account of what was loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.errors import InputError

NAMES_SHOWN = 3
STD_SAMPLE = 2048


@dataclass(frozen=True)
class LoadReport:
    """How many images were accepted, and the names of the others by reason.

    ``str(report)`` is one line such as ``97 images accepted, 3 rejected (2 not an image: a.txt, b.txt; 1 truncated:
    c.png)``.
    """

    accepted: int
    rejected: dict[str, list[str]] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        """Number of rejected images, over all reasons."""
        return sum(len(names) for names in self.rejected.values())

    def __str__(self) -> str:
        text = f"{self.accepted} image{'' if self.accepted == 1 else 's'} accepted"
        return f"{text}, {self.refused} rejected ({self.reasons()})" if self.refused else text

    def reasons(self) -> str:
        """The rejected names by reason, commonest reason first, with at most three names each."""
        ranked = sorted(self.rejected.items(), key=lambda item: (-len(item[1]), item[0]))
        return "; ".join(f"{len(names)} {reason}: {shortened(names)}" for reason, names in ranked if names)

    def require(self, where: str) -> LoadReport:
        """The report itself.

        Raises:
            InputError: no image was accepted; the message names ``where`` and the reasons.
        """
        if self.accepted:
            return self
        found = f"{self.refused} rejected ({self.reasons()})" if self.refused else "it holds no files"
        raise InputError(f"{where}: 0 images accepted, {found}; expected at least one png, jpg, webp, bmp or gif image")


def shortened(names: Sequence[str], most: int = NAMES_SHOWN) -> str:
    """The names joined by commas, cut after ``most`` of them with the number left out."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


class Data(Protocol):
    """A set of pictures.

    ``take`` is a pure function of the ids (same ids, same pictures; any order, any thread, any batch size), so a
    training loop may fetch ahead in a thread and a resumed run sees the same pictures.
    """

    @property
    def name(self) -> str:
        """A short name for logs and reports."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every picture."""

    @property
    def classes(self) -> int:
        """Number of classes; 0 when the pictures have no labels."""

    @property
    def frequencies(self) -> list[float]:
        """The share of each class, summing to 1; empty when the pictures have no labels."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a sha256 over the content: equal content, equal fingerprint, on every machine."""

    @property
    def std(self) -> float:
        """Root mean square deviation of the pixels from their mean, in units of [-1, 1]: the data's sigma_data."""

    @property
    def report(self) -> LoadReport:
        """What was accepted and rejected on loading."""

    def __len__(self) -> int: ...

    def take(self, ids: Tensor) -> Batch:
        """The pictures ``ids`` (B,) int64 as x float32 (B, C, H, W) in [-1, 1], with cond {"label": (B,) int64} or {}.

        Raises:
            InputError: ids that are not one-dimensional int64 or lie outside 0 .. len - 1.
        """


class Images:
    """Pictures held in memory.

    Args:
        name: a short name for logs.
        pixels: (N, C, H, W), uint8 (shown as pixels / scale - 1) or float32 already in [-1, 1].
        labels: (N,) integers in 0 .. classes - 1, or None.
        scale: half the largest pixel value of a uint8 array.
        classes: number of classes; by default the largest label plus one.
        class_names: one name per class, or empty.
        report: what loading accepted and rejected.

    Raises:
        InputError: pixels that are not four-dimensional or not uint8 or float32, labels that do not fit.
    """

    def __init__(
        self,
        name: str,
        pixels: Tensor,
        labels: Tensor | None = None,
        *,
        scale: float = 127.5,
        classes: int | None = None,
        class_names: Sequence[str] = (),
        report: LoadReport | None = None,
    ) -> None:
        if pixels.ndim != 4 or not len(pixels) or pixels.dtype not in (torch.uint8, torch.float32):
            raise InputError(
                f"data {name!r}: pixels are {tuple(pixels.shape)} {pixels.dtype}, expected (N, C, H, W) with N > 0, "
                "uint8 or float32"
            )
        self.name = name
        self.pixels = pixels.contiguous()
        self.scale = scale
        self.labels = None if labels is None else labels.long()
        self.class_names = list(class_names)
        self.classes = count_classes(name, len(pixels), self.labels, classes)
        self.report = report or LoadReport(len(pixels))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, c, h, w = self.pixels.shape
        return c, h, w

    @cached_property
    def frequencies(self) -> list[float]:
        """The share of each class; empty without labels."""
        return shares(self.labels, self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over shape, scale, pixels and labels."""
        parts = [self.pixels] if self.labels is None else [self.pixels, self.labels]
        scale = self.scale if self.pixels.dtype == torch.uint8 else None
        return fingerprint([tuple(self.pixels.shape), scale, self.classes], (p.numpy().data for p in parts))

    @cached_property
    def std(self) -> float:
        """Root mean square deviation of the pixels from their mean, in units of [-1, 1]."""
        return deviation(self)

    def subset(self, limit: int | None) -> Images:
        """At most ``limit`` of the pictures, evenly spaced; all for None. Raises InputError for a limit below 1."""
        ids = spaced(len(self), limit)
        if len(ids) == len(self):
            return self
        return Images(
            self.name,
            self.pixels[ids],
            None if self.labels is None else self.labels[ids],
            scale=self.scale,
            classes=self.classes,
            class_names=self.class_names,
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, ids: Tensor) -> Batch:
        """The pictures ``ids`` (B,): x float32 (B, C, H, W) in [-1, 1]. Raises InputError for ids out of range."""
        check_ids(self.name, ids, len(self))
        x = unit(self.pixels[ids], self.scale)
        return Batch(x, {} if self.labels is None else {"label": self.labels[ids]})


def unit(pixels: Tensor, scale: float = 127.5) -> Tensor:
    """uint8 pixels as float32 in [-1, 1], ``pixels / scale - 1``; float32 pixels unchanged."""
    return pixels.float().div_(scale).sub_(1) if pixels.dtype == torch.uint8 else pixels


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raises InputError unless ``ids`` is a one-dimensional int64 tensor on the CPU with values in 0 .. size - 1."""
    if ids.ndim != 1 or ids.dtype != torch.int64 or ids.device.type != "cpu":
        raise InputError(
            f"data {name!r}: ids are {tuple(ids.shape)} {ids.dtype} on {ids.device}, expected a one-dimensional int64 "
            "tensor on the CPU"
        )
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise InputError(f"data {name!r}: id {int(outside[0])} does not exist, expected 0 to {size - 1}")


def count_classes(name: str, size: int, labels: Tensor | None, classes: int | None = None) -> int:
    """The number of classes of ``labels``: ``classes`` if given, else the largest label plus one; 0 without labels.

    Raises:
        InputError: labels that are not (size,) or lie outside 0 .. classes - 1.
    """
    if labels is None:
        return 0
    if tuple(labels.shape) != (size,):
        raise InputError(f"data {name!r}: labels are {tuple(labels.shape)}, expected ({size},), one for each image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        last = "" if classes is None else f" to {classes - 1}"
        raise InputError(f"data {name!r}: labels lie in {low} .. {high}, expected integers from 0{last}")
    return high + 1 if classes is None else classes


def shares(labels: Tensor | None, classes: int) -> list[float]:
    """The share of each class 0 .. classes - 1 among ``labels``; empty without labels."""
    if labels is None:
        return []
    return (torch.bincount(labels, minlength=classes).double() / len(labels)).tolist()


def fingerprint(header: Sequence[Any], parts: Iterable[bytes | memoryview]) -> str:
    """16 hex digits of the sha256 over a JSON-able header and then raw bytes."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def spaced(total: int, most: int | None) -> list[int]:
    """At most ``most`` of the indices 0 .. total - 1, evenly spaced so that sorted classes all stay represented.

    Raises:
        InputError: ``most`` is below 1.
    """
    if most is not None and most < 1:
        raise InputError(f"limit {most} is not possible, expected at least 1 image, or None for all")
    count = total if most is None else min(most, total)
    return [i * total // count for i in range(count)]


def deviation(data: Data, most: int = STD_SAMPLE) -> float:
    """Root mean square deviation of the pixels from their mean, over at most ``most`` evenly spaced pictures."""
    count, total, square = 0, 0.0, 0.0
    for ids in torch.tensor(spaced(len(data), most)).split(256):
        x = data.take(ids).x
        if x is None:
            raise InputError(f"data {data.name!r} holds no pictures, so it has no pixel deviation")
        wide = x.double()
        count, total, square = count + wide.numel(), total + float(wide.sum()), square + float(wide.square().sum())
    mean = total / count
    return max(square / count - mean * mean, 0.0) ** 0.5
