"""Reflow (rectified flow, arXiv 2209.03003; InstaFlow, 2309.06380): straighter flows from pairs, then few steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.denoiser import Denoiser
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Models, Update
from fewstep.distill.straightening import Stage, Straightening, between, flow_draw, mirrored, paired
from fewstep.errors import InputError
from fewstep.loss.perceptual import distance_in


@dataclass(frozen=True)
class Reflow(Straightening):
    """Learns from pairs of a noise and the teacher's picture: first the whole straight line, then its start alone.

    :meth:`run` straightens ``rounds`` times, each time on pairs of the flow before, and distils the last flow. A
    guided teacher is folded in, because its pairs are guided ones: with a text-conditional one this is InstaFlow.

    Attributes:
        rounds: flows that are trained on pairs before distillation; 0 distils the teacher itself.
        distil: ends with distillation; without, the last flow is shipped as it is.
        fresh: distils on pairs of the last flow, as the paper has it; without, on those that it was trained on.
    """

    rounds: int = 1
    distil: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 0:
            raise InputError(f"Reflow needs rounds >= 0, got {self.rounds}")
        if not self.rounds and not self.distil:
            raise InputError("Reflow(rounds=0, distil=False) has nothing to do: set rounds, or distil")

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Eq. 1 of arXiv 2209.03003 with the pair as coupling, or section 2.1's distillation at the steps' times.

        The velocity ``n - x0`` is off by the error of x0 over t, which is what the distance is taken of. At t = 1
        both are the same.
        """
        # Stages of one run share a seed, and should not share their draws.
        own = noise.fold(self.stage)
        x0, n = paired(batch, m.student, type(self).__name__)
        if self.flip:
            x0, n = mirrored(own, x0, n)
        D, cond = m.student, batch.cond
        sigma = flow_draw(self.draw, own, D) if self.stage == "reflow" else flow_step(own, D, self.steps)
        x, per_t = between(D, x0, n, sigma), widen(1 + 1 / sigma, x0)
        distance = distance_in(m, self.distance if self.stage == "distil" else "l2")
        if self.distance == "lpips" and self.stage == "distil":
            # Features of a picture: a distance between velocities would have no meaning.
            yield Update("student", lambda: distance(D(x, sigma, cond), x0).mean())
            return
        yield Update("student", lambda: distance(per_t * D(x, sigma, cond), per_t * x0).mean())

    def stages(self, teacher: Generator, options: Mapping[str, Any]) -> list[Stage]:
        """``rounds`` flows, then the distillation."""
        left = (1 - self.share if self.distil else 1.0) / max(self.rounds, 1)
        flows = [Stage(f"reflow-{k + 1}", replace(self, stage="reflow"), left, k > 0) for k in range(self.rounds)]
        if not self.distil:
            return flows
        return [*flows, Stage("distil", replace(self, stage="distil"), self.share if self.rounds else 1.0, self.fresh)]


def flow_step(noise: Noise, D: Denoiser, steps: int) -> Tensor:
    """(B,) float64: one of the ``steps`` levels that the sampler evaluates at, all alike likely."""
    k = noise.integers(1, steps + 1, (), "step").double()
    top = float(D.sigma_max)
    t = top / (1 + top) * k / steps
    return torch.where(k == steps, torch.full_like(t, top), t / (1 - t))
