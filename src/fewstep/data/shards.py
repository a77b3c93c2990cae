"""Named tensors in files of many rows, read through memory maps: what sets too large for memory lie in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.state import save_tensors
from fewstep.errors import InputError

# What the header of a safetensors file calls the types that pictures and conditions have.
_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def shard_name(k: int) -> str:
    """The file of shard ``k`` below the folder of a set."""
    return f"shards/{k:06d}.safetensors"


def write_shard(file: Path, held: Mapping[str, Tensor]) -> None:
    """Writes a shard whole or not at all, with the digest of its content in its header.

    Raises:
        InputError: the place cannot be written.
    """
    digest = sha256()
    for name in sorted(held):
        digest.update(name.encode())
        digest.update(held[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    save_tensors(file, held, {"sha256": digest.hexdigest()[:16]})


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as a private memory map, which reads only what is touched.

    Raises:
        InputError: the file is missing, shortened, or no safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = int.from_bytes(file.read(8), "little")
            if not 0 < head <= size - 8:
                raise ValueError(f"a header of {head} bytes in a file of {size}")
            entries = json.loads(file.read(head))
        entries.pop("__metadata__", None)
        start = 8 + head
        if size != start + max(e["data_offsets"][1] for e in entries.values()):
            raise ValueError("its size is not what its header says")
        storage: Any = torch.UntypedStorage.from_file(str(path), False, size)
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        spans = {name: slice(*(start + o for o in e["data_offsets"])) for name, e in entries.items()}
        return {name: flat[spans[name]].view(_NAMES[e["dtype"]]).reshape(e["shape"]) for name, e in entries.items()}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: expected a shard") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is not a whole shard ({error}): remove it and use --resume") from None


def is_whole(file: Path) -> bool:
    """Whether a shard is there; one that somebody shortened is made again."""
    if not file.is_file():
        return False
    try:
        return bool(mapped(file))
    except InputError:
        return False


def digest_of(file: Path) -> str:
    """What :func:`write_shard` wrote into the header of a shard, so that nothing has to be read again."""
    with file.open("rb") as opened:
        head = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return str(head.get("__metadata__", {}).get("sha256", ""))
