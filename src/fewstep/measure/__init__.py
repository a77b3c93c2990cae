"""Scores: how far generated pictures are from real ones, and whether anything of the real ones is missing.

:func:`evaluate` is the way in. Below it: feature extractors (:mod:`~fewstep.measure.features`), Frechet distance
(:mod:`~fewstep.measure.frechet`), kernel distance (:mod:`~fewstep.measure.kernel`), precision, recall, density and
coverage (:mod:`~fewstep.measure.manifold`), modes and labels (:mod:`~fewstep.measure.modes`) and the cached statistics
of the real data (:mod:`~fewstep.measure.reference`). All statistics are float64, and do not depend
on how the features came in batches.
"""

from fewstep.measure.evaluate import DEFAULT, METRICS, Metric, evaluate
from fewstep.measure.features import (
    EXTRACTORS,
    Classifier,
    DigitsExtractor,
    DigitsNet,
    Extractor,
    PixelExtractor,
    digits_extractor,
    digits_metadata,
    extractor,
    snap_digits,
)
from fewstep.measure.frechet import Moments, frechet
from fewstep.measure.kernel import kid
from fewstep.measure.manifold import prdc
from fewstep.measure.modes import ModeCoverage, label_accuracy, mode_coverage
from fewstep.measure.reference import RealData, Reference, cache_folder, cache_path

__all__ = [
    "DEFAULT",
    "EXTRACTORS",
    "METRICS",
    "Classifier",
    "DigitsExtractor",
    "DigitsNet",
    "Extractor",
    "Metric",
    "ModeCoverage",
    "Moments",
    "PixelExtractor",
    "RealData",
    "Reference",
    "cache_folder",
    "cache_path",
    "digits_extractor",
    "digits_metadata",
    "evaluate",
    "extractor",
    "frechet",
    "kid",
    "label_accuracy",
    "mode_coverage",
    "prdc",
    "snap_digits",
]
