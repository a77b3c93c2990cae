"""SANA-Sprint (arXiv 2503.09641): continuous-time consistency distillation and a latent adversarial loss in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Losses, Models, Optim, Role, Update, named
from fewstep.distill.scm import SCM
from fewstep.errors import InputError, unknown
from fewstep.loss.gan import ADVERSARIAL, through_samples
from fewstep.models.discriminator import Discriminator, discriminator_config, discriminator_loss, generator_loss
from fewstep.models.frozen import frozen
from fewstep.solve.step import pictures


@dataclass(frozen=True)
class SanaSprint(SCM):
    """sCM's loss and an adversarial one on the teacher's features, from a flow-matching teacher as it is. Needs data.

    The teacher is seen in TrigFlow's coordinates by exact algebra, without retraining. The adversarial loss judges the
    student's own x0, noised again, by heads on features of the frozen teacher; half of the time that x0 is made from
    pure noise. One student serves one to four evaluations.

    Attributes:
        middle: angles t = atan(sigma / sigma_data) of the sampler between the first level and 0, falling, ``steps - 1``
            of them. Without any: 1.3 for two evaluations, as published, otherwise evenly spaced.
        source: of the trajectories: teacher, as published, or data.
        adaptive: whether the variance of the consistency loss at each level is learned and divided out.
        optim: of the student; the paper's is CAME with lr 2e-6.
        consistency: weight of the consistency loss; 0 leaves it and its cost out.
        adversarial: weight of the adversarial loss; 0 leaves it, its heads and their cost out.
        game: form of the adversarial loss: hinge, as published, or non-saturating.
        top: share of the pictures that are judged, which are made from the highest level; 0 draws all levels alike.
        taps: features of the teacher that the heads read; none are those that suit its kind of network.
        hidden: width of each head.
        lean: makes the judged x0 twice, so that its graph and that of the adversarial loss are never held together: the
            same gradients with less memory, for one forward pass of the student more.
        heads: how the heads are trained.
        judge_mean: of ln sigma at which pictures are judged.
        judge_std: of ln sigma at which pictures are judged.
    """

    published_middle: ClassVar[float] = 1.3

    mean: float = 0.2
    std: float = 1.6
    optim: Optim = Optim(lr=1e-4, betas=(0.9, 0.99), decay="cosine", clip=1.0)
    ema: Ema = Ema(power=0.05)
    consistency: float = 1.0
    adversarial: float = 0.5
    game: str = "hinge"
    top: float = 0.5
    taps: tuple[str, ...] = ()
    hidden: int = 128
    lean: bool = True
    heads: Optim = Optim(lr=1e-4, betas=(0.0, 0.99))
    judge_mean: float = -0.6
    judge_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.consistency, self.adversarial)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise InputError(
                "SanaSprint needs weights >= 0 that are not both 0, got consistency="
                f"{self.consistency} and adversarial={self.adversarial}"
            )
        if not 0 <= self.top <= 1 or self.hidden < 1:
            raise InputError(f"SanaSprint needs 0 <= top <= 1 and hidden >= 1, got {self.top} and {self.hidden}")
        if not 0 < self.judge_std < math.inf or not math.isfinite(self.judge_mean):
            raise InputError(
                f"SanaSprint needs judge_std > 0 and a finite judge_mean, got {self.judge_std} and {self.judge_mean}"
            )
        if self.game not in ADVERSARIAL:
            raise unknown("adversarial loss", self.game, ADVERSARIAL)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """sCM's, and the heads; what a weight of 0 leaves out has no role.

        Raises:
            InputError: see :meth:`SCM.roles` and :func:`fewstep.models.discriminator.discriminator_config`.
        """
        roles = super().roles(teacher)
        if not self.consistency:
            roles.pop("variance", None)
        if self.adversarial:
            # Sizes first, so that a wrong tap is named before anything runs.
            config = discriminator_config(teacher, self.taps, self.hidden)
            made = frozen(teacher.denoiser)
            roles |= {
                "teacher": Role(lambda: made),
                "heads": Role(lambda: Discriminator(config), self.heads),
            }
        return roles

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The student on both losses, then the heads on the pictures that it has just made."""
        found = self.point(m, batch, noise) if self.consistency else None
        fakes: list[Tensor] = []

        def consistent() -> Losses:
            assert found is not None
            made = self.consistency * named(self.loss(m, *found, batch.cond))["loss"]
            return {"loss": made, "consistency": made}

        def fooling(lean: bool) -> Losses:
            x, at = self.asked(m, batch, noise.fold("guess"))

            def fooled(fake: Tensor) -> dict[str, Tensor]:
                seen, sigma = self.noised(m, fake, noise.fold("student"))
                made = generator_loss(m.teacher, m.heads, seen, sigma, batch.cond, game=self.game)
                return {"loss": self.adversarial * made}

            made, fake = through_samples(lambda: m.student(x, at, batch.cond), fooled, x, lean=lean)
            fakes.append(fake)
            return {**made, "adversarial": made["loss"]}

        def terms(lean: bool) -> tuple[Callable[[], Losses], ...]:
            first: tuple[Callable[[], Losses], ...] = (consistent,) if self.consistency else ()
            return (*first, partial(fooling, lean)) if self.adversarial else first

        trained = ("student", "variance") if self.consistency and self.adaptive else "student"
        yield Update.of(trained, *terms(lean=False))._replace(parts=terms(lean=self.lean))
        if self.adversarial:
            yield Update("heads", lambda: self.verdict(m, batch, fakes[0], noise.fold("heads")))

    def asked(self, m: Models, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """Noised pictures (B, ...) whose x0 is judged and their levels (B,), a share ``top`` of them the highest."""
        x0 = pictures("SanaSprint", batch, m.student.shape)
        low, top = self.ends(m.student)
        sigma = self.levels(noise, low, top)
        sigma = torch.where(noise.uniform((), "top") < self.top, torch.full_like(sigma, top), sigma)
        return x0 + widen(sigma, x0) * noise.normal(x0.shape[1:], "n"), sigma

    def noised(self, m: Models, x: Tensor, noise: Noise, own: str = "n") -> tuple[Tensor, Tensor]:
        """Pictures ``x`` (B, ...), noised to a level of the judges' own draw by the noise ``own``, and the levels."""
        low, top = m.teacher.sigma_min, m.teacher.sigma_max
        draw = noise.normal((), "level", dtype=torch.float64) * self.judge_std + self.judge_mean
        sigma = draw.exp().clamp(low, top)
        return x + widen(sigma, x) * noise.normal(x.shape[1:], own), sigma

    def verdict(self, m: Models, batch: Batch, fake: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        """The heads' loss on real pictures and the student's, both at the same levels."""
        x0 = pictures("SanaSprint", batch, m.student.shape)
        (real, sigma), (made, _) = self.noised(m, x0, noise, "real"), self.noised(m, fake, noise, "fake")
        return discriminator_loss(m.teacher, m.heads, real, made, sigma, batch.cond, game=self.game)
