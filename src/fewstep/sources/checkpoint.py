"""State dicts as files: named tensors and nothing else, with errors that say what else there was."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.state import load_tensors
from fewstep.errors import InputError, unknown

DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
}
"""The types that weights can have, by name."""
# What reading bytes that are no checkpoint can raise: any of them may be taken for an instruction of the format.
_GARBAGE = (
    *(ArithmeticError, AttributeError, EOFError, ImportError, LookupError),
    *(OSError, RuntimeError, TypeError, ValueError, struct.error),
)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` or ``.safetensors`` state dict, by name, on the CPU. Nothing in it is executed.

    Raises:
        InputError: the file is missing or damaged, or holds anything but named tensors (names what).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: expected a .pt or .safetensors checkpoint")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        # Files older than the zip format cannot be mapped, only read.
        body = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise InputError(f"{path} is damaged or not a checkpoint of torch: copy it again or use another") from None
        raise InputError(
            f"{path} holds more than tensors: it asks for {named[1]}, which is not executed. Save its state_dict alone"
        ) from None
    except _GARBAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a whole checkpoint ({reason}): copy it again or use another") from None
    if not isinstance(body, Mapping) or not body:
        raise InputError(f"{path} must hold a state dict of named tensors, got {type(body).__name__}")
    for name, value in body.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{path} must hold named tensors alone, but {name!r} is a {type(value).__name__}: save the state_dict "
                "of the network that you sample from, usually the average (ema)"
            )
    return dict(body)


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The type that weights are to have, float32 where none is said; by name too, such as "bfloat16" or "bf16".

    Raises:
        InputError: an unknown name, or a type that is none of :data:`DTYPES`.
    """
    if dtype is None:
        return torch.float32
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        if name not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        return DTYPES[name]
    if dtype not in DTYPES.values():
        raise InputError(f"dtype must be a floating type such as torch.float16, got {dtype!r}")
    return dtype
