"""Parquet files in the image schema of the Hugging Face Hub: a struct {bytes, path} and a class label for each row."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from fewstep.data.base import shortened, spaced
from fewstep.data.encoded import CACHE_BYTES, Encoded, Source
from fewstep.data.pixels import Filter
from fewstep.errors import InputError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
SPLITS = frozenset({"train", "test", "validation", "valid", "val", "dev"})


def parquet(
    path: str | Path,
    resize: int | None = None,
    split: str | None = None,
    *,
    centre_crop: bool = True,
    channels: int | None = None,
    filter: Filter | None = None,
    limit: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Encoded:
    """Images of one Parquet file, or of all such files in a folder, with the class labels if there are any.

    The image column is called image or img, or is the only struct with a field ``bytes``; the label column is called
    label, fine_label or labels and holds integers or strings. Class names come from the Hub's metadata in the schema.
    The encoded images are held in memory. Rows without a valid label or image are counted in ``report``.

    Args:
        path: a ``.parquet`` file, or a folder that has some, in sub-folders or not.
        resize: side of the square pictures in pixels; None keeps the size, which must then be the same for all.
        split: take only files whose name or folder starts with this word, such as "train".
        centre_crop: cut the centred square out before resizing; False stretches instead.
        channels: 1 or 3; by default 1 if all pictures are grey and 3 otherwise.
        filter: "box" or "lanczos"; by default box if all sides are whole multiples of ``resize``.
        limit: look at no more than this many rows, evenly spaced; None is all.
        cache_bytes: decoded pictures are kept in memory when all of them need at most this many bytes.

    Raises:
        InputError: pyarrow is missing, no such file, several splits and none chosen, no image column, no image
            accepted, different sizes without ``resize``.
    """
    files = parquet_files(Path(path), split)
    table = _table(files)
    image = image_column(files[0], table)
    label = next((name for name in LABEL_COLUMNS if name in table.column_names), None)
    rows = spaced(table.num_rows, limit)
    data = _bytes(table.column(image))
    numbers, names = (None, []) if label is None else _labels(files[0], table, label)
    missing = [i for i in rows if not data[i].is_valid]
    present = [i for i in rows if data[i].is_valid] if missing else rows
    source = Source(
        name=Path(path).stem,
        names=[f"row {i}" for i in present],
        open=lambda i: io.BytesIO(data[present[i]].as_py()),
        labels=None if numbers is None else [numbers[i] for i in present],
        class_names=names,
        refused={"no bytes in the row": [f"row {i}" for i in missing]},
    )
    return Encoded(
        source,
        resize=resize,
        centre_crop=centre_crop,
        channels=channels,
        filter=filter,
        cache_bytes=cache_bytes,
    )


def parquet_files(path: Path, split: str | None = None) -> list[Path]:
    """The Parquet files of a path in order, of one split if there are several.

    Raises:
        InputError: there are none, or there are several splits and ``split`` does not choose among them.
    """
    if path.is_file():
        return [path]
    files = sorted(f for f in path.rglob("*.parquet") if not f.name.startswith("."))
    if not files:
        raise InputError(f"{path}: no such .parquet file, and no folder that has some")
    splits = {file: split_of(file.relative_to(path)) for file in files}
    found = sorted(set(splits.values()))
    named = ", ".join(name or "(no split in the name)" for name in found)
    if split is not None:
        chosen = [file for file in files if splits[file] == split]
        if not chosen:
            raise InputError(f"{path}: no file of the split {split!r}, expected one of {named}")
        return chosen
    if len(found) > 1:
        raise InputError(
            f"{path}: holds several splits ({named}), expected one: name a file such as {files[0]}, or pass split="
        )
    return files


def split_of(file: Path) -> str:
    """The split that a file's name or folder starts with (train, test, validation ...), or an empty string."""
    for part in reversed(file.with_suffix("").parts):
        word = re.split(r"[-_.]", part)[0].lower()
        if word in SPLITS:
            return word
    return ""


def _table(files: list[Path]) -> Any:
    """The rows of all files as one Arrow table."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"{files[0]}: reading Parquet needs pyarrow: pip install 'fewstep[hf]'") from error
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file, partitioning=None))
        except (OSError, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{file}: not a readable Parquet file ({reason}): download it again") from error
        if tables[-1].schema.names != tables[0].schema.names:
            raise InputError(f"{file}: has other columns than {files[0]}, expected the same in all files")
    return pa.concat_tables(tables, promote_options="permissive")


def image_column(file: Path, table: Any) -> str:
    """The name of the column with encoded images.

    Raises:
        InputError: no column, or more than one unnamed column, can be it.
    """
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    able = [field.name for field in table.schema if holds_bytes(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in able]
    if named or len(able) == 1:
        return (named or able)[0]
    raise InputError(
        f"{file}: columns are {shortened(table.column_names, 8)}, expected one named image or img that holds "
        "{bytes, path}"
    )


def _bytes(column: Any) -> Any:
    """The encoded images of an image column, one binary value for each row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _labels(file: Path, table: Any, label: str) -> tuple[list[int] | None, list[str]]:
    """Class number of each row (-1 where there is none) and the class names; (None, []) if no row has a label."""
    values = table.column(label).to_pylist()
    known = {v for v in values if v is not None}
    if known and all(isinstance(v, str) for v in known):
        names = sorted(known)
        number = {name: i for i, name in enumerate(names)}
        return [number.get(v, -1) for v in values], names
    if any(isinstance(v, bool) or not isinstance(v, int) for v in known):
        raise InputError(f"{file}: column {label!r} is {table.column(label).type}, expected whole numbers or strings")
    if max(known, default=-1) < 0:
        return None, []
    names = class_names(table.schema.metadata or {}, label) or [str(i) for i in range(max(known) + 1)]
    return [-1 if v is None else v for v in values], names


def class_names(metadata: dict[bytes, bytes], label: str) -> list[str]:
    """The names of a ClassLabel column in the Hub's schema metadata; empty if there are none."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return [str(name) for name in features[label].get("names", [])]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        return []
