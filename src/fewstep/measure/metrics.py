"""The metrics by name: what each needs to be kept of the pictures, and how it is computed from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import nan, prod
from typing import Any

from torch import Tensor

from fewstep.errors import InputError, unknown
from fewstep.measure.copies import diversity
from fewstep.measure.features import Classifier, Extractor
from fewstep.measure.frechet import BLOCKS, Moments, Target, frechet_error, frechet_infinity
from fewstep.measure.kernel import cmmd, discrepancy
from fewstep.measure.manifold import Manifold, manifold
from fewstep.measure.modes import coverage_of, histogram
from fewstep.measure.reference import Reference
from fewstep.measure.scores import InceptionScore, Split
from fewstep.measure.sliced import sliced_wasserstein

DEFAULT = "default"
# Most values of a picture whose covariance is computed.
PIXELS = 4096


@dataclass(frozen=True)
class Score:
    """A value; its standard error, nan where there is none; and over how many pictures, None for all of them."""

    value: float
    error: float = nan
    n: int | None = None


@dataclass
class Comparison:
    """Generated and real pictures under one extractor, as the metrics see them; each metric reads what it needs.

    Attributes:
        extractor: of the features.
        target: the real side of Frechet distances, or None where no metric needs it.
        reference: the real pictures' kept features and classes, or None where there are only statistics.
        moments: of the generated pictures' features.
        pixels: moments of their pixels.
        pixel_target: the real side of those.
        features: those kept of the generated pictures, in the order of their ids.
        classes: seen in the generated pictures.
        labels: asked for.
        inception: class probabilities, summed.
        text: score of the prompts.
        pictures: generated pictures kept for diversity, with their distance.
        k: neighbour of the manifolds.
        seed: of whatever is drawn.
        normalise: whether Frechet distances are scaled to 100.
        intervals: whether standard errors that cost time are computed.
    """

    extractor: Extractor
    moments: Moments
    target: Target | None = None
    reference: Reference | None = None
    pixels: Moments | None = None
    pixel_target: Target | None = None
    features: Tensor | None = None
    classes: Tensor | None = None
    labels: Tensor | None = None
    inception: InceptionScore | None = None
    text: Split | None = None
    pictures: Tensor | None = None
    distance: Callable[[Tensor, Tensor], Tensor] | None = None
    k: int = 5
    seed: int = 0
    normalise: bool = True
    intervals: bool = False

    @cached_property
    def manifold(self) -> Manifold:
        """Neighbourhoods, computed once for precision, recall, density and coverage."""
        made, real = self.both()
        return manifold(made, real, k=self.k, groups=min(BLOCKS, len(made)) if self.intervals else 1)

    def both(self) -> tuple[Tensor, Tensor]:
        """Generated and real features."""
        assert self.features is not None and self.reference is not None and self.reference.features is not None
        return self.features, self.reference.features


def _fd(c: Comparison) -> dict[str, Score]:
    assert c.target is not None
    value, error = c.target.distance(c.moments, normalise=c.normalise), nan
    if c.intervals and c.features is not None and len(c.features) >= 2 * BLOCKS:
        # Of more pictures than are kept, the error of the kept ones shrinks with the root of the counts.
        kept = c.moments if len(c.features) == c.moments.n else Moments.of(c.features.split(512))
        error = frechet_error(c.features, kept, c.target, normalise=c.normalise) * (kept.n / c.moments.n) ** 0.5
    return {"fd": Score(value, error)}


def _fd_infinity(c: Comparison) -> dict[str, Score]:
    assert c.target is not None and c.features is not None
    value = frechet_infinity(c.features, c.target, seed=c.seed, normalise=c.normalise)
    return {"fd_infinity": Score(value, n=len(c.features))}


def _pixel_fd(c: Comparison) -> dict[str, Score]:
    assert c.pixels is not None and c.pixel_target is not None
    return {"pixel_fd": Score(c.pixel_target.distance(c.pixels, normalise=c.normalise))}


def _kid(c: Comparison) -> dict[str, Score]:
    made, real = c.both()
    return {"kid": Score(*discrepancy(made, real), n=len(made))}


def _cmmd(c: Comparison) -> dict[str, Score]:
    made, real = c.both()
    return {"cmmd": Score(*cmmd(made, real), n=len(made))}


def _sliced(c: Comparison) -> dict[str, Score]:
    made, real = c.both()
    return {"sliced_wasserstein": Score(sliced_wasserstein(made, real, seed=c.seed), n=len(made))}


def _manifold(name: str) -> Callable[[Comparison], dict[str, Score]]:
    def compute(c: Comparison) -> dict[str, Score]:
        error = c.manifold.errors[name] if c.intervals else nan
        return {name: Score(c.manifold.values[name], error, len(c.manifold.balls))}

    return compute


def _accuracy(c: Comparison) -> dict[str, Score]:
    if c.labels is None or c.classes is None:
        raise InputError("metric 'accuracy' got no labels, expected one per image: pass labels=... or leave it out")
    right = (c.classes == c.labels).double()
    return {"accuracy": Score(right.mean().item(), right.std().item() / len(right) ** 0.5 if len(right) > 1 else nan)}


def _modes(c: Comparison) -> dict[str, Score]:
    assert isinstance(c.extractor, Classifier) and c.classes is not None
    assert c.reference is not None and c.reference.classes is not None
    found = coverage_of(histogram(c.classes, c.extractor), histogram(c.reference.classes, c.extractor))
    return {"modes": Score(float(found.modes)), "modes_kl": Score(found.kl)}


def _inception(c: Comparison) -> dict[str, Score]:
    assert c.inception is not None
    return {"inception_score": Score(*c.inception.score())}


def _clip_score(c: Comparison) -> dict[str, Score]:
    if c.text is None:
        raise InputError("metric 'clip_score' got no prompts, expected one per image: pass prompts=...")
    return {"clip_score": Score(*c.text)}


def _diversity(c: Comparison) -> dict[str, Score]:
    assert c.pictures is not None and c.distance is not None
    value, error, pairs = diversity(c.pictures, c.distance)
    return {"diversity": Score(value, error, 2 * pairs)}


@dataclass(frozen=True)
class Metric:
    """A named score.

    Attributes:
        about: range, direction and paper, in a line.
        compute: the scores by name, without the sample count.
        keeps: what has to be kept of the generated pictures beside their moments: features, pixels, classes, inception,
            text or pictures.
        least: how many pictures it needs.
        real: whether it compares with real pictures themselves; "statistics" where mean and covariance suffice.
        default: whether it is among the metrics of "default".
    """

    about: str
    compute: Callable[[Comparison], dict[str, Score]]
    keeps: str | None = None
    least: int = 1
    real: Any = True
    default: bool = True


METRICS: dict[str, Metric] = {
    "fd": Metric(
        "Frechet distance of features, 0 is best, 100 is no variation (arXiv:1706.08500)",
        *(_fd, None, 2, "statistics"),
    ),
    "pixel_fd": Metric("Frechet distance of pixels, 0 is best, 100 is no variation", _pixel_fd, "pixels", 2),
    "kid": Metric("kernel distance of features, 0 is best (arXiv:1801.01401)", _kid, "features", 2),
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
    "accuracy": Metric("pictures that show the class asked for, 0 to 1", _accuracy, "classes", real=False),
    "modes": Metric(
        "stacked digits: modes hit, of 1000, and modes_kl, 0 is best (arXiv:1611.02163)", _modes, "classes"
    ),
    "fd_infinity": Metric(
        "Frechet distance at endlessly many generated pictures, 0 is best (arXiv:1911.07023)",
        *(_fd_infinity, "features", 100, "statistics", False),
    ),
    "sliced_wasserstein": Metric(
        "sliced Wasserstein distance of features, 0 is best", _sliced, "features", default=False
    ),
    "cmmd": Metric(
        "CLIP embeddings: Gaussian kernel distance, 0 is best (arXiv:2401.09603)", _cmmd, "features", 2, default=False
    ),
    "clip_score": Metric(
        "CLIP embeddings: pictures that fit their prompts, 0 to 100 (arXiv:2104.08718)",
        *(_clip_score, "text", 1, False, False),
    ),
    "inception_score": Metric(
        "Inception's classes: sure and varied, 1 to 1008 (arXiv:1606.03498)", _inception, "inception", 20, False, False
    ),
    "diversity": Metric(
        "LPIPS of two generated pictures, 0 is one picture (arXiv:1801.03924)", _diversity, "pictures", 2, False, False
    ),
}


def names_of(metrics: Iterable[str]) -> list[str]:
    """The names asked for, each once and known.

    Raises:
        InputError: an unknown one, or none at all.
    """
    if isinstance(metrics, str):
        metrics = [name for name, m in METRICS.items() if m.default] if metrics == DEFAULT else [metrics]
    names = list(dict.fromkeys(metrics))
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    if not names:
        raise InputError(f"no metrics were asked for, expected some of {', '.join(METRICS)}: use metrics='default'")
    return names


def obstacle(name: str, extractor: Extractor, shape: tuple[int, ...] | None, statistics: bool = False) -> str | None:
    """Why a metric does not apply to these data, or None; ``statistics`` where no real pictures are at hand."""
    metric = METRICS[name]
    got = f"metric {name!r} got extractor {extractor.name!r}"
    if statistics and metric.real is True:
        return f"metric {name!r} got a file of statistics, expected real pictures: give them, or leave the metric out"
    if metric.keeps == "classes" and not isinstance(extractor, Classifier):
        return f"{got}, expected one that classifies: leave the metric out"
    if name == "modes" and getattr(extractor, "channels", 1) == 1:
        return f"{got}, expected 'stacked-digits': leave the metric out"
    if metric.keeps == "pixels" and (shape is None or prod(shape) > PIXELS):
        return f"metric {name!r} got {prod(shape or ())} pixels, expected at most {PIXELS}: leave the metric out"
    if name in ("cmmd", "clip_score") and not hasattr(extractor, "text"):
        return f"{got}, expected clip:<folder or Hub id>: choose it, or leave the metric out"
    if metric.keeps == "inception" and not hasattr(extractor, "seen"):
        return f"{got}, expected one with class probabilities, such as inception: leave the metric out"
    return None
