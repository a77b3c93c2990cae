"""EM distillation (EMD, arXiv 2405.16852): maximum likelihood, with Langevin chains on noise and latents as E-step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, start_std
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Optim, Update
from fewstep.distill.vsd import VSD, rollout
from fewstep.errors import InputError, unknown
from fewstep.loss.draw import KarrasUniform
from fewstep.loss.matching import Normaliser, directed, direction


class Chain(NamedTuple):
    """What an E-step ends with, all (B, *shape) and without a gradient.

    Attributes:
        latent: the student's unit noise ``z``.
        noise: the unit noise ``e`` between the student's sample and ``y = g(z) + sigma e``.
        drift: ``noise`` less everything random that was added to it, its first value included.
        sample: ``g(z)`` at the first ``z``, a plain sample of the student.
        d_teacher: what the teacher said of the last ``y`` that it was asked for.
        fisher: mean square of the difference of the two estimates at the start, a scalar.
    """

    latent: Tensor
    noise: Tensor
    drift: Tensor
    sample: Tensor
    d_teacher: Tensor
    fisher: Tensor


@dataclass(frozen=True)
class EMD(VSD):
    """Moves the student's samples to where the teacher would have the noised ones, latents and all.

    The E-step draws a latent and a noise and takes both ``chain`` Langevin steps towards the teacher's distribution of
    noised pictures; the M-step is a regression of the student, at the new latent, onto the new picture. Long chains
    descend the forward KL divergence, which covers modes; one step without a move of the latent is VSD.

    Attributes:
        chain: Langevin steps.
        noise_step: step size of the noise, in (0, 1).
        latent_step: step size of the latent, in [0, 1); 0 leaves it where it was drawn, and saves its vector-Jacobian
            products. Small under ``cancel``, see there.
        latent_scaling: multiplies the latent's step by sigma^2 / (sigma^2 + sigma_data^2), because the score that
            pulls it grows as 1 / sigma^2; without it the step is the same at all levels.
        cancel: regresses onto the picture without the random part of its noise, which is most of the variance. The
            mean is kept where latents rest; moving ones know of that part, which widens the student if they move far.
        integrator: euler adds noise of variance twice the step, exact as much as leaves the unit normal prior as it is.
        steps: evaluations of the student; in each of several the latent is the noise that was added before it.
        draw: noise levels of the chains.
    """

    chain: int = 16
    noise_step: float = 0.08
    latent_step: float = 1e-3
    latent_scaling: bool = True
    cancel: bool = True
    integrator: Literal["exact", "euler"] = "exact"
    normaliser: Normaliser = "sample"
    draw: KarrasUniform = KarrasUniform(top=0.98, bottom=0.02)
    ratio: int = 1
    student: Optim = Optim(lr=1e-4)
    fake: Optim = Optim(lr=1e-4)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chain < 1 or not 0 < self.noise_step < 1 or not 0 <= self.latent_step < 1:
            raise InputError(
                f"EMD needs chain >= 1, 0 < noise_step < 1 and 0 <= latent_step < 1, got {self.chain}, "
                f"{self.noise_step} and {self.latent_step}"
            )
        if self.integrator not in ("exact", "euler"):
            raise unknown("integrator", self.integrator, ("exact", "euler"))

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """E-step and M-step every ``ratio`` iterations, then the fake score on samples of latents as drawn."""
        cond, levels = batch.cond, self.grid(m.student)
        # The same step for all samples, micro-batches and processes: the ones before it are run for it.
        k = int(m.common(i).integers(0, len(levels), (), "step"))
        z, scale = latent_of(m.student, levels, k, noise)
        base: Tensor | float = 0.0
        if k:
            with torch.no_grad():
                base = rollout(m.student, levels[: k + 1], noise, cond) - scale * z

        def generate(latent: Tensor) -> Tensor:
            made: Tensor = m.student(base + scale * latent, levels[k], cond)
            return made

        if i % self.ratio == 0:
            own = noise.fold("student")
            sigma, _ = self.draw(own, m.student.sigma_data)
            found = self.expectation(m, generate, z, sigma, cond, own)
            yield Update("student", lambda: self.maximisation(generate(found.latent), found, sigma))
            sample = found.sample
        else:
            with torch.no_grad():
                sample = generate(z)
        yield self.fake_update(m, sample, batch, noise.fold("fake"))

    def expectation(
        self, m: Models, generate: Callable[[Tensor], Tensor], z: Tensor, sigma: Tensor, cond: Cond, noise: Noise
    ) -> Chain:
        """The E-step: chains at the levels ``sigma`` (B,) from latents ``z`` (B, *shape) and fresh noise.

        No parameter gets a gradient; ``generate`` maps a latent to the student's sample.
        """
        move = torch.full_like(sigma, self.latent_step)
        if self.latent_scaling:
            move = move * sigma**2 / (sigma**2 + m.student.sigma_data**2)
        return langevin(
            generate,
            lambda y: self.estimates(m, y, sigma, cond, noise),
            z,
            noise.normal(z.shape[1:], "n"),
            sigma,
            noise,
            count=self.chain,
            noise_step=self.noise_step,
            latent_step=move if self.latent_step else None,
            spread=SPREADS[self.integrator],
        )

    def maximisation(self, x: Tensor, found: Chain, sigma: Tensor) -> dict[str, Tensor]:
        """The M-step: samples ``x`` of the new latents, with a graph, regressed onto ``x + sigma e``.

        The gradient is that of ``w |x - sg(x + sigma e)|^2 / 2`` per value, with the drift of ``e`` alone under
        ``cancel`` and the weight ``w`` of the normaliser. With a chain of one step and a latent at rest ``-sigma e`` is
        ``noise_step (D_fake - D_teacher)``, the direction of VSD.
        """
        with torch.no_grad():
            e = found.drift if self.cancel else found.noise
            away = -widen(sigma, x) * e
            # As if the teacher were at 0: only the differences to it count.
            g = direction(x - found.d_teacher, away, torch.zeros_like(away), sigma, self.normaliser)
        return {"loss": directed(x, g), "fisher": found.fisher}


# The standard deviation of the noise that a Langevin step of size h adds. Euler's is Langevin's own discretisation,
# whose stationary variance is 1 / (1 - h / 2); the other keeps a unit normal law in every step.
SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "euler": lambda h: (2 * h).sqrt(),
    "exact": lambda h: (h * (2 - h)).sqrt(),
}


def latent_of(student: Denoiser, levels: list[float], k: int, noise: Noise) -> tuple[Tensor, float]:
    """The unit noise (B, *shape) in what :func:`rollout` gives a student at ``levels[k]``, and its scale there."""
    if k == 0:
        return noise.normal(student.shape, "start"), start_std(student, levels[0])
    return noise.normal(student.shape, "again", k - 1), levels[k]


def langevin(
    generate: Callable[[Tensor], Tensor],
    estimates: Callable[[Tensor], tuple[Tensor, Tensor]],
    z: Tensor,
    e: Tensor,
    sigma: Tensor,
    noise: Noise,
    *,
    count: int,
    noise_step: float,
    latent_step: Tensor | None,
    spread: Callable[[Tensor], Tensor],
) -> Chain:
    """``count`` Langevin steps on latents ``z`` and noises ``e`` (both B, *shape), in the paper's reparametrised form.

    The target is ``N(e) N(z) q(y) / p(y)`` at ``y = generate(z) + sigma e`` (B, *shape), with the teacher's density
    ``q`` and the student's ``p`` of noised pictures, whose scores differ by ``r = (D_teacher - D_fake) / sigma^2``:

        e <- e + a (sigma r - e) + sqrt(2 a) xi,    z <- z + b (J^T r - z) + sqrt(2 b) xi'

    ``J`` is the Jacobian of ``generate``. ``estimates(y)`` is ``(D_fake, D_teacher)`` and is not differentiated.
    ``latent_step`` is b (B,), or None where the latents rest; ``noise_step`` is a; ``spread`` is one of ``SPREADS``.
    """
    level, shape = widen(sigma, e), e.shape[1:]
    added = float(spread(torch.tensor(noise_step, dtype=torch.float64)))
    b = None if latent_step is None else widen(latent_step, z)
    drift, fisher = torch.zeros_like(e), sigma.new_zeros(())
    x = leaf = sample = d_teacher = z
    for i in range(count):
        if b is not None:
            # The latent alone asks for a gradient: a frozen student's parameters get none.
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                x = generate(leaf)
        elif i == 0:
            with torch.no_grad():
                x = generate(z)
        with torch.no_grad():
            d_fake, d_teacher = estimates(x + level * e)
            pull = (d_teacher - d_fake) / level
            if i == 0:
                sample, fisher = x.detach(), (d_fake - d_teacher).square().mean()
        if b is not None:
            (back,) = torch.autograd.grad(x, leaf, (pull / level).to(x.dtype))
            with torch.no_grad():
                z = (1 - b) * z + b * back + spread(b) * noise.normal(shape, "latent", i)
        e = (1 - noise_step) * e + noise_step * pull + added * noise.normal(shape, "chain", i)
        drift = (1 - noise_step) * drift + noise_step * pull
    return Chain(z, e, drift, sample, d_teacher, fisher)
