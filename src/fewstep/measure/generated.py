"""What is kept of the generated pictures while they stream by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.measure.features import Classifier, Extractor, PixelExtractor
from fewstep.measure.frechet import Moments, Target, require_finite
from fewstep.measure.keep import Kept, gathered
from fewstep.measure.metrics import METRICS, Comparison
from fewstep.measure.modes import check_labels, classes_of
from fewstep.measure.reference import KEEP, RealData, Reference, seen
from fewstep.measure.scores import InceptionScore, Split, clip_values
from fewstep.measure.statistics import Made, Statistics
from fewstep.measure.stream import Part

# Of pictures kept for diversity: at most so many, and so many bytes.
PICTURES, BYTES = 512, 2**27


@dataclass(frozen=True)
class Sides:
    """The real side of a comparison, as far as its metrics need it: kept features and classes, and distances' targets.

    ``reference`` holds no moments where no metric needs them, because those of 2048 features are 34 MB.
    """

    reference: Reference | None = None
    target: Target | None = None
    pixels: Target | None = None


class Generated:
    """What is kept of the generated pictures while they stream by, as far as the metrics need it.

    ``watch`` is called with the features (B, dim) and ids (B,) of every batch.
    """

    def __init__(
        self,
        extractor: Extractor,
        names: Sequence[str],
        shape: tuple[int, ...] | None,
        *,
        keep: int = KEEP,
        intervals: bool = False,
        perceptual: str | Path | None = None,
        watch: Callable[[Tensor, Tensor], object] | None = None,
    ) -> None:
        needs = {METRICS[name].keeps for name in names}
        self.extractor, self.names, self.watch = extractor, list(names), watch
        self.needs_features = bool(needs & {None, "features"})
        self.needs_moments = None in needs
        self.moments = Moments(extractor.dim if self.needs_moments else 0)
        self.kept = Kept(keep) if "features" in needs or (intervals and None in needs) else None
        self.pixel = None
        if "pixels" in needs and shape is not None:
            self.pixel = PixelExtractor((shape[0], shape[1], shape[2]), snap=getattr(extractor, "snap", False))
        self.pixels = None if self.pixel is None else Moments(self.pixel.dim)
        self.keep_classes = "classes" in needs
        self.inception = InceptionScore() if "inception" in needs else None
        self.keep_text = "text" in needs
        self.distance = None
        self.pictures: Kept | None = None
        if "pictures" in needs:
            self.distance = _distance(shape, perceptual)
        self.count = 0
        self.classes: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.text: list[Tensor] = []

    def add(self, part: Part, prompts: Sequence[str] | None = None) -> None:
        """Takes in one checked batch; all batches bring labels or none does."""
        images, labels, ids = part
        if self.count and bool(self.labels) != (labels is not None and self.keep_classes):
            raise InputError(
                f"labels came with some batches and not with others (first change at image {self.count}), "
                f"expected all or none: give every batch its labels"
            )
        features, scores = self._seen(images)
        if self.needs_moments:
            self.moments.update(features)
        else:
            require_finite(features)
        if self.watch is not None:
            self.watch(features, ids)
        if self.kept is not None:
            self.kept.add(features, ids)
        if self.pixel is not None and self.pixels is not None:
            self.pixels.update(self.pixel(images))
        if self.keep_classes and scores is not None:
            if labels is not None:
                assert isinstance(self.extractor, Classifier)
                self.labels.append(check_labels(labels, len(images), self.extractor))
            self.classes.append(classes_of(scores))
        if self.inception is not None and scores is not None:
            self.inception.update(scores, ids)
        if self.keep_text and prompts is not None:
            own = prompts[self.count : self.count + len(images)]
            self.text.append(clip_values(features, self._embedded(own, len(images))))
        if self.distance is not None:
            if self.pictures is None:
                self.pictures = Kept(max(2, min(PICTURES, BYTES // (2 * images[0].numel()))))
            self.pictures.add(images.cpu().half(), ids)
        self.count += len(images)

    def _seen(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.keep_classes:
            return seen(self.extractor, images)
        if self.inception is not None:
            features, scores = self.extractor.seen(images)  # type: ignore[attr-defined]
            return features.cpu(), scores
        if not self.needs_features and not self.keep_text and self.watch is None:
            return torch.empty(len(images), 0), None
        return self.extractor(images).cpu(), None

    def _embedded(self, prompts: Sequence[str], count: int) -> Tensor:
        if len(prompts) != count:
            raise InputError(
                f"{self.count + len(prompts)} prompts for {self.count + count} images, expected as many: give one each"
            )
        found: Tensor = self.extractor.text(prompts).cpu()  # type: ignore[attr-defined]
        return found

    def finish(self, prompts: Sequence[str] | None = None, *, join: bool = False) -> None:
        """Joins the processes if asked, and refuses an empty stream."""
        if prompts is not None and self.keep_text and len(prompts) != self.count:
            raise InputError(f"{len(prompts)} prompts for {self.count} images, expected as many: give one each")
        if join:
            self._join()
        if self.count == 0:
            raise InputError(
                "evaluation of 0 images, expected at least 2: give pictures (an iterator can be read only once)"
            )

    def _join(self) -> None:
        counts, labelled = gathered(torch.tensor([[self.count, bool(self.labels)]])).T
        if int(labelled.min()) != int(labelled.max()):
            raise InputError(f"labels came in {int(labelled.sum())} of {len(counts)} processes, expected all or none")
        if int(counts.min()) < 1:
            raise InputError(
                f"evaluation of {counts.tolist()} images in {len(counts)} processes, expected at least 1 in each"
            )
        self.count = int(counts.sum())
        for moments in (self.moments if self.needs_moments else None, self.pixels):
            if moments is not None:
                moments.all_reduce()
        for held in (self.kept, self.pictures, self.inception):
            if held is not None:
                held.all_reduce()
        for lists in (self.classes, self.labels, self.text):
            if lists:
                lists[:] = [gathered(torch.cat(lists))]

    def refuse(self, name: str) -> None:
        """Raises InputError, because ``name`` needs more pictures."""
        least = METRICS[name].least
        what = "Frechet distance" if name in ("fd", "pixel_fd") else f"metric {name!r}"
        raise InputError(f"{what} of {self.count} generated samples, expected at least {least}: give more pictures")

    def sides(self, real: RealData | Statistics, cache: str | Path | None) -> Sides:
        """The real side, from the cache where it can."""
        if isinstance(real, Statistics):
            return Sides(target=real.target)
        reference, target, pixels = None, None, None
        metrics = [METRICS[name] for name in self.names]
        if not any(metric.real for metric in metrics):
            return Sides()
        if self.needs_features or self.keep_classes:
            pairs = any(metric.keeps == "features" and metric.real is True for metric in metrics)
            reference = Reference.of(real, self.extractor, keep=KEEP if pairs else 0, cache=cache)
            if any(metric.real == "statistics" for metric in metrics):
                target = Target.of(reference.moments)
            reference = replace(reference, moments=Moments(0))
        if self.pixel is not None:
            pixels = Target.of(Reference.of(real, self.pixel, keep=0, cache=cache).moments)
        return Sides(reference, target, pixels)

    def against(
        self, sides: Sides, *, k: int = 5, seed: int = 0, normalise: bool = True, intervals: bool = False
    ) -> Comparison:
        """The comparison with the real side that :meth:`sides` gave."""
        classes, labels, text = (torch.cat(held) if held else None for held in (self.classes, self.labels, self.text))
        return Comparison(
            extractor=self.extractor,
            moments=self.moments,
            target=sides.target,
            reference=sides.reference,
            pixels=self.pixels,
            pixel_target=sides.pixels,
            features=None if self.kept is None else self.kept.in_order(),
            classes=classes,
            labels=labels,
            inception=self.inception,
            text=None if text is None else Split.of(text),
            pictures=None if self.pictures is None else self.pictures.in_order().float(),
            distance=self.distance,
            k=k,
            seed=seed,
            normalise=normalise,
            intervals=intervals,
        )

    def facts(self) -> dict[str, Any]:
        """What the scores rest on, on the generated side."""
        made = Made.by(self.extractor)
        kept = None if self.kept is None else len(self.kept.ids)
        return {
            "n": self.count,
            "kept": kept,
            "extractor": made.extractor,
            "fingerprint": made.fingerprint,
            "resize": made.resize,
            "weights": made.weights,
        }


def _distance(shape: tuple[int, ...] | None, perceptual: str | Path | None) -> Any:
    # In the function, because that room reads this one's networks.
    from fewstep.loss.perceptual import distance_of

    if shape is None:
        raise InputError("metric 'diversity' with a file of statistics: give real pictures, or leave the metric out")
    return distance_of("lpips", shape, "own" if perceptual is None else str(perceptual))
