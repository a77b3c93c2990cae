"""Conditions without pictures to learn from, for data-free methods; and conditions that are pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Classes, Cond
from fewstep.core.noise import Noise
from fewstep.core.pipeline import Conditions, conditions
from fewstep.data.base import Data
from fewstep.data.sr import IMAGE, SuperResolution
from fewstep.errors import InputError, unknown


@dataclass(frozen=True)
class ConditionsOnly:
    """Batches with conditions drawn from a generator's own, a function of (seed, number), and no pictures."""

    conds: Conditions | None
    seed: int = 0
    size: int = 2**16

    def __len__(self) -> int:
        return self.size

    def take(self, ids: Tensor) -> Batch:
        """The conditions numbered ``ids`` (B,)."""
        return Batch(None, {} if self.conds is None else self.conds.draw(Noise.of(self.seed, ids)))


class ImageData(Data, Protocol):
    """Data whose condition ``image`` is a picture, such as :class:`fewstep.data.sr.SuperResolution`."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of ``cond["image"]``."""


@conditions("images")
class ImageConditions:
    """Conditions ``image`` (B, C, h, w), and ``label`` (B,) where the data keep labels, drawn from a data set.

    A file holds their shape and where the data are. So a generator opens and takes given pictures where the data are
    not; only drawing needs them, and it refuses data that have changed.

    Args:
        data: what is drawn from.
        source: what :func:`fewstep.data.load_data` finds the pictures by, such as a path. Without one, built-in data
            are found by their name; other data cannot be drawn from after the generator was saved and opened.

    Raises:
        InputError: data without image conditions.
    """

    def __init__(self, data: ImageData, source: str | None = None) -> None:
        shape = getattr(data, "image_shape", None)
        if shape is None:
            raise InputError(
                f"data {data.name!r} has no pictures as conditions: expected data such as sr-digits, or "
                "SuperResolution(data, factor)"
            )
        self.shape = tuple(int(n) for n in shape)
        self.classes = Classes(tuple(data.frequencies)) if data.classes else None
        self.fingerprint, self.source = data.fingerprint, source
        self.options = data.options() if isinstance(data, SuperResolution) else None
        if source is None and isinstance(data, SuperResolution):
            self.source = _built_in(data)
        self._data: ImageData | None = data

    @classmethod
    def opened(cls, fields: Mapping[str, Any]) -> ImageConditions:
        """From what :meth:`describe` told; the data are found when they are first drawn from."""
        made = cls.__new__(cls)
        made.shape = tuple(int(n) for n in fields["shape"])
        if len(made.shape) != 3 or min(made.shape) < 1:
            raise InputError(f"image conditions need a shape (C, h, w), got {made.shape}")
        made.classes = Classes(tuple(fields["classes"])) if fields["classes"] else None
        made.fingerprint, made.source, made.options = fields["fingerprint"], fields["source"], fields["options"]
        made._data = None
        return made

    def describe(self) -> dict[str, Any]:
        """JSON-able: what :meth:`opened` makes them from."""
        classes = [] if self.classes is None else list(self.classes.frequencies)
        told = {"shape": list(self.shape), "classes": classes, "source": self.source, "options": self.options}
        return {**told, "fingerprint": self.fingerprint}

    def __repr__(self) -> str:
        return f"ImageConditions(shape={self.shape}, classes={len(self.classes.frequencies) if self.classes else 0})"

    def nulls(self) -> dict[str, Tensor]:
        """What stands for "no picture", without batch dimension: zeros, which are mid-grey."""
        return {IMAGE: torch.zeros(self.shape)}

    def draw(self, noise: Noise) -> dict[str, Tensor]:
        """The conditions of one example of the data per source, a function of its seed alone.

        Raises:
            InputError: the data are not where they were, or have changed.
        """
        data = self.data
        ids = noise.integers(0, len(data), (), IMAGE).cpu()
        return {name: value.to(noise.seeds.device) for name, value in data.take(ids).cond.items()}

    @property
    def data(self) -> ImageData:
        """What is drawn from.

        Raises:
            InputError: see :meth:`draw`.
        """
        if self._data is None:
            self._data = self._found()
        return self._data

    def _found(self) -> ImageData:
        from fewstep.data import load_data

        advice = "pass the pictures as cond={'image': pictures}"
        if self.source is None or self.options is None:
            raise InputError(f"this file does not say where the data of its image conditions are: {advice}")
        try:
            found = SuperResolution(load_data(self.source), **self.options)
        except InputError as error:
            raise InputError(f"the data of these image conditions do not open: {advice} ({error})") from None
        if found.fingerprint != self.fingerprint:
            raise InputError(f"data {self.source!r} have changed since these image conditions were saved: {advice}")
        return found

    def check(self, cond: Cond) -> None:
        """Raises InputError for anything but ``image`` (B, C, h, w) of this size, and ``label`` where there are."""
        names = (IMAGE, "label") if self.classes is not None else (IMAGE,)
        for name in cond:
            if name not in names:
                raise unknown("condition of a generator that reads pictures", name, names)
        image = cond.get(IMAGE)
        if image is None:
            raise InputError("the condition 'image' is missing: this generator reads a picture for every sample")
        if not image.is_floating_point() or tuple(image.shape[1:]) != self.shape:
            wanted = "x".join(map(str, self.shape))
            told = f"{str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}"
            raise InputError(
                f"image conditions of wrong size: expected floating (B, {wanted.replace('x', ', ')}), got {told}"
            )
        if not bool(image.isfinite().all()):
            raise InputError("image conditions hold values that are not finite")
        if self.classes is not None and "label" in cond:
            self.classes.check({"label": cond["label"]})


def _built_in(data: SuperResolution) -> str | None:
    """The name by which the pictures are found without a path."""
    from fewstep.data import DATASETS

    name = data.data.name
    known = name in DATASETS and DATASETS[name]().fingerprint == data.data.fingerprint
    return name if known else None
