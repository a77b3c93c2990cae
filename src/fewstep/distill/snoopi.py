"""SNOOPI's training, PG-SB (arXiv 2412.02687): SwiftBrush with a random guidance scale; see models.nasa for NASA."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Role
from fewstep.distill.swiftbrush import SwiftBrush
from fewstep.errors import InputError


@dataclass(frozen=True)
class SNOOPI(SwiftBrush):
    """SwiftBrush whose guidance scale is drawn anew for each sample, the same for teacher and fake score.

    A range of one value is SwiftBrush with that scale, bit for bit. Negative prompts for the student are
    :func:`fewstep.models.nasa.nasa`.

    Attributes:
        guidance_range: lowest and highest scale, drawn evenly; both at least 1.
        guidance: of SwiftBrush; stays None, because the range stands in for it.
    """

    guidance_range: tuple[float, float] = (1.5, 7.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance is not None:
            raise InputError(
                f"SNOOPI draws its guidance from guidance_range, got guidance={self.guidance}: leave it out, or use "
                "SwiftBrush for one scale"
            )
        found = self.guidance_range
        if len(found) != 2 or not found[0] <= found[1] < math.inf:
            raise InputError(f"SNOOPI needs guidance_range as lowest and highest scale, in this order, got {found}")
        if found[0] < 1:
            raise InputError(
                f"guidance range below 1: SNOOPI moves away from no condition, not towards it, got {found}"
            )

    @property
    def highest(self) -> float | None:
        """See :attr:`SwiftBrush.highest`."""
        return self.guidance_range[1]

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """See :meth:`SwiftBrush.roles`.

        Raises:
            InputError: an unconditional teacher, or what :meth:`SwiftBrush.roles` refuses.
        """
        if teacher.conds is None:
            raise InputError(
                "SNOOPI needs a teacher with classes or prompts, because guidance has nothing to move away from: this "
                "one is unconditional, use swiftbrush or vsd"
            )
        return super().roles(teacher)

    def scales(self, noise: Noise) -> Tensor | None:
        """(B,) drawn evenly from the range, the same for teacher and fake score."""
        low, high = self.guidance_range
        return None if high == 1 else low + (high - low) * noise.uniform((), "guidance")
