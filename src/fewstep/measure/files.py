"""Statistics files: ``.npz`` written whole or not at all, read without executing anything."""

from __future__ import annotations

import os
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.errors import InputError


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where reference files are kept: ``cache``, else the environment's FEWSTEP_CACHE, else ~/.cache/fewstep."""
    return Path(cache or os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep").expanduser()


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes ``arrays`` to ``path``: a temporary file beside it, flushed to the disk, then renamed.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    except OSError as error:
        raise InputError(
            f"cannot write in {path.parent} ({error.strerror}): choose a folder you can write to"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        data = np.load(path, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is a single array, expected an .npz file: write it with Moments.save")
        with data:
            yield data
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: expected an .npz file of statistics, check the path") from error
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, struct.error, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable .npz file ({error}): delete it and compute it again") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file; pickled content is refused.

    Raises:
        InputError: no such file, or not a whole npz file of plain arrays.
    """
    with _opened(path) as data:
        return {key: data[key] for key in data.files}


def names_in(path: Path) -> set[str]:
    """The names of the arrays of an ``.npz`` file; the arrays are not read.

    Raises:
        InputError: no such file, or not an npz file.
    """
    with _opened(path) as data:
        return set(data.files)
