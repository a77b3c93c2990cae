"""What is kept of a stream, its spread over processes, errors, extrapolation, copies, classes, sliced distance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from fewstep.core.cond import Batch
from fewstep.data import load_data
from fewstep.errors import InputError
from fewstep.measure import (
    InceptionScore,
    Moments,
    PixelExtractor,
    Target,
    cmmd,
    copies,
    discrepancy,
    diversity,
    evaluate,
    evaluate_by_class,
    frechet_error,
    frechet_infinity,
    sliced_wasserstein,
)
from fewstep.measure.keep import Kept

torch.set_num_threads(1)
DIGITS = load_data("digits")
REAL = DIGITS.take(torch.arange(len(DIGITS)))
X, LABELS = REAL.x, REAL.cond["label"]
PAIRS = ("kid", "precision", "recall", "density", "coverage", "sliced_wasserstein")


class Noise:
    """A few pictures of noise: no two distances are equal, so rounding decides nothing."""

    name, shape, fingerprint = "noise", (1, 4, 4), "noise"

    def __init__(self, n: int = 150, seed: int = 0) -> None:
        self.images = torch.rand(n, *self.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def take(self, ids: torch.Tensor) -> Batch:
        return Batch(self.images[ids], {})


MADE = Noise(201, 1).images * 0.8


def cloud(n: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- any batches, any processes


@pytest.mark.parametrize("keep", [90, 10_000])
def test_no_score_depends_on_the_batches(keep: int, tmp_path) -> None:
    # The extrapolation needs 100 pictures.
    names = ("fd", *PAIRS) if keep < 100 else ("fd", *PAIRS, "fd_infinity")

    def scores(images, batch: int) -> dict[str, float]:
        return evaluate(images, Noise(), metrics=names, extractor="pixel", batch=batch, keep=keep, cache=tmp_path)

    whole = scores(MADE, 512)
    assert list(whole) == ["fd@201", *(f"{name}@{min(keep, 201)}" for name in names[1:])]
    for parts in (scores(MADE, 7), scores(MADE.split(31), 16)):
        assert max(abs(whole[name] - parts[name]) for name in whole) <= 1e-10


def share(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    got = evaluate(
        MADE[rank::2].split(20), Noise(), metrics=("fd", "pixel_fd", *PAIRS), extractor="pixel", keep=90,
        intervals=True, joined=True, cache=folder,
    )  # fmt: skip
    (Path(folder) / f"{rank}.json").write_text(json.dumps([got, got.errors, got.facts]))
    torch.distributed.destroy_process_group()


def test_two_processes_score_as_one(tmp_path) -> None:
    mp.start_processes(share, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = evaluate(
        MADE, Noise(), metrics=("fd", "pixel_fd", *PAIRS), extractor="pixel", keep=90, intervals=True, cache=tmp_path
    )
    for rank in range(2):
        values, errors, facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert values.keys() == expected.keys()
        assert max(abs(values[name] - expected[name]) for name in values) <= 1e-10
        assert errors.keys() == expected.errors.keys() >= {"fd@201", "kid@90", "recall@90"}
        assert max(abs(errors[name] - expected.errors[name]) for name in errors) <= 1e-10
        assert facts == expected.facts


def test_what_is_kept_depends_on_no_batch_and_no_order() -> None:
    rows, ids = cloud(500), torch.arange(500)
    whole = Kept(60).add(rows, ids).in_order()
    parts = Kept(60)
    for pick in torch.randperm(500, generator=torch.Generator().manual_seed(1)).split(37):
        parts.add(rows[pick], pick)
    assert torch.equal(parts.in_order(), whole)
    assert torch.equal(Kept(500).add(rows, ids).in_order(), rows)


# ---- scores


def test_inception_score_is_the_published_formula() -> None:
    logs = cloud(203, 5).log_softmax(1)
    values = []
    for split in range(10):
        p = logs[split::10].exp()
        values.append(float((p * (p / p.mean(0)).log()).sum(1).mean().exp()))
    score, ids = InceptionScore(), torch.arange(203)
    for pick in torch.randperm(203, generator=torch.Generator().manual_seed(2)).split(50):
        score.update(logs[pick], ids[pick])
    assert score.score().value == pytest.approx(np.mean(values), rel=1e-10)
    assert score.score().error == pytest.approx(np.std(values, ddof=1) / 10**0.5, rel=1e-10)
    with pytest.raises(InputError, match="Inception score of 3 pictures"):
        InceptionScore().update(logs[:3], ids[:3]).score()


def test_extrapolation_finds_the_distance_of_gaussians() -> None:
    # N(0, 1) against N(0.3, 1.2^2) in each of 4 places: 0.3^2 + 0.2^2 each.
    target = Target(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    found = [frechet_infinity(cloud(2000, 4, seed) * 1.2 + 0.3, target, normalise=False) for seed in range(8)]
    plain = [target.distance(Moments.of(cloud(200, 4, seed) * 1.2 + 0.3), normalise=False) for seed in range(8)]
    assert np.mean(found) == pytest.approx(0.52, abs=0.03)
    assert np.mean(plain) > 0.52


def test_intervals_hold_the_value(tmp_path) -> None:
    scores = evaluate(X[:200].flip(3), DIGITS, metrics=("fd", "kid"), intervals=True, cache=tmp_path)
    for name in ("fd@200", "kid@200"):
        low, high = scores.interval(name)
        assert low < scores[name] < high
    with pytest.raises(InputError, match="no error of 'fd@200' is known"):
        evaluate(X[:200].flip(3), DIGITS, metrics="fd", cache=tmp_path).interval("fd@200")


def test_copies_are_found() -> None:
    pixel = PixelExtractor((1, 8, 8))
    found = copies(X[100:140], DIGITS, pixel)
    assert found.generated.id.tolist() == list(range(100, 140))
    assert found.generated.distance.max() == 0
    assert found.nearer > 0.99
    assert found.z > 10
    assert found.near == 1
    assert copies(X[100:140] * 0, DIGITS, pixel).nearer < 0.1


def test_sliced_distance_along_one_axis_is_exact() -> None:
    a, b = cloud(30, 1, 1), cloud(20, 1, 2)
    x, y = a[:, 0].sort().values.repeat_interleave(20), b[:, 0].sort().values.repeat_interleave(30)
    wanted = (x - y).square().mean().sqrt().item()
    assert sliced_wasserstein(a, b, directions=3) == pytest.approx(wanted, rel=1e-12)
    assert sliced_wasserstein(a, a) == 0


def test_cmmd_is_the_published_formula() -> None:
    a, b = (torch.nn.functional.normalize(cloud(n, 5, n), dim=1) for n in (40, 30))
    kernel = [(-torch.cdist(x, y).square() / 200).exp().mean() for x, y in ((a, a), (b, b), (a, b))]
    assert cmmd(a, b).value == pytest.approx(float(1000 * (kernel[0] + kernel[1] - 2 * kernel[2])), rel=1e-6)
    with pytest.raises(InputError, match="expected 1: use the clip extractor"):
        cmmd(a * 2, b)


def test_errors_are_those_of_repeated_draws() -> None:
    real = cloud(4000, 4, 99)
    target, fds, kids, said = Target.of(Moments.of(real)), [], [], []
    for seed in range(40):
        made = cloud(300, 4, seed) * 1.3 + 0.3
        fds.append(target.distance(Moments.of(made)))
        kids.append(discrepancy(made, real[:300]).value)
        if seed < 8:
            said.append((frechet_error(made, Moments.of(made), target), discrepancy(made, real[:300]).error))
    for values, told in ((fds, [s[0] for s in said]), (kids, [s[1] for s in said])):
        assert float(np.mean(told)) == pytest.approx(float(np.std(values)), rel=0.5)


def test_leaving_out_and_extrapolating() -> None:
    a = cloud(400, 4, 3)
    left, wanted = Moments.of(a).without(a[::10]), Moments.of(a[torch.arange(400) % 10 != 0])
    assert left.n == wanted.n
    assert (left.scatter - wanted.scatter).abs().max() < 1e-9
    target = Target.of(Moments.of(cloud(20000, 4, 5)))
    # Equal laws: the distance of few samples is too large, and the extrapolated one is nearer to 0.
    assert abs(frechet_infinity(a, target)) < target.distance(Moments.of(a))


def test_diversity_and_classes(tmp_path) -> None:
    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).flatten(1).square().mean(1)

    wanted = (X[0:100:2] - X[1:100:2]).square().mean((1, 2, 3)).double().mean().item()
    assert diversity(X[:100], distance).value == pytest.approx(wanted, rel=1e-6)
    assert diversity(X[:1].repeat(6, 1, 1, 1), distance).value == 0
    scores = evaluate_by_class(X[:300], DIGITS, labels=LABELS[:300], metrics=("fd", "accuracy"), cache=tmp_path)
    three = evaluate(
        X[:300][LABELS[:300] == 3], DIGITS, labels=LABELS[:300][LABELS[:300] == 3], metrics="accuracy", cache=tmp_path
    )
    assert sorted(scores) == list(range(10))
    assert {k: v for k, v in scores[3].items() if k.startswith("accuracy")} == dict(three)
