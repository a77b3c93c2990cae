"""Adversarial score identity distillation (SiDA, arXiv 2410.14919): the fake score's encoder is the discriminator."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Precond
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Models, Role, Update
from fewstep.distill.sid import SiD, distances, sid_loss, within
from fewstep.errors import InputError, unknown
from fewstep.models.discriminator import usual_taps
from fewstep.models.frozen import network_under

# Beyond these a logit gives the student no gradient, as in the released code.
LOGIT = 10.0
ENCODER = "encoder"


@dataclass(frozen=True)
class SiDA(SiD):
    """SiD with a GAN term that needs no further parameters: the mean over the channels of what the encoder returns.

    Every place of that map is the logit of a patch. The fake score learns to tell data from samples, both with the
    same noise of the same level; the student's GAN term reads the pass that its score term needs anyway.

    Attributes:
        gan: weight of the student's GAN term beside SiD's loss, both means over pixels; the paper's 0.01 beside 100 is
            1e-4. 0 leaves the GAN out, and then no data are needed.
        critic: weight of the encoder's GAN loss beside the fake score's loss summed over the pixels; the paper's is 1.
        gan_after: share of the budget after which the GAN starts; above 0 SiD alone comes first (the paper's SiD2A).
        tap: name of the encoder's output; without one the encoder's last activation, or the bottleneck.
        alpha: weight of the squared difference; 1 in the paper.
        fake_draw: noise levels of the fake score's, and of what it judges, held within the teacher's.
        student: optimizer of the student. The paper's lr is 1e-5 at 56 M parameters.
    """

    gan: float = 1e-4
    critic: float = 1.0
    gan_after: float = 0.0
    tap: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.gan < math.inf and 0 <= self.critic < math.inf and 0 <= self.gan_after < 1):
            raise InputError(
                "SiDA needs gan >= 0, critic >= 0, both finite, and gan_after within [0, 1), got "
                f"{self.gan}, {self.critic} and {self.gan_after}"
            )

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """With the GAN term alone."""
        return self.gan > 0

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of SiD: the discriminator is a part of the fake score.

        Raises:
            InputError: see :meth:`SiD.roles`, or a tap that the network does not declare.
        """
        found = super().roles(teacher)
        if self.gan:
            self.tap_of(network_under(teacher.denoiser))
        return found

    def tap_of(self, D: Precond) -> str:
        """The tap that is judged: of the encoder's the one of lowest resolution.

        Raises:
            InputError: the network declares no such tap, or none at all.
        """
        if self.tap:
            if self.tap not in D.taps:
                raise unknown("feature tap", self.tap, D.taps)
            return self.tap
        found = (re.fullmatch(rf"{ENCODER}(\d+)", tap) for tap in D.taps)
        heights = [int(match[1]) for match in found if match]
        return f"{ENCODER}{min(heights)}" if heights else usual_taps(D)[0]

    def judges(self, m: Models) -> bool:
        """Whether the GAN takes part at this point of the run."""
        return self.gan > 0 and m.progress >= self.gan_after

    def student_losses(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """The generator's loss of the paper: SiD's and the patches' cross entropy, both divided by omega."""
        if not self.judges(m):
            return super().student_losses(m, x, batch, noise)
        cond = batch.cond
        s, _ = within(self.draw, noise, m.student)
        y = x + widen(s, x) * noise.normal(x.shape[1:], "n")
        d_teacher = m.teacher(y, s, cond)
        d_fake, logits = self.judged(m, y, s, cond, self.kappa_fake)
        losses = sid_loss(x, d_teacher, d_fake, self.alpha)
        each = F.softplus(-logits.clamp(-LOGIT, LOGIT)).mean(1) / distances(x, d_teacher)
        adversarial = each.mean()
        return {**losses, "loss": losses["loss"] + self.gan * adversarial, "adversarial": adversarial.detach()}

    def fake_update(self, m: Models, x: Tensor, batch: Batch, noise: Noise) -> Update:
        """Denoising of the samples ``x``, and the cross entropy of samples and data under the same noise."""
        if not self.judges(m):
            return super().fake_update(m, x, batch, noise)
        real, cond = batch.x, batch.cond
        if real is None or real.shape != x.shape:
            got = None if real is None else tuple(real.shape[1:])
            raise InputError(f"SiDA needs pictures of {tuple(x.shape[1:])}, got {got}")
        sigma, weight = within(self.fake_draw, noise, m.fake)
        n = widen(sigma, x) * noise.normal(x.shape[1:], "n")

        # The released code sums the fake score's loss over the pixels and takes the cross entropy as it is.
        share = 0.5 * self.critic * weight / x[0].numel()

        def on_samples() -> dict[str, Tensor]:
            estimate, logits = self.judged(m, x + n, sigma, cond, self.kappa_train)
            denoising = (widen(weight, x) * (estimate - x).square()).mean()
            entropy = F.softplus(logits).mean(1)
            return {
                "loss": denoising + (share * entropy).mean(),
                "denoising": denoising.detach(),
                "discriminator": 0.5 * entropy.detach().mean(),
                "logit_fake": logits.detach().mean(),
            }

        def on_data() -> dict[str, Tensor]:
            logits = patch_logits(m.fake.activations(real + n, sigma, cond, (self.tap_of(m.fake),)))
            entropy = F.softplus(-logits).mean(1)
            return {
                "loss": (share * entropy).mean(),
                "discriminator": 0.5 * entropy.detach().mean(),
                "logit_real": logits.detach().mean(),
            }

        return Update.of("fake", on_samples, on_data)

    def judged(self, m: Models, y: Tensor, sigma: Tensor, cond: Cond, scale: float) -> tuple[Tensor, Tensor]:
        """The fake score's estimate at ``y``, guided by ``scale``, and its logits (B, n), which nothing guides."""
        taps = (self.tap_of(m.fake),)
        if scale == 1:
            estimate, found = m.fake.features(y, sigma, cond, taps)
            return estimate, patch_logits(found)
        found = m.fake.activations(y, sigma, cond, taps)
        return self.fake_score(m, scale)(y, sigma, cond), patch_logits(found)


def patch_logits(found: dict[str, Tensor]) -> Tensor:
    """Logits (B, n), high for real, in float32: the mean over the channels of one activation.

    It is (B, C), (B, T, C) or (B, C, h, w), and n is 1, T or h w.

    Raises:
        InputError: an activation of another rank.
    """
    ((tap, feature),) = found.items()
    if feature.ndim not in (2, 3, 4):
        raise InputError(f"feature {tap!r} is {tuple(feature.shape)}, expected (B, C), (B, T, C) or (B, C, h, w)")
    return feature.float().mean(2 if feature.ndim == 3 else 1).reshape(len(feature), -1)
