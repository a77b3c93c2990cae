"""SlimFlow (arXiv 2407.12718): a smaller one-step student, by annealing reflow and flow-guided distillation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, cat
from fewstep.core.denoiser import Denoiser, Precond, start_std
from fewstep.core.generator import Generator
from fewstep.core.network import build_network, describe_network
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Models, Role, Update
from fewstep.distill.straightening import Stage, Straightening, between, flow_draw, mirrored, paired
from fewstep.errors import InputError, unknown
from fewstep.loss.perceptual import distance_in
from fewstep.models.frozen import frozen, network_under

Anneal = Literal["linear", "exponential", "cosine", "none"]
ANNEALS = ("linear", "exponential", "cosine", "none")
LEGS = ("student", "flow")
# What a configuration calls its width, and what it must be a multiple of.
WIDTHS = {"channels": 8, "width": 8}


@dataclass(frozen=True)
class SlimFlow(Straightening):
    """A fresh smaller network learns a straight flow from the teacher's pairs, then to do it in one step.

    At first its noises are independent of the pictures, as in flow matching, and slowly become those of the pairs.
    The distillation compares with the teacher's pairs, and at fresh noises with the result of two steps of the flow.

    Attributes:
        steps: 1: the student has one step.
        shrink: width of the student as a share of the teacher's; 1 is the same size.
        anneal: how the share of independent noise falls: linear (the paper's), exponential, cosine, or none (reflow).
        until: share of the first stage after which a linear or cosine share of independent noise is 0; an exponential
            one is exp(-1) there.
        guide: weight of the flow-guided loss; 0 is plain distillation, which is better where two steps of the small
            flow (``stages/reflow`` of the run) are worse than the distilled step.
        guide_times: flow times, from the noise, at which the second step of the guide begins; drawn uniformly.
        first_leg: who takes the guide's first step: student (the paper's) or flow.
        fresh: distils on pairs of the small flow; without, on the teacher's, as published.
        flip: turns picture and noise over together, at random; the paper does.
        optim: of both stages; the paper's lr is 2e-4, for 3 to 28 M parameters. Fewer want more: 4e-3 for 0.08 M.
    """

    shrink: float = 0.5
    anneal: Anneal = "linear"
    until: float = 0.6
    guide: float = 1.0
    guide_times: tuple[float, float] = (0.2, 0.8)
    first_leg: Literal["student", "flow"] = "student"
    fresh: bool = False
    share: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != 1:
            raise InputError(f"SlimFlow trains a student of one step, got steps={self.steps}: for more use reflow")
        if not 0 < self.shrink <= 1 or not 0 < self.until <= 1 or not 0 <= self.guide < math.inf:
            raise InputError(f"SlimFlow needs 0 < shrink, until <= 1 and finite guide >= 0, got {self}")
        if len(self.guide_times) != 2 or not 0 < self.guide_times[0] <= self.guide_times[1] < 1:
            raise InputError(f"SlimFlow needs two guide_times, 0 < guide_times < 1 in order, got {self.guide_times}")
        for what, value, known in (("anneal", self.anneal, ANNEALS), ("first_leg", self.first_leg, LEGS)):
            if value not in known:
                raise unknown(what, value, known)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the network that it is given; in a guided distillation that is the frozen flow too.

        Raises:
            InputError: a denoiser without a network, or one that predicts noise and starts at pure noise.
        """
        found = super().roles(teacher)
        if self.stage == "reflow" or not self.guide:
            return found
        whole = frozen(teacher.denoiser)
        return found | {"flow": Role(lambda: whole)}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """One stage's update on pairs."""
        own = noise.fold(self.stage)
        x0, n = paired(batch, m.student, "SlimFlow")
        if self.flip:
            x0, n = mirrored(own, x0, n)
        if self.stage == "reflow":
            yield self._straighten(m, x0, n, batch.cond, own)
        else:
            yield self._shorten(m, x0, n, batch.cond, own)

    def _straighten(self, m: Models, x0: Tensor, n: Tensor, cond: dict[str, Tensor], noise: Noise) -> Update:
        """Annealing reflow: reflow from ``sqrt(1 - b^2) n + b xi`` with fresh ``xi``."""
        b = self.independent(m.progress)
        if b:
            n = math.sqrt(1 - b * b) * n + b * noise.normal(x0.shape[1:], "xi")
        D, sigma = m.student, flow_draw(self.draw, noise, m.student)
        x, per_t = between(D, x0, n, sigma), widen(1 + 1 / sigma, x0)
        return Update("student", lambda: (per_t * (D(x, sigma, cond) - x0)).square().mean())

    def independent(self, progress: float) -> float:
        """The amplitude b of the independent noise when ``progress`` of the stage is done: from 1 to 0."""
        done = progress / self.until
        if self.anneal == "none":
            return 0.0
        if self.anneal == "exponential":
            return math.exp(-done)
        return max(0.0, 1 - done) if self.anneal == "linear" else math.cos(math.pi / 2 * min(1.0, done))

    def _shorten(self, m: Models, x0: Tensor, n: Tensor, cond: dict[str, Tensor], noise: Noise) -> Update:
        """One step from the pairs' noises against their pictures, and from fresh ones against two steps.

        The student runs once for both halves; its first leg carries no gradient.
        """
        D, distance, top = m.student, distance_in(m, self.distance), float(m.student.sigma_max)
        start = start_std(D, top)
        if not self.guide:
            return Update("student", lambda: distance(D(start * n, top, cond), x0).mean())
        z = noise.normal(x0.shape[1:], "fresh", dtype=x0.dtype)
        low, high = self.guide_times
        from_noise = low + (high - low) * noise.uniform((), "time", dtype=torch.float64)
        both, conds = start * torch.cat([n, z]), cat([cond, cond])

        def loss() -> dict[str, Tensor]:
            of_pairs, of_fresh = D(both, top, conds).chunk(2)
            with torch.no_grad():
                leg = of_fresh.detach() if self.first_leg == "student" else m.flow(start * z, top, cond)
                aim = two_steps(m.flow, leg, z, from_noise, cond)
            pairs, guide = distance(of_pairs, x0).mean(), distance(of_fresh, aim).mean()
            return {"loss": pairs + self.guide * guide, "pairs": pairs.detach(), "guide": guide.detach()}

        return Update("student", loss)

    def stages(self, teacher: Generator, options: Mapping[str, Any]) -> list[Stage]:
        """The small flow, then its distillation.

        Raises:
            InputError: a network that cannot be made smaller, or LoRA on one that has no trained weights.
        """
        if options.get("lora") is not None:
            raise InputError(
                "SlimFlow trains a network from scratch, which LoRA layers cannot stand on: leave LoRA out"
            )
        small = partial(slimmer, shrink=self.shrink, seed=int(options.get("seed", 0)))
        small(teacher)
        return [
            Stage("reflow", replace(self, stage="reflow"), 1 - self.share, False, small),
            Stage("distil", replace(self, stage="distil"), self.share, self.fresh),
        ]


def two_steps(flow: Denoiser, x0: Tensor, n: Tensor, from_noise: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Where the second of two Euler steps ends: to the time ``from_noise`` (B,) towards ``x0``, then all the way.

    ``n`` (B, ...) is the unit noise of the start; ``from_noise`` in (0, 1) is 0 there and 1 at the picture. The second
    step is the flow's, and ends at its estimate (arXiv 2407.12718, section 3.3).
    """
    top = float(flow.sigma_max)
    t = top / (1 + top) * (1 - from_noise)
    sigma = t / (1 - t)
    return flow(between(flow, x0, n, sigma), sigma, cond)


def slimmer(teacher: Generator, *, shrink: float, seed: int) -> Generator:
    """The generator with a fresh network of ``shrink`` times the width in place of its own, a function of ``seed``.

    Widths are rounded to multiples of 8, and at least 8.

    Raises:
        InputError: a network without a single width, such as those of diffusers.
    """
    D = network_under(teacher.denoiser)
    told = describe_network(D.net)
    name = next((w for w in WIDTHS if isinstance(told.get(w), int)), None)
    if name is None:
        raise InputError(
            f"a {told['kind']} network has no single width to shrink, expected one of {', '.join(WIDTHS)} in its "
            "configuration: distil into the same network with reflow"
        )
    fold = WIDTHS[name]
    narrow = max(fold, round(told[name] * shrink / fold) * fold)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(Noise.of(seed, 1).fold("slim").seeds))
        net = build_network({**told, name: narrow})
    made: Precond = D.with_net(net.to(teacher.device)).eval().requires_grad_(False)
    return replace(teacher, denoiser=made)
