"""One call from generated pictures to scores, each with the number of samples it rests on in its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.errors import InputError, unknown
from fewstep.measure import features as extractors
from fewstep.measure.features import Classifier, Extractor, PixelExtractor
from fewstep.measure.frechet import Moments, frechet
from fewstep.measure.kernel import kid
from fewstep.measure.manifold import prdc
from fewstep.measure.modes import check_labels, classes, coverage_of, histogram
from fewstep.measure.reference import KEEP, RealData, Reference

DEFAULT = "default"
RANGE = 1.5
KID_ALL_PAIRS = 10_000

Images = Tensor | Iterable[Tensor | Batch | tuple[Tensor, Tensor]]


@dataclass
class Comparison:
    """Generated and real pictures under one extractor, as the metrics see them; each metric reads what it needs."""

    reference: Reference
    extractor: Extractor
    moments: Moments
    pixels: Moments | None
    pixel_reference: Reference | None
    features: Tensor | None
    classes: Tensor | None
    labels: Tensor | None
    k: int
    seed: int
    normalise: bool

    @cached_property
    def manifold(self) -> dict[str, float]:
        """Precision, recall, density and coverage, computed once for all four."""
        return prdc(*self.both(), k=self.k)

    def both(self) -> tuple[Tensor, Tensor]:
        """Generated and real features."""
        assert self.features is not None and self.reference.features is not None
        return self.features, self.reference.features


def _fd(c: Comparison) -> dict[str, float]:
    return {"fd": frechet(c.moments, c.reference.moments, normalise=c.normalise)}


def _pixel_fd(c: Comparison) -> dict[str, float]:
    assert c.pixels is not None and c.pixel_reference is not None
    return {"pixel_fd": frechet(c.pixels, c.pixel_reference.moments, normalise=c.normalise)}


def _kid(c: Comparison) -> dict[str, float]:
    generated, real = c.both()
    # All pairs cost time in the product of the sizes; the paper's subsets are for sets where that hurts.
    size = None if max(len(generated), len(real)) <= KID_ALL_PAIRS else min(1000, len(generated), len(real))
    return {"kid": kid(generated, real, subset_size=size, seed=c.seed)}


def _manifold(name: str) -> Callable[[Comparison], dict[str, float]]:
    return lambda c: {name: c.manifold[name]}


def _accuracy(c: Comparison) -> dict[str, float]:
    if c.labels is None or c.classes is None:
        raise InputError("metric 'accuracy' got no labels, expected one per image: pass labels=... or leave it out")
    return {"accuracy": (c.classes == c.labels).double().mean().item()}


def _modes(c: Comparison) -> dict[str, float]:
    assert isinstance(c.extractor, Classifier) and c.classes is not None and c.reference.classes is not None
    found = coverage_of(histogram(c.classes, c.extractor), histogram(c.reference.classes, c.extractor))
    return {"modes": float(found.modes), "modes_kl": found.kl}


@dataclass(frozen=True)
class Metric:
    """A named score.

    Attributes:
        about: range, direction and paper, in a line.
        compute: the scores by name, without the sample count.
        keeps: what has to be kept of the generated pictures beside their moments: features, pixels or classes.
    """

    about: str
    compute: Callable[[Comparison], dict[str, float]]
    keeps: str | None = None


METRICS: dict[str, Metric] = {
    "fd": Metric("Frechet distance of features, 0 is best, 100 is no variation (arXiv:1706.08500)", _fd),
    "pixel_fd": Metric("Frechet distance of pixels, 0 is best, 100 is no variation", _pixel_fd, "pixels"),
    "kid": Metric("kernel distance of features, 0 is best (arXiv:1801.01401)", _kid, "features"),
    "precision": Metric(
        "generated pictures that look real, 0 to 1 (arXiv:1904.06991)", _manifold("precision"), "features"
    ),
    "recall": Metric("real pictures that are reached, 0 to 1 (arXiv:1904.06991)", _manifold("recall"), "features"),
    "density": Metric(
        "real neighbours of generated pictures, near 1 (arXiv:2002.09797)", _manifold("density"), "features"
    ),
    "coverage": Metric(
        "real pictures with a generated neighbour, 0 to 1 (arXiv:2002.09797)", _manifold("coverage"), "features"
    ),
    "accuracy": Metric("pictures that show the class asked for, 0 to 1", _accuracy, "classes"),
    "modes": Metric(
        "stacked digits: modes hit, of 1000, and modes_kl, 0 is best (arXiv:1611.02163)", _modes, "classes"
    ),
}


def evaluate(
    images: Images,
    reference_data: RealData,
    *,
    metrics: Iterable[str] = DEFAULT,
    labels: Tensor | None = None,
    extractor: Extractor | str | None = None,
    batch: int = 512,
    k: int = 5,
    seed: int = 0,
    cache: str | Path | None = None,
    normalise: bool = True,
) -> dict[str, float]:
    """Scores of generated pictures against real ones.

    Args:
        images: (N, C, H, W) in [-1, 1], or an iterable of such batches, of (images, labels) or of ``Batch`` (its
            "label" is read). Batches are dropped once read; features are kept only for the metrics that need them all.
        reference_data: the real pictures. All of them enter fd, pixel_fd and modes_kl; 10 000, evenly spaced, the rest.
        metrics: names in :data:`METRICS`, or "default": all that apply. "accuracy" applies when there are labels and
            the extractor classifies, "modes" to stacked digits, "pixel_fd" to at most 4096 pixels.
        labels: (N,) the classes asked for, when ``images`` does not bring them.
        extractor: an extractor or its name in ``EXTRACTORS``; None picks the packaged one of digits and stacked digits.
        batch: pictures at a time.
        k: the neighbour that decides precision, recall, density and coverage.
        seed: decides the subsets of kid on sets of more than 10 000.
        cache: the folder of reference files; None is $FEWSTEP_CACHE or ~/.cache/fewstep.
        normalise: True scales fd and pixel_fd so that 100 is the trace of the real covariance; False is plain FID.

    Returns:
        Scores by name and sample count, such as ``{"fd@2000": 0.31, "recall@2000": 0.88}``: scores of different counts
        are not comparable, so their names differ.

    Raises:
        InputError: an unknown metric or one that does not apply; no images; images with NaN, outside [-1.5, 1.5] or of
            another shape than the data; labels that do not fit; too few samples for a metric.
    """
    if batch < 1 or k < 1:
        raise InputError(f"batch={batch} and k={k}, expected both at least 1: use batch=512, k=5")
    extractor = extractor_for(extractor, reference_data)
    names = applicable(metrics, extractor, reference_data.shape)
    keeps = {METRICS[name].keeps for name in names}
    pixel = PixelExtractor(reference_data.shape, snap=getattr(extractor, "snap", False)) if "pixels" in keeps else None
    generated = _Generated(extractor, pixel, "features" in keeps, "classes" in keeps)
    for part, asked in _batches(images, labels, reference_data.shape, batch):
        generated.add(part, asked)
    count = generated.moments.n
    if count == 0:
        raise InputError(
            "evaluation of 0 images, expected at least 2: give pictures (an iterator can be read only once)"
        )
    if metrics == DEFAULT and not generated.labels:
        names = [name for name in names if name != "accuracy"]
    comparison = generated.against(reference_data, cache, k=k, seed=seed, normalise=normalise)
    scores = [METRICS[name].compute(comparison) for name in names]
    return {f"{name}@{count}": value for score in scores for name, value in score.items()}


class _Generated:
    """What is kept of the generated pictures while they stream by."""

    def __init__(self, extractor: Extractor, pixel: PixelExtractor | None, features: bool, classes: bool) -> None:
        self.extractor, self.pixel, self.keep_features, self.keep_classes = extractor, pixel, features, classes
        self.moments = Moments(extractor.dim)
        self.pixels = None if pixel is None else Moments(pixel.dim)
        self.features: list[Tensor] = []
        self.classes: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        """Takes in one checked batch; all batches bring labels or none does."""
        if self.moments.n and bool(self.labels) != (labels is not None and self.keep_classes):
            raise InputError(
                f"labels came with some batches and not with others (first change at image {self.moments.n}), "
                f"expected all or none: give every batch its labels"
            )
        features = self.extractor(images).cpu()
        if self.keep_features:
            self.features.append(features)
        if self.pixel is not None and self.pixels is not None:
            self.pixels.update(self.pixel(images))
        if self.keep_classes and isinstance(self.extractor, Classifier):
            if labels is not None:
                self.labels.append(check_labels(labels, len(images), self.extractor))
            self.classes.append(classes(images, self.extractor))
        self.moments.update(features)

    def against(self, data: RealData, cache: str | Path | None, *, k: int, seed: int, normalise: bool) -> Comparison:
        """The comparison with ``data``, whose references come from the cache where they can."""
        features, found, labels = (
            torch.cat(kept) if kept else None for kept in (self.features, self.classes, self.labels)
        )
        return Comparison(
            reference=Reference.of(data, self.extractor, keep=KEEP if self.keep_features else 0, cache=cache),
            extractor=self.extractor,
            moments=self.moments,
            pixels=self.pixels,
            pixel_reference=None if self.pixel is None else Reference.of(data, self.pixel, keep=0, cache=cache),
            features=features,
            classes=found,
            labels=labels,
            k=k,
            seed=seed,
            normalise=normalise,
        )


def extractor_for(given: Extractor | str | None, data: RealData) -> Extractor:
    """The extractor itself, the one of that name, or the packaged one that knows the data."""
    if given is None and data.name not in ("digits", "stacked-digits"):
        raise InputError(
            f"no packaged extractor knows data {data.name!r}: pass extractor='pixel' (--extractor pixel), or an object "
            f"with name, dim, fingerprint and a call from images to features"
        )
    if given is None or isinstance(given, str):
        return extractors.extractor(data.name if given is None else given, data.shape)
    return given


def _names(metrics: Iterable[str]) -> list[str]:
    if isinstance(metrics, str):
        metrics = METRICS if metrics == DEFAULT else [metrics]
    names = list(dict.fromkeys(metrics))
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    if not names:
        raise InputError(f"no metrics were asked for, expected some of {', '.join(METRICS)}: use metrics='default'")
    return names


def applicable(metrics: Iterable[str], extractor: Extractor, shape: tuple[int, int, int]) -> list[str]:
    """The metrics asked for; of the default ones, those that apply."""
    names = _names(metrics)
    obstacles = {name: text for name in names if (text := _obstacle(name, extractor, shape))}
    if obstacles and metrics != DEFAULT:
        raise InputError(next(iter(obstacles.values())))
    return [name for name in names if name not in obstacles]


def _obstacle(name: str, extractor: Extractor, shape: tuple[int, int, int]) -> str | None:
    """Why a metric does not apply to these data, or None."""
    keeps = METRICS[name].keeps
    if keeps == "classes" and not isinstance(extractor, Classifier):
        return f"metric {name!r} got extractor {extractor.name!r}, expected one that classifies: leave the metric out"
    if name == "modes" and getattr(extractor, "channels", 1) == 1:
        return f"metric 'modes' got extractor {extractor.name!r}, expected 'stacked-digits': leave the metric out"
    if keeps == "pixels" and prod(shape) > 4096:
        return f"metric {name!r} got {prod(shape)} pixels, expected at most 4096: leave the metric out"
    return None


def _batches(
    images: Images, labels: Tensor | None, shape: tuple[int, int, int], batch: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Checked batches of at most ``batch`` pictures with their labels."""
    seen = 0
    for item in [images] if isinstance(images, Tensor) else images:
        part, own = _unpack(item)
        if own is not None and labels is not None:
            raise InputError("labels came with the images and as labels=..., expected one of the two: leave one out")
        asked = own if labels is None else labels[seen : seen + len(part)]
        if asked is not None and len(asked) != len(part):
            given = len(asked) if labels is None else len(labels)
            raise InputError(
                f"{given} labels for {seen + len(part)} images, expected as many: give one class per image"
            )
        for start in range(0, len(part), batch):
            piece = part[start : start + batch].detach()
            _check(piece, shape, seen + start)
            yield piece, None if asked is None else asked[start : start + batch]
        seen += len(part)
    if labels is not None and len(labels) != seen:
        raise InputError(f"{len(labels)} labels for {seen} images, expected as many: give one class per image")


def _unpack(item: object) -> tuple[Tensor, Tensor | None]:
    images, labels = item, None
    if isinstance(item, Batch):
        images, labels = item.x, item.cond.get("label")
    elif isinstance(item, tuple | list) and len(item) == 2:
        images, labels = item
    if not isinstance(images, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        raise InputError(
            f"images came as {type(images).__name__} (labels as {type(labels).__name__}), "
            f"expected tensors: convert with torch.from_numpy"
        )
    return images, labels


def _check(images: Tensor, shape: tuple[int, int, int], first: int) -> None:
    """Raises InputError unless ``images`` are pictures of ``shape`` in [-1, 1]; ``first`` is the index of the first."""
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(shape):
        raise InputError(
            f"images have shape {tuple(images.shape)}, expected (N, {', '.join(map(str, shape))}) like the reference: "
            f"evaluate against the data that the generator was trained on"
        )
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}, expected float in [-1, 1]: convert with images / 127.5 - 1")
    flat = images.flatten(1)
    if len(bad := (~flat.isfinite()).any(1).nonzero().flatten()):
        raise InputError(
            f"{len(bad)} of images {first} to {first + len(images) - 1} hold NaN or infinity, first at index "
            f"{', '.join(str(first + i) for i in bad[:5].tolist())}; expected numbers: mend the generator, or drop them"
        )
    if len(bad := (flat.abs() > RANGE).any(1).nonzero().flatten()):
        value = flat[bad[0]].gather(0, flat[bad[0]].abs().argmax()[None]).item()
        raise InputError(
            f"image {first + int(bad[0])} has a pixel of {value:.4g}, expected -1 to 1 (at most {RANGE} beyond 0): "
            f"scale to [-1, 1] or clamp"
        )
