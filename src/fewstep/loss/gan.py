"""Adversarial losses on logits, and the penalty on a discriminator's gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.loss.matching import in_two_passes

Game = Literal["hinge", "non-saturating", "least-squares"]


class Adversarial(NamedTuple):
    """The two sides of a game, each a mean over all logits, high for real.

    Attributes:
        discriminator: ``(real, fake)`` logits, of any shape -> scalar.
        generator: ``fake`` logits -> scalar.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def _softplus(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def _squares(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


ADVERSARIAL: dict[str, Adversarial] = {
    # arXiv 1705.02894
    "hinge": Adversarial(_hinge, lambda fake: -fake.mean()),
    # arXiv 1406.2661, section 3, in logits
    "non-saturating": Adversarial(_softplus, lambda fake: F.softplus(-fake).mean()),
    # arXiv 1611.04076, eq. 9: 1 for real and 0 for fake
    "least-squares": Adversarial(_squares, lambda fake: 0.5 * (fake - 1).square().mean()),
}


def r1(logits: Tensor, inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """``E |d logit / d input|^2``, times 1/2 (arXiv 1801.04406, eq. 9, without its gamma); keeps its graph.

    ``logits`` (B, ...), summed over all but the batch, of real ``inputs`` (B, ...), which need a gradient. Several
    inputs, such as the features of each tap (arXiv 2311.17042), count as one long one.
    """
    given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    slopes = torch.autograd.grad(logits.float().sum(), given, create_graph=True)
    return 0.5 * torch.stack([slope.float().flatten(1).square().sum(1).mean() for slope in slopes]).sum()


def through_samples(
    generate: Callable[[], Tensor], losses: Callable[[Tensor], Mapping[str, Tensor]], like: Tensor, *, lean: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """``losses(generate())`` and the samples (B, ...) without a graph, on the device of ``like``.

    ``lean`` makes the samples twice and never holds the graph of the losses beside that of the samples
    (:func:`fewstep.loss.matching.in_two_passes`): the same gradients with less memory, for one forward pass more.
    """
    if lean:
        return in_two_passes(generate, losses, like.device)
    x = generate()
    return dict(losses(x)), x.detach()
