"""Image files, Parquet files and checks that the tests of the data sets share."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data import Data
from fewstep.errors import InputError


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def everything(data: Data) -> torch.Tensor:
    x = data.take(torch.arange(len(data))).x
    assert x is not None and x.dtype == torch.float32 and x.shape == (len(data), *data.shape)
    assert x.min() >= -1 and x.max() <= 1
    return x


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def make_pictures(root: Path) -> Path:
    """Two classes, cat and dog, of three 8x6 (width x height) colour pictures; picture i is ``noise(i, 6, 8, 3)``."""
    for i in range(6):
        put(root / ("cat" if i < 3 else "dog") / f"{i}.png", noise(i, 6, 8, 3))
    return root


def write_parquet(
    path: Path, images: list[bytes | None], labels: list[object] | None = None, names: list[str] | None = None, **c: str
) -> Path:
    """A file in the Hub's schema; ``image`` and ``label`` rename the columns."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {c.get("image", "image"): pa.array([{"bytes": b, "path": None} for b in images], kind)}
    features: dict[str, object] = {c.get("image", "image"): {"_type": "Image"}}
    if labels is not None:
        columns[c.get("label", "label")] = pa.array(labels)
        features[c.get("label", "label")] = {"_type": "ClassLabel", **({"names": names} if names else {})}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path
