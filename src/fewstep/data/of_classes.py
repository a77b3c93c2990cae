"""The pictures of some of the classes of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.data.base import LoadReport, check_ids, deviation, fingerprint, shares
from fewstep.errors import InputError

CHUNK = 1024


class OfClasses:
    """The pictures of ``data`` whose class is among ``kept``, in their order; labels keep their numbers.

    Args:
        data: labelled pictures.
        labels: (N,) int64, those of all pictures: see :func:`labels_of`.
        kept: the classes.
    """

    def __init__(self, data: Any, labels: Tensor, kept: Sequence[int]) -> None:
        self.data, self.kept = data, tuple(kept)
        self.ids = torch.isin(labels, torch.tensor(self.kept, dtype=torch.int64)).nonzero()[:, 0]
        self.labels = labels[self.ids]
        self.name, self.shape, self.classes = data.name, data.shape, data.classes

    @cached_property
    def frequencies(self) -> list[float]:
        """The share of each class of the whole data set, 0 for those left out."""
        return shares(self.labels, self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the fingerprint of the whole data set and the classes."""
        return fingerprint([self.data.fingerprint, self.kept], [])

    @cached_property
    def std(self) -> float:
        """Root mean square deviation of the pixels from their mean, in units of [-1, 1]."""
        return deviation(self)

    @property
    def report(self) -> LoadReport:
        """That of the whole data set."""
        found: LoadReport = self.data.report
        return found

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, ids: Tensor) -> Batch:
        """See :class:`fewstep.data.base.Data`."""
        check_ids(self.name, ids, len(self))
        found: Batch = self.data.take(self.ids[ids])
        return found


def labels_of(data: Any) -> Tensor:
    """(N,) int64 labels of all pictures; data that do not hold them apart are read through once.

    Raises:
        InputError: pictures without labels.
    """
    held = getattr(data, "labels", None)
    if isinstance(held, Tensor) and held.shape == (len(data),):
        return held
    parts = []
    for ids in torch.arange(len(data)).split(CHUNK):
        label = data.take(ids).cond.get("label")
        if label is None:
            raise InputError(f"data {data.name!r} have no labels, so that they cannot be divided by class")
        parts.append(label)
    return torch.cat(parts)
