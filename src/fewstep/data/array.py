"""Pictures in a NumPy file: ``.npy``, or ``.npz`` with labels beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fewstep.data.base import Images, shortened
from fewstep.errors import InputError

IMAGE_KEYS = ("images", "x", "data", "samples", "arr_0")
LABEL_KEYS = ("labels", "label", "y", "arr_1")


def array(path: str | Path, *, limit: int | None = None) -> Images:
    """Pictures of a ``.npy`` or ``.npz`` file.

    An ``.npz`` holds the pictures as ``images`` (or x, data, samples, arr_0) and, if there are any, integer labels as
    ``labels`` (or label, y, arr_1). Nothing in the file is executed.

    Args:
        path: the file. Its array is (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; uint8 in 0..255, or floats
            in [-1, 1].
        limit: at most this many pictures, evenly spaced; None is all.

    Raises:
        InputError: a file that cannot be read, a shape or type that is not one of these, NaN or infinity (with the
            indices), floats outside [-1, 1] or all in [0, 1], labels that do not fit.
    """
    path = Path(path)
    pixels, labels = _read(path)
    pixels = _channels_first(path, pixels)
    if pixels.dtype != np.uint8:
        pixels = _checked(path, pixels)
    numbers = None
    if labels is not None:
        if labels.dtype.kind not in "iu":
            raise InputError(f"{path}: labels are {labels.dtype}, expected integers from 0")
        numbers = torch.from_numpy(labels.astype(np.int64))
    return Images(path.stem, torch.from_numpy(np.ascontiguousarray(pixels)), numbers).subset(limit)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The pictures and the labels of a file, as stored."""
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            return stored, None
        with stored:
            arrays = {name: stored[name] for name in stored.files if name in IMAGE_KEYS + LABEL_KEYS}
            names = stored.files
    # a damaged file makes NumPy raise many types: EOFError, zipfile.BadZipFile, ValueError, OSError
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a readable NumPy file ({reason}), expected a uint8 or float array without Python objects"
        ) from error
    images = next((key for key in IMAGE_KEYS if key in arrays), None)
    if images is None:
        raise InputError(f"{path}: holds the arrays {', '.join(names) or 'none'}, expected one named {IMAGE_KEYS[0]!r}")
    labels = next((key for key in LABEL_KEYS if key in arrays), None)
    return arrays[images], None if labels is None else arrays[labels]


def _channels_first(path: Path, pixels: np.ndarray) -> np.ndarray:
    """The pictures as (N, C, H, W)."""
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise InputError(f"{path}: the array is {pixels.dtype}, expected uint8 in 0..255 or floats in [-1, 1]")
    if pixels.ndim == 3 and pixels.size:
        return pixels[:, None]
    first, last = (pixels.ndim == 4 and pixels.shape[axis] in (1, 3) for axis in (1, 3))
    if not pixels.size or first == last:
        what = "could be (N, C, H, W) and (N, H, W, C)" if first and last else "is neither of these"
        raise InputError(
            f"{path}: the array is {pixels.shape}, expected (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; "
            f"it {what}"
        )
    return pixels if first else pixels.transpose(0, 3, 1, 2)


def _checked(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Float pictures as float32, after a look at every value."""
    bad = np.flatnonzero(~np.isfinite(pixels).all(axis=(1, 2, 3)))
    if len(bad):
        where = shortened([str(i) for i in bad], 8)
        raise InputError(
            f"{path}: {len(bad)} of {len(pixels)} images hold NaN or infinity (indices {where}), expected finite "
            "values: remove them"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if low < -1 or high > 1 or low >= 0:
        raise InputError(
            f"{path}: float values lie in [{low:.4g}, {high:.4g}], expected [-1, 1] with some below 0: rescale them, "
            "or store uint8 in 0..255"
        )
    return pixels.astype(np.float32)
