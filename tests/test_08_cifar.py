"""The packaged networks for CIFAR-10: on any pictures, and on the real ones where $FEWSTEP_CIFAR10 names their file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fewstep.core.state import save_tensors
from fewstep.data import Images, load_data
from fewstep.errors import InputError
from fewstep.measure import (
    CifarNet,
    Classifier,
    Moments,
    Statistics,
    Target,
    cifar,
    cifar_extractor,
    cifar_metadata,
    digits_extractor,
    evaluate,
    evaluate_by_class,
    extractor,
)
from fewstep.measure.cifar import CLASSES, LAYOUTS, cifar_weights, known_cifar
from fewstep.measure.evaluate import extractor_for
from real_pictures import Real

torch.set_num_threads(1)
SIDES = tuple(side for side in LAYOUTS if cifar_weights(side).is_file())
FEATURES = {8: 64, 32: 128}


def noise(n: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Labelled(Real):
    """Pictures whose names of classes are given."""

    def __init__(self, name: str, images: torch.Tensor, class_names: tuple[str, ...]) -> None:
        super().__init__(name, images)
        self.class_names = list(class_names)


@pytest.fixture(scope="module", params=SIDES)
def pictures(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """600 real test pictures and their classes."""
    file = os.environ.get("FEWSTEP_CIFAR10", "")
    if not Path(file).is_file():
        pytest.skip("needs real pictures: FEWSTEP_CIFAR10 is not the Parquet file of CIFAR-10's test pictures")
    pytest.importorskip("pyarrow")
    data = load_data(file, resize=None if request.param == 32 else request.param, limit=600)
    batch = data.take(torch.arange(600))
    return batch.x, batch.cond["label"]


@pytest.mark.parametrize("side", SIDES)
def test_features_and_classes(side: int) -> None:
    network = cifar_extractor(side)
    assert isinstance(network, Classifier)
    images = noise(6, side)
    features, scores = network.seen(images)
    assert features.shape == (6, FEATURES[side]) and network.dim == FEATURES[side]
    assert features.dtype == torch.float32
    assert (scores.exp().sum(1) - 1).abs().max() <= 1e-5
    assert torch.equal(network.classify(images), scores)
    # The features of a picture do not depend on the others.
    assert (network(images[2:3]) - features[2:3]).abs().max() <= 1e-5
    assert (network(images.flip(0)).flip(0) - features).abs().max() <= 1e-5
    # Nothing is constant, and classes are seen by the head.
    assert features.std(0).min() > 0
    assert torch.equal(network.net.logits(images).argmax(1), scores.argmax(1))


@pytest.mark.parametrize("side", SIDES)
def test_named_and_told_apart(side: int) -> None:
    name = f"cifar10-{side}"
    first, second = cifar_extractor(side), extractor(name, (3, side, side))
    assert first.name == second.name == name and first.fingerprint == second.fingerprint
    assert first.fingerprint not in (digits_extractor().fingerprint, digits_extractor(channels=3).fingerprint)
    assert torch.equal(first(noise(3, side)), second(noise(3, side)))
    with pytest.raises(InputError, match=rf"'{name}' got pictures of shape \(3, 16, 16\), expected \(3, {side}, "):
        extractor(name, (3, 16, 16))
    with pytest.raises(InputError, match=rf"'{name}' got images \(2, 1, {side}, {side}\)"):
        first(noise(2, side)[:, :1])
    with pytest.raises(InputError, match="expected 8 or 32"):
        CifarNet(side + 1)


@pytest.mark.parametrize("side", LAYOUTS)
def test_networks_of_both_sides_and_their_weights_in_a_file(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "cifar_weights", lambda side: tmp_path / f"{side}.safetensors")
    with pytest.raises(InputError, match=f"no weights of extractor 'cifar10-{side}': train them with"):
        extractor(f"cifar10-{side}", (3, side, side))
    data = Labelled("train", noise(4, side), CLASSES)
    assert known_cifar(data) is None
    torch.manual_seed(0)
    net = CifarNet(side).eval()
    save_tensors(tmp_path / f"{side}.safetensors", {name: value.half() for name, value in net.state_dict().items()})
    network = cifar_extractor(side)
    assert extractor_for(None, data).fingerprint == network.fingerprint
    assert network.dim == FEATURES[side]
    with torch.no_grad():
        assert (network(data.images) - net(data.images)).abs().max() < 1e-2


@pytest.mark.parametrize("side", SIDES)
def test_weights_are_small_and_say_where_they_come_from(side: int) -> None:
    assert cifar_weights(side).stat().st_size <= 700_000
    metadata = cifar_metadata(side)
    assert metadata["side"] == str(side) and metadata["script"].endswith("train_cifar_features.py")
    assert {"seed", "epochs", "train_sha256", "test_sha256", "pictures"} <= metadata.keys()
    # Ten classes: guessing gives .1.
    assert 0.5 < float(metadata["test_accuracy"]) < 1


def test_chosen_by_itself_only_where_the_pictures_are_known() -> None:
    eight, large = noise(4, 8), noise(4, 32)
    assert known_cifar(Labelled("train", eight, CLASSES)) == "cifar10-8"
    assert known_cifar(Real("CIFAR-10_test", eight)) == "cifar10-8"
    assert extractor_for(None, Labelled("train", eight, CLASSES)).name == "cifar10-8"
    assert extractor_for("cifar10-8", Real("train", eight)).name == "cifar10-8"
    for other in (
        Real("train", eight),
        Real("cifar100", eight),
        Real("photos", large),
        Labelled("train", eight, CLASSES[::-1]),
        Labelled("cifar10", noise(4, 16), CLASSES),
    ):
        with pytest.raises(InputError, match=f"no packaged extractor knows data '{other.name}'"):
            extractor_for(None, other)
    assert extractor_for(None, Real("stacked-digits", eight)).name == "stacked-digits"


def test_scores_by_default(tmp_path: Path) -> None:
    data = Labelled("train", noise(60, 8), CLASSES)
    labels = torch.arange(40) % 10
    scores = evaluate(noise(40, 8, 1), data, labels=labels, cache=tmp_path)
    assert {name.partition("@")[0] for name in scores} == {
        *("fd", "pixel_fd", "kid", "precision", "recall", "density", "coverage", "accuracy")
    }
    network = cifar_extractor(8)
    assert scores.facts["fingerprint"] == network.fingerprint
    seen = network.classify(noise(40, 8, 1)).argmax(1)
    assert scores["accuracy@40"] == pytest.approx((seen == labels).float().mean().item())
    with pytest.raises(InputError, match="'modes' got extractor 'cifar10-8', expected 'stacked-digits'"):
        evaluate(noise(40, 8), data, metrics=["modes"], cache=tmp_path)


def test_statistics_of_the_network(tmp_path: Path) -> None:
    network, real = cifar_extractor(8), noise(150, 8)
    Statistics.of(Moments.of(network(real)), network).save(tmp_path / "real.npz")
    found = evaluate(noise(40, 8, 1), tmp_path / "real.npz", metrics=["fd"])
    wanted = evaluate(noise(40, 8, 1), Real("cifar10", real), metrics=["fd"], cache=tmp_path)
    assert found["fd@40"] == pytest.approx(wanted["fd@40"], rel=1e-6)


def test_accuracy_on_real_pictures(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = pictures
    side = images.shape[-1]
    seen = cifar_extractor(side).classify(images).argmax(1)
    stated = float(cifar_metadata(side)["test_accuracy"])
    # Three deviations of the share in 600.
    assert (seen == labels).float().mean().item() == pytest.approx(stated, abs=3 * (0.25 / 600) ** 0.5)


def test_distances_of_real_pictures(pictures: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    images, labels = pictures
    network = cifar_extractor(images.shape[-1])
    target = Target.of(Moments.of(network(images[::2])))
    drawn = noise(300, images.shape[-1])
    half, blurred, noisy = (
        target.distance(Moments.of(network(made)))
        for made in (images[1::2], torch.nn.functional.avg_pool2d(images[1::2], 3, 1, 1), drawn)
    )
    assert half < 10 and 2 * half < blurred < noisy and noisy > 50
    data = Images("test", images, labels, classes=10, class_names=CLASSES)
    by_class = evaluate_by_class(images, data, metrics=["fd", "accuracy"], labels=labels, cache=tmp_path)
    assert sorted(by_class) == list(range(10))
    shares = [(network.classify(images[labels == c]).argmax(1) == c).float().mean().item() for c in range(10)]
    for c, scores in by_class.items():
        n = int((labels == c).sum())
        assert scores[f"accuracy@{n}"] == pytest.approx(shares[c]) and scores[f"fd@{n}"] < 1e-6
