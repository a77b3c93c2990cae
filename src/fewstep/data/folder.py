"""A folder of image files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fewstep.data.base import spaced
from fewstep.data.encoded import CACHE_BYTES, Encoded, Source
from fewstep.data.pixels import SUFFIXES, Filter
from fewstep.errors import InputError


def folder(
    path: str | Path,
    resize: int | None = None,
    centre_crop: bool = True,
    labels: Literal["folders", "none"] = "folders",
    *,
    channels: int | None = None,
    filter: Filter | None = None,
    limit: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Encoded:
    """The png, jpg, jpeg, webp, bmp and gif (first frame) images in a folder and its sub-folders.

    Files are sorted by their path. Hidden files and folders are not looked at; every other file that is not an image
    is counted in ``report``. Upper-case suffixes such as ``.JPEG`` count too.

    Args:
        path: the folder.
        resize: side of the square pictures in pixels; None keeps the size, which must then be the same for all.
        centre_crop: cut the centred square out before resizing; False stretches instead.
        labels: "folders" makes the top sub-folders the classes if there are two or more of them, in the order of their
            names (of their numbers, if all are numbers); "none" makes the set unlabelled.
        channels: 1 or 3; by default 1 if all pictures are grey and 3 otherwise.
        filter: "box" or "lanczos"; by default box if all sides are whole multiples of ``resize``.
        limit: look at no more than this many images, evenly spaced over the sorted list; None is all.
        cache_bytes: decoded pictures are kept in memory when all of them need at most this many bytes.

    Raises:
        InputError: no such folder, no image accepted, different sizes without ``resize``, images both inside and
            outside of sub-folders with labels="folders".
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder, expected a folder of images")
    if labels not in ("folders", "none"):
        raise InputError(f"labels {labels!r} is not possible, expected 'folders' or 'none'")
    files = sorted(walk(root), key=lambda f: f.relative_to(root).as_posix())
    images = [f.relative_to(root) for f in files if f.suffix.lower() in SUFFIXES]
    others = [f.relative_to(root).as_posix() for f in files if f.suffix.lower() not in SUFFIXES]
    classes = class_folders(root, images) if labels == "folders" else []
    chosen = [images[i] for i in spaced(len(images), limit)]
    number = {name: i for i, name in enumerate(classes)}
    source = Source(
        name=root.resolve().name,
        names=[image.as_posix() for image in chosen],
        open=lambda i: (root / chosen[i]).open("rb"),
        labels=[number[image.parts[0]] for image in chosen] if classes else None,
        class_names=classes,
        refused={"not an image": others},
    )
    return Encoded(
        source,
        resize=resize,
        centre_crop=centre_crop,
        channels=channels,
        filter=filter,
        cache_bytes=cache_bytes,
    )


def walk(root: Path) -> Iterator[Path]:
    """All files below ``root`` that are not hidden, links followed, no folder entered twice."""
    entered = {root.resolve()}
    for here, folders, files in os.walk(root, followlinks=True):
        fresh = [f for f in sorted(folders) if not f.startswith(".") and (Path(here) / f).resolve() not in entered]
        entered.update((Path(here) / f).resolve() for f in fresh)
        folders[:] = fresh
        yield from (Path(here) / f for f in files if not f.startswith("."))


def class_folders(root: Path, images: list[Path]) -> list[str]:
    """The top sub-folders that hold images, in class order; empty if there are fewer than two.

    Raises:
        InputError: there are images beside the sub-folders.
    """
    names = {image.parts[0] for image in images if len(image.parts) > 1}
    loose = [image for image in images if len(image.parts) == 1]
    if len(names) < 2:
        return []
    if loose:
        raise InputError(
            f"{root}: {len(loose)} images (such as {loose[0]}) lie beside the {len(names)} class folders, expected all "
            "inside: move them, or pass labels='none'"
        )
    return sorted(names, key=lambda n: (int(n), n)) if all(name.isdecimal() for name in names) else sorted(names)
