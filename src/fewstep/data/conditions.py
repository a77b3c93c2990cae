"""Training material without pictures: conditions alone, for data-free methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.noise import Noise
from fewstep.core.pipeline import Conditions


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
