"""Improved distribution matching distillation (DMD2, arXiv 2405.14867): two time scales, a GAN term, few steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.core.cond import Batch, Cond
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.distill.vsd import VSD
from fewstep.errors import InputError, unknown
from fewstep.loss.draw import KarrasUniform, edm_weight
from fewstep.loss.gan import ADVERSARIAL
from fewstep.loss.matching import directed, direction, in_two_passes
from fewstep.models.discriminator import Discriminator, discriminator_config, read


@dataclass(frozen=True)
class DMD2(VSD):
    """Distribution matching with a fake score that learns faster, and a GAN term on its features.

    The discriminator is a small head on activations of the fake score, or of the teacher. It is trained with the fake
    score, on noised data and noised samples of the student. A student of several steps is trained on its own samples
    of the steps before.

    Attributes:
        normaliser: of the difference of scores: sample is the paper's.
        fake_draw: noise levels of the fake score's and the discriminator's training.
        ratio: updates of the fake score for each of the student; 5 in the paper, 10 for Stable Diffusion 1.5.
        student: optimizer of the student; the paper's lr is 2e-6 for ImageNet-64.
        gan: weight of the GAN term in the student's loss; 0 leaves it out, and then no data are needed.
        critic: weight of the discriminator's loss beside the fake score's.
        features: what the discriminator reads: fake, whose features it trains too (the paper's), or teacher.
        taps: names of the activations; without any the bottleneck, or a transformer's middle block.
        hidden: width of the discriminator's head.
        lean: makes the student's samples twice, so that its graph and that of the GAN term are never held together: the
            same gradients with less memory, for one forward pass of the student more in each of its updates.
    """

    any_steps: ClassVar[bool] = False

    ratio: int = 5
    student: Optim = Optim(lr=1e-4, weight_decay=0.01, clip=10.0)
    fake: Optim = Optim(lr=1e-4, weight_decay=0.01, clip=10.0)
    ema: Ema = Ema(power=0.05)
    fake_draw: KarrasUniform = KarrasUniform(top=1.0)
    gan: float = 3e-3
    critic: float = 1e-2
    features: Literal["fake", "teacher"] = "fake"
    taps: tuple[str, ...] = ()
    hidden: int = 128
    lean: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan < 0 or self.critic < 0 or self.hidden < 1:
            raise InputError(
                f"{type(self).__name__} needs gan >= 0, critic >= 0 and hidden >= 1, got {self.gan}, {self.critic} and "
                f"{self.hidden}"
            )
        if self.features not in ("fake", "teacher"):
            raise unknown("features of the discriminator", self.features, ("fake", "teacher"))

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """With the GAN term alone."""
        return self.gan > 0

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of VSD, and the discriminator's head where there is a GAN term.

        Raises:
            InputError: see :meth:`VSD.roles`, or a tap that the network does not declare.
        """
        found = super().roles(teacher)
        if self.gan:
            size = discriminator_config(teacher, self.taps, self.hidden)
            found["heads"] = Role(lambda: Discriminator(size), self.fake)
        return found

    def student_update(
        self, m: Models, generate: Callable[[], Tensor], made: list[Tensor], batch: Batch, noise: Noise
    ) -> Update:
        """See :meth:`VSD.student_update`; ``lean`` says how it runs."""
        whole = super().student_update(m, generate, made, batch, noise)
        if not (self.lean and self.gan):
            return whole

        def loss() -> dict[str, Tensor]:
            device = noise.seeds.device
            losses, x = in_two_passes(generate, lambda x: self.student_losses(m, x, batch, noise), device)
            made.append(x)
            return losses

        return whole._replace(parts=(loss,))

    def student_losses(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Eq. 1 and the generator's side of eq. 4."""
        sigma, _ = self.draw(noise, m.student.sigma_data)
        with torch.no_grad():
            y = x + widen(sigma, x) * noise.normal(x.shape[1:], "n")
            d_fake, d_teacher, weight = self.judged_estimates(m, y, sigma, batch.cond)
            g = weight * direction(x, d_fake, d_teacher, sigma, self.normaliser)
        found = {"fisher": (d_fake - d_teacher).square().mean()}
        loss = directed(x, g)
        if self.gan:
            own = noise.fold("gan")
            level, _ = self.fake_draw(own, m.fake.sigma_data)
            noised = x + widen(level, x) * own.normal(x.shape[1:], "n")
            logits = m.heads(read(self.reader(m), m.heads, noised, level, batch.cond))
            found["adversarial"] = ADVERSARIAL["non-saturating"].generator(logits)
            loss = loss + self.gan * found["adversarial"]
        return {"loss": loss, **found}

    def judged_estimates(self, m: Models, y: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """The fake score's and the teacher's estimates at ``y``, and what the direction is multiplied by: 1."""
        return m.fake(y, sigma, cond), m.teacher(y, sigma, cond), y.new_ones(())

    def reader(self, m: Models) -> Any:
        """The denoiser whose activations the discriminator reads."""
        return m.fake if self.features == "fake" else m.teacher

    def fake_update(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> Update:
        """Denoising of the student's samples, and the discriminator's loss on the same noised samples and on data."""
        if not self.gan:
            return super().fake_update(m, x, batch, noise)
        real, cond, taps = batch.x, batch.cond, m.heads.config.taps
        if real is None or real.shape[1:] != x.shape[1:]:
            got = None if real is None else tuple(real.shape[1:])
            raise InputError(f"{type(self).__name__} needs pictures of {tuple(x.shape[1:])}, got {got}")
        sigma, _ = self.fake_draw(noise, m.fake.sigma_data)
        level, _ = self.fake_draw(noise.fold("real"), m.fake.sigma_data)
        weight = edm_weight(sigma, m.fake.sigma_data)
        y = x + widen(sigma, x) * noise.normal(x.shape[1:], "n")
        data = real + widen(level, real) * noise.normal(x.shape[1:], "real n")

        # The discriminator's loss is a sum over samples and data, and each part has a graph of its own.
        def on_samples() -> dict[str, Tensor]:
            if self.features == "fake":
                estimate, found = m.fake.features(y, sigma, cond, taps)
            else:
                estimate = m.fake(y, sigma, cond)
                with torch.no_grad():
                    found = read(m.teacher, m.heads, y, sigma, cond)
            denoising = (widen(weight, x) * (estimate - x).square()).mean()
            logits = m.heads(found)
            judging = F.softplus(logits).mean()
            return {
                "loss": denoising + self.critic * judging,
                "denoising": denoising,
                "discriminator": judging,
                "logit_fake": logits.mean(),
            }

        def on_data() -> dict[str, Tensor]:
            with torch.set_grad_enabled(self.features == "fake"):
                found = read(self.reader(m), m.heads, data, level, cond)
            logits = m.heads(found)
            judging = F.softplus(-logits).mean()
            return {"loss": self.critic * judging, "discriminator": judging, "logit_real": logits.mean()}

        return Update.of(("fake", "heads"), on_samples, on_data)
