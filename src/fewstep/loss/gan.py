"""Adversarial losses on logits, and the penalty on a discriminator's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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


ADVERSARIAL: dict[str, Adversarial] = {
    # arXiv 1705.02894
    "hinge": Adversarial(_hinge, lambda fake: -fake.mean()),
    # arXiv 1406.2661, section 3, in logits
    "non-saturating": Adversarial(_softplus, lambda fake: F.softplus(-fake).mean()),
}


def r1(logits: Tensor, inputs: Tensor) -> Tensor:
    """``E |d logit / d input|^2``, times 1/2 (arXiv 1801.04406, eq. 9, without its gamma); keeps its graph.

    ``logits`` (B, ...), summed over all but the batch, of real ``inputs`` (B, ...), which need a gradient.
    """
    (slope,) = torch.autograd.grad(logits.float().sum(), inputs, create_graph=True)
    return 0.5 * slope.float().flatten(1).square().sum(1).mean()
