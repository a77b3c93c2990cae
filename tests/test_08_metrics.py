"""Metrics against published implementations, independence of batches and order, the reference cache, bad input."""

from __future__ import annotations

import io
import itertools
import warnings
from contextlib import redirect_stdout

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fewstep.core.cond import Batch
from fewstep.errors import InputError
from fewstep.measure import (
    METRICS,
    Moments,
    digits_extractor,
    digits_metadata,
    evaluate,
    extractor,
    frechet,
    kid,
    label_accuracy,
    mode_coverage,
    prdc,
    snap_digits,
)
from fewstep.measure.features import WEIGHTS
from fewstep.measure.kernel import rows_of
from fewstep.measure.modes import classes, coverage_of, histogram
from real_pictures import Real

torch.set_num_threads(1)
RAW = load_digits()
DIGITS = torch.tensor(RAW.images, dtype=torch.float32)[:, None] / 8 - 1
LABELS = torch.tensor(RAW.target, dtype=torch.int64)
CLASSIFIER = digits_extractor()


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Correlated features with means and scales that differ between seeds."""
    g = draw(seed)
    mix = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    return torch.randn(n, dim, generator=g, dtype=torch.float64) @ mix + torch.randn(dim, generator=g) * 3


def stacked(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    pick = torch.randint(len(DIGITS), (n, 3), generator=draw(seed))
    return DIGITS[pick, 0], LABELS[pick] @ torch.tensor([100, 10, 1])


@pytest.fixture
def real() -> Real:
    return Real("digits", DIGITS)


# ---- Frechet distance


def sqrtm_frechet(a: np.ndarray, b: np.ndarray) -> float:
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_frechet_is_the_sqrtm_formula(dim: int) -> None:
    a, b = features(500, dim, 1), features(400, dim, 2)
    expected = sqrtm_frechet(a.numpy(), b.numpy())
    assert frechet(Moments.of(a), Moments.of(b), normalise=False) == pytest.approx(expected, rel=1e-8)
    scaled = 100 * expected / np.trace(np.cov(b.numpy(), rowvar=False))
    assert frechet(Moments.of(a), Moments.of(b)) == pytest.approx(scaled, rel=1e-8)


def test_frechet_of_singular_covariances_and_of_a_point() -> None:
    # Diagonal Gaussians have the closed form sum (m1 - m2)^2 + (s1 - s2)^2, with zeros among the deviations.
    a, b = torch.zeros(400, 3, dtype=torch.float64), torch.zeros(400, 3, dtype=torch.float64)
    unit = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(200)
    a[:, 0], b[:, 0], b[:, 1] = 3 * unit, unit + 2, unit.roll(1)[torch.randperm(400, generator=draw())] * 0
    variance = 400 / 399
    expected = 4 + (3 - 1) ** 2 * variance
    assert frechet(Moments.of(a), Moments.of(b), normalise=False) == pytest.approx(expected, rel=1e-8)
    real = features(300, 5)
    point = real.mean(0).repeat(50, 1)
    assert frechet(Moments.of(point), Moments.of(real)) == pytest.approx(100, rel=1e-8)
    assert frechet(Moments.of(real), Moments.of(real)) == pytest.approx(0, abs=1e-8)


def torchmetrics_pair(kind: str, real: torch.Tensor, fake: torch.Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Flat(torch.nn.Module):
        num_features = 16

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    if kind == "fid":
        metric = FrechetInceptionDistance(feature=Flat(), normalize=True).set_dtype(torch.float64)
    else:
        metric = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=len(real), normalize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric.update(real.reshape(-1, 1, 4, 4), real=True)
        metric.update(fake.reshape(-1, 1, 4, 4), real=False)
        value = metric.compute()
    return float(value if kind == "fid" else value[0])


def test_frechet_and_kid_equal_torchmetrics() -> None:
    real, fake = features(600, 16, 3), features(600, 16, 4)
    ours = frechet(Moments.of(fake), Moments.of(real), normalise=False)
    assert ours == pytest.approx(torchmetrics_pair("fid", real, fake), rel=1e-5)
    assert kid(fake, real) == pytest.approx(torchmetrics_pair("kid", real, fake), rel=1e-10)
    assert kid(fake, real, subset_size=600) == kid(fake, real)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=6), st.randoms(use_true_random=False))
def test_moments_depend_on_no_split_and_no_order(cuts: list[int], random: object) -> None:
    whole = features(200, 12) + 50
    expected = Moments.of(whole)
    edges = [0, *sorted(cuts), 200]
    parts = [Moments(12).update(whole[a:b]) for a, b in itertools.pairwise(edges)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    merged = Moments(12)
    for part in parts:
        merged.merge(part)
    assert merged.n == 200
    assert (merged.mean - expected.mean).abs().max() <= 1e-10
    assert (merged.covariance() - expected.covariance()).abs().max() <= 1e-10
    assert (expected.covariance() - whole.T.cov()).abs().max() <= 1e-10


def reduce_share(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    moments = Moments(6)
    if rank == 0:
        moments.update(features(101, 6)[:70])
    else:
        moments.update(features(101, 6)[70:])
    moments.all_reduce().save(f"{folder}/{rank}.npz")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path) -> None:
    mp.start_processes(reduce_share, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = Moments.of(features(101, 6))
    for rank in range(2):
        got = Moments.load(tmp_path / f"{rank}.npz")
        assert got.n == 101
        assert (got.mean - expected.mean).abs().max() <= 1e-10
        assert (got.covariance() - expected.covariance()).abs().max() <= 1e-10


def test_moments_file(tmp_path) -> None:
    moments = Moments.of(features(50, 4))
    moments.save(tmp_path / "m.npz")
    again = Moments.load(tmp_path / "m.npz")
    assert again.n == 50
    assert (again.scatter - moments.scatter).abs().max() <= 1e-10
    np.savez(tmp_path / "foreign.npz", mu=moments.mean.numpy(), sigma=moments.covariance().numpy())
    assert Moments.load(tmp_path / "foreign.npz", n=50).n == 50
    with pytest.raises(InputError, match="does not state its sample count: pass n="):
        Moments.load(tmp_path / "foreign.npz")
    with pytest.raises(InputError, match=r"no file .*absent\.npz"):
        Moments.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="not a readable"):
        Moments.load(tmp_path / "pickled.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(InputError, match="is a single array"):
        Moments.load(tmp_path / "single.npy")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3), n=np.array(5))
    with pytest.raises(InputError, match="lacks mu, sigma"):
        Moments.load(tmp_path / "other.npz")


# ---- KID, precision, recall, density, coverage


def test_kid_of_unequal_sizes_and_in_blocks(monkeypatch) -> None:
    a, b = features(37, 5, 1), features(61, 5, 2)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / 5 + 1) ** 3

    def off_diagonal(x: torch.Tensor) -> torch.Tensor:
        return kernel(x, x)[~torch.eye(len(x), dtype=torch.bool)].mean()

    expected = off_diagonal(a) + off_diagonal(b) - 2 * kernel(a, b).mean()
    assert kid(a, b) == pytest.approx(expected.item(), rel=1e-10)
    monkeypatch.setattr("fewstep.measure.kernel.BLOCK", 7)
    assert kid(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_tiles_of_many_features_change_nothing() -> None:
    assert [rows_of(dim) for dim in (64, 1024, 2048, 100_000)] == [512, 512, 256, 64]
    a, b = torch.randn(150, 8192, generator=draw(1)), torch.randn(130, 8192, generator=draw(2)) * 0.99
    one, many = prdc(a, b, block=150), prdc(a, b)
    assert many == one and rows_of(8192) == 64
    x, y = a.double(), b.double()
    inside, across = ((x @ x.T / 8192 + 1) ** 3, (x @ y.T / 8192 + 1) ** 3)
    real = (y @ y.T / 8192 + 1) ** 3
    whole = [(m.sum() - m.trace()) / (len(m) * (len(m) - 1)) for m in (inside, real)]
    assert kid(a, b) == pytest.approx(float(whole[0] + whole[1] - 2 * across.mean()), rel=1e-9)


def test_kid_subsets_are_keyed_and_near_the_whole() -> None:
    a, b = features(400, 8, 5), features(500, 8, 5).roll(1, 0) * 1.1
    values = [kid(a, b, subset_size=200, subsets=40, seed=seed) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert values[2] == pytest.approx(kid(a, b), rel=0.2)


def test_kid_has_no_bias() -> None:
    g = draw(3)
    pool = torch.randn(200, 40, 6, generator=g, dtype=torch.float64)
    values = torch.tensor([kid(x[:20], x[20:]) for x in pool], dtype=torch.float64)
    assert values.mean().abs() < 4 * values.std() / 200**0.5
    assert values.min() < 0 < values.max()


@pytest.mark.parametrize(("k", "block"), [(3, 50), (5, 1024)])
def test_precision_recall_equal_prdc(k: int, block: int) -> None:
    from prdc import compute_prdc

    fake = torch.randn(300, 4, generator=draw(1), dtype=torch.float64)
    real = torch.randn(350, 4, generator=draw(2), dtype=torch.float64) + torch.tensor([2.0, 0, 0, 0])
    with redirect_stdout(io.StringIO()):
        expected = compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    got = prdc(fake, real, k=k, block=block)
    assert set(got) == set(expected)
    assert all(0.05 < got[name] < 0.95 for name in ("precision", "recall", "coverage"))
    assert max(abs(got[name] - expected[name]) for name in got) <= 1e-12


def test_a_generator_of_few_pictures_has_no_recall() -> None:
    real = CLASSIFIER(DIGITS)
    few = prdc(real[:50].repeat(20, 1), real)
    assert few["precision"] == 1
    assert few["recall"] == 0
    assert few["coverage"] < 0.2


# ---- packaged network, labels, modes


def test_packaged_weights_on_the_held_out_digits() -> None:
    _, held_out = train_test_split(np.arange(1797), test_size=360, random_state=0, stratify=RAW.target)
    accuracy = label_accuracy(DIGITS[held_out], LABELS[held_out], CLASSIFIER)
    assert accuracy >= 0.985
    assert digits_metadata()["held_out_accuracy"] == f"{accuracy:.4f}"
    assert WEIGHTS.stat().st_size <= 400_000


def test_features_and_probabilities() -> None:
    one = CLASSIFIER(DIGITS[:8])
    assert one.shape == (8, 64)
    assert one.dtype == torch.float32
    assert not one.requires_grad
    probabilities = CLASSIFIER.classify(DIGITS[:8]).exp().sum(1)
    assert (probabilities - 1).abs().max() <= 1e-5
    assert (CLASSIFIER(DIGITS[:200])[:1] - CLASSIFIER(DIGITS[:1])).abs().max() <= 1e-4
    images, _ = stacked(8)
    three = extractor("stacked-digits", (3, 8, 8))
    expected = torch.cat([CLASSIFIER(images[:, c : c + 1]) for c in range(3)], 1)
    assert (three(images) - expected).abs().max() <= 1e-4
    assert len({CLASSIFIER.fingerprint, three.fingerprint, digits_extractor(snap=False).fingerprint}) == 3


def test_snapping_hides_what_is_below_a_grey_level() -> None:
    assert torch.equal(snap_digits(DIGITS), DIGITS)
    noisy = DIGITS[:50] + (torch.rand(50, 1, 8, 8, generator=draw()) - 0.5) * 0.1
    assert torch.equal(CLASSIFIER(noisy), CLASSIFIER(DIGITS[:50]))
    assert not torch.equal(digits_extractor(snap=False)(noisy), CLASSIFIER(DIGITS[:50]))


def test_modes_of_real_and_of_collapsed_stacked_digits() -> None:
    three = extractor("stacked-digits", (3, 8, 8))
    images, labels = stacked(4000)
    found = classes(images, three)
    assert (found == labels).double().mean() > 0.99
    real = coverage_of(histogram(found, three))
    assert real.modes >= 960
    assert real.kl < 0.2
    assert coverage_of(histogram(found, three), histogram(found, three)).kl < 0.02
    assert label_accuracy(images[:300], labels[:300], three) > 0.97
    assert label_accuracy(images[:300], labels[:300].flip(0), three) < 0.05
    collapsed = mode_coverage(images[:7].repeat(80, 1, 1, 1), three)
    assert collapsed.modes == len(set(found[:7].tolist()))
    assert collapsed.kl == pytest.approx(np.log(1000 / 7), rel=1e-6)


# ---- evaluate


def test_names_carry_the_sample_count_and_batches_do_not_matter(real: Real, tmp_path) -> None:
    # Mirrored, because copies of real pictures tie with the balls' radii and rounding decides ties.
    images, labels = DIGITS[:700].flip(3) + 0.01, LABELS[:700]
    whole = evaluate(images, real, labels=labels, cache=tmp_path)
    assert list(whole) == [f"{name}@700" for name, metric in METRICS.items() if metric.default and name != "modes"]
    pairs = zip(images.split(33), labels.split(33), strict=True)
    parts = evaluate(pairs, real, cache=tmp_path, batch=17)
    assert max(abs(whole[name] - parts[name]) for name in whole) <= 1e-4
    batches = (Batch(x, {"label": y}) for x, y in zip(images.split(100), labels.split(100), strict=True))
    assert evaluate(batches, real, metrics=["accuracy"], cache=tmp_path) == {"accuracy@700": whole["accuracy@700"]}
    assert "accuracy@700" not in evaluate(images, real, cache=tmp_path)


def test_scores_are_those_of_the_parts(real: Real, tmp_path) -> None:
    images = DIGITS[300:900].flip(3)
    got = evaluate(images, real, labels=LABELS[300:900], cache=tmp_path)
    fake, true = CLASSIFIER(images), CLASSIFIER(DIGITS)
    expected = {"fd": frechet(Moments.of(fake), Moments.of(true)), "kid": kid(fake, true), **prdc(fake, true)}
    expected["pixel_fd"] = frechet(Moments.of(images.flatten(1)), Moments.of(DIGITS.flatten(1)))
    expected["accuracy"] = label_accuracy(images, LABELS[300:900], CLASSIFIER)
    assert {f"{name}@600" for name in expected} == set(got)
    assert max(abs(got[f"{name}@600"] / value - 1) for name, value in expected.items()) <= 1e-4
    assert got["fd@600"] > 5
    plain = evaluate(images, real, metrics=["fd"], cache=tmp_path, normalise=False)
    trace = Moments.of(true).covariance().trace().item()
    assert plain["fd@600"] == pytest.approx(got["fd@600"] * trace / 100, rel=1e-4)


def test_stacked_digits_report_modes(tmp_path) -> None:
    real = Real("stacked-digits", stacked(1500)[0])
    got = evaluate(stacked(500, 1)[0], real, cache=tmp_path, metrics=["fd", "modes"])
    assert set(got) == {"fd@500", "modes@500", "modes_kl@500"}
    assert 300 < got["modes@500"] < 450


def test_other_data_bring_their_extractor(tmp_path) -> None:
    real = Real("photos", torch.rand(60, 3, 6, 6, generator=draw()) * 2 - 1)
    images = torch.rand(40, 3, 6, 6, generator=draw(1)) * 2 - 1
    got = evaluate(images, real, extractor="pixel", cache=tmp_path)
    assert list(got) == [f"{n}@40" for n in ("fd", "pixel_fd", "kid", "precision", "recall", "density", "coverage")]
    with pytest.raises(InputError, match="no packaged extractor knows data 'photos'"):
        evaluate(images, real, cache=tmp_path)
