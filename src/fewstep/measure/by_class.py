"""The scores of each class for itself: which classes a student lost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from fewstep.data.of_classes import OfClasses, labels_of
from fewstep.errors import InputError
from fewstep.measure.evaluate import Scores, applicable, extractor_for, named
from fewstep.measure.features import Extractor
from fewstep.measure.generated import Generated
from fewstep.measure.metrics import DEFAULT, METRICS
from fewstep.measure.reference import RealData
from fewstep.measure.stream import Images, Part, parts_of

# Of the moments of all classes at once.
BYTES = 2**31


def evaluate_by_class(
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
) -> dict[int, Scores]:
    """Scores of the generated pictures of each class against the real ones of that class.

    The pictures stream by once, as in :func:`fewstep.measure.evaluate`, whose arguments these are. A class has few
    pictures, so its distances are larger than those of the whole: compare classes of equal counts, or one class between
    students.

    Returns:
        By class, for the classes that were asked for; the sample count is in the names.

    Raises:
        InputError: pictures or data without labels, a class that the data lack, moments that would need more than 2 GB,
            or see :func:`fewstep.measure.evaluate`.
    """
    if batch < 1 or k < 1:
        raise InputError(f"batch={batch} and k={k}, expected both at least 1: use batch=512, k=5")
    use = extractor_for(extractor, reference_data)
    names = applicable(metrics, use, reference_data.shape)
    real, found = labels_of(reference_data), dict[int, Generated]()
    for part in parts_of(images, labels, None, reference_data.shape, batch, 1):
        if part.labels is None:
            raise InputError("scores by class got no labels, expected one per image: pass labels=...")
        for c in part.labels.unique().tolist():
            if c not in found:
                if not bool((real == c).any()):
                    raise InputError(f"images of class {c}, which data {reference_data.name!r} lack: check the labels")
                found[c] = Generated(use, names, reference_data.shape)
                if len(found) * 8 * use.dim**2 > BYTES:
                    raise InputError(
                        f"{len(found)} classes of {use.dim} features need more than 2 GB of moments: choose an "
                        f"extractor with fewer features, or evaluate one class at a time"
                    )
            own = part.labels == c
            found[c].add(Part(part.images[own], part.labels[own], part.ids[own.cpu()]))
    if not found:
        raise InputError("evaluation of 0 images, expected at least 2: give pictures")
    scores = {}
    for c, generated in sorted(found.items()):
        data = OfClasses(reference_data, real, [c])
        try:
            comparison = generated.against(generated.sides(data, cache), k=k, seed=seed, normalise=normalise)
            values = {key: score for name in names for key, score in METRICS[name].compute(comparison).items()}
        except InputError as error:
            raise InputError(f"class {c}: {error}") from None
        facts = {**generated.facts(), "reference": data.name, "reference_n": len(data), "class": c}
        scores[c] = named(values, generated.count, {**facts, "k": k, "seed": seed, "normalise": normalise})
    return scores
