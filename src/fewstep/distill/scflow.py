"""Self-corrected flow distillation (SCFlow, arXiv 2412.16906): one x0 along the flow, for one step and for more."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Losses, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.loss.gan import Game, through_samples
from fewstep.loss.huber import pixel_huber
from fewstep.models.discriminator import (
    Discriminator,
    check_game,
    discriminator_config,
    discriminator_loss,
    generator_loss,
    judging,
)
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.euler import euler
from fewstep.solve.step import ddim, pictures


@dataclass(frozen=True)
class SCFlow:
    """A student whose x0 is the same all along the teacher's flow, for one and for more Euler steps. Needs data.

    Times are those of a flow, ``t = sigma / (1 + sigma)``, whatever the teacher's own path is. A weight of 0 switches
    its term off, with all that it costs.

    Attributes:
        steps: evaluations of the shipped sampler; training is the same for all.
        consistency: weight of the agreement with the neighbour nearer to the data.
        bidirectional: weight of the agreement with the neighbour farther from the data.
        correction: weight of the self-correction: the student's own one-step sample, noised again, is found again.
        gan: weight of the adversarial term on the one-step sample.
        near: the longest way to a neighbour, in flow time.
        truncation: neighbours below this time have the data's picture as target; the paper's are 0.4 (CelebA), 0.1.
        huber: c of the pseudo-Huber distance, per pixel.
        weighted: divides the distance to a neighbour by t, as an error e of x0 is an error e / t of the velocity that
            the sampler follows. The paper weighs all times alike; this trades one step for more.
        bidirectional_from: share of the run after which its term starts.
        correction_from: share of the run after which its term starts.
        gan_from: share of the run after which the adversarial term starts, and the discriminator's training.
        game: adversarial loss: non-saturating (the paper's), hinge or least-squares.
        r1: weight gamma of the penalty on the discriminator's gradient; the paper's are 1 (CelebA) and 0.
        r1_on: what that gradient is taken by: pictures (the paper's) or features, which costs less.
        judged_at: flow times at which the discriminator sees pictures, drawn alike; 0 is the clean picture.
        taps: the features of the teacher that it reads; without any the bottleneck, or a transformer's middle block.
        hidden: width of its heads.
        lean: makes the one-step sample twice, so that its graph and that of the adversarial term are never held
            together: the same gradients with less memory, for one forward pass of the student more.
        optim: of the student.
        critic: optimizer of the discriminator.
        target: the average that the neighbours' targets are made with.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = True

    steps: int = 2
    consistency: float = 1.0
    bidirectional: float = 0.1
    correction: float = 0.1
    gan: float = 0.1
    near: float = 0.1
    truncation: float = 0.1
    huber: float = 0.01
    weighted: bool = False
    bidirectional_from: float = 0.05
    correction_from: float = 0.05
    gan_from: float = 0.0
    game: Game = "non-saturating"
    r1: float = 1.0
    r1_on: Literal["pictures", "features"] = "pictures"
    judged_at: tuple[float, ...] = (0.0,)
    taps: tuple[str, ...] = ()
    hidden: int = 128
    lean: bool = True
    optim: Optim = Optim(lr=1e-4)
    critic: Optim = Optim(lr=1e-4, betas=(0.0, 0.999))
    target: Ema = Ema(rate=0.9)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        weights = (self.consistency, self.bidirectional, self.correction, self.gan)
        if not self.steps >= 1 or not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise InputError(f"SCFlow needs steps >= 1, weights >= 0 and one of its terms above 0, got {self}")
        if not 0 < self.near <= 1 or not 0 <= self.truncation < 1 or not 0 < self.huber < math.inf:
            raise InputError(
                f"SCFlow needs near within (0, 1], truncation within [0, 1) and huber > 0, got {self.near}, "
                f"{self.truncation} and {self.huber}"
            )
        shares = (self.bidirectional_from, self.correction_from, self.gan_from)
        if not all(0 <= share < 1 for share in shares):
            raise InputError(f"SCFlow's terms start at shares of the run within [0, 1), got {shares}")
        check_game("SCFlow", self.game, self.judged_at, self.hidden, r1=self.r1)
        if self.r1_on not in ("pictures", "features"):
            raise unknown("input of R1", self.r1_on, ("pictures", "features"))

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the network of the teacher, whose guidance stays with it.

        Raises:
            InputError: a denoiser without a network, one without features for the adversarial term, or too many steps
                for its levels.
        """
        made, student = frozen(teacher.denoiser), network_under(teacher.denoiser)
        self.levels(teacher.denoiser)
        roles = {
            "teacher": Role(lambda: made),
            "student": Role(lambda: copy.deepcopy(student), self.optim, self.ema, self.target, ships=True),
        }
        if self.gan:
            size = discriminator_config(teacher, self.taps, self.hidden)
            roles["discriminator"] = Role(lambda: Discriminator(size), self.critic)
        return roles

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The student and then, while there is an adversarial term, the discriminator on what the student just made."""
        x0, cond = pictures("SCFlow", batch, m.student.shape), batch.cond
        n = noise.normal(x0.shape[1:], "n", dtype=x0.dtype)
        t = self.times(m.student, noise)
        sigma = level(t).clamp(m.student.sigma_min, m.student.sigma_max)
        x = x0 + widen(sigma, x0) * n
        top = torch.full_like(sigma, m.student.sigma_max)
        start = start_std(m.student, m.student.sigma_max) * n
        corrects = self.correction if m.progress >= self.correction_from else 0.0
        plays = self.gan if m.progress >= self.gan_from else 0.0
        aims = self.aims(m, x0, x, t, cond, noise)
        # Early in a run all of its terms may still be off.
        if not (aims or corrects or plays):
            return
        seen = judging(noise, self.judging_levels(m.student), x0) if plays else None
        # The one-step samples: with a gradient for the game, and without one for the correction and the discriminator.
        samples: list[Tensor] = []
        if corrects and not plays:
            with torch.no_grad():
                samples.append(m.student(start, top, cond))

        def playing(lean: bool) -> dict[str, Tensor]:
            game = partial(self.played, m, seen, plays, cond)
            found, sample = through_samples(lambda: m.student(start, top, cond), game, x0, lean=lean)
            samples.append(sample)
            return {**found, "adversarial": found["loss"]}

        def agreeing() -> dict[str, Tensor]:
            own = m.student(x, sigma, cond)
            each = 1 / t if self.weighted else torch.ones_like(t)
            parts = {name: w * self.distance(own, aim, each) for name, (w, aim) in aims.items()}
            return {"loss": torch.stack([*parts.values()]).sum(), **parts}

        def correcting() -> dict[str, Tensor]:
            again = m.student(samples[-1] + widen(sigma, x) * n, sigma, cond)
            found = corrects * (again - samples[-1]).square().mean()
            return {"loss": found, "correction": found}

        def terms(lean: bool) -> tuple[Callable[[], Losses], ...]:
            every = ((partial(playing, lean), plays), (agreeing, aims), (correcting, corrects))
            return tuple(term for term, on in every if on)

        yield Update.of("student", *terms(lean=False))._replace(parts=terms(self.lean))
        if seen is not None:
            at, z = seen
            yield Update("discriminator", lambda: self.judged(m, x0 + z, samples.pop() + z, at, cond))

    def played(
        self, m: Models, seen: tuple[Tensor, Tensor] | None, weight: float, cond: Cond, sample: Tensor
    ) -> dict[str, Tensor]:
        """The student's side of the game on its one-step ``sample`` (B, ...), seen as :func:`judging` says."""
        assert seen is not None
        at, z = seen
        return {"loss": weight * generator_loss(m.teacher, m.discriminator, sample + z, at, cond, game=self.game)}

    def judged(self, m: Models, real: Tensor, fake: Tensor, at: Tensor, cond: Cond) -> dict[str, Tensor]:
        """The discriminator's side, on pictures (B, ...) noised to levels ``at`` (B,)."""
        return discriminator_loss(
            m.teacher, m.discriminator, real, fake, at, cond, game=self.game, gamma=self.r1, penalised=self.r1_on
        )

    def aims(
        self, m: Models, x0: Tensor, x: Tensor, t: Tensor, cond: Cond, noise: Noise
    ) -> dict[str, tuple[float, Tensor]]:
        """Weight and target (B, ...) for each neighbour that is asked for: the average's x0 there, without a gradient.

        Both neighbours are one Euler step of the teacher away, from the one evaluation at ``x``; a step of Euler in
        flow time is DDIM's.
        """
        low, top = times_of(m.student)
        farther = self.bidirectional if m.progress >= self.bidirectional_from else 0.0
        if not self.consistency and not farther:
            return {}
        out: dict[str, tuple[float, Tensor]] = {}
        sigma = level(t).clamp(m.student.sigma_min, m.student.sigma_max)
        with torch.no_grad():
            x_data = m.teacher(x, sigma, cond)
            for name, weight, room in (
                ("consistency", self.consistency, low - t),
                ("bidirectional", farther, top - t),
            ):
                if not weight:
                    continue
                way = noise.uniform((), name, dtype=torch.float64) * room.clamp(-self.near, self.near)
                s = level(t + way).clamp(m.student.sigma_min, m.student.sigma_max)
                aim = m.target("student")(ddim(x, x_data, sigma, s), s, cond)
                if name == "consistency" and self.truncation:
                    near_data = (t + way < self.truncation).reshape(-1, *[1] * (x.ndim - 1))
                    aim = torch.where(near_data, x0, aim.to(x0.dtype))
                out[name] = (weight, aim)
        return out

    def distance(self, a: Tensor, b: Tensor, each: Tensor) -> Tensor:
        """``mean of sqrt((a - b)^2 + c^2) - c`` over pixels and batch, each picture weighed by ``each`` (B,)."""
        found = pixel_huber(a - b, self.huber)
        return (each.to(found) * found).mean()

    def times(self, D: Denoiser, noise: Noise) -> Tensor:
        """(B,) float64 flow times, uniform between those of the denoiser's lowest and highest level."""
        low, top = times_of(D)
        return low + (top - low) * noise.uniform((), "t", dtype=torch.float64)

    def judging_levels(self, D: Denoiser) -> list[float]:
        """The levels at which the discriminator sees pictures."""
        return [min(max(t / (1 - t), D.sigma_min), D.sigma_max) for t in self.judged_at]

    def levels(self, D: Denoiser) -> Tensor:
        """(steps + 1,) float64 levels of the sampler: even in flow time, from the highest to 0.

        Raises:
            InputError: the last of them is below the denoiser's lowest.
        """
        t = times_of(D)[1] * torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        sigmas = level(t)
        sigmas[0] = D.sigma_max
        if sigmas[-2] < D.sigma_min:
            raise InputError(
                f"SCFlow(steps={self.steps}) would evaluate at sigma {float(sigmas[-2]):.3g}, below the teacher's "
                f"lowest, {D.sigma_min:g}: take fewer steps"
            )
        return sigmas

    def sampler(self, teacher: Generator) -> Tableau:
        """Euler's method on the flow, on levels even in its time."""
        return euler(self.levels(teacher.denoiser))


def level(t: Tensor) -> Tensor:
    """``sigma = t / (1 - t)``: the noise level at flow time ``t`` within [0, 1)."""
    return t / (1 - t)


def times_of(D: Denoiser) -> tuple[float, float]:
    """The flow times ``sigma / (1 + sigma)`` of the lowest and of the highest level."""
    return D.sigma_min / (1 + D.sigma_min), D.sigma_max / (1 + D.sigma_max)
