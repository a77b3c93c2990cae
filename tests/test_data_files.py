"""Folders and Parquet files of encoded images: what is accepted, what is rejected and why, and exact pixels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data import folder, load_data, parquet
from fewstep.errors import InputError
from image_files import encoded, everything, make_pictures, noise, one_line, put, write_parquet


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "set")


# ---- folders


def test_folder_reads_every_format_and_counts_the_rest(tmp_path: Path) -> None:
    grey = noise(0, 8, 8)
    for suffix in ("png", "jpg", "JPEG", "webp", "bmp", "gif", "PNG"):
        put(tmp_path / f"ok_{suffix}_.{suffix}", np.stack([grey] * 3, -1))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_text("not a png")
    (tmp_path / ".hidden").write_text("not looked at")
    (tmp_path / "empty.jpg").touch()
    for suffix in ("png", "jpg", "webp", "bmp", "gif"):
        whole = encoded(noise(1, 40, 40, 3), {"jpg": "JPEG"}.get(suffix, suffix.upper()))
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    broken = bytearray(encoded(noise(2, 40, 40, 3)))
    broken[len(broken) // 2] ^= 0xFF
    (tmp_path / "broken.png").write_bytes(broken)
    put(tmp_path / "wide.tiff", grey)
    data = folder(tmp_path)
    assert {reason: sorted(names) for reason, names in data.report.rejected.items()} == {
        "not an image": ["a.txt", "b.png", "wide.tiff"],
        "empty file": ["empty.jpg"],
        "truncated": ["cut.bmp", "cut.gif", "cut.jpg", "cut.png", "cut.webp"],
        "damaged": ["broken.png"],
    }
    assert data.report.accepted == len(data) == 7 and data.classes == 0 and data.frequencies == []
    assert everything(data).shape == (7, 3, 8, 8)
    assert str(data.report).startswith("7 images accepted, 10 rejected (5 truncated: cut.bmp, ")


def test_folder_pixels_are_exact(pictures: Path) -> None:
    data = folder(pictures)
    assert (data.name, data.shape, data.classes, data.class_names) == ("set", (3, 6, 8), 2, ["cat", "dog"])
    want = torch.from_numpy(np.stack([noise(i, 6, 8, 3) for i in range(6)])).permute(0, 3, 1, 2) / 127.5 - 1
    assert (everything(data) - want).abs().max() < 1e-6
    assert data.take(torch.arange(6)).cond["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert folder(pictures, labels="none").take(torch.tensor([0])).cond == {}


def test_folder_mixed_sizes(pictures: Path) -> None:
    put(pictures / "dog" / "large.png", noise(7, 16, 12, 3))
    with pytest.raises(InputError) as error:
        folder(pictures)
    message = one_line(error)
    assert "cat/0.png is 8x6" in message and "dog/large.png is 12x16" in message and "--resize N" in message
    assert folder(pictures, resize=4).shape == (3, 4, 4)


def test_folder_resize_crops_the_centre_and_averages(tmp_path: Path) -> None:
    pixels = noise(0, 8, 12)
    put(tmp_path / "a.png", pixels)
    data = folder(tmp_path, resize=4)
    mean = pixels[:, 2:10].reshape(4, 2, 4, 2).mean(axis=(1, 3))
    assert data.filter == "box" and data.shape == (1, 4, 4)
    assert np.abs((everything(data)[0, 0].numpy() + 1) * 127.5 - mean).max() <= 1 + 1e-4  # Pillow rounds twice
    assert folder(tmp_path, resize=3).filter == "lanczos" and folder(tmp_path).filter is None
    stretched = folder(tmp_path, resize=4, centre_crop=False)
    mean = pixels.reshape(4, 2, 4, 3).mean(axis=(1, 3))
    assert np.abs((everything(stretched)[0, 0].numpy() + 1) * 127.5 - mean).max() <= 1 + 1e-4  # Pillow rounds twice


def test_folder_channels(tmp_path: Path) -> None:
    put(tmp_path / "grey.png", noise(0, 4, 4))
    put(tmp_path / "deep.png", np.full((4, 4), 40_000, dtype=np.uint16))
    data = folder(tmp_path)
    assert data.shape == (1, 4, 4)
    assert data.take(torch.tensor([0])).x[0, 0, 0, 0] == pytest.approx((40_000 >> 8) / 127.5 - 1)
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    put(tmp_path / "clear.png", clear)
    data = folder(tmp_path)
    assert data.shape == (3, 4, 4)
    assert (data.take(torch.tensor([0])).x == 1).all()
    assert folder(tmp_path, channels=1).shape == (1, 4, 4)
    with pytest.raises(InputError, match="channels 2"):
        folder(tmp_path, channels=2)


def test_folder_turns_photographs(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "turned.jpg", noise(0, 8, 16, 3), exif=exif)
    data = folder(tmp_path)
    assert data.shape == (3, 16, 8) and everything(data).shape == (1, 3, 16, 8)


def test_folder_classes(tmp_path: Path) -> None:
    for name in ("10", "9", "2"):
        put(tmp_path / "n" / name / "deep" / "a.png", noise(int(name), 4, 4))
    assert folder(tmp_path / "n").class_names == ["2", "9", "10"]
    put(tmp_path / "n" / "loose.png", noise(0, 4, 4))
    with pytest.raises(InputError, match=r"loose\.png.*beside the 3 class folders"):
        folder(tmp_path / "n")
    put(tmp_path / "single" / "images" / "a.png", noise(0, 4, 4))
    assert folder(tmp_path / "single").classes == 0


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0 images accepted, it holds no files"):
        folder(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError) as error:
        folder(tmp_path)
    assert tmp_path.name in one_line(error) and "1 rejected (1 not an image: a.txt)" in str(error.value)
    with pytest.raises(InputError, match="no such folder"):
        folder(tmp_path / "missing")


def test_folder_changed_after_the_check(pictures: Path) -> None:
    data = folder(pictures)
    (pictures / "cat" / "0.png").unlink()
    with pytest.raises(InputError, match=r"cat/0\.png can no longer be decoded"):
        data.take(torch.tensor([0]))
    put(pictures / "cat" / "1.png", noise(0, 4, 4, 3))
    with pytest.raises(InputError, match=r"cat/1\.png is \(3, 4, 4\), but was \(3, 6, 8\)"):
        data.take(torch.tensor([1]))


# ---- Parquet


def test_parquet_in_the_hub_schema(tmp_path: Path) -> None:
    rows = [encoded(noise(i, 16, 16, 3)) for i in range(10)]
    path = write_parquet(tmp_path / "t.parquet", rows, [i % 3 for i in range(10)], ["plane", "car", "bird", "cat"])
    data = parquet(path, resize=8)
    assert (data.name, data.shape, data.classes, data.filter) == ("t", (3, 8, 8), 4, "box")
    assert data.class_names == ["plane", "car", "bird", "cat"]
    assert data.frequencies == pytest.approx([0.4, 0.3, 0.3, 0.0])
    want = np.stack([noise(i, 16, 16, 3).reshape(8, 2, 8, 2, 3).mean(axis=(1, 3)) for i in range(10)])
    got = (everything(data).permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert np.abs(got - want).max() <= 1 + 1e-4  # Pillow rounds twice
    limited = parquet(path, limit=5)
    assert limited.take(torch.arange(5)).cond["label"].tolist() == [0, 2, 1, 0, 2]


def test_parquet_counts_bad_rows(tmp_path: Path) -> None:
    whole = encoded(noise(0, 40, 40, 3), "JPEG")
    rows = [whole, None, b"junk", whole[:500], whole, whole, whole]
    data = parquet(write_parquet(tmp_path / "t.parquet", rows, [0, 0, 0, 0, 7, None, 1], ["a", "b"]))
    assert data.report.rejected == {
        "no bytes in the row": ["row 1"],
        "not an image": ["row 2"],
        "truncated": ["row 3"],
        "label missing or out of range": ["row 4", "row 5"],
    }
    assert len(data) == 2 and data.take(torch.arange(2)).cond["label"].tolist() == [0, 1]
    with pytest.raises(InputError, match=r"0 images accepted, 1 rejected \(1 not an image: row 0\)"):
        parquet(write_parquet(tmp_path / "u.parquet", [b"junk"]))


@pytest.mark.parametrize(
    ("labels", "column", "names"),
    [
        (None, "label", []),
        ([-1, -1], "label", []),
        ([1, 0], "fine_label", ["0", "1"]),
        (["dog", "cat"], "labels", ["cat", "dog"]),
        ([1, 0], "other", []),
    ],
)
def test_parquet_label_columns(tmp_path: Path, labels: list[object] | None, column: str, names: list[str]) -> None:
    rows: list[bytes | None] = [encoded(noise(i, 8, 8)) for i in range(2)]
    data = parquet(write_parquet(tmp_path / "t.parquet", rows, labels, image="img", label=column))
    assert data.class_names == names and data.classes == len(names)
    want = {"label": [1, 0]} if names else {}
    assert {k: v.tolist() for k, v in data.take(torch.arange(2)).cond.items()} == want


def test_parquet_folder_and_splits(tmp_path: Path) -> None:
    for i, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]):
        write_parquet(tmp_path / "data" / f"{name}.parquet", [encoded(noise(i, 8, 8))], [i])
    with pytest.raises(InputError, match=r"several splits \(test, train\)"):
        load_data(str(tmp_path))
    train = load_data(str(tmp_path), split="train")
    assert len(train) == 2 and train.take(torch.arange(2)).cond["label"].tolist() == [0, 1]
    with pytest.raises(InputError, match="no file of the split 'dev', expected one of test, train"):
        load_data(str(tmp_path), split="dev")


def test_parquet_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="not a readable Parquet file") as error:
        load_data(str(tmp_path / "bad.parquet"))
    one_line(error)
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "text.parquet")
    with pytest.raises(InputError, match="columns are text, label, expected one named image or img"):
        parquet(tmp_path / "text.parquet")
    path = write_parquet(tmp_path / "f.parquet", [encoded(noise(0, 8, 8))], [0.5])
    with pytest.raises(InputError, match="'label' is double, expected whole numbers or strings"):
        parquet(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'fewstep\[hf\]'"):
        parquet(path)
