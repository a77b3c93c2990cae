"""Data sets: taking depends on ids only, fingerprints, digits, arrays, and how `load_data` finds a loader."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data import Data, Images, LoadReport, array, digits, folder, load_data, parquet, stacked_digits
from fewstep.data.base import check_ids, deviation, spaced
from fewstep.errors import InputError
from image_files import encoded, everything, make_pictures, noise, one_line, put, write_parquet


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "set")


@pytest.fixture
def every_kind(tmp_path: Path, pictures: Path) -> dict[str, Data]:
    np.savez(tmp_path / "a.npz", images=noise(0, 20, 8, 8, 3), labels=np.arange(20) % 4)
    return {
        "digits": digits(),
        "stacked": stacked_digits(300, labelled=True),
        "folder": folder(pictures),
        "uncached folder": folder(pictures, cache_bytes=0),
        "parquet": parquet(write_parquet(tmp_path / "p.parquet", [encoded(noise(i, 8, 8)) for i in range(9)], [0] * 9)),
        "array": array(tmp_path / "a.npz"),
    }


# ---- what all data sets have in common


def test_take_is_a_pure_function_of_the_ids(every_kind: dict[str, Data]) -> None:
    for name, data in every_kind.items():
        ids = torch.randint(len(data), (40,), generator=torch.Generator().manual_seed(0))
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda i, d=data: d.take(torch.tensor([i])), ids.tolist()))
        batch = data.take(ids)
        assert torch.equal(torch.cat([p.x for p in parts]), batch.x), name
        assert torch.equal(everything(data)[ids], batch.x), name
        assert torch.equal(torch.cat([p.cond["label"] for p in parts]), batch.cond["label"]), name
        assert batch.cond["label"].dtype == torch.int64
        assert data.take(ids[:0]).x.shape == (0, *data.shape), name


def test_frequencies_and_deviation(every_kind: dict[str, Data]) -> None:
    for name, data in every_kind.items():
        labels = data.take(torch.arange(len(data))).cond["label"]
        counted = torch.bincount(labels, minlength=data.classes).double() / len(data)
        assert data.frequencies == pytest.approx(counted.tolist()), name
        assert len(data.frequencies) == data.classes and sum(data.frequencies) == pytest.approx(1)
        assert data.std == pytest.approx(float(everything(data).double().std(correction=0)), rel=1e-6), name
        assert data.report.accepted == len(data)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([0, 5]), "id 5 does not exist, expected 0 to 4"),
        (torch.tensor([-1]), "id -1 does not exist"),
        (torch.tensor([0.0]), "torch.float32"),
        (torch.tensor(0), "one-dimensional"),
    ],
)
def test_bad_ids(ids: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_ids("digits", ids, 5)


def test_report_is_one_short_line() -> None:
    report = LoadReport(1797, {"truncated": ["c.png"], "not an image": ["a.txt", "b.txt"]})
    assert str(report) == "1797 images accepted, 3 rejected (2 not an image: a.txt, b.txt; 1 truncated: c.png)"
    assert str(LoadReport(1)) == "1 image accepted"
    assert "9 damaged: 0, 1, 2, and 6 more" in str(LoadReport(1, {"damaged": [str(i) for i in range(9)]}))


def test_spaced_keeps_every_part() -> None:
    assert spaced(10, None) == list(range(10)) and spaced(3, 99) == [0, 1, 2]
    assert spaced(10, 5) == [0, 2, 4, 6, 8]
    with pytest.raises(InputError, match="limit 0"):
        spaced(10, 0)


def test_deviation_is_measured_on_a_sample() -> None:
    data = digits()
    assert deviation(data, most=600) == pytest.approx(data.std, rel=0.02)


FINGERPRINTS = """
import sys
from fewstep.data import *
print(digits().fingerprint, stacked_digits().fingerprint, load_data(sys.argv[1]).fingerprint)
"""


def test_fingerprint_is_the_same_in_another_process(pictures: Path) -> None:
    here = [digits().fingerprint, stacked_digits().fingerprint, load_data(str(pictures)).fingerprint]
    there = subprocess.run(
        [sys.executable, "-c", FINGERPRINTS, str(pictures)], capture_output=True, text=True, check=True
    )
    assert there.stdout.split() == here
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in here)


def test_fingerprint_follows_the_content(pictures: Path, tmp_path: Path) -> None:
    first = folder(pictures)
    assert folder(pictures).fingerprint == first.fingerprint
    others = [folder(pictures, resize=4), folder(pictures, labels="none"), folder(pictures, channels=1)]
    put(pictures / "cat" / "0.png", noise(99, 6, 8, 3))
    others.append(folder(pictures))
    x = torch.from_numpy(noise(0, 5, 1, 8, 8))
    held = [Images("x", x), Images("x", x + 1), Images("x", x, scale=8.0), Images("x", x, torch.arange(5))]
    held += [stacked_digits(5), stacked_digits(6), stacked_digits(5, seed=1), stacked_digits(5, labelled=True)]
    assert len({d.fingerprint for d in [first, *others, *held]}) == 13
    assert Images("other name", x).fingerprint == held[0].fingerprint


# ---- digits


def test_digits() -> None:
    data = digits()
    assert (data.name, len(data), data.shape, data.classes) == ("digits", 1797, (1, 8, 8), 10)
    x = everything(data)
    assert x.min() == -1 and x.max() == 1 and torch.equal((x + 1) * 8, ((x + 1) * 8).round())
    part = digits(limit=100)
    assert len(part) == 100 and part.classes == 10


def test_stacked_digits_are_uniform_and_shown_by_their_channels() -> None:
    data = stacked_digits(50_000)
    assert (data.shape, data.classes, data.frequencies, len(data)) == ((3, 8, 8), 0, [], 50_000)
    ids = torch.arange(50_000)
    modes = data.modes(ids)
    counts = torch.bincount(modes, minlength=1000)
    assert counts.min() >= 20 and counts.max() <= 90
    # chi-square with 999 degrees of freedom: mean 999, deviation 45; the digits themselves are not quite uniform
    assert ((counts - 50.0) ** 2 / 50).sum() < 1300
    batch = data.take(ids[:200])
    assert batch.cond == {}
    single = everything(digits())
    labels = digits().take(torch.arange(1797)).cond["label"]
    for i in range(200):
        for channel, figure in enumerate(f"{int(modes[i]):03d}"):
            same = (single[:, 0] == batch.x[i, channel]).all(dim=(1, 2))
            assert int(figure) in labels[same].tolist()


def test_stacked_digits_depend_on_id_and_seed_only() -> None:
    ids = torch.arange(500)
    small, large = stacked_digits(500), stacked_digits(10**9)
    assert torch.equal(small.take(ids).x, large.take(ids).x)
    assert (small.modes(ids) == stacked_digits(500, seed=1).modes(ids)).double().mean() < 0.02
    labelled = stacked_digits(500, labelled=True)
    assert labelled.classes == 1000
    assert torch.equal(labelled.take(ids).cond["label"], small.modes(ids))
    with pytest.raises(InputError, match="size 0"):
        stacked_digits(0)


# ---- arrays


@pytest.mark.parametrize("shape", [(5, 8, 6), (5, 8, 6, 3), (5, 3, 8, 6), (5, 8, 6, 1), (5, 1, 8, 6)])
def test_array_layouts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = noise(0, *shape)
    np.save(tmp_path / "x.npy", pixels)
    np.save(tmp_path / "f.npy", (pixels / 127.5 - 1).astype(np.float64))
    first = pixels[:, None] if len(shape) == 3 else pixels if shape[1] in (1, 3) else pixels.transpose(0, 3, 1, 2)
    for name in ("x.npy", "f.npy"):
        data = load_data(str(tmp_path / name))
        assert data.shape == first.shape[1:] and data.classes == 0
        assert np.abs(everything(data).numpy() - (first / 127.5 - 1)).max() < 1e-6


def test_array_labels_and_limit(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", arr_0=noise(0, 12, 8, 8, 3), arr_1=np.arange(12) // 4)
    data = load_data(str(tmp_path / "adm.npz"), limit=3)
    assert len(data) == 3 and data.classes == 3
    assert data.take(torch.arange(3)).cond["label"].tolist() == [0, 1, 2]


def test_array_nan_names_the_indices(tmp_path: Path) -> None:
    x = noise(0, 9, 8, 8) / 127.5 - 1
    x[3, 0, 0], x[7, 2, 2] = np.nan, np.inf
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match=r"2 of 9 images hold NaN or infinity \(indices 3, 7\)") as error:
        array(tmp_path / "x.npy")
    one_line(error)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.linspace(-1, 2, 128).reshape(2, 8, 8)}, r"\[-1, 2\], expected \[-1, 1\]"),
        ({"images": np.linspace(0, 1, 128).reshape(2, 8, 8)}, r"\[0, 1\], expected \[-1, 1\] with some below 0"),
        ({"images": np.zeros((2, 8, 8), dtype=np.int64)}, "int64, expected uint8"),
        ({"images": noise(0, 2, 8)}, r"\(2, 8\), expected \(N, H, W\)"),
        ({"images": noise(0, 0, 8, 8)}, r"\(0, 8, 8\)"),
        ({"images": noise(0, 2, 8, 8, 4)}, "neither"),
        ({"images": noise(0, 2, 3, 8, 3)}, "could be"),
        ({"pictures": noise(0, 2, 8, 8)}, "holds the arrays pictures, expected one named 'images'"),
        ({"images": noise(0, 2, 8, 8), "labels": np.array([0.5, 1])}, "labels are float64"),
        ({"images": noise(0, 2, 8, 8), "labels": np.arange(3)}, r"labels are \(3,\), expected \(2,\)"),
        ({"images": noise(0, 2, 8, 8), "labels": np.array([-1, 0])}, "labels lie in -1 .. 0"),
        ({"images": np.array([{}], dtype=object)}, "not a readable NumPy file"),
    ],
)
def test_array_bad_input(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=words) as error:
        array(tmp_path / "x.npz")
    assert "x" in one_line(error)


def test_array_truncated_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=noise(0, 9, 8, 8))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable NumPy file"):
        array(tmp_path / "x.npz")


# ---- the way in


def test_load_data_finds_the_loader(pictures: Path, tmp_path: Path) -> None:
    assert load_data("digits", limit=50).name == "digits" and len(load_data("digits", resize=8)) == 1797
    assert len(load_data("stacked-digits", limit=50)) == 50 and len(load_data("stacked-digits")) == 50_000
    few = load_data(str(pictures), resize=4, limit=2)
    assert few.take(torch.arange(2)).cond["label"].tolist() == [0, 1]


def test_load_data_bad_input(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.zip").touch()
    write_parquet(pictures / "t.parquet", [encoded(noise(0, 8, 8))])
    for spec, options, words in [
        ("digitz", {}, r"unknown data set 'digitz': did you mean 'digits'.* path of a folder"),
        ("digits", {"resize": 16}, "8x8 and cannot be resized to 16"),
        ("digits", {"limit": 0}, "limit 0"),
        ("stacked-digits", {"limit": 0}, "size 0"),
        ("digits", {"split": "train"}, "split 'train' needs a folder"),
        (str(tmp_path / "notes.zip"), {}, "file of another type"),
        (str(pictures), {}, r"holds \.parquet and \.png files"),
        (str(pictures / "cat"), {"resize": 0}, "resize 0"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            load_data(spec, **options)
        one_line(error)
