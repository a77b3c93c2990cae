"""Pickles read as data: no name in a file is ever imported, no function or class of a file is ever called.

A pickle is a program whose instructions may call anything that can be imported. Here every name that it asks for is
looked up in a fixed table, whose entries only write down what they were called with. Only when the file has been read
to its end are these notes turned into plain values, tensors, arrays and :class:`Persistent` records.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InputError


@dataclass(frozen=True, eq=False)
class Persistent:
    """An object of a class whose source travels in the file: what the file says of it, and none of its code.

    Attributes:
        class_name: name of the class; also of torch's own containers (``ModuleDict``, ``ModuleList``, ``Sequential``).
        init_args: positional arguments it was made with.
        init_kwargs: keyword arguments it was made with.
        state: its attributes; of a module also ``_parameters``, ``_buffers`` and ``_modules``.
    """

    class_name: str
    init_args: tuple[Any, ...]
    init_kwargs: dict[str, Any]
    state: dict[str, Any]


class _Sealed(type):
    """Classes that no BUILD instruction can change, for they outlive the file."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise InputError(f"it would set {name!r} of a class of the reader: refused")

    __delattr__ = __setattr__  # type: ignore[assignment]


class _Note(metaclass=_Sealed):
    """That a name was called with these arguments, and what BUILD said of the result."""

    __slots__ = ("args", "name", "state")
    name: str
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Note:
        return _note(cls, cls.__name__, args)

    def __init__(self, *args: Any) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        raise InputError(f"it would set the attribute {name!r} of a record: refused")

    def __setstate__(self, state: Any) -> None:
        if self.name not in _BUILT or self.state is not None:
            raise InputError(f"it would give a state to the result of {self.name}: refused")
        object.__setattr__(self, "state", state)


class _Mapping(dict[Any, Any], metaclass=_Sealed):
    """Stands for OrderedDict and EasyDict."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        raise InputError(f"it would set the attribute {name!r} of a mapping: refused")

    def __setstate__(self, state: Any) -> None:
        # torch hangs the versions of modules, which say nothing of the weights, on the OrderedDict of a state_dict.
        if not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise InputError("it would give a state to a mapping: refused")


class _Name:
    """A name that may be called: calling it makes a note."""

    __slots__ = ("name",)
    name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise InputError(f"it would set the attribute {name!r} of {self.name}: refused")

    def __setstate__(self, state: Any) -> None:
        raise InputError(f"it would give a state to {self.name}: refused")

    def __call__(self, *args: Any) -> _Note:
        return _note(_Note, self.name, args)


def _note(cls: type[_Note], name: str, args: tuple[Any, ...]) -> _Note:
    self = object.__new__(cls)
    for key, value in (("name", name), ("args", args), ("state", None)):
        object.__setattr__(self, key, value)
    return self


# Classes and not names, because files make these without calling them.
_CLASSES = {n: _Sealed(n, (_Note,), {"__slots__": ()}) for n in ("ModuleDict", "ModuleList", "Sequential", "ndarray")}
_MODULES = ("ModuleDict", "ModuleList", "Sequential")
# What BUILD may follow; everything else is complete once it is made.
_BUILT = {*_MODULES, "array", "dtype"}
_NUMPY = ("numpy.core", "numpy._core")
_TABLE: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Name("persistent"),
    ("torch._utils", "_rebuild_tensor_v2"): _Name("tensor"),
    ("torch._utils", "_rebuild_parameter"): _Name("parameter"),
    ("torch.storage", "_load_from_bytes"): _Name("storage"),
    **{("torch.nn.modules.container", name): _CLASSES[name] for name in _MODULES},
    ("collections", "OrderedDict"): _Mapping,
    ("dnnlib.util", "EasyDict"): _Mapping,
    ("builtins", "set"): _Name("set"),
    ("__builtin__", "set"): _Name("set"),
    ("_codecs", "encode"): _Name("bytes"),
    ("numpy", "dtype"): _Name("dtype"),
    ("numpy", "ndarray"): _CLASSES["ndarray"],
    **{(f"{room}.multiarray", "_reconstruct"): _Name("array") for room in _NUMPY},
    **{(f"{room}.multiarray", "scalar"): _Name("scalar") for room in _NUMPY},
    **{(f"{room}.numeric", "_frombuffer"): _Name("frombuffer") for room in _NUMPY},
}
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
_READS = "fewstep reads only networks of EDM and EDM2, tensors, arrays and plain values"


def read_pickle(path: str | Path) -> Any:
    """The content of a pickle of EDM or EDM2: plain values, CPU tensors, arrays and :class:`Persistent` records.

    Nothing is imported or executed from the file; source code in it is dropped. All tensors must fit in memory.

    Raises:
        InputError: the file is missing, damaged or no pickle; or it asks for any name beyond the fixed table, an
            attribute to be set, a registered extension, an external object, or more memory than the file holds. The
            message names what it would have executed, and nothing has been.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            file = _Bounded(raw)
            _check_start(raw)
            _check_instructions(file)
            raw.seek(0)
            found = _Reader(file).load()
        return _Resolver().value(found)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: expected a pickle (.pkl) of EDM or EDM2") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except InputError as error:
        raise InputError(f"{path} was not read: {error}") from None
    except RecursionError:
        raise InputError(f"{path} was not read: its values are nested too deeply") from None
    except MemoryError:
        raise InputError(f"{path} was not read: it needs more memory than there is") from None
    except _DAMAGE as error:
        raise InputError(f"{path} is not a whole pickle ({error}): copy it again") from None


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The table's entry, which only takes notes."""
        if (module, name) not in _TABLE:
            raise InputError(f"it would execute {module}.{name}: refused; {_READS}")
        return _TABLE[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refused: such files refer to things outside themselves."""
        raise InputError(f"it refers to an object outside the file ({_brief(pid)}): refused; {_READS}")


class _Bounded:
    """A file that never allocates for more bytes than it has."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.size = raw.seek(0, io.SEEK_END)
        raw.seek(0)
        self.tell = raw.tell

    def read(self, count: int) -> bytes:
        if count > self.size - self.raw.tell():
            raise InputError(f"it ends after {self.size} bytes, inside a value: the file is truncated or damaged")
        return self.raw.read(count)

    def readline(self) -> bytes:
        return self.raw.readline()


def _check_start(raw: BinaryIO) -> None:
    start = raw.read(4)
    raw.seek(0)
    if not start:
        raise InputError("it is empty: copy it again")
    if start.startswith(b"\x1f\x8b"):
        raise InputError("it is compressed with gzip: unpack it first (gunzip)")
    if start == b"PK\x03\x04":
        raise InputError("it is a zip archive, such as torch.save writes: expected a network-snapshot pickle")


def _check_instructions(file: _Bounded) -> None:
    """Walks over the instructions without following them: those that reach outside the table's checks are refused."""
    count = 0
    try:
        for op, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
            count += 1
            if op.name in ("EXT1", "EXT2", "EXT4"):
                raise InputError(f"it would execute the registered extension {argument}: refused; {_READS}")
            # The memo is an array as long as the largest number in it, so a small file could ask for all memory.
            if op.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(argument)) > count:
                raise InputError(
                    f"it asks for {argument} places to remember values after {count} instructions: refused"
                )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"it is not a pickle, or a damaged one ({error})") from None


class _Resolver:
    """Turns notes into values, each once, so that what the file shares stays shared and costs once."""

    def __init__(self) -> None:
        # The note is kept beside its value, because a number may be used again once its object is gone.
        self.done: dict[int, tuple[Any, Any]] = {}

    def value(self, found: Any) -> Any:
        if found is None or isinstance(found, bool | int | float | complex | str | bytes | bytearray):
            return found
        if id(found) in self.done:
            return self.done[id(found)][1]
        # A value that holds itself would be met again before it is finished.
        self.done[id(found)] = (found, _UNFINISHED)
        made = self._make(found)
        self.done[id(found)] = (found, made)
        return made

    def _make(self, found: Any) -> Any:
        if isinstance(found, dict):
            return {self._key(k): self._whole(v) for k, v in found.items()}
        if isinstance(found, list | tuple | set | frozenset):
            return type(found)(self._whole(v) for v in found)
        if isinstance(found, _Note):
            if found.name in _MODULES:
                return _persistent(found.name, self._whole(found.state))
            if found.name not in _MAKE:
                raise InputError(f"it holds a {found.name} where a value was expected")
            return _MAKE[found.name](self, *found.args, *(() if found.state is None else (found.state,)))
        raise InputError(f"it holds a {type(found).__name__} where a value was expected; {_READS}")

    def _whole(self, found: Any) -> Any:
        made = self.value(found)
        if made is _UNFINISHED:
            raise InputError("a value in it contains itself: refused")
        return made

    def _key(self, key: Any) -> Any:
        if not (key is None or isinstance(key, str | bytes | int | float | bool | tuple)):
            raise InputError(f"a key in it is a {type(key).__name__}: expected a plain value")
        return self._whole(key)

    def persistent(self, meta: Any) -> Persistent:
        meta = self._whole(meta)
        if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
            raise InputError(f"a persistent object in it is of no known form ({_brief(meta)})")
        return _persistent(meta["class_name"], meta.get("state"))

    def storage(self, data: Any) -> Tensor:
        """The elements of a storage as a flat tensor; its bytes are a file of torch.save in their own right."""
        try:
            held = torch.load(io.BytesIO(_bytes(self._whole(data))), map_location="cpu", weights_only=True)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the bytes of a tensor in it are refused: {_reason(error)}") from None
        if not isinstance(held, torch.storage.TypedStorage):
            raise InputError(f"the bytes of a tensor in it hold a {type(held).__name__}: refused")
        return torch.tensor([], dtype=held.dtype).set_(held._untyped_storage)

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
        held, shape, steps = self._whole(storage), tuple(self._whole(size)), tuple(self._whole(stride))
        if not isinstance(held, Tensor) or not all(_whole_number(n) for n in (offset, *shape, *steps)):
            raise InputError("a tensor in it is damaged: expected a storage, an offset, a size and strides")
        reach = offset + sum((n - 1) * s for n, s in zip(shape, steps, strict=True)) + 1
        if prod(shape) > len(held) or (prod(shape) and reach > len(held)):
            raise InputError(f"a tensor of size {shape} in it does not fit its {len(held)} stored elements")
        return held.as_strided(shape, steps, offset)

    def parameter(self, data: Any, *rest: Any) -> Tensor:
        made = self._whole(data)
        if not isinstance(made, Tensor):
            raise InputError(f"a parameter in it is a {type(made).__name__}")
        return made

    def encoded(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise InputError(f"bytes in it are written as {_brief(encoding)}, expected latin1")
        return text.encode("latin1")

    def members(self, items: Any = ()) -> set[Any]:
        return set(self._whole(items))

    def dtype(self, code: Any, *rest: Any) -> np.dtype[Any]:
        """Numbers and nothing else: arrays of objects are programs again."""
        state = rest[2] if len(rest) > 2 else (0, "|")
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code) or order not in ("<", ">", "|", "="):
            raise InputError(f"it holds an array of type {_brief(code)}: refused; only numbers are read")
        return np.dtype(code).newbyteorder(order)

    def array(self, kind: Any, shape: Any, code: Any, state: Any = None) -> np.ndarray:
        if not isinstance(state, tuple) or len(state) != 5:
            raise InputError("an array in it is damaged")
        _, size, dtype, fortran, data = state
        return self.frombuffer(data, dtype, size, "F" if fortran else "C")

    def frombuffer(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        kind, held = self._whole(dtype), _bytes(self._whole(data))
        if not isinstance(kind, np.dtype) or not isinstance(shape, tuple) or not all(map(_whole_number, shape)):
            raise InputError("an array in it is damaged: expected a type and a shape")
        if prod(shape) * kind.itemsize != len(held) or order not in ("C", "F", "A"):
            raise InputError(f"an array in it is damaged: {len(held)} bytes for the shape {_brief(shape)} of {kind}")
        return np.frombuffer(held, kind).reshape(shape, order=order).copy()

    def scalar(self, dtype: Any, data: Any) -> bool | int | float | complex:
        number: bool | int | float | complex = self.frombuffer(data, dtype, (), "C").item()
        return number


_UNFINISHED = object()
_MAKE: dict[str, Callable[..., Any]] = {
    "persistent": _Resolver.persistent,
    "storage": _Resolver.storage,
    "tensor": _Resolver.tensor,
    "parameter": _Resolver.parameter,
    "bytes": _Resolver.encoded,
    "set": _Resolver.members,
    "dtype": _Resolver.dtype,
    "array": _Resolver.array,
    "frombuffer": _Resolver.frombuffer,
    "scalar": _Resolver.scalar,
}


def _persistent(class_name: str, state: Any) -> Persistent:
    state = {} if state is None else state
    if not isinstance(state, Mapping):
        raise InputError(f"the state of a {class_name} in it is a {type(state).__name__}: expected a mapping")
    args, kwargs = state.get("_init_args"), state.get("_init_kwargs")
    return Persistent(class_name, tuple(args or ()), dict(kwargs or {}), dict(state))


def _bytes(data: Any) -> bytes:
    if not isinstance(data, bytes | bytearray):
        raise InputError(f"it holds a {type(data).__name__} where bytes were expected: refused")
    return bytes(data)


def _whole_number(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**62


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else type(value).__name__
    return repr(text if len(text) < 60 else text[:60] + "...")


def _reason(error: Exception) -> str:
    """What torch's own restricted reader objected to, without its advice to turn it off."""
    if named := re.search(r"GLOBAL:? ([\w.]+)", str(error)):
        return f"they would execute {named.group(1)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return lines[0] if lines else type(error).__name__
