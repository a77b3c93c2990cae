"""The pictures that are measured, batch by batch: from tensors, iterables or a folder, checked before they count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.errors import InputError

RANGE = 1.5
Images = Tensor | Iterable[Tensor | Batch | tuple[Tensor, Tensor]]


class Part(NamedTuple):
    """A batch: pictures, the classes asked for or None, and the number of each picture among all."""

    images: Tensor
    labels: Tensor | None
    ids: Tensor


class Watched:
    """A folder or file whose change while it is read is noticed, by name, size and time of every file.

    Args:
        path: the folder or file.

    Raises:
        InputError: there is nothing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise InputError(f"{path} does not exist: expected a folder of pictures, or a file of them")
        self.before = self._listing()

    def check(self) -> None:
        """Raises InputError, naming a file, if anything is not as it was."""
        after = self._listing()
        changed = sorted(name for name in self.before.keys() | after.keys() if self.before.get(name) != after.get(name))
        if changed:
            name = changed[0]
            how = "appeared" if name not in self.before else "vanished" if name not in after else "was changed"
            raise InputError(
                f"{self.path} changed while it was read: {name} {how}"
                + (f", and {len(changed) - 1} more" if len(changed) > 1 else "")
                + ": measure again when nothing writes there"
            )

    def _listing(self) -> dict[str, tuple[int, int]]:
        from fewstep.data.folder import walk

        files = walk(self.path) if self.path.is_dir() else [self.path]
        found = {}
        for file in files:
            try:
                facts = file.stat()
            except OSError:
                continue
            found[file.relative_to(self.path.parent).as_posix()] = (facts.st_size, facts.st_mtime_ns)
        return found


def of_data(data: Any, batch: int) -> Iterator[Tensor]:
    """All pictures of a data set, in order."""
    for ids in torch.arange(len(data)).split(batch):
        images = data.take(ids).x
        if images is None:
            raise InputError(
                f"data {data.name!r} has no pictures, expected real ones to compare with: choose other data"
            )
        yield images


def parts_of(
    images: Images, labels: Tensor | None, ids: Tensor | None, shape: tuple[int, ...] | None, batch: int, stride: int
) -> Iterator[Part]:
    """Checked batches of at most ``batch`` pictures.

    Args:
        images: see :func:`fewstep.measure.evaluate`.
        labels: (N,) or None.
        ids: (N,) numbers of the pictures, or None for 0, 1, 2 and so on.
        shape: (C, H, W) that they must have; None is that of the first.
        batch: pictures at a time.
        stride: how much the numbers grow from picture to picture where ``ids`` is None.

    Raises:
        InputError: see :func:`fewstep.measure.evaluate`.
    """
    seen = 0
    first = 0 if stride == 1 else torch.distributed.get_rank()
    for item in [images] if isinstance(images, Tensor) else images:
        part, own = _unpack(item)
        if own is not None and labels is not None:
            raise InputError("labels came with the images and as labels=..., expected one of the two: leave one out")
        asked = own if labels is None else labels[seen : seen + len(part)]
        if asked is not None and len(asked) != len(part):
            given = len(asked) if labels is None else len(labels)
            raise InputError(
                f"{given} labels for {seen + len(part)} images, expected as many: give one class per image"
            )
        if ids is None:
            numbers = first + stride * torch.arange(seen, seen + len(part))
        else:
            numbers = ids[seen : seen + len(part)]
            if len(numbers) != len(part):
                raise InputError(f"{len(ids)} ids for {seen + len(part)} images, expected as many: give one per image")
        shape = tuple(part.shape[1:]) if shape is None else shape
        for start in range(0, len(part), batch):
            here = slice(start, start + batch)
            piece = part[here].detach()
            check(piece, shape, numbers[here])
            yield Part(piece, None if asked is None else asked[here], numbers[here])
        seen += len(part)
    for name, all_of in (("labels", labels), ("ids", ids)):
        if all_of is not None and len(all_of) != seen:
            raise InputError(f"{len(all_of)} {name} for {seen} images, expected as many: give one class per image")


def _unpack(item: object) -> tuple[Tensor, Tensor | None]:
    images, labels = item, None
    if isinstance(item, Batch):
        images, labels = item.x, item.cond.get("label")
    elif isinstance(item, tuple | list) and len(item) == 2:
        images, labels = item
    if not isinstance(images, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        raise InputError(
            f"images came as {type(images).__name__} (labels as {type(labels).__name__}), "
            f"expected tensors: convert with torch.from_numpy"
        )
    return images, labels


def check(images: Tensor, shape: tuple[int, ...], ids: Tensor) -> None:
    """Raises InputError unless ``images`` are pictures of ``shape`` in [-1, 1]; ``ids`` (B,) number them."""
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(shape):
        raise InputError(
            f"images have shape {tuple(images.shape)}, expected (N, {', '.join(map(str, shape))}) like the reference: "
            f"evaluate against the data that the generator was trained on"
        )
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}, expected float in [-1, 1]: convert with images / 127.5 - 1")
    flat = images.flatten(1)
    if len(bad := (~flat.isfinite()).any(1).nonzero().flatten().cpu()):
        raise InputError(
            f"{len(bad)} of images {int(ids[0])} to {int(ids[-1])} hold NaN or infinity, first at index "
            f"{', '.join(str(int(ids[i])) for i in bad[:5].tolist())}; expected numbers: mend the generator, or drop "
            f"them"
        )
    if len(bad := (flat.abs() > RANGE).any(1).nonzero().flatten().cpu()):
        value = flat[bad[0]].gather(0, flat[bad[0]].abs().argmax()[None]).item()
        raise InputError(
            f"image {int(ids[bad[0]])} has a pixel of {value:.4g}, expected -1 to 1 (at most {RANGE} beyond 0): "
            f"scale to [-1, 1] or clamp"
        )
