"""Scores: how far generated pictures are from real ones, and whether anything of the real ones is missing.

:func:`evaluate` is the way in, :func:`evaluate_by_class` the same for each class, and :func:`copies` looks for training
pictures. Below them: feature extractors (:mod:`~fewstep.measure.features`, :mod:`~fewstep.measure.cifar`,
:mod:`~fewstep.measure.inception`, :mod:`~fewstep.measure.foundation`), Frechet distance
(:mod:`~fewstep.measure.frechet`), kernel distances (:mod:`~fewstep.measure.kernel`), precision, recall, density and
coverage (:mod:`~fewstep.measure.manifold`), sliced distance, Inception and CLIP scores, modes and labels, the cached
statistics of the real data (:mod:`~fewstep.measure.reference`) and files of statistics
(:mod:`~fewstep.measure.statistics`). All statistics are float64, and do not depend on how the features came in batches.
"""

from fewstep.measure.by_class import evaluate_by_class
from fewstep.measure.cifar import CifarExtractor, CifarNet, cifar_extractor, cifar_metadata
from fewstep.measure.copies import Copies, Diversity, Nearest, copies, diversity, nearest
from fewstep.measure.evaluate import DEFAULT, METRICS, Metric, Scores, evaluate
from fewstep.measure.extractors import EXTRACTORS, extractor
from fewstep.measure.features import (
    Classifier,
    DigitsExtractor,
    DigitsNet,
    Extractor,
    PixelExtractor,
    digits_extractor,
    digits_metadata,
    snap_digits,
)
from fewstep.measure.files import cache_folder
from fewstep.measure.foundation import ClipExtractor, DinoExtractor, clip_extractor, dino_extractor
from fewstep.measure.frechet import Moments, Target, frechet, frechet_error, frechet_infinity
from fewstep.measure.inception import Inception, InceptionExtractor, inception_extractor
from fewstep.measure.kernel import cmmd, discrepancy, kid
from fewstep.measure.manifold import prdc
from fewstep.measure.modes import ModeCoverage, label_accuracy, mode_coverage
from fewstep.measure.reference import RealData, Reference, cache_path
from fewstep.measure.scores import InceptionScore, clip_score
from fewstep.measure.sliced import sliced_wasserstein
from fewstep.measure.statistics import Made, Statistics, clean_fid_name

__all__ = [
    "DEFAULT",
    "EXTRACTORS",
    "METRICS",
    "CifarExtractor",
    "CifarNet",
    "Classifier",
    "ClipExtractor",
    "Copies",
    "DigitsExtractor",
    "DigitsNet",
    "DinoExtractor",
    "Diversity",
    "Extractor",
    "Inception",
    "InceptionExtractor",
    "InceptionScore",
    "Made",
    "Metric",
    "ModeCoverage",
    "Moments",
    "Nearest",
    "PixelExtractor",
    "RealData",
    "Reference",
    "Scores",
    "Statistics",
    "Target",
    "cache_folder",
    "cache_path",
    "cifar_extractor",
    "cifar_metadata",
    "clean_fid_name",
    "clip_extractor",
    "clip_score",
    "cmmd",
    "copies",
    "digits_extractor",
    "digits_metadata",
    "dino_extractor",
    "discrepancy",
    "diversity",
    "evaluate",
    "evaluate_by_class",
    "extractor",
    "frechet",
    "frechet_error",
    "frechet_infinity",
    "inception_extractor",
    "kid",
    "label_accuracy",
    "mode_coverage",
    "nearest",
    "prdc",
    "sliced_wasserstein",
    "snap_digits",
]
