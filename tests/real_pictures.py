"""Real pictures in memory, as comparisons take them."""

from __future__ import annotations

import torch

from fewstep.core.cond import Batch


class Real:
    """A data set in memory that counts what is taken."""

    def __init__(self, name: str, images: torch.Tensor) -> None:
        self.name, self.images, self.shape = name, images, tuple(images.shape[1:])
        self.fingerprint = f"{images.double().sum().item()} {tuple(images.shape)}"
        self.taken = 0

    def __len__(self) -> int:
        return len(self.images)

    def take(self, ids: torch.Tensor) -> Batch:
        self.taken += len(ids)
        return Batch(self.images[ids], {})
