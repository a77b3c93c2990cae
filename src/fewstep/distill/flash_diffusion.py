"""Flash Diffusion (arXiv 2406.02347): the teacher's guided solution, an adversarial and a DMD term, phase by phase."""

from __future__ import annotations

import bisect
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, Precond, Wrapper, start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.own import own_grid, own_levels
from fewstep.guide.cfg import CFG, guided
from fewstep.guide.dynamic import guided_at
from fewstep.loss.gan import Game
from fewstep.loss.huber import pseudo_huber
from fewstep.loss.perceptual import distance_in, distance_roles
from fewstep.models.discriminator import (
    Discriminator,
    check_game,
    discriminator_config,
    discriminator_loss,
    generator_loss,
    judging,
)
from fewstep.models.frozen import Frozen, frozen, network_under, nulls_of
from fewstep.solve.consistency import consistency
from fewstep.solve.dpmpp import dpmpp
from fewstep.solve.step import pictures

# The fractional part of its multiples fills [0, 1) as evenly as any sequence does.
GOLDEN = (math.sqrt(5) - 1) / 2
# Of two batches (B, ...): a scalar whose size does not depend on that of a picture.
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "huber": lambda x, y: pseudo_huber(x, y).mean() / math.sqrt(x[0].numel()),
    "l2": lambda x, y: (x - y).square().mean(),
    "l1": lambda x, y: (x - y).abs().mean(),
}


@dataclass(frozen=True)
class FlashDiffusion:
    """One trainer for any condition and backbone: x0 in one evaluation is to be where the teacher's solver ends.

    Noised data go into the student and into the teacher's multistep solver. The levels come from a mixture whose
    weight moves, phase by phase, from low levels to pure noise, while the further terms grow. Conditions of any kind
    pass through to the network. The paper trains LoRA layers of rank 128 (``--lora 128``).

    Attributes:
        steps: evaluations of the shipped sampler; training is the same for all.
        teacher_steps: K, the teacher's steps from pure noise to a picture, even in its own time: that of its path, or
            arctan(sigma / sigma_data) where that is the noise level itself.
        components: modes of the mixture of levels, at every (K / components)-th of those steps.
        modes: their weights, ``components`` numbers for each phase, phase after phase.
        variance: v of each mode, ``exp(-d^2 / v)`` at d steps of the teacher from its middle, as in the published code:
            the variance of that bell in the statistical sense is v / 2.
        distil: weight of the distance to the teacher's solution.
        distance: huber, the root mean square of a picture's error with a smooth minimum; l2 or l1, a mean over pixels;
            lpips, the paper's for Stable Diffusion 1.5, whose slope, like huber's, does not fade with the error.
        features: of lpips: own (the packaged network, for digits), teacher (its taps), or the path of LPIPS weights.
        adversarial: weight of the adversarial term in each phase.
        dmd: weight of the distribution matching term in each phase.
        guidance: lowest and highest scale of the teacher's guidance, drawn for each sample; the paper's is 3 to 13 for
            Stable Diffusion 1.5. None takes the teacher as it is given.
        game: adversarial loss: least-squares (the paper's for Stable Diffusion 1.5), hinge or non-saturating.
        real: what the discriminator takes for real: data (the paper's) or the teacher's solutions.
        judged_at: places, between 0 at the lowest and 1 at the highest level, at which the discriminator sees pictures.
        taps: the features of the teacher that it reads; without any the bottleneck, or a transformer's middle block.
        hidden: width of its heads.
        optim: of the student; the paper's lr is 1e-5.
        critic: optimizer of the discriminator; the paper's lr is 1e-5.
        ema: the average that ships; the paper keeps none.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = True

    steps: int = 4
    teacher_steps: int = 32
    components: int = 4
    modes: tuple[float, ...] = (
        *(0.0, 0.0, 0.5, 0.5),
        *(0.1, 0.3, 0.3, 0.3),
        *(0.25, 0.25, 0.25, 0.25),
        *(0.4, 0.2, 0.2, 0.2),
    )
    variance: float = 0.5
    distil: float = 1.0
    distance: Literal["huber", "l2", "l1", "lpips"] = "huber"
    features: str = "own"
    adversarial: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    dmd: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7)
    guidance: tuple[float, float] | None = None
    game: Game = "least-squares"
    real: Literal["data", "teacher"] = "data"
    judged_at: tuple[float, ...] = (0.01, 0.25, 0.5, 0.75)
    taps: tuple[str, ...] = ()
    hidden: int = 128
    optim: Optim = Optim(lr=1e-4)
    critic: Optim = Optim(lr=1e-4)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        whole = self.steps >= 1 and 1 <= self.components <= self.teacher_steps
        if not whole or not 0 < self.variance < math.inf:
            raise InputError(
                "FlashDiffusion needs steps >= 1, 1 <= components <= teacher_steps and variance > 0, got "
                f"{self.steps}, {self.components}, {self.teacher_steps} and {self.variance}"
            )
        phases = len(self.adversarial)
        if not phases or len(self.dmd) != phases or len(self.modes) != phases * self.components:
            raise InputError(
                f"FlashDiffusion needs a weight in adversarial and dmd and {self.components} in modes for each phase, "
                f"got {phases}, {len(self.dmd)} and {len(self.modes)}"
            )
        rows = [self.modes[k : k + self.components] for k in range(0, len(self.modes), self.components)]
        weights = (self.distil, *self.adversarial, *self.dmd, *self.modes)
        if not all(0 <= weight < math.inf for weight in weights) or not all(sum(row) > 0 for row in rows):
            raise InputError("FlashDiffusion needs finite weights >= 0, and in each phase a mode above 0")
        if any(self.distil + a + d == 0 for a, d in zip(self.adversarial, self.dmd, strict=True)):
            raise InputError("FlashDiffusion needs one of its terms above 0 in each phase")
        around = self.guidance
        if around is not None and not (len(around) == 2 and 0 <= around[0] <= around[1] < math.inf):
            raise InputError(
                f"FlashDiffusion(guidance=...) is the lowest and the highest of a range of scales >= 0, got {around}"
            )
        check_game("FlashDiffusion", self.game, self.judged_at, self.hidden)
        named = (
            ("distance", self.distance, (*DISTANCES, "lpips")),
            ("kind of real pictures", self.real, ("data", "teacher")),
        )
        for what, value, known in named:
            if value not in known:
                raise unknown(what, value, known)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the network of the teacher, whose guidance stays with it.

        Raises:
            InputError: a denoiser without a network, one without features for the adversarial term, guidance asked of a
                teacher that is unconditional or wrapped otherwise, or what
                :func:`fewstep.loss.perceptual.distance_roles` refuses.
        """
        D, student = teacher.denoiser, network_under(teacher.denoiser)
        own_grid(D, self.teacher_steps)
        if self.guidance is not None:
            D = (
                D
                if isinstance(D, CFG)
                else guided(teacher, self.guidance[1] if self.guidance[1] != 1 else 2.0).denoiser
            )
            if not isinstance(D, CFG) or not isinstance(D.denoiser, Precond):
                raise InputError(
                    f"FlashDiffusion(guidance={self.guidance}) cannot guide a {type(teacher.denoiser).__name__}: take "
                    "the wrapper off, or leave guidance out"
                )
        made = frozen(D)
        roles = {
            "teacher": Role(lambda: made),
            "student": Role(lambda: copy.deepcopy(student), self.optim, self.ema, ships=True),
        }
        if self.distil:
            roles |= distance_roles(self.distance, teacher, self.features)
        if any(self.adversarial):
            size = discriminator_config(teacher, self.taps, self.hidden)
            roles["discriminator"] = Role(lambda: Discriminator(size), self.critic)
        return roles

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The teacher's solution from noised data, the student and, in phases that play, the discriminator."""
        x0, cond = pictures("FlashDiffusion", batch, m.student.shape), batch.cond
        phase = self.phase(m.progress)
        plays, matches = self.adversarial[phase], self.dmd[phase]
        start = self.start(m, i, phase)
        table = _solution(self, m.student, start)
        n = noise.normal(x0.shape[1:], "n", dtype=x0.dtype)
        x = start_std(m.student, table.start) * n if start == 0 else x0 + table.start * n
        sigma = torch.full((len(x),), table.start, dtype=torch.float64, device=x.device)
        aim = x0
        if self.distil or (plays and self.real == "teacher"):
            # The sampler records no gradient.
            aim = table(self.guide(m, noise), x, cond)
        seen = judging(noise, self.judging_levels(m), x0) if plays else None
        kept: list[Tensor] = []

        def loss() -> dict[str, Tensor]:
            own = m.student(x, sigma, cond)
            parts: dict[str, Tensor] = {}
            if self.distil:
                parts["distil"] = self.distil * self.apart(m, own, aim)
            if seen is not None:
                at, z = seen
                kept.append(own.detach())
                game = generator_loss(m.teacher, m.discriminator, own + z, at, cond, game=self.game)
                parts["adversarial"] = plays * game
            if matches:
                parts["dmd"] = matches * self.matching(m, own, cond, noise.fold("dmd"))
            told = {name: part.detach() for name, part in parts.items()}
            return {"loss": torch.stack([*parts.values()]).sum(), **told}

        yield Update("student", loss)
        if seen is None:
            return
        at, z = seen
        real = (x0 if self.real == "data" else aim) + z

        def judge() -> dict[str, Tensor]:
            return discriminator_loss(m.teacher, m.discriminator, real, kept.pop() + z, at, cond, game=self.game)

        yield Update("discriminator", judge)

    def apart(self, m: Models, x: Tensor, aim: Tensor) -> Tensor:
        """The distance to the teacher's solution, a scalar whose size does not depend on that of a picture."""
        return distance_in(m, "lpips")(x, aim).mean() if self.distance == "lpips" else DISTANCES[self.distance](x, aim)

    def matching(self, m: Models, x: Tensor, cond: Cond, noise: Noise) -> Tensor:
        """The DMD term of ``x`` (B, ...), a scalar whose gradient is 2 (D_student - D_teacher) / mean|x - D_teacher|.

        The student itself stands in for a fake score. Each gradient is divided by the number of values, and ``x``
        alone gets one.
        """
        sigma = own_levels(m.student, noise.uniform((), "level", dtype=torch.float64))
        with torch.no_grad():
            y = x + widen(sigma, x) * noise.normal(x.shape[1:], "n", dtype=x.dtype)
            d_teacher, d_fake = self.guide(m, noise)(y, sigma, cond), m.student(y, sigma, cond)
            scale = (x - d_teacher).abs().flatten(1).mean(1) + 1e-5
            aim = x - (d_fake - d_teacher) / scale.reshape(-1, *[1] * (x.ndim - 1))
        return (x - aim).square().mean()

    def guide(self, m: Models, noise: Noise) -> Denoiser:
        """The teacher as it is given, or with a guidance scale for each sample."""
        if self.guidance is None:
            return cast(Denoiser, m.teacher)
        low, high = self.guidance
        return Scaled(cast(Frozen, m.teacher), low + (high - low) * noise.uniform((), "guidance"))

    def phase(self, progress: float) -> int:
        """The number of the phase when the share ``progress`` of the budget is spent; all are equally long."""
        return min(len(self.adversarial) - 1, int(progress * len(self.adversarial)))

    def chances(self, phase: int) -> list[float]:
        """The probability of each of the teacher's levels, the highest first, as training points in a phase."""
        apart = self.teacher_steps // self.components
        own = self.modes[phase * self.components : (phase + 1) * self.components]
        mass = [
            sum(w * math.exp(-((k - j * apart) ** 2) / self.variance) for j, w in enumerate(own))
            for k in range(self.teacher_steps)
        ]
        return [part / sum(mass) for part in mass]

    def start(self, m: Models, i: int, phase: int) -> int:
        """The number of the level of iteration ``i``, one for all samples, as the teacher goes on from there.

        From a sequence that meets every level as often as it is probable, in any stretch of iterations, and that starts
        where the run's seed says: nothing of it depends on the batch, so that processes and micro-batches agree.
        """
        first = float(m.common(0).uniform((), "start", dtype=torch.float64))
        place = (first + GOLDEN * i) % 1.0
        edges = list(itertools.accumulate(self.chances(phase)))
        return min(bisect.bisect_right(edges, place), self.teacher_steps - 1)

    def judging_levels(self, m: Models) -> list[float]:
        """The levels at which the discriminator sees pictures."""
        return own_levels(m.student, torch.tensor(self.judged_at, dtype=torch.float64)).tolist()

    def sampler(self, teacher: Generator) -> Tableau:
        """Multistep consistency sampling on levels even in the teacher's own time, as for latent consistency models.

        They are every (K / steps)-th level of the teacher where ``steps`` divides K.
        """
        return consistency(own_grid(teacher.denoiser, self.steps))


class Scaled(Wrapper):
    """The network of a guided teacher with a scale of its own for each sample, ``w`` (B,)."""

    def __init__(self, teacher: Frozen, w: Tensor) -> None:
        super().__init__(teacher.network)
        self.w, self.nulls = w, nulls_of(teacher)

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`; one batch of twice the size."""
        return guided_at(self.denoiser, x, sigma, cond or {}, self.w, self.nulls)


@lru_cache(maxsize=128)
def _table(teacher_steps: int, start: int, levels: tuple[float, ...]) -> Tableau:
    return dpmpp(torch.tensor(levels[start:], dtype=torch.float64), 2)


def _solution(method: FlashDiffusion, D: Denoiser, start: int) -> Tableau:
    """The teacher's solver from its level number ``start`` on: DPM-Solver++(2M)."""
    return _table(method.teacher_steps, start, tuple(own_grid(D, method.teacher_steps).tolist()))
