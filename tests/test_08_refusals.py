"""Input that the measures refuse, and what they say."""

from __future__ import annotations

import pytest
import torch

from fewstep.data import load_data
from fewstep.errors import InputError
from fewstep.measure import (
    Moments,
    PixelExtractor,
    digits_extractor,
    evaluate,
    frechet,
    kid,
    label_accuracy,
    mode_coverage,
    prdc,
)

torch.set_num_threads(1)
HUNDRED = load_data("digits", limit=100)
TAKEN = HUNDRED.take(torch.arange(100))
DIGITS, LABELS = TAKEN.x, TAKEN.cond["label"]
CLASSIFIER = digits_extractor()


def features(n: int, dim: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- bad input: (what is passed to evaluate, the message)


def spoiled(index: int, value: float, n: int = 20) -> torch.Tensor:
    images = DIGITS[:n].clone()
    images[index, 0, 3, 3] = value
    return images


BAD = [
    ({"images": DIGITS[:9], "metrics": ["recal"]}, r"unknown metric 'recal': did you mean 'recall'"),
    ({"images": DIGITS[:9], "metrics": "fid"}, r"unknown metric 'fid': did you mean 'fd'"),
    ({"images": DIGITS[:9], "metrics": []}, r"no metrics were asked for"),
    ({"images": DIGITS[:0]}, r"evaluation of 0 images, expected at least 2"),
    ({"images": []}, r"evaluation of 0 images"),
    ({"images": spoiled(7, float("nan"))}, r"1 of images 0 to 19 hold NaN or infinity, first at index 7"),
    ({"images": spoiled(7, float("inf")).split(5)}, r"1 of images 5 to 9 hold NaN or infinity, first at index 7"),
    ({"images": spoiled(13, float("nan")), "batch": 4}, r"images 12 to 15 hold NaN or infinity, first at index 13"),
    ({"images": spoiled(4, -1.75)}, r"image 4 has a pixel of -1\.75, expected -1 to 1"),
    ({"images": DIGITS[:9] * 8 + 8}, r"has a pixel of 1\d, expected -1 to 1"),
    ({"images": torch.zeros(9, 1, 8, 8, dtype=torch.uint8)}, r"torch\.uint8, expected float .* / 127\.5 - 1"),
    ({"images": torch.zeros(9, 3, 8, 8)}, r"shape \(9, 3, 8, 8\), expected \(N, 1, 8, 8\)"),
    ({"images": torch.zeros(1, 8, 8)}, r"shape \(1, 8, 8\), expected \(N, 1, 8, 8\)"),
    ({"images": DIGITS[:9].numpy()}, r"images came as ndarray"),
    ({"images": DIGITS[:1]}, r"Frechet distance of 1 generated samples, expected at least 2"),
    ({"images": DIGITS[:5]}, r"k=5 of 5 generated samples, expected at least 6"),
    ({"images": DIGITS[:1], "metrics": ["kid"]}, r"KID of 1 samples on a side, expected at least 2"),
    ({"images": DIGITS[:9], "k": 0}, r"k=0 and keep=10000, expected at least 1"),
    ({"images": DIGITS[:9], "batch": 0}, r"batch=0, k=5 and"),
    ({"images": DIGITS[:9], "metrics": ["accuracy"]}, r"'accuracy' got no labels"),
    ({"images": DIGITS[:9], "labels": LABELS[:8]}, r"8 labels for 9 images"),
    ({"images": DIGITS[:9], "labels": LABELS[:10]}, r"10 labels for 9 images"),
    ({"images": DIGITS[:9], "labels": LABELS[:9] - 20}, r"labels from -20 to .*, expected 0 to 9"),
    ({"images": DIGITS[:9], "labels": LABELS[:9].float()}, r"expected \(9,\) whole numbers"),
    ({"images": [(DIGITS[:9], LABELS[:9]), DIGITS[:9]]}, r"first change at image 9"),
    ({"images": [DIGITS[:9], (DIGITS[:9], LABELS[:9])]}, r"first change at image 9"),
    ({"images": [(DIGITS[:9], LABELS[:9])], "labels": LABELS[:9]}, r"expected one of the two"),
    ({"images": DIGITS[:9], "metrics": ["modes"]}, r"'modes' got extractor 'digits', expected 'stacked-digits'"),
    (
        {"images": DIGITS[:9], "metrics": ["accuracy"], "extractor": "pixel"},
        r"got extractor 'pixel', expected one that",
    ),
    ({"images": DIGITS[:9], "extractor": "digit"}, r"unknown extractor 'digit': did you mean 'digits'"),
    ({"images": DIGITS[:9], "extractor": "stacked-digits"}, r"\(1, 8, 8\), expected \(3, 8, 8\)"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_evaluate_refuses(arguments: dict, message: str, tmp_path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        evaluate(**{"reference_data": HUNDRED, "cache": tmp_path, **arguments})
    assert "\n" not in str(caught.value)


PARTS = [
    (
        lambda: frechet(Moments.of(features(1, 4)), Moments.of(features(9, 4))),
        "1 generated samples, expected at least 2",
    ),
    (
        lambda: frechet(Moments.of(features(9, 4)), Moments.of(features(1, 4))),
        "1 reference samples, expected at least 2",
    ),
    (lambda: frechet(Moments.of(features(9, 4)), Moments.of(features(9, 5))), "4 dimensions and the reference 5"),
    (lambda: frechet(Moments.of(features(9, 4)), Moments.of(torch.zeros(9, 4))), "reference features have variance 0"),
    (lambda: Moments(4).update(features(9, 5)), r"shape \(9, 5\), expected \(B, 4\)"),
    (lambda: Moments(4).merge(Moments(5)), "cannot merge moments of 5 features into moments of 4"),
    (lambda: Moments(1).update(torch.tensor([[1.0], [float("nan")]])), r"samples \[1\] of this batch are not finite"),
    (lambda: Moments.of([]), "moments of no batches"),
    (lambda: kid(features(9, 4), features(9, 5)), "use one extractor for both"),
    (lambda: kid(features(9, 4), features(30, 4), subset_size=20), "expected at least 1 of 2 to 9 samples"),
    (lambda: prdc(features(9, 4), features(4, 4), k=5), "k=5 of 4 reference samples, expected at least 6"),
    (lambda: prdc(features(9, 4), features(9, 4), k=0), "k=0 neighbours"),
    (lambda: prdc(features(9, 4), features(9, 5)), "use one extractor for both"),
    (lambda: CLASSIFIER(torch.zeros(2, 3, 8, 8)), r"got images \(2, 3, 8, 8\), expected \(B, 1, 8, 8\)"),
    (lambda: PixelExtractor((1, 4, 4))(torch.zeros(2, 1, 8, 8)), r"expected \(B, 1, 4, 4\)"),
    (lambda: PixelExtractor((3, 64, 64)), "12288 dimensions, expected at most 4096"),
    (lambda: label_accuracy(DIGITS[:0], LABELS[:0], CLASSIFIER), "label accuracy of 0 images"),
    (lambda: mode_coverage(DIGITS[:0], CLASSIFIER), "mode coverage of 0 samples"),
    (lambda: mode_coverage(DIGITS[:9], CLASSIFIER, torch.ones(1000)), "histograms of 10 and 1000 modes"),
]


@pytest.mark.parametrize(("call", "message"), PARTS, ids=[message[:40] for _, message in PARTS])
def test_parts_refuse(call, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
