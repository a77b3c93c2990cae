"""Pickles read as data: what is read, and that nothing a file asks for is ever done."""

from __future__ import annotations

import collections
import copyreg
import gzip
import io
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep import InputError
from fewstep.sources import unpickle
from fewstep.sources.unpickle import Persistent, read_pickle

REBUILD = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def read(folder: Path, content: bytes) -> Any:
    (folder / "net.pkl").write_bytes(content)
    return read_pickle(folder / "net.pkl")


class Runs:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_tensors_and_arrays_come_back(tmp_path: Path, protocol: int) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    said = {
        "plain": [1, 2.5, True, None, "word", b"\x00\xff", (1, (2,)), {1, 2}],
        "ordered": collections.OrderedDict(a=1, b=weight),
        "again": weight,
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "whole": torch.arange(4)[1:3],
        "nothing": torch.zeros(0, 3),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "flags": np.array([True, False]),
        "number": np.float64(0.5),
    }
    found = read(tmp_path, pickle.dumps(said, protocol=protocol))
    assert found["plain"] == said["plain"]
    assert type(found["ordered"]) is dict and list(found["ordered"]) == ["a", "b"]
    assert torch.equal(found["ordered"]["b"], weight.detach()) and found["again"] is found["ordered"]["b"]
    for name in ("half", "whole", "nothing"):
        assert torch.equal(found[name], said[name]) and found[name].dtype == said[name].dtype
    for name in ("array", "flags"):
        assert np.array_equal(found[name], said[name]) and found[name].dtype == said[name].dtype
    assert found["number"] == 0.5 and type(found["number"]) is float


def test_a_persistent_object_is_a_record_and_its_source_stays_text(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    state = {"_init_args": (1,), "_init_kwargs": {"width": 2}, "height": 3}
    meta = {"type": "class", "version": 6, "module_src": f"open({str(marker)!r}, 'w')", "class_name": "Net"}
    body = pickle.dumps({**meta, "state": state}, protocol=2)[2:-1]
    found = read(tmp_path, b"\x80\x02" + REBUILD + body + b"\x85R.")
    assert isinstance(found, Persistent) and not marker.exists()
    assert (found.class_name, found.init_args, found.init_kwargs) == ("Net", (1,), {"width": 2})
    assert found.state["height"] == 3


def test_containers_of_torch_are_records_too(tmp_path: Path) -> None:
    net = torch.nn.ModuleDict({"list": torch.nn.ModuleList([torch.nn.Sequential()])})
    found = read(tmp_path, pickle.dumps(net))
    inner = found.state["_modules"]["list"]
    assert (found.class_name, inner.class_name) == ("ModuleDict", "ModuleList")
    assert inner.state["_modules"]["0"].class_name == "Sequential"


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_a_call_is_refused_before_it_runs(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(InputError, match=r"net\.pkl was not read: it would execute posix\.system: refused; fewstep r"):
        read(tmp_path, pickle.dumps({"ema": [Runs(marker)]}, protocol=protocol))
    assert not marker.exists()


NAMES = [
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "builtins.__import__",
    "builtins.object",
    "builtins.open",
    "os.system",
    "subprocess.Popen",
    "torch.load",
    "torch.hub.load",
    "torch.jit._serialization.load",
    "torch._utils._rebuild_from_type_v2",
    "torch.storage.UntypedStorage",
    "torch.nn.modules.linear.Linear",
    "numpy.load",
    "numpy.f2py.crackfortran.myeval",
    "copyreg._reconstructor",
    "copyreg.__newobj__",
    "functools.partial",
    "operator.attrgetter",
    "pickle.loads",
    "_pickle.loads",
    "collections.namedtuple",
    "importlib.import_module",
    "torch_utils.persistence.import_hook",
    "dnnlib.util.open_url",
    "fewstep.sources.unpickle._note",
    "fewstep.sources.unpickle._TABLE",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_other_name_is_looked_up(tmp_path: Path, name: str) -> None:
    room, _, last = name.rpartition(".")
    for content in (
        f"c{room}\n{last}\n.".encode(),
        b"\x80\x04" + text(room) + text(last) + b"\x93.",
        f"(i{room}\n{last}\n.".encode(),
    ):
        with pytest.raises(InputError, match=f"would execute {name}: refused".replace(".", r"\.")):
            read(tmp_path, content)


def test_dots_in_a_name_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"would execute torch\.storage\._load_from_bytes\.__globals__"):
        read(tmp_path, b"\x80\x04" + text("torch.storage") + text("_load_from_bytes.__globals__") + b"\x93.")
    with pytest.raises(InputError, match=r"would execute torch\.storage\._load_from_bytes"):
        read(tmp_path, b"\x80\x04" + text("torch") + text("storage._load_from_bytes") + b"\x93.")


@pytest.mark.parametrize("zipped", [False, True])
def test_the_bytes_of_a_tensor_cannot_hold_a_program(tmp_path: Path, zipped: bool) -> None:
    marker, inner = tmp_path / "ran", io.BytesIO()
    torch.save(Runs(marker), inner, _use_new_zipfile_serialization=zipped)
    for held in (inner.getvalue(), pickle.dumps(Runs(marker)), b"", b"noise"):
        with pytest.raises(InputError, match="the bytes of a tensor in it are refused") as error:
            read(tmp_path, b"\x80\x03" + stored(held) + b".")
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
    assert not marker.exists()


def test_the_bytes_of_a_tensor_hold_a_storage_and_nothing_else(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save({"a": 1}, inner)
    with pytest.raises(InputError, match="hold a dict: refused"):
        read(tmp_path, b"\x80\x03" + stored(inner.getvalue()) + b".")


BUILDS = {
    "a name": (REBUILD, "would give a state to persistent"),
    "a result": (REBUILD + b"}\x85R", "would give a state to the result of persistent"),
    "a class": (b"ctorch.nn.modules.container\nModuleDict\n", "not a whole pickle"),
    "a mapping": (b"ccollections\nOrderedDict\n)R", "would give a state to a mapping"),
    "a class of mappings": (b"cdnnlib.util\nEasyDict\n", "not a whole pickle"),
    "a module": (
        b"ctorch.nn.modules.container\nModuleDict\n)\x81",
        "the state of a ModuleDict in it is a tuple|holds a _Name where a value",
    ),
    "a tensor": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "would give a state to the result of tensor"),
    "a dictionary": (b"}", "not a whole pickle"),
}


@pytest.mark.parametrize("what", BUILDS)
def test_no_attribute_is_ever_set(tmp_path: Path, what: str) -> None:
    target, said = BUILDS[what]
    before = {name: dict(vars(kind)) for name, kind in unpickle._CLASSES.items()}
    # The second form of BUILD's state sets attributes by name, on anything.
    for state in (b"N}" + text("name") + text("evil") + b"s\x86", b"N}" + text("__new__") + REBUILD + b"s\x86"):
        with pytest.raises(InputError, match=said):
            read(tmp_path, b"\x80\x02" + target + state + b"b.")
    assert {name: dict(vars(kind)) for name, kind in unpickle._CLASSES.items()} == before
    assert unpickle._TABLE["torch_utils.persistence", "_reconstruct_persistent_obj"].name == "persistent"


def test_classes_of_the_reader_cannot_be_changed() -> None:
    for kind in (*unpickle._CLASSES.values(), unpickle._Mapping):
        with pytest.raises(InputError, match="of a class of the reader: refused"):
            kind.__new__ = None
    for thing in (unpickle._CLASSES["ModuleDict"](), unpickle._Mapping(), unpickle._Name("tensor")):
        with pytest.raises(InputError, match="would set the attribute 'name'"):
            thing.name = "evil"


def test_registered_extensions_are_refused_even_when_python_knows_them(tmp_path: Path) -> None:
    marker, code = tmp_path / "ran", 0x7E57
    call = text(f"touch {marker}") + b"\x85R."
    extension = b"\x83" + struct.pack("<H", code)
    copyreg.add_extension("posix", "system", code)
    try:
        # From here on pickle has the function at hand, and would look nothing up.
        assert pickle.loads(b"\x80\x02" + extension + b".") is os.system
        with pytest.raises(InputError, match=f"would execute the registered extension {code}: refused"):
            read(tmp_path, b"\x80\x02" + extension + call)
    finally:
        copyreg.remove_extension("posix", "system", code)
    assert not marker.exists()


def frame(length: int) -> bytes:
    return b"\x80\x04\x95" + struct.pack("<Q", length)


def array(code: str, order: str, size: bytes, data: bytes) -> bytes:
    dtype = (
        b"cnumpy\ndtype\n"
        + text(code)
        + b"\x89\x88\x87R(K\x03"
        + text(order)
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return b"\x80\x03" + made + b"(K\x01" + size + dtype + b"\x89" + data + b"tb."


def stored(held: bytes) -> bytes:
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(held)) + held + b"\x85R"


def tensor(offset: int, size: int, stride: int) -> bytes:
    storage = stored(torch.arange(4.0)._typed_storage().__reduce__()[1][0])
    numbers = b"J" + struct.pack("<i", offset)
    pair = b"".join(b"\x8a\x08" + struct.pack("<q", n) + b"\x85" for n in (size, stride))
    return b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + pair + b"\x89}tR."


BAD = {
    "empty": (b"", "it is empty"),
    "a sentence": (b"hello world", "not a pickle, or a damaged one"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(20), "not a pickle"),
    "gzip": (gzip.compress(pickle.dumps({})), "compressed with gzip"),
    "zip": (b"PK\x03\x04" + bytes(30), "a zip archive, such as torch.save writes"),
    "cut in a value": (pickle.dumps({"ema": "x" * 100})[:60], "inside a value"),
    "cut between values": (pickle.dumps([1, 2, 3], protocol=2)[:-1], "inside a value"),
    "bytes longer than the file": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 45) + b"abc.", "inside a value"),
    "text longer than the file": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 45) + b"abc.", "inside a value"),
    "a frame longer than the file": (frame(1 << 45) + b"N.", "inside a value"),
    "a number longer than the file": (b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"\x01.", "inside a value"),
    "a memo for all memory": (b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFFE) + b".", "4294967294 places to remember"),
    "a memo in words": (b"Np999999999999\n.", "999999999999 places to remember"),
    "an outer object": (b"Pnet.pt\n.", "refers to an object outside the file ('net.pt')"),
    "an outer object by value": (b"\x80\x02" + text("net.pt") + b"Q.", "refers to an object outside the file"),
    "an outer buffer": (b"\x80\x05\x97.", "not a whole pickle"),
    "no values": (b"\x80\x02.", "not a whole pickle"),
    "an unknown protocol": (b"\x80\x63N.", "not a whole pickle"),
    "itself": (b"\x80\x02]q\x00h\x00a.", "contains itself"),
    "deep nesting": (b"\x80\x02)" + b"\x85" * 20_000 + b".", "nested too deeply"),
    "a bare name": (REBUILD + b".", "holds a _Name where a value was expected"),
    "a bare class": (b"cnumpy\nndarray\n.", "holds a _Sealed where a value was expected"),
    "an array without data": (b"\x80\x02cnumpy\nndarray\n)\x81.", "holds a ndarray where a value was expected"),
    "keywords": (
        b"\x80\x04ctorch.nn.modules.container\nModuleDict\n)}" + text("a") + b"Ns\x92.", "not a whole pickle"
    ),
    "a record as list": (b"\x80\x02" + REBUILD + b"}\x85RNa.", "not a whole pickle"),
    "a record as mapping": (b"\x80\x02" + REBUILD + b"}\x85RNNs.", "not a whole pickle"),
    "a record as function": (b"\x80\x02" + REBUILD + b"}\x85R)R.", "not a whole pickle"),
    "a record as key": (b"\x80\x02}" + REBUILD + b"}\x85RNs.", "a key in it is a _Note"),
    "no meta": (b"\x80\x02" + REBUILD + b"}\x85R.", "of no known form"),
    "meta as list": (b"\x80\x02" + REBUILD + b"]\x85R.", "of no known form"),
    "no meta at all": (b"\x80\x02" + REBUILD + b")R.", "not a whole pickle"),
    "objects in an array": (array("O8", "|", b"K\x01\x85", b"]Na"), "an array of type 'O8': refused; only numbers"),
    "records in an array": (array("V8", "|", b"K\x01\x85", b"C\x08" + bytes(8)), "an array of type 'V8': refused"),
    "an array of a list": (array("f8", "<", b"K\x01\x85", b"]Na"), "a list where bytes were expected"),
    "an array larger than it is": (array("f8", "<", b"J\xff\xff\xff\x7f\x85", b"C\x00"), "damaged: 0 bytes"),
    "an array of negative size": (array("f8", "<", b"J\xff\xff\xff\xff\x85", b"C\x00"), "expected a type and a shape"),
    "a tensor larger than it is": (tensor(0, 1 << 50, 0), "does not fit its 4 stored elements"),
    "a tensor beyond its end": (tensor(1, 4, 1), "does not fit its 4 stored elements"),
    "a tensor before its start": (tensor(-1, 4, 1), "expected a storage, an offset, a size and strides"),
    "a tensor with wide strides": (tensor(0, 2, 1 << 40), "does not fit its 4 stored elements"),
    "bytes by another codec": (b"c_codecs\nencode\n" + text("a") + text("rot13") + b"\x86R.", "expected latin1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_damage_is_named(tmp_path: Path, what: str) -> None:
    content, said = BAD[what]
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert str(said) in str(error.value) and "net.pkl" in str(error.value)


def test_the_crafted_tensors_and_arrays_are_read_when_they_are_right(tmp_path: Path) -> None:
    assert torch.equal(read(tmp_path, tensor(1, 3, 1)), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(read(tmp_path, tensor(3, 3, 0)), torch.tensor([3.0, 3.0, 3.0]))
    found = read(tmp_path, array("f8", ">", b"K\x01\x85", b"C\x08" + struct.pack(">d", 1.5)))
    assert found.tolist() == [1.5]


def test_values_shared_a_billion_times_cost_once(tmp_path: Path) -> None:
    # Each round pairs the value with itself: 2^60 leaves for whoever counts them.
    content = b"\x80\x02]" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"."
    began = time.monotonic()
    found = read(tmp_path, content)
    assert time.monotonic() - began < 60 and found[0] is found[1]


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pkl does not exist"):
        read_pickle(tmp_path / "none.pkl")
    with pytest.raises(InputError, match="cannot be read"):
        read_pickle(tmp_path)
