"""One call from generated pictures to scores, each with the number of samples it rests on in its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fewstep.errors import InputError
from fewstep.measure import extractors
from fewstep.measure.cifar import known_cifar
from fewstep.measure.features import Extractor
from fewstep.measure.files import names_in
from fewstep.measure.generated import Generated
from fewstep.measure.metrics import DEFAULT, METRICS, Comparison, Metric, Score, names_of, obstacle
from fewstep.measure.reference import KEEP, RealData
from fewstep.measure.statistics import Statistics
from fewstep.measure.stream import Images, Watched, of_data, parts_of

__all__ = ["DEFAULT", "METRICS", "Metric", "Scores", "applicable", "evaluate", "extractor_for"]
# Student's factor for 95 % with ten blocks or splits, and the normal one for scores of single samples.
BLOCKED = {"fd": 2.262, "recall": 2.262, "coverage": 2.262, "inception_score": 2.262}
SINGLE = 1.96
# Of the pictures that packaged networks take, where there are only statistics.
SHAPES = {"digits": (1, 8, 8), "stacked-digits": (3, 8, 8), "cifar10-8": (3, 8, 8), "cifar10-32": (3, 32, 32)}


class Scores(dict[str, float]):
    """Scores by name and sample count, and what they rest on.

    Attributes:
        errors: the standard error over the generated pictures of each score that has one, by the same name.
        facts: extractor, its fingerprint, resize and the hash of its weights; counts of generated and real pictures and
            of those kept for metrics of pairs; name of the real data; k, seed and scale. JSON-able.
    """

    def __init__(self, values: Mapping[str, float], errors: Mapping[str, float], facts: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.errors, self.facts = dict(errors), dict(facts)

    def interval(self, name: str) -> tuple[float, float]:
        """95 % of a score over the choice of generated pictures; it knows nothing of bias by the sample count.

        Raises:
            InputError: no such score, or one without an error (most need ``intervals=True``).
        """
        if name not in self.errors:
            raise InputError(f"no error of {name!r} is known, only of {', '.join(self.errors) or 'none'}")
        half = BLOCKED.get(name.partition("@")[0], SINGLE) * self.errors[name]
        return self[name] - half, self[name] + half


def evaluate(
    images: Images | str | Path,
    reference_data: RealData | Statistics | str | Path,
    *,
    metrics: Iterable[str] = DEFAULT,
    labels: Tensor | None = None,
    extractor: Extractor | str | None = None,
    batch: int = 512,
    k: int = 5,
    seed: int = 0,
    cache: str | Path | None = None,
    normalise: bool = True,
    keep: int = KEEP,
    intervals: bool = False,
    prompts: Sequence[str] | None = None,
    perceptual: str | Path | None = None,
    ids: Tensor | None = None,
    joined: bool = False,
    watch: Callable[[Tensor, Tensor], object] | None = None,
) -> Scores:
    """Scores of generated pictures against real ones.

    Args:
        images: (N, C, H, W) in [-1, 1], or an iterable of such batches, of (images, labels) or of ``Batch`` (its
            "label" is read), or the path of a folder of pictures. Batches are dropped once read; at most ``keep``
            features are kept, and only for the metrics that need them.
        reference_data: the real pictures, or a path to them; or statistics, for fd and fd_infinity alone. All real
            pictures enter fd, pixel_fd and modes_kl; 10 000, evenly spaced, the rest.
        metrics: names in :data:`METRICS`, or "default": those of them that apply. "accuracy" applies when there are
            labels and the extractor classifies, "modes" to stacked digits, "pixel_fd" to at most 4096 pixels.
        labels: (N,) the classes asked for, when ``images`` does not bring them.
        extractor: an extractor or its name, see :func:`fewstep.measure.extractor`; None picks the packaged one of
            digits, stacked digits or CIFAR-10 at 8 or 32 pixels (see :func:`fewstep.measure.cifar.known_cifar`).
        batch: pictures at a time.
        k: the neighbour that decides precision, recall, density and coverage.
        seed: decides subsets of fd_infinity and directions of sliced_wasserstein.
        cache: the folder of reference files; None is $FEWSTEP_CACHE or ~/.cache/fewstep.
        normalise: True scales fd and pixel_fd so that 100 is the trace of the real covariance; False is plain FID.
        keep: most generated pictures that enter metrics of pairs (kid, precision ...); a random subset by their ids.
        intervals: also the standard errors that cost time: ten more distances for fd, and recall and coverage.
        prompts: (N,) texts of the pictures, for clip_score.
        perceptual: path of LPIPS weights, for diversity; None takes the packaged network of digits.
        ids: (N,) int64, the number of each picture; 0, 1, 2 ... without. They decide what is kept.
        joined: joins the pictures of all processes of torch.distributed; each calls this with its share, and gets the
            same scores. Without ``ids`` the shares count as interleaved.
        watch: called with the features (B, dim) and ids (B,) of every batch of this process, for statistics of the
            caller's own: no network needs to run twice.

    Returns:
        Scores by name and sample count, such as ``{"fd@2000": 0.31, "recall@2000": 0.88}``: scores of different counts
        are not comparable, so their names differ. Metrics of pairs carry the number kept.

    Raises:
        InputError: an unknown metric or one that does not apply; no images; images with NaN, outside [-1.5, 1.5] or of
            another shape than the data; labels, prompts or ids that do not fit; too few samples for a metric;
            statistics of another extractor; or files that change while they are read.
    """
    if batch < 1 or k < 1 or keep < 1:
        raise InputError(f"batch={batch}, k={k} and keep={keep}, expected at least 1: use batch=512, k=5, keep=10000")
    watched = [Watched(p) for p in (images, reference_data) if isinstance(p, str | Path)]
    real = real_side(reference_data)
    shape = None if isinstance(real, Statistics) else tuple(real.shape)
    if isinstance(images, str | Path):
        images = of_data(_opened(images), batch)
    use = extractor_for(extractor, real)
    if isinstance(real, Statistics):
        real.check(use)
    names = applicable(metrics, use, shape, statistics=isinstance(real, Statistics))
    generated = Generated(use, names, shape, keep=keep, intervals=intervals, perceptual=perceptual, watch=watch)
    stride = dist.get_world_size() if joined and dist.is_initialized() else 1
    parts, sides = parts_of(images, labels, ids, shape, batch, stride), None
    for part in parts:
        generated.add(part, prompts)
        # Once a batch is known to be good; before the others, because a real side needs most memory while it is made.
        sides = generated.sides(real, cache) if sides is None else sides
    generated.finish(prompts, join=stride > 1)
    if metrics == DEFAULT and not generated.labels:
        names = [name for name in names if name != "accuracy"]
    for name in names:
        if generated.count < METRICS[name].least and METRICS[name].keeps != "features":
            generated.refuse(name)
    assert sides is not None
    comparison = generated.against(sides, k=k, seed=seed, normalise=normalise, intervals=intervals)
    found = {key: score for name in names for key, score in METRICS[name].compute(comparison).items()}
    for one in watched:
        one.check()
    facts = {**generated.facts(), **_facts_of(real, comparison), "k": k, "seed": seed, "normalise": normalise}
    return named(found, generated.count, facts)


def named(found: Mapping[str, Score], count: int, facts: Mapping[str, Any]) -> Scores:
    """Scores under their names with the sample count."""
    names = {key: f"{key}@{count if score.n is None else score.n}" for key, score in found.items()}
    errors = {names[key]: score.error for key, score in found.items() if not isnan(score.error)}
    return Scores({names[key]: score.value for key, score in found.items()}, errors, facts)


def _facts_of(real: RealData | Statistics, c: Comparison) -> dict[str, Any]:
    if isinstance(real, Statistics):
        return {"reference": real.source, "reference_n": real.n}
    kept = None if c.reference is None or c.reference.features is None else len(c.reference.features)
    return {"reference": real.name, "reference_n": len(real), "reference_kept": kept}


def real_side(given: RealData | Statistics | str | Path) -> RealData | Statistics:
    """The real pictures, or statistics of them, that an argument means.

    Raises:
        InputError: a path of neither.
    """
    if not isinstance(given, str | Path):
        return given
    path = Path(given).expanduser()
    if path.suffix == ".npz" and path.is_file():
        names = names_in(path)
        # Features that clean-fid keeps are refused there, by name.
        if names & {"mu", "sigma"} or names == {"feats"}:
            return Statistics.load(path)
    return _opened(given)


def _opened(place: str | Path) -> RealData:
    from fewstep.data import load_data

    opened: RealData = load_data(str(Path(place).expanduser()))
    return opened


def extractor_for(given: Extractor | str | None, data: RealData | Statistics) -> Extractor:
    """The extractor itself, the one of that name, or the packaged one that was trained on such pictures.

    Raises:
        InputError: no packaged extractor knows the data, an unknown name, or one for pictures of another shape.
    """
    if given is not None and not isinstance(given, str):
        return given
    name = given or _packaged(data)
    if isinstance(data, Statistics):
        return extractors.extractor(name, SHAPES.get(name, (3, 32, 32)))
    return extractors.extractor(name, data.shape)


def _packaged(data: RealData | Statistics) -> str:
    """The name of the packaged extractor that knows some data."""
    name = data.made.extractor or data.source if isinstance(data, Statistics) else data.name
    if name in ("digits", "stacked-digits") or (isinstance(data, Statistics) and name in SHAPES):
        return name
    cifar = None if isinstance(data, Statistics) else known_cifar(data)
    if cifar is None:
        raise InputError(
            f"no packaged extractor knows data {name!r}: pass extractor='pixel' (--extractor pixel), the name of "
            f"another, or an object with name, dim, fingerprint and a call from images to features"
        )
    return cifar


def applicable(
    metrics: Iterable[str], extractor: Extractor, shape: tuple[int, ...] | None, *, statistics: bool = False
) -> list[str]:
    """The metrics asked for; of the default ones, those that apply.

    Raises:
        InputError: an unknown metric, or one that was asked for and does not apply.
    """
    names = names_of(metrics)
    obstacles = {name: text for name in names if (text := obstacle(name, extractor, shape, statistics))}
    if obstacles and metrics != DEFAULT:
        raise InputError(next(iter(obstacles.values())))
    return [name for name in names if name not in obstacles]
