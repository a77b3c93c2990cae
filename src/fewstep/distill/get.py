"""Offline one-step distillation into an equilibrium transformer (GET, arXiv 2401.08639), from stored pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Classes
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.data.pairs import OnlinePairs, Pairs, require_pairs
from fewstep.distill.straightening import paired
from fewstep.errors import InputError, unknown
from fewstep.loss.huber import pseudo_huber
from fewstep.models.get import GRADIENTS, GETConfig, Gradient, OneLevel, ViTConfig, one_level, transformer
from fewstep.solve.euler import euler

NETWORKS, DISTANCES = ("get", "vit"), ("l1", "l2", "huber")


@dataclass(frozen=True)
class GETDistillation:
    """Regression of a teacher's picture on the noise it was made from, by a transformer that starts afresh.

    The data are pairs of unit noise and picture, such as ``fewstep pairs`` writes. The teacher is not asked again.

    Attributes:
        steps: 1, the evaluations of the student.
        network: get, the equilibrium transformer; or vit, the same transformer with ``vit_depth`` untied blocks.
        width: of every token.
        heads: of the attention; they divide ``width``.
        patch: side of a patch; it divides the picture.
        depth: blocks of the injection transformer. The paper's sizes have 6, or 1 (B).
        tied: blocks of the equilibrium.
        tied_mlp: hidden width of their MLPs, in units of ``width``; 6 to 12 in the paper.
        iterations: of the equilibrium, in training and in sampling.
        start: where the iterations start: tokens, what the injection blocks end with, or zero.
        vit_depth: blocks of the vit.
        gradient: unrolled differentiates all iterations, as in the paper; phantom and implicit iterate without a
            gradient first.
        damping: of the phantom gradient's iterations, in (0, 1]; 1 is none.
        backward: iterations of the phantom gradient, or terms of the implicit one.
        correction: fixed-point correction: iterates before the last are decoded and supervised too, each with this
            times the weight of the next. 0 supervises the last alone.
        distance: l1 (the paper's without feature networks), l2 or huber.
        optim: of the student; the paper's is AdamW with lr 1e-4, constant.
        ema: the average that ships; 0.9999 in the paper.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = False

    steps: int = 1
    network: Literal["get", "vit"] = "get"
    width: int = 256
    heads: int = 4
    patch: int = 2
    depth: int = 6
    tied: int = 3
    tied_mlp: float = 6.0
    iterations: int = 6
    start: Literal["tokens", "zero"] = "tokens"
    vit_depth: int = 24
    gradient: Gradient = "unrolled"
    damping: float = 1.0
    backward: int = 6
    correction: float = 0.9
    distance: Literal["l1", "l2", "huber"] = "l1"
    optim: Optim = Optim(lr=1e-4)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        if self.steps != 1:
            raise InputError(f"GET makes pictures in one evaluation, got steps={self.steps}: leave steps out")
        for what, value, known in (
            ("network", self.network, NETWORKS),
            ("gradient", self.gradient, GRADIENTS),
            ("distance", self.distance, DISTANCES),
        ):
            if value not in known:
                raise unknown(what, value, known)
        if not 0 < self.damping <= 1 or self.backward < 1 or not 0 <= self.correction <= 1:
            raise InputError(
                f"GET needs damping in (0, 1], backward >= 1 and correction in [0, 1], got {self.damping}, "
                f"{self.backward} and {self.correction}"
            )

    def size(self, teacher: Generator) -> ViTConfig:
        """The student's network, for the teacher's pictures and classes.

        Raises:
            InputError: a teacher with other conditions than classes, or pictures that no patches fit.
        """
        conds, shape = teacher.conds, teacher.denoiser.shape
        if not isinstance(conds, Classes | None):
            raise InputError("GET reads classes or nothing: a teacher with prompts cannot be distilled into it")
        if len(shape) != 3:
            raise InputError(f"GET makes pictures (C, H, W), the teacher's are {tuple(shape)}")
        classes = 0 if conds is None else len(conds.frequencies)
        alike = ((shape[0], shape[1], shape[2]), classes, self.patch, self.width, self.heads)
        if self.network == "vit":
            return ViTConfig(*alike, self.vit_depth)
        tied = {"tied": self.tied, "tied_mlp": self.tied_mlp, "iterations": self.iterations}
        return GETConfig(*alike, self.depth, **tied, start=self.start)  # type: ignore[arg-type]

    def check(self, teacher: Generator, data: Any) -> Pairs | OnlinePairs:
        """The data, if it is pairs that ``teacher`` made.

        Raises:
            InputError: see :func:`fewstep.data.pairs.require_pairs`.
        """
        return require_pairs(data, teacher, "GET")

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student alone, with fresh weights.

        Raises:
            InputError: see :meth:`size`.
        """
        size, D = self.size(teacher), teacher.denoiser

        def fresh() -> OneLevel:
            levels = {"sigma_min": D.sigma_min, "sigma_max": D.sigma_max, "sigma_data": D.sigma_data}
            return one_level(transformer(size), D.shape, **levels)

        return {"student": Role(fresh, self.optim, self.ema, ships=True)}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Regression with every supervised iterate (arXiv 2401.08639, section 4).

        Raises:
            InputError: data without the noise that the pictures were made from, or of another shape.
        """
        x, n = paired(batch, m.student, "GET")

        def loss() -> dict[str, Tensor]:
            found = m.student.net.iterates(n, batch.cond, self.gradient, self.damping, self.backward)
            errors = torch.stack([distance(self.distance, picture.to(x.dtype), x) for picture in found])
            return {"loss": (weights(len(found), self.correction).to(errors) * errors).sum(), "last": errors[-1]}

        yield Update("student", loss)

    def sampler(self, teacher: Generator) -> Tableau:
        """One evaluation at the highest level."""
        return euler(torch.tensor([teacher.denoiser.sigma_max, 0.0], dtype=torch.float64))


def weights(count: int, correction: float) -> Tensor:
    """(count,) weights of the iterates, ``correction`` to the power of the distance from the last; their sum is 1."""
    found = torch.tensor(correction, dtype=torch.float64) ** torch.arange(count - 1, -1, -1)
    return found / found.sum()


def distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """The mean over pictures and, but for huber, pixels: a scalar."""
    if name == "huber":
        return pseudo_huber(x, y).mean()
    return (x - y).abs().mean() if name == "l1" else (x - y).square().mean()
