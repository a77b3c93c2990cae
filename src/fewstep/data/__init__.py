"""Data sets: pictures in [-1, 1] taken by integer ids. One file per source; `load_data` finds the right one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fewstep.data.array import array
from fewstep.data.base import Data, Images, LoadReport
from fewstep.data.digits import StackedDigits, digits, stacked_digits
from fewstep.data.encoded import Encoded
from fewstep.data.folder import folder, walk
from fewstep.data.pairs import FILE as PAIRS_FILE
from fewstep.data.pairs import OnlinePairs, Pairs, make_pairs, require_pairs
from fewstep.data.parquet import parquet
from fewstep.data.pixels import SUFFIXES
from fewstep.data.sr import SuperResolution, sr_digits
from fewstep.errors import InputError, unknown

__all__ = [
    "DATASETS",
    "Data",
    "Encoded",
    "Images",
    "LoadReport",
    "OnlinePairs",
    "Pairs",
    "StackedDigits",
    "SuperResolution",
    "array",
    "digits",
    "folder",
    "load_data",
    "make_pairs",
    "parquet",
    "require_pairs",
    "sr_digits",
    "stacked_digits",
]

# each takes ``limit``, the largest number of pictures, or None
DATASETS: dict[str, Callable[..., Data]] = {"digits": digits, "stacked-digits": stacked_digits, "sr-digits": sr_digits}

PATHS = "a folder of images or of pairs, a .parquet file or a folder of them, a .npy or .npz file"


def load_data(spec: str, *, resize: int | None = None, limit: int | None = None, split: str | None = None) -> Data:
    """The data set that a word or a path names.

    Args:
        spec: a name in `DATASETS`, or the path of a folder of images, a ``.parquet`` file or a folder of them, a
            ``.npy`` or ``.npz`` file, or a folder that ``fewstep pairs`` made.
        resize: side of the square pictures in pixels, for encoded images; None keeps their size.
        limit: at most this many pictures, evenly spaced; None is all.
        split: which split of a folder of Parquet files, such as "train"; None where there is only one.

    Raises:
        InputError: neither a name nor a path, an option that this source does not have, or data that its loader
            refuses.
    """
    if split is not None and (spec in DATASETS or not Path(spec).is_dir()):
        raise InputError(f"split {split!r} needs a folder of .parquet files, {spec!r} is none: drop it")
    if spec in DATASETS:
        return _unresized(DATASETS[spec](limit=limit), resize)
    path = Path(spec)
    if path.is_dir():
        return _directory(path, resize, limit, split)
    if not path.exists():
        raise InputError(f"{unknown('data set', spec, DATASETS)}; or give the path of {PATHS}")
    if path.suffix.lower() == ".parquet":
        return parquet(path, resize, limit=limit)
    if path.suffix.lower() in (".npy", ".npz"):
        return _unresized(array(path, limit=limit), resize)
    raise InputError(f"data {spec!r} is a file of another type, expected {PATHS}")


def _directory(path: Path, resize: int | None, limit: int | None, split: str | None) -> Data:
    """A folder's data set: pairs, Parquet or images, whichever it holds."""
    if (path / PAIRS_FILE).is_file():
        if (resize, limit, split) != (None, None, None):
            raise InputError(f"{path} holds pairs, which have one size, number and split: drop resize, limit and split")
        return Pairs(path)
    suffixes = {file.suffix.lower() for file in walk(path)}
    images, tables = sorted(suffixes & SUFFIXES), ".parquet" in suffixes
    if images and tables:
        raise InputError(
            f"{path}: holds .parquet and {', '.join(images)} files, expected one kind: name the sub-folder"
        )
    if tables or split is not None:
        return parquet(path, resize, split, limit=limit)
    return folder(path, resize, limit=limit)


def _unresized(data: Data, resize: int | None) -> Data:
    """The data itself, after a check that it already has the wanted side."""
    if resize is not None and data.shape[1:] != (resize, resize):
        _, h, w = data.shape
        raise InputError(f"data {data.name!r} is {h}x{w} and cannot be resized to {resize}: drop --resize")
    return data
