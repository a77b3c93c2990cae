"""Weights of published networks: a path, or an address that the user gave, and in either case a checksum."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.measure.files import cache_folder

# The convention of torch.hub: the first digits of the sha256 end the name.
_NAMED = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex.

    Raises:
        InputError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(CHUNK):
                found.update(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path of the weights") from None
    return found.hexdigest()


def weights_file(place: str | Path, *, sha256: str | None = None, cache: str | Path | None = None) -> tuple[Path, str]:
    """A file of weights on this machine, and its sha256.

    Args:
        place: a path, or an address that begins with http:// or https://, which is fetched once into the cache. Either
            may end in ``#sha256=...``.
        sha256: the checksum, or its first 8 digits or more. Without one, the digits that end the file's name count, as
            in ``pt_inception-2015-12-05-6726825d.pth``; an address must have one of the three.
        cache: see :func:`fewstep.measure.cache_folder`.

    Raises:
        InputError: no such file, an address without a checksum or that cannot be fetched, or another checksum.
    """
    text, _, said = str(place).partition("#sha256=")
    wanted = (sha256 or said or "").lower()
    remote = text.startswith(("http://", "https://"))
    name = Path(urlsplit(text).path).name if remote else Path(text).name
    if not wanted and (named := _NAMED.search(name)):
        wanted = named[1]
    if wanted and not re.fullmatch(r"[0-9a-f]{8,64}", wanted):
        raise InputError(f"checksum {wanted!r} of {text}: expected 8 to 64 hex digits of its sha256")
    if remote and not wanted:
        raise InputError(f"{text} comes without a checksum: add #sha256=<at least 8 hex digits>, or give a path")
    path = _fetched(text, name, wanted, cache) if remote else Path(text).expanduser()
    if not path.is_file():
        raise InputError(f"no file {path}: expected weights as .pth or .safetensors, check the path")
    found = sha256_of(path)
    if not found.startswith(wanted):
        raise InputError(f"{path} has the sha256 {found[:16]}..., expected {wanted}: it is damaged or another file")
    return path, found


def _fetched(url: str, name: str, wanted: str, cache: str | Path | None) -> Path:
    path = cache_folder(cache) / "weights" / f"{wanted[:8]}-{name}"
    if path.is_file():
        return path
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=60) as answer:
            shutil.copyfileobj(answer, file, CHUNK)
            file.flush()
            os.fsync(file.fileno())
        found = sha256_of(Path(temporary))
        if not found.startswith(wanted):
            raise InputError(f"{url} has the sha256 {found[:16]}..., expected {wanted}: it came damaged or has changed")
        Path(temporary).replace(path)
    except (OSError, urllib.error.URLError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{url} could not be fetched ({error}): download it yourself and give its path") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def hash_of(module: nn.Module) -> str:
    """The sha256 over the names and bytes of all tensors of a network, in hex: for weights that come as many files."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
