"""Adversarial consistency distillation (arXiv 2407.06095) of models from picture to picture, and of any other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Models, Optim, Role, Update
from fewstep.distill.consistency import CD, Target
from fewstep.errors import InputError, unknown
from fewstep.loss.draw import LogNormal
from fewstep.loss.gan import ADVERSARIAL, Game
from fewstep.models.discriminator import Discriminator, discriminator_config, discriminator_loss, generator_loss
from fewstep.solve.step import pictures


@dataclass(frozen=True)
class AdversarialCD(CD):
    """Consistency distillation whose estimates must also pass for real to heads on the teacher's features.

    The condition, such as the picture to translate, reaches teacher, student and features alike, so that the heads
    judge pairs. With ``adversarial`` 0 it is consistency distillation, and there are no heads.

    Attributes:
        target_ema: the target's average.
        optim: of the student.
        adversarial: weight of the adversarial term; 0 leaves it out.
        after: share of the budget after which the term begins; the heads are trained from the start.
        game: hinge, non-saturating or least-squares.
        draw: noise levels at which real and made pictures are judged.
        taps: the teacher's features that are judged; without any the bottleneck, or a transformer's middle block.
        hidden: width of each head.
        heads: optimizer of the heads.
        penalty: weight of R1, the squared gradient of the heads at the features of real pictures; 0 leaves it out.
    """

    # Those of the first paper: weighed by the inverse gap, the game's share would depend on the grid.
    target: Target = "ema"
    levels: int = 18
    weighted: bool = False
    adversarial: float = 0.1
    after: float = 0.0
    game: Game = "hinge"
    draw: LogNormal = LogNormal(mean=-0.8, std=1.6)
    taps: tuple[str, ...] = ()
    hidden: int = 128
    heads: Optim = Optim(lr=1e-3, betas=(0.0, 0.999))
    penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.adversarial, self.penalty)
        if not all(0 <= w < math.inf for w in weights) or not 0 <= self.after < 1 or self.hidden < 1:
            raise InputError(
                f"AdversarialCD needs adversarial >= 0, 0 <= after < 1, penalty >= 0 and hidden >= 1, got "
                f"{self.adversarial}, {self.after}, {self.penalty} and {self.hidden}"
            )
        if self.game not in ADVERSARIAL:
            raise unknown("game", self.game, ADVERSARIAL)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of consistency distillation, and the heads.

        Raises:
            InputError: see :meth:`CD.roles` and :func:`fewstep.models.discriminator.discriminator`.
        """
        made = super().roles(teacher)
        if self.adversarial:
            size = discriminator_config(teacher, self.taps, self.hidden)
            made["heads"] = Role(lambda: Discriminator(size), self.heads)
        return made

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """An update of the student, then one of the heads on the estimates that the student was just trained on."""
        if not self.adversarial:
            yield from super().step(m, batch, i, noise)
            return
        x0, cond = pictures("AdversarialCD", batch, m.student.shape), batch.cond
        pair = self.pair(m, batch, noise)
        s, _ = self.draw(noise.fold("judge"), m.student.sigma_data)
        s = s.clamp(m.teacher.sigma_min, m.teacher.sigma_max)
        z_fake, z_real = (widen(s, x0) * noise.normal(x0.shape[1:], "judge", part) for part in ("fake", "real"))
        share = self.adversarial if m.progress >= self.after else 0.0
        kept: list[Tensor] = []

        def student() -> dict[str, Tensor]:
            agree, made = self.agreement(m, *pair[:4], cond, pair.weight)
            kept.append(made.detach())
            if not share:
                return {"loss": agree, "agreement": agree}
            fooled = generator_loss(m.teacher, m.heads, made + z_fake, s, cond, game=self.game)
            return {"loss": agree + share * fooled, "agreement": agree, "fooled": fooled}

        yield Update("student", student)

        def heads() -> dict[str, Tensor]:
            fake, real = kept.pop() + z_fake, x0 + z_real
            return discriminator_loss(m.teacher, m.heads, real, fake, s, cond, game=self.game, gamma=self.penalty)

        yield Update("heads", heads)
