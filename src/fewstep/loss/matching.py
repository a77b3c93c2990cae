"""Distribution matching: directions in which a sample should move, losses with such gradients, f-divergences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.path import widen

Normaliser = Literal["sample", "vp", "none"]
NORMALISERS = ("sample", "vp", "none")
# Logits beyond these are as good as certain; a ratio beyond those would let one sample outvote its batch.
LOGIT, LEAST, MOST = 10.0, 0.1, 20.0

# h(r) = r^2 f''(r) with r = p_teacher / p_student, up to constant factors (arXiv 2502.15681, table 1).
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "jensen-shannon": lambda r: r / (1 + r),
    "hellinger": torch.sqrt,
    "forward-kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
}


def directed(x: Tensor, direction: Tensor) -> Tensor:
    """A scalar whose gradient is ``direction / numel`` and whose value is ``mean(direction^2) / 2``.

    The same as half the mean square distance to the detached ``x - direction`` (arXiv 2311.18828, eq. 7), without the
    digits that ``x - (x - direction)`` would lose. Both (B, ...).
    """
    held = direction.detach().to(x.dtype)
    moved = x * held
    return (moved - moved.detach()).mean() + 0.5 * held.square().mean()


def in_two_passes(
    generate: Callable[[], Tensor], losses: Callable[[Tensor], Mapping[str, Tensor]], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """``losses(generate())``, with their gradient, and the samples (B, ...) without one; one graph is held at a time.

    The samples are made without a graph, the gradient of the ``loss`` with respect to them is taken, and they are made
    again with a graph that this gradient is sent through: one forward pass more. What ``generate`` draws from torch's
    own generators on ``device``, such as dropout, it draws twice alike. Nothing but the samples, and through them what
    ``generate`` reads, gets a gradient.
    """
    x = without_graph(generate, device)
    leaf = x.detach().requires_grad_()
    found = dict(losses(leaf))
    (slope,) = torch.autograd.grad(found["loss"], leaf)
    told = {name: value.detach() for name, value in found.items()}
    # The graph of the losses must not stand beside the next.
    del found
    return {**told, "loss": carried(generate(), slope, told["loss"])}, x


def without_graph(generate: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What ``generate()`` returns, without a graph; the next call, which may have one, draws the same from torch."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        made = generate()
    # Autocast would hand weights that it converted without a graph to the pass with one.
    torch.clear_autocast_cache()
    return made


def carried(x: Tensor, slope: Tensor, value: Tensor) -> Tensor:
    """A scalar of this ``value`` whose gradient with respect to ``x`` is ``slope``, both (B, ...)."""
    moved = x * slope.to(x.dtype)
    return (moved - moved.detach()).sum() + value.detach()


def direction(x: Tensor, d_fake: Tensor, d_teacher: Tensor, sigma: Tensor, normaliser: Normaliser = "sample") -> Tensor:
    """``w (D_fake - D_teacher)`` (B, ...): downhill from here the student's scores become the teacher's.

    The difference is ``sigma^2`` times that of the scores, fake minus teacher. ``normaliser`` "sample" divides by the
    mean of ``|x - D_teacher|`` of each sample (arXiv 2311.18828, eq. 8, in x0); "vp" multiplies by ``a b = sigma / (1 +
    sigma^2)``, which is ``b^2`` times the difference of noise predictions (arXiv 2312.05239); "none" by 1.
    """
    difference = d_fake - d_teacher
    if normaliser == "none":
        return difference
    if normaliser == "vp":
        return widen(sigma / (1 + sigma**2), x) * difference
    scale = (x - d_teacher).abs().flatten(1).mean(1).clamp_min(1e-6)
    return difference / widen(scale, x)


def density_ratio(logits: Tensor) -> Tensor:
    """(B,) ``p_data / p_student`` from a discriminator's logits (B, n), held between 0.1 and 20; no gradient.

    The mean over a sample's logits is clamped to [-10, 10] (arXiv 2502.15681). It is the ratio to the data that the
    discriminator learned from, which is the teacher's only where the teacher is as good as them.
    """
    return logits.detach().float().mean(1).clamp(-LOGIT, LOGIT).exp().clamp(LEAST, MOST)
