"""Extractors by their names, as ``extractor=`` and ``--extractor`` take them."""

from __future__ import annotations

from collections.abc import Callable

from fewstep.errors import InputError, unknown
from fewstep.measure.cifar import cifar_extractor
from fewstep.measure.features import Extractor, PixelExtractor, digits_extractor
from fewstep.measure.foundation import clip_extractor, dino_extractor
from fewstep.measure.inception import inception_extractor


def _digits(shape: tuple[int, int, int]) -> Extractor:
    _require_extractor_shape("digits", shape, (1, 8, 8))
    return digits_extractor()


def _stacked_digits(shape: tuple[int, int, int]) -> Extractor:
    _require_extractor_shape("stacked-digits", shape, (3, 8, 8))
    return digits_extractor(channels=3)


def _cifar(side: int) -> Callable[[tuple[int, int, int]], Extractor]:
    def made(shape: tuple[int, int, int]) -> Extractor:
        _require_extractor_shape(f"cifar10-{side}", shape, (3, side, side))
        return cifar_extractor(side)

    return made


def _require_extractor_shape(name: str, shape: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    if tuple(shape) != expected:
        raise InputError(
            f"extractor {name!r} got pictures of shape {tuple(shape)}, expected {expected}: "
            f"choose 'pixel' or pass an extractor of your own"
        )


EXTRACTORS: dict[str, Callable[[tuple[int, int, int]], Extractor]] = {
    "digits": _digits,
    "stacked-digits": _stacked_digits,
    "cifar10-8": _cifar(8),
    "cifar10-32": _cifar(32),
    "pixel": PixelExtractor,
}


def _inception(resize: str) -> Callable[[str], Extractor]:
    def made(place: str) -> Extractor:
        return inception_extractor(place, resize=resize)

    return made


def _dino(place: str) -> Extractor:
    return dino_extractor(place)


def _clip(place: str) -> Extractor:
    return clip_extractor(place)


# Networks whose weights the user brings: named as kind:place.
PLACED: dict[str, Callable[[str], Extractor]] = {
    "inception": _inception("tf1"),
    "inception-clean": _inception("clean"),
    "inception-pytorch": _inception("pytorch"),
    "dinov2": _dino,
    "clip": _clip,
}


def extractor(name: str, shape: tuple[int, int, int]) -> Extractor:
    """The extractor ``name`` for pictures of ``shape`` (C, H, W).

    Args:
        name: of :data:`EXTRACTORS`; or a kind of :data:`PLACED`, a colon and where its weights are, such as
            ``inception:pt_inception-2015-12-05-6726825d.pth`` or ``dinov2:facebook/dinov2-large``.
        shape: of the pictures.

    Raises:
        InputError: no such extractor, it does not take pictures of this shape, or its weights cannot be read.
    """
    kind, _, place = name.partition(":")
    if kind in PLACED:
        if not place:
            raise InputError(f"extractor {kind!r} needs its weights: write {kind}:<path, address or Hub id>")
        return PLACED[kind](place)
    if name not in EXTRACTORS:
        raise unknown("extractor", name, [*EXTRACTORS, *PLACED])
    return EXTRACTORS[name](shape)
