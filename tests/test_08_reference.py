"""The cached statistics of real data, files of statistics, folders that change while they are read, single passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data import load_data
from fewstep.errors import InputError
from fewstep.measure import (
    Moments,
    Reference,
    Statistics,
    Target,
    cache_folder,
    cache_path,
    clean_fid_name,
    digits_extractor,
    evaluate,
)
from fewstep.measure.generated import Generated
from fewstep.measure.stream import Watched
from fewstep.report.compare import Measure
from real_pictures import Real

torch.set_num_threads(1)
DATA = load_data("digits")
DIGITS = DATA.take(torch.arange(len(DATA))).x
CLASSIFIER = digits_extractor()


@pytest.fixture
def real() -> Real:
    return Real("digits", DIGITS)


def test_reference_cache_hit_miss_and_corruption(real: Real, tmp_path) -> None:
    first = Reference.of(real, CLASSIFIER, cache=tmp_path)
    assert real.taken == 1797
    assert len(list(tmp_path.iterdir())) == 1
    second = Reference.of(real, CLASSIFIER, cache=tmp_path)
    assert real.taken == 1797
    assert (first.moments.scatter - second.moments.scatter).abs().max() <= 1e-8
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.classes, second.classes)
    Reference.of(real, digits_extractor(snap=False), cache=tmp_path)
    Reference.of(Real("digits", DIGITS * 0.5), CLASSIFIER, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    path = cache_path(real, CLASSIFIER, cache=tmp_path)
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    for damaged in (b"", b"not a file", content[:middle], flipped):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="'digits' is computed again: .* is not a readable"):
            repaired = Reference.of(real, CLASSIFIER, cache=tmp_path)
        assert torch.equal(repaired.features, first.features)
        assert path.read_bytes() == content
    np.savez(path, **Moments.of(first.features[:100]).arrays())
    with pytest.warns(UserWarning, match="does not hold 1797 pictures"):
        Reference.of(real, CLASSIFIER, cache=tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".npz"]


def test_reference_keeps_at_most_what_is_asked(real: Real, tmp_path) -> None:
    whole = Reference.of(real, CLASSIFIER, cache=tmp_path)
    some = Reference.of(real, CLASSIFIER, keep=100, cache=tmp_path)
    none = Reference.of(real, CLASSIFIER, keep=0, cache=tmp_path)
    assert none.features is None
    assert torch.equal(some.features, whole.features[torch.arange(100) * 1797 // 100])
    for other in (some, none):
        assert (other.moments.scatter - whole.moments.scatter).abs().max() <= 1e-8
    assert torch.equal(Reference.of(real, CLASSIFIER, keep=100, cache=tmp_path).features, some.features)


def test_cache_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "from-environment"))
    assert cache_folder() == tmp_path / "from-environment"
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.delenv("FEWSTEP_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "fewstep")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose a folder you can write to"):
        Reference.of(Real("digits", DIGITS[:10]), CLASSIFIER, cache=tmp_path / "file")


# ---- files of statistics


class Six:
    """Six features by sums, under the name and resize of a network that other tools know."""

    dim, weights = 6, None

    def __init__(self, name: str = "inception", resize: str = "clean") -> None:
        self.name, self.resize, self.fingerprint = name, resize, f"six {name} {resize}"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, 10:16]


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("edm-32x32.npz", np.savez),
        ("pytorch_fid.npz", np.savez_compressed),
        ("birds_clean_custom_na.npz", np.savez_compressed),
    ],
)
def test_statistics_of_other_tools(name: str, save, tmp_path) -> None:
    moments = Moments.of(Six()(DIGITS))
    save(tmp_path / name, mu=moments.mean.numpy(), sigma=moments.covariance().numpy())
    got = evaluate(DIGITS[:300].flip(3), tmp_path / name, metrics="fd", extractor=Six(), normalise=False)
    wanted = evaluate(
        DIGITS[:300].flip(3), Real("d", DIGITS), metrics="fd", extractor=Six(), normalise=False, cache=tmp_path
    )
    # Pixels that are always black make the covariance singular, where a root is good to half the digits.
    assert got["fd@300"] == pytest.approx(wanted["fd@300"], rel=1e-7)
    assert got.facts["reference_n"] is None


def test_files_of_clean_fid_say_how_they_were_made(tmp_path) -> None:
    statistics = Statistics.of(Moments.of(Six()(DIGITS)), Six(), "birds")
    assert clean_fid_name("birds", Six()) == "birds_clean_custom_na.npz"
    name = clean_fid_name("birds", Six(resize="tf1"), split="train", side=32)
    assert name == "birds_legacy_tensorflow_train_32.npz"
    # What clean-fid writes holds nothing of ours, so the name decides.
    np.savez(tmp_path / name, mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    with pytest.raises(InputError, match=r"was made with resize 'tf1', and extractor 'inception' has 'clean'"):
        evaluate(DIGITS[:30], tmp_path / name, metrics="fd", extractor=Six())
    assert Statistics.load(tmp_path / name).made.data == "birds"
    np.savez(tmp_path / "birds_clean_custom_na_kid.npz", feats=np.zeros((9, 6)))
    with pytest.raises(InputError, match=r"holds features, which clean-fid keeps for KID"):
        evaluate(DIGITS[:30], tmp_path / "birds_clean_custom_na_kid.npz", metrics="fd", extractor=Six())


def test_statistics_that_are_none(tmp_path) -> None:
    for arrays, message in (
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, r"has mu \(6,\) and sigma \(5, 5\)"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "not finite"),
        ({"mu": np.zeros(6)}, "lacks sigma, it holds mu"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "fewstep": np.array("{")}, "garbles what fewstep wrote"),
    ):
        np.savez(tmp_path / "s.npz", **arrays)
        with pytest.raises(InputError, match=message):
            evaluate(DIGITS[:30], tmp_path / "s.npz", metrics="fd", extractor=Six())


# ---- folders


def written(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        levels = ((image[0] + 1) * 127.5).round().byte().numpy()
        Image.fromarray(levels).save(folder / f"{i:03}.png")
    return folder


def test_a_folder_of_pictures_counts_like_a_tensor(tmp_path) -> None:
    images = ((DIGITS[:40].flip(3) + 1) * 127.5).round() / 127.5 - 1
    folder = written(tmp_path / "made", images)
    got = evaluate(folder, DATA, metrics=("fd", "kid"), cache=tmp_path)
    wanted = evaluate(images, DATA, metrics=("fd", "kid"), cache=tmp_path)
    assert list(got) == ["fd@40", "kid@40"]
    assert got["fd@40"] == pytest.approx(wanted["fd@40"], rel=1e-4)


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path) -> None:
    folder = written(tmp_path / "made", DIGITS[:12])

    class Writing(Six):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            (folder / "999.png").write_bytes(b"late")
            return super().__call__(images)

    Reference.of(DATA, Six(), cache=tmp_path)
    with pytest.raises(InputError, match=r"changed while it was read: .*999\.png appeared"):
        evaluate(folder, DATA, metrics="fd", extractor=Writing(), cache=tmp_path)
    watched = Watched(folder)
    watched.check()
    (folder / "000.png").unlink()
    with pytest.raises(InputError, match=r"000\.png vanished"):
        watched.check()


# ---- one pass of the network for all metrics


class Counting:
    """The sums of rows as features; counts the pictures that it sees."""

    name, dim, fingerprint = "counting", 8, "counting"

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.count += len(images)
        return images.sum((1, 3))


class Parts(list):
    """Batches of pictures, numbered as the files of a run are."""

    def ids(self, at: int) -> torch.Tensor:
        return torch.arange(at * 20, at * 20 + len(self[at]))


def test_the_network_sees_each_picture_once(real: Real, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    network, watched = Counting(), Moments(8)
    made = DIGITS[:90].flip(3)
    scores = evaluate(
        made, real, extractor=network, batch=20, intervals=True, watch=lambda rows, ids: watched.update(rows)
    )  # fmt: skip
    assert {"fd@90", "kid@90", "recall@90", "pixel_fd@90"} <= scores.keys()
    assert network.count == 90 + 1797
    target = Target.of(Reference.of(real, network).moments)
    assert target.distance(watched) == pytest.approx(scores["fd@90"], rel=1e-10)
    # The same in a comparison, with the real side computed anew.
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "other"))
    network.count = 0
    measure = Measure.of(real, extractor=network, n=90, batch=20)
    fd, without, others = measure.scores(Parts(made.split(20)), None)
    assert network.count == 90 + 1797
    assert fd == pytest.approx(scores["fd@90"], rel=1e-10) and len(without) == 10
    assert others["recall@90"] == scores["recall@90"]
    alone = Measure.of(real, extractor=network, metrics=["fd"], n=90, batch=20).scores(Parts(made.split(20)), None)
    assert alone[0] == pytest.approx(fd, rel=1e-10) and not alone[2]


def test_pixels_alone_still_show_the_features(real: Real, tmp_path) -> None:
    network, ids = Counting(), []
    evaluate(
        DIGITS[:30], real, metrics=["pixel_fd"], extractor=network, batch=20, cache=tmp_path,
        watch=lambda rows, own: ids.append((rows.shape, own)),
    )  # fmt: skip
    assert [shape for shape, _ in ids] == [(20, 8), (10, 8)] and network.count == 30
    assert torch.equal(torch.cat([own for _, own in ids]), torch.arange(30))


def test_bad_pictures_are_refused_before_the_real_side_is_computed(real: Real, tmp_path) -> None:
    with pytest.raises(InputError, match="hold NaN"):
        evaluate(DIGITS[:30] * torch.nan, real, extractor=Counting(), cache=tmp_path)
    assert real.taken == 0


def test_real_side_keeps_no_moments_that_no_metric_needs(real: Real, tmp_path) -> None:
    for names, dim in ((["recall"], None), (["recall", "fd"], 8)):
        sides = Generated(Counting(), names, real.shape).sides(real, tmp_path)
        assert sides.reference.features.shape == (1797, 8) and sides.reference.moments.n == 0
        assert (sides.target is None) == (dim is None)
    assert len(list(tmp_path.iterdir())) == 1
